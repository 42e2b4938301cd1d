"""The chain as MONAI's users know it: the same voxels as the workers make, and open to further transforms."""

import json

import monai.data
import nibabel as nib
import numpy as np
import pytest
from monai.transforms import MedianSmooth, NormalizeIntensity, RandFlip, ScaleIntensity, Transform

from brainage_nb.volumes import brain, heads, registration, tissues
from brainage_nb.volumes.preprocessing import preprocess
from brainage_nb.volumes.scans import ScanError
from brainage_nb.volumes.settings import (
    BELOW_CROWN,
    IN_TEMPLATE,
    STEPS,
    PreprocessingSettings,
    parse_transforms,
)
from brainage_nb.volumes.store import build_store, current_store
from brainage_nb.volumes.transforms import add_transforms, preprocessing_chain, run_steps
from tests.volumes.template_head import head, pose

SMALL = PreprocessingSettings(spacing_mm=4, size=48)
BEST = PreprocessingSettings.of_recipe("best", spacing_mm=4, size=48)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "a.nii.gz"
    nib.save(head(pose((8, 5, -6)))[0], path)
    return path


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        PreprocessingSettings(4, 48, smooth=False, to_mni=True),
        PreprocessingSettings(4, 48, brain_only=True),
        BEST,
        PreprocessingSettings(4, 48, extra="MedianSmooth(radius=1); ScaleIntensity(minv=0.0, maxv=2.0)"),
    ],
    ids=lambda settings: settings.recipe,
)
def test_the_chain_and_the_workers_give_the_very_same_voxels(scan, settings):
    chain = preprocessing_chain(settings)
    volume = chain(scan)
    assert volume.shape == (1, 48, 48, 48)
    assert np.array_equal(volume[0].numpy(), preprocess(scan, settings))
    steps = run_steps(chain, scan)
    assert len(steps) == len(chain.transforms)
    assert np.array_equal(steps[-1][1], volume[0].numpy())
    assert all(array.ndim == 3 and np.shape(size) == (3,) for _, array, size in steps)


def test_each_step_is_named_with_its_numbers(scan):
    titles = [
        title for title, *_ in run_steps(preprocessing_chain(add_transforms(SMALL, MedianSmooth(2))), scan)
    ]
    assert titles[0] == "OpenScan()"
    assert titles[1].startswith("SmoothAndSample(spacing_mm=4.0, size=48, smooth=True")
    assert titles[2:] == ["ScaleCube()", "MedianSmooth(radius=2)"]


def test_volumes_of_the_chain_go_through_a_loader_in_batches(scan):
    data = monai.data.Dataset([scan, scan], preprocessing_chain(SMALL))
    (batch,) = monai.data.DataLoader(data, batch_size=2)
    assert batch.shape == (2, 1, 48, 48, 48)


def test_a_scan_that_cannot_be_used_says_why_in_the_pictures_too(tmp_path):
    (tmp_path / "x.nii").write_text("nothing")
    with pytest.raises(ScanError, match=r"x\.nii"):
        run_steps(preprocessing_chain(SMALL), tmp_path / "x.nii")


def test_an_added_transform_is_another_store_and_survives_the_way_through_its_settings(scan, tmp_path):
    import pandas as pd

    smoothed = add_transforms(SMALL, MedianSmooth(radius=1))
    assert smoothed.extra == "MedianSmooth(radius=1)"
    assert smoothed.recipe == "reference, then MedianSmooth(radius=1)"
    assert smoothed.fingerprint != SMALL.fingerprint
    assert PreprocessingSettings.from_json(json.loads(json.dumps(smoothed.to_json()))) == smoothed
    scans = pd.DataFrame({"scan_id": ["a"], "image": [str(scan)]})
    plain = build_store(scans, tmp_path, SMALL, n_jobs=1).store["a"].astype(np.float32)
    path = tmp_path / SMALL.fingerprint / "preprocessing.json"
    content = json.loads(path.read_text())
    del content["settings"]["modality"], content["settings"]["extra"]  # release 0.1.0 had neither
    path.write_text(json.dumps(content))
    report = build_store(scans, tmp_path, smoothed, n_jobs=1)
    assert "changed: extra  -> MedianSmooth(radius=1)." in report.note
    store = current_store(tmp_path)
    assert store.settings == smoothed
    wanted = MedianSmooth(radius=1)(plain[None])[0].numpy()
    assert np.abs(store["a"] - wanted).max() < 0.01


class Own(Transform):
    """A transform that only its writer has."""

    def __call__(self, volume):
        return volume


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (Own(), "Own is no transform of MONAI"),
        (RandFlip(), "RandFlip cannot be part of the chain"),
        (NormalizeIntensity(subtrahend=np.ones(3)), "plain values"),
    ],
)
def test_what_a_bundle_cannot_carry_is_refused_in_words(transform, words):
    with pytest.raises(ValueError, match=words):
        add_transforms(SMALL, transform)


@pytest.mark.parametrize(
    "text",
    [
        "LoadImage()",
        "Lambda(func='x')",
        "MedianSmooth(1)",
        "MedianSmooth(radius=open('x'))",
        "MedianSmooth(**{'radius': 1})",
        "monai.transforms.MedianSmooth()",
        "__import__('os')",
        "MedianSmooth(",
        "MedianSmooth(radius=b'1')",
        "x = MedianSmooth()",
        "ScaleIntensity(); " * 100,
        "(" * 900,
    ],
)
def test_a_text_that_is_no_list_of_known_transforms_is_refused_and_never_run(text):
    with pytest.raises(ValueError, match="extra"):
        PreprocessingSettings(extra=text)


def test_arguments_that_monai_does_not_take_are_refused_before_any_scan_is_opened(tmp_path):
    import pandas as pd

    scans = pd.DataFrame({"scan_id": ["a"], "image": ["gone.nii"]})
    wrong = PreprocessingSettings(4, 48, extra="MedianSmooth(colour=1)")
    with pytest.raises(ValueError, match="colour"):
        build_store(scans, tmp_path, wrong, n_jobs=1)


def test_texts_of_transforms_are_written_alike_however_they_were_typed():
    typed = PreprocessingSettings(extra=" MedianSmooth( radius = 1 );ScaleIntensity() ")
    assert typed.extra == "MedianSmooth(radius=1); ScaleIntensity()"
    assert parse_transforms(typed.extra) == [("MedianSmooth", {"radius": 1}), ("ScaleIntensity", {})]
    assert add_transforms(typed, ScaleIntensity()).extra.startswith(typed.extra)


def test_the_numbers_that_make_the_fingerprint_are_those_that_are_used():
    assert list(registration.DEGREES) == STEPS["find the brain"]["bending_degrees"]
    for name in ("core_degree", "deep_mm"):
        assert getattr(registration, name.upper()) == STEPS["find the brain"][name]
    for name in ("margin_mm", "lowest_correlation"):
        assert getattr(brain, name.upper()) == STEPS["find the brain"][name]
    for name in (
        *("spacing_mm", "resolution_mm", "prior_mm", "field_degree", "lowest_contrast"),
        *("core_mm", "rim_mm", "most_empty"),
    ):
        assert getattr(tissues, name.upper()) == STEPS["tissues"][name]
    for name, value in BELOW_CROWN.items():
        assert getattr(heads, name.upper()) == value
    assert registration.CENTRE_MM.tolist() == IN_TEMPLATE["centre_mm"]
