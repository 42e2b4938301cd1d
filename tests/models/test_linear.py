"""The ridge regression beside a network: scikit-learn's on smoothed voxels, and half of each age."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import Ridge

from brainage_nb.models import network as linear
from brainage_nb.models.network import VoxelRegression, cubes, fit_linear, resnet18_regressor
from brainage_nb.models.train import train
from brainage_nb.volumes.resampling import FWHM_PER_SD


def cohort(n=40, size=24, seed=0):
    """Smooth volumes (n, 1, size, size, size) whose age sits in one corner, and ages in years."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(20, 80, n)
    volumes = np.stack([gaussian_filter(rng.normal(size=(size,) * 3), 2) for _ in range(n)])
    volumes[:, 4:9, 4:9, 4:9] += (age[:, None, None, None] - 50) / 60
    return torch.tensor(volumes[:, None], dtype=torch.float32), age


def test_one_map_of_weights_says_what_ridge_on_smoothed_voxels_says(monkeypatch):
    volumes, age = cohort()
    monkeypatch.setattr(linear, "PENALTIES", np.array([0.05]))
    fitted = fit_linear(volumes.split(16), age, np.arange(40), spacing_mm=4.0)
    plain = volumes[:, 0].numpy()
    sd = 12.0 / FWHM_PER_SD / 4.0
    smooth = np.stack([gaussian_filter((v + v[::-1]) / 2, sd, mode="constant") for v in plain])
    used = smooth.std(axis=0) > linear.LEAST_SPREAD * smooth.std(axis=0).max()
    scaled = (smooth - smooth.mean(axis=0))[:, used] / smooth.std(axis=0)[used]
    gram = np.linalg.eigvalsh(scaled @ scaled.T)
    expected = Ridge(alpha=0.05 * gram.mean()).fit(scaled, age).predict(scaled)
    assert np.ptp(expected) > 20
    assert fitted(volumes).numpy() == pytest.approx(expected, abs=0.02)
    assert fitted.weight.numpy() == pytest.approx(np.flip(fitted.weight.numpy(), 0), abs=1e-5)
    assert float(fitted.bias) == pytest.approx(age.mean(), abs=1e-3)  # the age of the mean volume
    parts = fitted.parts(volumes) + fitted.parts(volumes.flip(2))
    assert parts.mean(dim=0).abs().max() < parts.abs().max() / 1000


def test_it_finds_planted_ages_in_new_volumes_and_noise_gives_the_mean():
    volumes, age = cohort(80)
    fitted = fit_linear(volumes[:60].split(16), age[:60], np.arange(60), spacing_mm=4.0)
    errors = fitted(volumes[60:]).numpy() - age[60:]
    assert np.abs(errors).mean() < 0.5 * np.abs(age[60:] - age[:60].mean()).mean()
    shuffled = np.random.default_rng(1).permutation(age[:60])
    blind = fit_linear(volumes[:60].split(16), shuffled, np.arange(60), spacing_mm=4.0)
    assert blind(volumes[60:]).std() < 0.4 * fitted(volumes[60:]).std()


def test_the_penalty_is_chosen_with_all_scans_of_a_person_on_one_side(monkeypatch):
    volumes, age = cohort(30)
    people = np.repeat(np.arange(15), 2)
    seen = []
    from sklearn.model_selection import GroupKFold

    split = GroupKFold.split

    def watched(self, x, y=None, groups=None):
        for train_rows, test_rows in split(self, x, y, groups):
            seen.append(set(groups[train_rows]) & set(groups[test_rows]))
            yield train_rows, test_rows

    monkeypatch.setattr(GroupKFold, "split", watched)
    fit_linear(volumes.split(16), age, people, spacing_mm=4.0)
    assert seen and not any(seen)


@pytest.mark.parametrize(("spacing_mm", "edge"), [(2.0, 12), (4.0, 24), (8.0, 24)])
def test_fine_volumes_are_averaged_to_four_millimetres_and_smoothed_by_twelve(spacing_mm, edge, monkeypatch):
    volumes, age = cohort(8)
    wide = []
    monkeypatch.setattr(linear, "_smooth", lambda volume, sd: wide.append(sd) or volume)
    fitted = fit_linear([volumes], age, np.arange(8), spacing_mm)
    assert fitted.weight.shape == (edge,) * 3
    cube_mm = 24 * spacing_mm / edge
    assert np.array(wide) * cube_mm * FWHM_PER_SD == pytest.approx(12.0)
    assert cubes(volumes, edge).mean() == pytest.approx(float(volumes.mean()), abs=1e-6)
    assert fitted(volumes).shape == (8,)


def test_an_age_is_the_mean_of_network_and_regression():
    network = resnet18_regressor(
        widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), age_mean=50.0, linear_edge=8
    ).eval()
    volumes = torch.randn(3, 1, 16, 16, 16)
    beside = VoxelRegression(torch.randn(8, 8, 8), torch.randn(8, 8, 8), 20.0)
    network.linear = beside
    with torch.no_grad():
        both, half = network(volumes), beside(volumes)
        network.linear = None
        alone = network(volumes)
    assert both.numpy() == pytest.approx(((alone + half) / 2).numpy(), abs=1e-4)
    assert half.std() > 1


def test_a_run_predicts_with_both_and_keeps_the_network_as_it_was(tiny, tiny_settings, tmp_path):
    store, splits = tiny
    made = {
        name: train(store, splits, tmp_path / name, replace(tiny_settings, linear=name == "both"))
        for name in ("both", "alone")
    }
    places = {name: next((tmp_path / name).glob("checkpoints/*/weights.safetensors")) for name in made}
    weights = {name: load_file(place) for name, place in places.items()}
    assert set(weights["both"]) - set(weights["alone"]) == {"linear.weight", "linear.centre", "linear.bias"}
    assert all(torch.equal(tensor, weights["both"][name]) for name, tensor in weights["alone"].items())
    both, alone = (made[name].predictions.set_index("scan_id")["predicted_age"] for name in ("both", "alone"))
    stored = weights["both"]
    maps = (stored[f"linear.{name}"].float() for name in ("weight", "centre"))
    beside = VoxelRegression(*maps, float(stored["linear.bias"]))
    volumes = torch.from_numpy(store.read(both.index).astype(np.float32))[:, None]
    assert both.to_numpy() == pytest.approx((alone + beside(volumes).numpy()).to_numpy() / 2, abs=1e-3)
    error = np.abs(beside(volumes).numpy() - splits.set_index("scan_id").loc[both.index, "age"])
    assert error.mean() < 6  # balls that shrink with age, 20 to 80 years
