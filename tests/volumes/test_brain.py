"""Brains in template heads of known pose, in what is no head, and in real scans."""

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from brainage_nb.volumes import registration
from brainage_nb.volumes.brain import (
    FINE_MM,
    _read_mask_of,
    brain_or_error,
    find_brain,
    mask_beside,
)
from brainage_nb.volumes.heads import find_head
from brainage_nb.volumes.preprocessing import grid_affine, preprocess
from brainage_nb.volumes.registration import template
from brainage_nb.volumes.scans import ScanError, load_scan
from brainage_nb.volumes.settings import PreprocessingSettings, list_changes
from brainage_nb.volumes.store import build_store
from tests.volumes.template_head import SIZE, VOXEL_MM, head, pose, shuffled

BEST = PreprocessingSettings.of_recipe("best", spacing_mm=4, size=48)
REGISTERED = PreprocessingSettings.of_recipe("reference", brain_only=True, to_mni=True, spacing_mm=4, size=48)


def brain_inside(image, settings):
    """The brain mask on the grid of `preprocess`'s result."""
    brain = brain_or_error(image, found_masks=settings.found_masks)
    return brain.mask_on(grid_affine(image, settings), (settings.size,) * 3)


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def farthest_mm(to_scan, truth):
    """Largest distance of a map to the scan from the true one over the corners of the brain."""
    corners = np.array(np.meshgrid([-65, 65], [-100, 65], [-60, 75])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(8)])
    return np.linalg.norm(((to_scan - truth) @ corners)[:3], axis=0).max()


TILTED = pose((18, -14, 20), (12, -25, 14))


@pytest.fixture(scope="module")
def tilted():
    image, inside = head(TILTED)
    return image, inside, find_brain(image)


def test_a_tilted_head_of_known_pose_is_laid_onto_the_template(tilted):
    image, inside, brain = tilted
    assert brain.problems == ()
    assert farthest_mm(brain.alignment.to_scan, TILTED) < 3.0
    assert farthest_mm(brain.to_scan, TILTED) < 0.8
    assert dice(brain.mask_on(image.affine, image.shape), inside) > 0.96
    assert brain.volume_l == pytest.approx(inside.sum() * VOXEL_MM**3 / 1e6, rel=0.05)


def test_the_same_scan_gives_the_same_brain_bit_by_bit(tilted):
    image, _, brain = tilted
    again = find_brain(nib.Nifti1Image(np.asarray(image.dataobj), image.affine))
    assert again is not brain
    assert np.array_equal(again.depth_mm, brain.depth_mm)
    assert np.array_equal(again.to_scan, brain.to_scan)


def test_storage_order_changes_nothing_in_the_world(tilted):
    image, _, brain = tilted
    change = nib.orientations.axcodes2ornt(("P", "S", "L"))
    start = nib.io_orientation(image.affine)
    stored = image.as_reoriented(nib.orientations.ornt_transform(start, change))
    assert nib.aff2axcodes(stored.affine) == ("P", "S", "L")
    assert farthest_mm(find_brain(stored).to_scan, brain.to_scan) < 0.1


def test_a_stripped_brain_is_found_as_well():
    truth = pose((8, 5, -6))
    image, inside = head(truth, brain_only=True)
    brain = find_brain(image)
    assert brain.problems == ()
    assert dice(brain.mask_on(image.affine, image.shape), inside) > 0.93
    assert farthest_mm(brain.to_scan, truth) < 0.8
    whole = find_brain(head(truth)[0])
    assert farthest_mm(brain.to_scan, whole.to_scan) < 0.4 < farthest_mm(brain.alignment.to_scan, truth)
    core = [one.depth_on(image.affine, image.shape, core=True) for one in (brain, whole)]
    assert np.abs(core[0] - core[1])[inside].mean() < 0.2


def test_z_scores_of_a_stripped_brain_lie_where_the_brain_did():
    truth = pose((8, 5, -6))
    image, inside = head(truth, brain_only=True)
    voxels = np.asarray(image.dataobj)
    scores = (voxels - voxels[inside].mean()) / voxels[inside].std()
    scored = nib.Nifti1Image(np.where(inside, scores, 0).astype(np.float32), image.affine)
    brain, before = find_brain(scored), find_brain(image)
    assert brain.problems == ()
    assert farthest_mm(brain.to_scan, before.to_scan) < 0.5
    assert brain.volume_l == pytest.approx(before.volume_l, rel=0.02)


def upside_down(image):
    return nib.Nifti1Image(np.asarray(image.dataobj)[:, ::-1, ::-1], image.affine)


def ball(image):
    away = np.linalg.norm(np.indices(image.shape) - (SIZE - 1) / 2, axis=0) * VOXEL_MM
    return nib.Nifti1Image(np.where(away < 75, 400.0, 0).astype(np.float32), image.affine)


@pytest.mark.parametrize("spoilt", [shuffled, upside_down, ball])
def test_what_is_no_upright_brain_is_refused_and_says_why(spoilt):
    image = spoilt(head(pose())[0])
    with pytest.raises(ScanError, match="unlike a brain") as error:
        brain_or_error(image)
    assert error.value.code == "brain_not_found"


def test_a_scan_without_a_brain_says_what_was_odd_about_its_header():
    image = ball(head(pose())[0])
    image.extra["flags"] = {"header_disagrees": "The sform says 3 mm, the qform 1 mm."}
    with pytest.raises(ScanError, match=r"Look at the scan\. The sform says 3 mm, the qform 1 mm\.$"):
        preprocess(image, REGISTERED)


def test_a_child_of_half_the_size_is_refused_for_its_size():
    image = head(pose(scale=(0.5, 0.5, 0.5)))[0]
    brain = find_brain(image)
    assert any("litres" in problem or "size" in problem for problem in brain.problems)
    assert brain.quality == 0.0


def test_masks_of_other_tools_are_found_by_their_names(tmp_path):
    anat = tmp_path / "sub-01" / "anat"
    derived = tmp_path / "derivatives" / "fmriprep" / "sub-01" / "anat"
    for folder in (anat, derived):
        folder.mkdir(parents=True)
    scan = anat / "sub-01_T1w.nii.gz"
    assert mask_beside(scan) is None
    (derived / "sub-01_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz").touch()
    assert mask_beside(scan) is None  # another space than the scan's
    (derived / "sub-01_desc-brain_mask.nii.gz").touch()
    assert mask_beside(scan) == derived / "sub-01_desc-brain_mask.nii.gz"
    (anat / "sub-01_T1w_bet_mask.nii.gz").touch()
    assert mask_beside(scan) == anat / "sub-01_T1w_bet_mask.nii.gz"
    (tmp_path / "brainmask.mgz").touch()
    assert mask_beside(tmp_path / "T1.mgz") == tmp_path / "brainmask.mgz"


@pytest.mark.parametrize("part", ["mask", "lesion_mask", "roi", "label-lesion_mask", "desc-brainstem_mask"])
def test_a_mask_whose_name_does_not_mean_the_brain_is_none(tmp_path, part):
    scan = tmp_path / "sub-01" / "sub-01_T1w.nii.gz"
    derived = tmp_path / "derivatives" / "tool" / "sub-01"
    for folder in (scan.parent, derived):
        folder.mkdir(parents=True)
        (folder / f"sub-01_{part}.nii.gz").touch()
        (folder / f"sub-01_T1w_{part}.nii.gz").touch()
    (tmp_path / "brainmask.mgz").touch()
    assert mask_beside(scan) is None
    assert mask_beside(tmp_path / "subject7.mgz") is None  # one brainmask.mgz beside many people's scans


def test_a_brain_mask_beside_the_scan_replaces_ours(tmp_path, tilted):
    image, inside, _ = tilted
    smaller = gaussian_filter(inside.astype(np.float32), 1.5) > 0.7
    nib.save(image, tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(smaller.astype(np.uint8), image.affine), tmp_path / "a_brain_mask.nii.gz")
    scan = load_scan(tmp_path / "a.nii.gz")
    grid_mask = brain_inside(scan, BEST)
    taken = brain_or_error(scan, found_masks=True)
    assert taken.source.endswith("a_brain_mask.nii.gz")
    assert scan.extra["flags"] == {}
    assert dice(taken.mask_on(image.affine, image.shape), smaller) > 0.97
    assert grid_mask.sum() < 0.97 * brain_inside(image, BEST).sum()


def test_a_mask_that_cannot_be_the_brains_is_not_taken_and_it_is_said(tmp_path, tilted):
    image, inside, brain = tilted
    lesion, nothing = np.zeros_like(inside), np.zeros_like(inside)
    lesion[40:44, 40:44, 40:44] = True
    voxel_l = brain.volume_l / np.count_nonzero(brain.depth_mm < 0)
    for name, mask, words in [
        ("a_mask", inside, "its name"),
        ("a_brain_mask", np.roll(inside, 20, axis=1), "overlaps the brain"),
        ("a_brain_mask", lesion, "0.00 litres"),
        ("a_brain_mask", nothing, "every voxel is 0"),
    ]:
        path = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), image.affine), path)
        with pytest.raises(ScanError, match=words):
            _read_mask_of(path, brain.alignment.to_scan @ template(FINE_MM).affine, brain.depth_mm, voxel_l)
    nib.save(image, tmp_path / "a.nii.gz")
    scan = load_scan(tmp_path / "a.nii.gz")
    found = find_brain(scan, found_masks=True)
    assert (found.source, found.problems) == ("template", ())
    assert np.allclose(found.depth_mm, brain.depth_mm, atol=1e-3)
    assert scan.extra["flags"]["mask_not_taken"].startswith("a_brain_mask.nii.gz was not taken")


def test_with_the_template_a_tilted_head_gives_the_same_volume(tilted):
    image, _, _ = tilted
    straight = head(pose((0, 0, 0)))[0]
    one, other = preprocess(straight, REGISTERED), preprocess(image, REGISTERED)
    inside = brain_inside(straight, REGISTERED)
    assert np.corrcoef(one[inside], other[inside])[0, 1] > 0.9
    assert (one[~inside] == 0).all()
    assert one[inside].mean() == pytest.approx(0, abs=1e-4)
    assert one[inside].std() == pytest.approx(1, abs=1e-4)


def test_a_scan_without_a_brain_stands_among_the_failed_ones_of_a_store(tmp_path):
    import pandas as pd

    nib.save(shuffled(head(pose())[0]), tmp_path / "x.nii.gz")
    scans = pd.DataFrame({"scan_id": ["x"], "image": [str(tmp_path / "x.nii.gz")]})
    report = build_store(scans, tmp_path / "volumes", BEST, n_jobs=1)
    assert report.failed["code"].tolist() == ["brain_not_found"]
    assert report.store.scan_ids == []


def test_recipes_name_their_switches_and_the_reference_keeps_its_fingerprint():
    reference = PreprocessingSettings.of_recipe("reference", spacing_mm=2, size=96)
    assert reference == PreprocessingSettings()
    assert reference.fingerprint == "2mm-96-6d7d21ed87"
    assert (BEST.recipe, BEST.to_json()["recipe"]) == ("best", "best")
    assert PreprocessingSettings.from_json(BEST.to_json()) == BEST
    with pytest.raises(ValueError, match="expected one of reference, best"):
        PreprocessingSettings.of_recipe("bset")
    old = {"settings": {"spacing_mm": 2.0, "size": 96, "smooth": True}, "fingerprint": reference.fingerprint}
    assert PreprocessingSettings.from_json(old) == reference
    old["settings"] |= {"n4": False, "stripped": False}  # switches that older versions had
    assert PreprocessingSettings.from_json(old) == reference
    assert BEST.fingerprint == "4mm-48-fdaa5d78e3"
    without_n4 = old | {"settings": old["settings"] | {"n4": False}}
    assert PreprocessingSettings.from_json(without_n4) == reference
    with pytest.raises(ValueError, match="n4"):
        PreprocessingSettings.from_json(old | {"settings": {"n4": True}})


def test_what_is_asked_beside_a_recipe_is_done_named_and_another_fingerprint_or_refused():
    plain = PreprocessingSettings.of_recipe("best")
    asked = PreprocessingSettings.of_recipe("best", to_mni=False, spacing_mm=4)
    assert (asked.to_mni, asked.grey_matter, asked.recipe) == (False, True, "best with to_mni=False")
    assert asked.fingerprint != plain.fingerprint
    assert list_changes(asked, "best") == "spacing_mm=4.0 instead of 2.0; to_mni=False instead of True"
    assert list_changes(plain, "best") == "nothing"
    with pytest.raises(ValueError, match=r"brain_only = False cannot be had.*grey_matter implies"):
        PreprocessingSettings.of_recipe("best", brain_only=False)
    unregistered = PreprocessingSettings.of_recipe("best", grey_matter=False, brain_only=False, to_mni=False)
    assert unregistered == PreprocessingSettings() and unregistered.recipe == "reference"


@pytest.mark.parametrize("name", ["IXI013-HH-1212-T1", "IXI258-HH-1717-T1"])
def test_real_scans_agree_with_their_reference_masks(shared_data, name):
    folder = shared_data / "ixi_hh"
    paths = sorted((folder / "images").glob(f"{name[:6]}*.nii.gz"))
    if not paths:
        pytest.skip(f"no scan {name[:6]} in {folder}")
    image = load_scan(paths[0])
    stem = paths[0].name.removesuffix(".nii.gz")
    reference = np.asarray(nib.load(folder / "dlmuse" / f"{stem}_DLMUSE.nii.gz").dataobj) > 0
    brain = find_brain(image)
    assert brain.problems == ()
    assert dice(brain.mask_on(image.affine, image.shape), reference) > 0.955


def test_the_map_onto_a_scan_comes_to_rest(shared_data):
    path = shared_data / "ixi_hh" / "images" / "IXI095-HH-1390-T1.nii.gz"
    if not path.exists():
        pytest.skip(f"no {path}")
    image = load_scan(path)
    voxels, middle = np.asarray(image.dataobj), np.array(find_head(image).centre_mm)
    found = registration.align(voxels, image.affine, middle)
    target, _ = registration._head_at(4.0, voxels, image.affine, middle, found.level)
    points, values, _ = template(4.0).points()
    again, _ = registration._search(target, points, values, found.to_scan, steps=25, similarity=False)
    assert np.abs(again - found.to_scan)[:3, 3].max() < 0.5  # mm; it once swung by 4 mm for ever


def test_the_preview_draws_brains_and_says_why_one_is_not_drawn(tmp_path, tilted):
    from brainage_nb.volumes.pictures import OUTLINE, brain_preview

    nib.save(tilted[0], tmp_path / "good.nii.gz")
    nib.save(shuffled(tilted[0]), tmp_path / "bad.nii.gz")
    names = ("good", "bad", "gone")
    table, figure = brain_preview({name: tmp_path / f"{name}.nii.gz" for name in names}, BEST)
    assert table["problems"].str.len().gt(0).tolist() == [False, True, True]
    assert [ax.get_title() for ax in figure.axes] == ["good", "", ""]  # three planes of the good one
    for ax in figure.axes:
        (contour,) = ax.collections
        assert np.allclose(
            contour.get_edgecolor()[0, :3], [int(OUTLINE[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        )
