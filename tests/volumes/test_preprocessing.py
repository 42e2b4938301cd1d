"""One scan gives one volume, whatever the way it was stored, and MONAI's chain gives the same."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from brainage_nb.volumes.preprocessing import as_stored, grid_affine, preprocess, smooth_and_sample, start
from brainage_nb.volumes.resampling import resample, smoothing_sd
from brainage_nb.volumes.scans import ScanError, voxel_sizes
from brainage_nb.volumes.settings import PreprocessingSettings

from .conftest import BRAIN_CENTRE, BRAIN_RADII, head_array

SMALL = PreprocessingSettings(spacing_mm=4, size=48)


def sampled(image):
    """The cube before it is scaled."""
    return smooth_and_sample(start(image), spacing_mm=4, size=48).array


def tilted(image, degrees):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1.0]])
    return nib.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine)


def monai_chain(path, grid, settings):
    """The plain chain: what one would write with MONAI alone."""
    from monai.transforms import GaussianSmooth, LoadImage, NormalizeIntensity, Orientation, SpatialResample

    volume = LoadImage(image_only=True, ensure_channel_first=True)(path)
    volume = Orientation("RAS", labels=None)(volume)
    sd = smoothing_sd(voxel_sizes(volume.affine.numpy()), settings.spacing_mm)
    volume = GaussianSmooth([max(float(s), 1e-6) for s in sd])(volume)
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", align_corners=False)
    volume = resample(volume, dst_affine=grid, spatial_size=(settings.size,) * 3)
    return NormalizeIntensity()(volume)[0].numpy()


@pytest.mark.parametrize("degrees", [0, 8])
def test_the_plain_monai_chain_gives_the_same_values(make_head, tmp_path, degrees):
    image = tilted(make_head(2.5), degrees)
    nib.save(image.as_reoriented([[1, -1], [2, 1], [0, 1]]), tmp_path / "scan.nii.gz")
    settings = PreprocessingSettings(spacing_mm=4, size=40)
    ours = preprocess(tmp_path / "scan.nii.gz", settings)
    theirs = monai_chain(tmp_path / "scan.nii.gz", grid_affine(tmp_path / "scan.nii.gz", settings), settings)
    assert np.abs(ours - theirs).max() < 1e-4


def test_the_result_is_float32_of_the_size_asked_with_mean_0_and_deviation_1(make_head):
    volume = preprocess(make_head(), SMALL)
    assert volume.shape == (48, 48, 48)
    assert volume.dtype == np.float32
    assert volume.mean(dtype=float) == pytest.approx(0, abs=1e-5)
    assert volume.std(dtype=float) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("axes", [("L", "P", "S"), ("P", "S", "R"), ("I", "A", "L"), ("S", "R", "P")])
def test_the_same_head_stored_in_any_orientation_gives_the_same_volume(make_head, axes):
    image = make_head()
    wanted = nib.orientations.axcodes2ornt(axes)
    stored = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))
    assert nib.aff2axcodes(stored.affine) == axes
    assert np.allclose(preprocess(stored, SMALL), preprocess(image, SMALL), atol=1e-4)


def test_an_oblique_grid_of_the_same_head_gives_the_same_volume(make_head):
    straight = make_head(2.0, neck_mm=130)
    affine = tilted(straight, 12).affine
    affine[:3, 3] += np.array([0, 24, 22])
    oblique = nib.Nifti1Image(head_array(affine, (96, 130, 130)), affine)
    here, there = preprocess(straight, SMALL), preprocess(oblique, SMALL)
    shift = grid_affine(oblique, SMALL)[:3, 3] - grid_affine(straight, SMALL)[:3, 3]
    assert np.abs(shift).max() < 5
    assert np.corrcoef(here[:, :, 16:40].ravel(), there[:, :, 16:40].ravel())[0, 1] > 0.93


def test_a_fine_and_a_coarse_scan_of_one_head_agree(make_head):
    settings = PreprocessingSettings(spacing_mm=3, size=64)
    fine, coarse = make_head(1.5), make_head(3.0)
    shift = grid_affine(fine, settings)[:3, 3] - grid_affine(coarse, settings)[:3, 3]
    assert np.abs(shift).max() <= 1.5 + 1.0  # half a voxel of the coarser lattice, and the crown's own error
    apart = np.corrcoef(preprocess(fine, settings).ravel(), preprocess(coarse, settings).ravel())[0, 1]
    assert apart > 0.93


def test_smoothing_brings_a_fine_scan_to_the_texture_of_a_coarse_one():
    # A coarse scanner sees what a fine one sees, averaged over its own voxel.
    rng = np.random.default_rng(0)
    fine = rng.normal(size=(60, 60, 60)).astype(np.float32)
    grid = np.diag([3.0, 3, 3, 1])
    grid[:3, 3] = 1
    coarse = fine.reshape(20, 3, 20, 3, 20, 3).mean(axis=(1, 3, 5))
    smoothed = resample(fine, np.eye(4), grid, 20, smoothing_sd(np.ones(3), 3.0))
    plain = resample(fine, np.eye(4), grid, 20)
    inner = (slice(2, -2),) * 3
    assert smoothed[inner].std() == pytest.approx(coarse[inner].std(), rel=0.6)
    assert plain[inner].std() > 4 * coarse[inner].std()


def test_a_scan_on_the_target_lattice_is_copied_and_not_blurred(make_head):
    image = make_head(4.0)
    grid = grid_affine(image, SMALL)
    offset = (np.linalg.inv(image.affine) @ grid)[:3, 3]
    assert np.allclose(offset, np.round(offset), atol=1e-6)
    values = sampled(image)
    assert set(np.unique(values)) <= set(np.unique(image.dataobj)) | {0.0}


def test_the_grid_says_where_in_the_world_a_voxel_is(make_head):
    image = make_head()
    affine = grid_affine(image, SMALL)
    voxels = np.indices((48, 48, 48)).reshape(3, -1).T
    cube = sampled(image)
    direct = head_array(affine, (48, 48, 48))
    inside = (((voxels @ affine[:3, :3].T + affine[:3, 3] - BRAIN_CENTRE) / BRAIN_RADII) ** 2).sum(1) < 0.7
    assert np.abs(cube.ravel() - direct.ravel())[inside].max() < 60  # of about 700
    assert np.allclose(np.diag(affine), [4, 4, 4, 1])


def test_the_whole_brain_is_inside_with_a_long_neck(make_head):
    affine = grid_affine(make_head(neck_mm=200), SMALL)
    low, high = affine[:3, 3] - 2, affine[:3, 3] + 190
    assert np.all(low < BRAIN_CENTRE - BRAIN_RADII)
    assert np.all(high > BRAIN_CENTRE + BRAIN_RADII)


def test_a_sheared_and_an_unoriented_scan_are_preprocessed(make_head, tmp_path):
    image = make_head()
    shear = image.affine.copy()
    shear[1, 2] = 0.4
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None), tmp_path / "none.nii")
    for scan in (nib.Nifti1Image(np.asarray(image.dataobj), shear), tmp_path / "none.nii"):
        assert preprocess(scan, SMALL).std() == pytest.approx(1, abs=1e-4)


def test_a_scan_that_cannot_be_used_raises_its_reason(tmp_path):
    (tmp_path / "x.nii").write_text("nothing")
    with pytest.raises(ScanError, match=r"x\.nii"):
        preprocess(tmp_path / "x.nii", SMALL)


def test_rounding_for_the_store_is_float16():
    values = np.linspace(-2, 6, 1001, dtype=np.float32)
    assert as_stored(values).dtype == np.float16
    assert np.abs(as_stored(values).astype(float) - values).max() < 0.004


def test_settings_go_to_json_and_back_and_every_number_counts():
    content = json.loads(json.dumps(SMALL.to_json()))
    assert PreprocessingSettings.from_json(content) == SMALL
    prints = {
        s.fingerprint
        for s in (
            SMALL,
            PreprocessingSettings(4, 40),
            PreprocessingSettings(3, 48),
            PreprocessingSettings(4, 48, False),
            PreprocessingSettings(4, 48, extra="MedianSmooth(radius=1)"),
            PreprocessingSettings(4, 48, extra="MedianSmooth(radius=2)"),
        )
    }
    assert len(prints) == 6
    assert SMALL.fingerprint == PreprocessingSettings(4.0, 48).fingerprint
    assert SMALL.fingerprint.startswith("4mm-48-")


def test_settings_of_other_steps_or_unknown_names_are_refused():
    content = SMALL.to_json()
    with pytest.raises(ValueError, match="other steps"):
        PreprocessingSettings.from_json(content | {"fingerprint": "4mm-48-0"})
    with pytest.raises(ValueError, match="Unknown"):
        PreprocessingSettings.from_json(content | {"settings": {"colour": 1}})
    with pytest.raises(ValueError, match="spacing_mm"):
        PreprocessingSettings(spacing_mm=0)
    with pytest.raises(ValueError, match="size"):
        PreprocessingSettings(size=4)


def test_preprocessing_imports_neither_torch_nor_monai():
    code = (
        "import sys, brainage_nb.volumes.preprocessing, brainage_nb.volumes.store;"
        "print([m for m in ('torch', 'monai', 'scipy', 'pandas', 'nibabel') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.strip() == "[]"
