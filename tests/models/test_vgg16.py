"""Triplets, network weights and the feature cache, on tiny made-up heads and a random-projection network."""

import hashlib

import numpy as np
import pandas as pd
import pytest
import torch

from brainage_nb.models import vgg16 as vgg_network
from brainage_nb.models.vgg16 import (
    FeatureSettings,
    WeightsError,
    extract_features,
    triplet_images,
    triplets_with_brain,
    vgg16_features,
    volume_features,
)
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.workspace import read_json

SIZE, SPACING = 24, 8.0  # a 192 mm cube
SMALL = FeatureSettings(image_size=32)


@pytest.fixture(scope="module")
def network():
    return vgg16_features("random_projection").place("cpu")


def head(top=21, bottom=0, seed=0):
    """A z-scored block of head from slice `bottom` to slice `top`, float16 as in a store."""
    rng = np.random.default_rng(seed)
    volume = rng.normal(0, 0.02, (SIZE, SIZE, SIZE))
    volume[6:18, 5:19, bottom : top + 1] += rng.uniform(1, 2, (12, 14, top + 1 - bottom))
    return ((volume - volume.mean()) / volume.std()).astype(np.float16)


class Store(dict):
    """A dictionary with the face of a volume store."""

    def __init__(self, volumes, fingerprint="store-a"):
        super().__init__(volumes)
        self.scan_ids, self.fingerprint, self.spacing_mm = list(volumes), fingerprint, SPACING
        self.settings = PreprocessingSettings(spacing_mm=SPACING)
        hashes = [hashlib.sha256(volume.tobytes()).hexdigest() for volume in volumes.values()]
        self.index = pd.DataFrame({"scan_id": self.scan_ids, "sha256": hashes})


# --- triplets -------------------------------------------------------------------------------------------


def test_triplets_above_the_crown_and_in_the_neck_are_skipped():
    positions = triplets_with_brain(head(top=21), SPACING, SMALL)
    # Middle slices 1, 4, … 22; the crown is slice 21, and 160 mm below it lies slice 1.
    assert positions.tolist() == [0, 1, 2, 3, 4, 5, 6]
    shallow = FeatureSettings(image_size=32, brain_depth_mm=80)
    assert triplets_with_brain(head(top=21), SPACING, shallow).tolist() == [4, 5, 6]


@pytest.mark.parametrize("shift", [-0.01, 0.01])
def test_a_brain_on_its_own_is_found_whatever_its_mean(shift):
    volume = np.zeros((SIZE, SIZE, SIZE))
    brain = np.random.default_rng(0).standard_normal((12, 14, 9))
    volume[6:18, 5:19, 9:18] = (brain - brain.mean()) / brain.std() + shift
    assert triplets_with_brain(volume.astype(np.float16), SPACING, SMALL).tolist() == [3, 4, 5]


def test_a_position_means_the_same_slices_in_every_scan():
    low, high = head(top=15), head(top=21)
    assert triplets_with_brain(low, SPACING, SMALL)[-1] == 4  # middle slice 13
    images = triplet_images(high, [4], SMALL)
    native = triplet_images(high, [4], FeatureSettings(image_size=96))
    assert images.shape == (1, 3, 32, 32)
    assert native.shape == (1, 3, 96, 96)
    for channel in range(3):
        expected = (high[:, :, 12 + channel].astype(np.float32).mean() + 1) / 5
        assert native[0, channel].mean().item() == pytest.approx(expected, abs=0.02)


def test_shares_of_grey_matter_fill_the_window_and_other_volumes_keep_theirs():
    best, reference = (PreprocessingSettings.of_recipe(name) for name in ("best", "reference"))
    grey = FeatureSettings.for_volumes(best, image_size=32)
    assert (grey.window, grey.image_size) == ((0.0, 1.0), 32)
    assert FeatureSettings.for_volumes(reference) == FeatureSettings()
    image = triplet_images(np.full((32, 32, 3), 0.75, np.float16), [0], grey)
    assert image.mean().item() == pytest.approx(0.75, abs=1e-3)


def test_images_show_anterior_up_and_left_at_left():
    volume = np.full((64, 64, 6), -1.0, dtype=np.float16)
    volume[:32, 32:, :] = 4.0  # left, anterior
    image = triplet_images(volume, [0], FeatureSettings(image_size=64))[0, 0]
    assert image[:30, :30].mean() > 0.95
    assert image[34:, :].mean() < 0.05
    assert image[:, 34:].mean() < 0.05


def test_values_beyond_the_window_are_clipped_to_black_and_white():
    volume = np.zeros((32, 32, 3), dtype=np.float16)
    volume[0], volume[1] = -9, 90
    image = triplet_images(volume, [0], SMALL)
    assert image.min() == 0
    assert image.max() == 1
    assert image[0, 0, 16, 16].item() == pytest.approx(0.2)  # z = 0 in a window from -1 to 4


# --- the network ----------------------------------------------------------------------------------------


def test_features_have_the_published_length():
    network = vgg16_features("random_projection")
    assert network.n_features(224) == 25_088
    assert network.n_features(112) == 512 * 3 * 3
    assert network(torch.rand(1, 3, 112, 112)).shape == (1, 512 * 3 * 3)
    assert vgg16_features("random_projection", pooling="mean").n_features(224) == 512


def test_the_layers_are_those_of_torchvision():
    from torchvision.models import vgg16

    with torch.device("meta"):
        expected = vgg16(weights=None).features
    layers = vgg16_features("random_projection").layers
    assert {k: v.shape for k, v in layers.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }
    assert str(layers) == str(expected)


def test_random_weights_keep_their_seed_and_say_what_they_are():
    one, same, other = (vgg16_features("random_projection", seed=seed) for seed in (0, 0, 1))
    assert one.weights_sha256 == same.weights_sha256 != other.weights_sha256
    assert "random projection" in one.title
    assert one.layers[0].weight.std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.05)


def test_absent_imagenet_weights_raise_and_are_replaced_only_by_auto_with_a_warning(monkeypatch, tmp_path):
    def offline(url, path, *_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(WeightsError, match=r"no route to host.*random_projection"):
        vgg16_features("imagenet")
    with pytest.raises(WeightsError, match="No such file"):
        vgg16_features(tmp_path / "absent.pth")
    with pytest.warns(UserWarning, match="RANDOM PROJECTION instead of ImageNet weights.*no route to host"):
        fallen_back = vgg16_features("auto", seed=7)
    assert fallen_back.mode == "random_projection"


def test_a_local_weights_file_is_read_only_if_its_hash_is_right(monkeypatch, tmp_path):
    drawn = vgg16_features("random_projection", seed=7)
    path = tmp_path / "my_copy.pth"
    state = {f"features.{name}": value for name, value in drawn.layers.state_dict().items()}
    torch.save({**state, "classifier.0.bias": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="expected 397923af"):
        vgg16_features(path)
    start = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(vgg_network, "IMAGENET_SHA256_START", start)
    loaded = vgg16_features(path)
    assert loaded.mode == "imagenet"
    assert loaded.weights_sha256 == drawn.weights_sha256


# --- features of a volume and the cache -----------------------------------------------------------------


def test_features_of_skipped_triplets_are_missing_not_zero(network):
    rows = volume_features(head(top=15), SPACING, network, SMALL)
    assert rows.shape == (8, 512)
    assert rows.dtype == np.float16
    assert np.isfinite(rows).all(axis=1).tolist() == [True] * 5 + [False] * 3
    assert np.isnan(rows[5:]).all()


def test_a_batch_gives_the_features_of_its_images_one_by_one(network):
    volume = head()
    together = volume_features(volume, SPACING, network, SMALL, batch_size=16)
    alone = volume_features(volume, SPACING, network, SMALL, batch_size=1)
    np.testing.assert_allclose(together.astype(float), alone.astype(float), atol=2e-3, rtol=2e-3)


def test_a_scan_that_fails_is_reported_and_has_no_features(network, tmp_path):
    broken = head()
    broken[3, 3, 3] = np.nan
    store = Store({"sub-1": head(), "sub-2": broken, "sub-3": np.zeros((SIZE,) * 3, np.float16)})
    features = extract_features(
        store, tmp_path, network, settings=SMALL, scan_ids=["sub-1", "sub-2", "sub-3", "sub-9"]
    )
    reasons = features.failed.set_index("scan_id")["reason"]
    assert sorted(reasons.index) == ["sub-2", "sub-3", "sub-9"]
    assert "missing or infinite" in reasons["sub-2"]
    assert "no triplet" in reasons["sub-3"]
    assert "not in the volume store" in reasons["sub-9"]
    assert list(features.files) == ["sub-1"]


def test_only_missing_scans_are_computed(network, tmp_path, monkeypatch):
    store = Store({f"sub-{i}": head(seed=i) for i in range(3)})
    first = extract_features(store, tmp_path, network, settings=SMALL, scan_ids=["sub-0", "sub-1"])
    assert (first.computed, first.reused) == (2, 0)
    before = first.files["sub-0"].stat().st_mtime_ns
    first.files["sub-1"].write_bytes(b"half a file")
    second = extract_features(store, tmp_path, network, settings=SMALL)
    assert (second.computed, second.reused) == (2, 1)
    assert second.files["sub-0"].stat().st_mtime_ns == before
    np.testing.assert_array_equal(second["sub-1"], volume_features(store["sub-1"], SPACING, network, SMALL))


def test_a_volume_that_changed_is_computed_again_and_old_features_are_deleted(network, tmp_path):
    first = extract_features(Store({"a": head(), "b": head(seed=1)}), tmp_path, network, settings=SMALL)
    broken = np.zeros((SIZE,) * 3, np.float16)
    changed = Store({"a": head(seed=2), "b": broken})
    second = extract_features(changed, tmp_path, network, settings=SMALL)
    assert second.folder == first.folder
    assert (second.computed, second.reused) == (1, 0)
    np.testing.assert_array_equal(second["a"], volume_features(changed["a"], SPACING, network, SMALL))
    assert list(second.folder.glob("*.npy")) == [second.files["a"]]


def test_an_interrupted_extraction_keeps_what_was_done(network, tmp_path):
    class Interrupted(Store):
        def __getitem__(self, scan_id):
            if scan_id == "sub-2":
                raise KeyboardInterrupt
            return super().__getitem__(scan_id)

    volumes = {f"sub-{i}": head(seed=i) for i in range(3)}
    with pytest.raises(KeyboardInterrupt):
        extract_features(Interrupted(volumes), tmp_path, network, settings=SMALL)
    report = extract_features(Store(volumes), tmp_path, network, settings=SMALL)
    assert (report.computed, report.reused) == (1, 2)
    assert not list(tmp_path.rglob("*.tmp"))


def test_other_volumes_weights_or_settings_go_to_another_folder(network, tmp_path):
    store = Store({"sub-1": head()})
    base = extract_features(store, tmp_path, network, settings=SMALL).folder
    drawn, mean = (vgg16_features("random_projection", **kind) for kind in ({"seed": 1}, {"pooling": "mean"}))
    others = [
        extract_features(Store({}, fingerprint="store-b"), tmp_path, network, settings=SMALL),
        extract_features(store, tmp_path, drawn, settings=SMALL),
        extract_features(store, tmp_path, mean, settings=SMALL),
        extract_features(store, tmp_path, network, settings=FeatureSettings(image_size=64)),
        extract_features(store, tmp_path, network, settings=FeatureSettings(image_size=32, window=(-1, 5))),
    ]
    assert len({base, *(features.folder for features in others)}) == 6
    again = extract_features(store, tmp_path, network, settings=SMALL)
    assert (again.folder, again.reused, again.settings) == (base, 1, SMALL)
    assert read_json(base / "features.json")["weights"] == "random_projection"


def test_a_volume_with_odd_intensities_is_refused(network):
    class Loud(torch.nn.Module):
        device = "cpu"

        def forward(self, images):
            return images.flatten(1)[:, :4] * 1e6

    with pytest.raises(ValueError, match="overflows half precision"):
        volume_features(head(), SPACING, Loud(), SMALL)
