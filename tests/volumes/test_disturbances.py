"""What `benchmarks/steadiness.py` does to a head, and how it counts, are facts its figures rest on."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_dilation

from benchmarks import disturbances
from benchmarks.disturbances import CASES, GEOMETRIC, disturb, mirrored, neck_cut, resampled
from brainage_nb.volumes.heads import find_head
from brainage_nb.volumes.scans import load_scan
from tests.models.tiny_bundle import write_scan, write_tiny_bundle

PSR = np.array([[0, 0, 2.0, -75], [-1.5, 0, 0, 117], [0, 1, 0, -136], [0, 0, 0, 1]])  # edges 1.5, 1 and 2 mm


def world(image: nib.Nifti1Image) -> np.ndarray:
    """Position (i, j, k, 3) of every voxel centre, mm."""
    voxels = np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"), axis=-1)
    return voxels @ image.affine[:3, :3].T + image.affine[:3, 3]


def centre_of_mass(image: nib.Nifti1Image, part: slice = slice(None)) -> np.ndarray:
    """World position (3,), mm, of what is bright, of some of the slices along the second axis."""
    weights = np.asarray(image.dataobj)[:, part, :, None]
    return (weights * world(image)[:, part]).sum(axis=(0, 1, 2)) / weights.sum()


def blob(shape: tuple[int, ...], places: list[tuple[int, ...]]) -> nib.Nifti1Image:
    """Round spots of 6 mm at some voxels."""
    empty = nib.Nifti1Image(np.zeros(shape, np.float32), PSR)
    squared = [((world(empty) - world(empty)[place]) ** 2).sum(axis=-1) for place in places]
    return nib.Nifti1Image(sum(np.exp(-part / 72) for part in squared).astype(np.float32), PSR)


def test_mirrored_storage_is_the_same_picture_of_the_same_world(make_head):
    head = nib.as_closest_canonical(make_head(6.0)).slicer[:, 2:, :-3]
    other = mirrored(head)
    assert nib.aff2axcodes(other.affine) == ("L", "P", "I")
    back = nib.as_closest_canonical(other)
    np.testing.assert_array_equal(back.dataobj, head.dataobj)
    np.testing.assert_allclose(back.affine, head.affine, atol=1e-9)


def test_a_cut_neck_takes_the_lowest_slices_and_moves_nothing(make_head):
    whole = mirrored(make_head(4.0, neck_mm=150.0))
    cut = neck_cut(whole)
    removed = whole.shape[2] - cut.shape[2]
    assert removed > 2 and cut.shape[:2] == whole.shape[:2]
    np.testing.assert_array_equal(cut.dataobj, np.asarray(whole.dataobj)[:, :, :-removed])  # stored downwards
    np.testing.assert_allclose(world(cut), world(whole)[:, :, :-removed])
    lowest = find_head(whole).crown_mm - disturbances.NECK_CUT_MM
    assert lowest <= world(cut)[..., 2].min() < lowest + 4


@pytest.mark.parametrize("edges", [(1, 1, 1), (1, 1, 3)])
def test_resampling_keeps_world_positions_and_the_field_of_view(edges):
    empty = nib.Nifti1Image(np.zeros((40, 42, 44), np.float32), PSR)
    ramp = world(empty) @ [1.0, 2.5, -3.0]
    other = resampled(nib.Nifti1Image(ramp.astype(np.float32), PSR), edges)
    np.testing.assert_allclose(disturbances.voxel_sizes(other.affine), (edges[1], edges[2], edges[0]))
    inner = tuple(slice(n // 4, -(n // 4)) for n in other.shape)
    expected = (world(other) @ [1.0, 2.5, -3.0])[inner]
    assert expected.size > 1000
    np.testing.assert_allclose(np.asarray(other.dataobj)[inner], expected, atol=0.01)
    ends = [
        nib.affines.apply_affine(image.affine, [np.full(3, -0.5), np.array(image.shape) - 0.5])
        for image in (empty, other)
    ]
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-9)


def test_the_header_does_not_tell_of_a_shift_of_20_mm():
    image = blob((30, 40, 20), [(15, 20, 10)])
    moved = disturb(image, "shifted 20 mm", "A")
    distance = np.linalg.norm(centre_of_mass(moved) - centre_of_mass(image))
    assert distance == pytest.approx(20, abs=0.1)
    np.testing.assert_array_equal(moved.affine[:3, :3], image.affine[:3, :3])


def test_a_tilt_turns_without_stretching_unequal_voxels():
    image = blob((30, 100, 24), [(15, 20, 12), (15, 80, 12)])

    def between(scan: nib.Nifti1Image) -> np.ndarray:
        middle = scan.shape[1] // 2
        ends = [centre_of_mass(scan, part) for part in (slice(middle), slice(middle, None))]
        return ends[1] - ends[0]

    before, after = between(image), between(disturb(image, "tilted up to 15 degrees", "A"))
    assert np.linalg.norm(after) == pytest.approx(np.linalg.norm(before), rel=0.001)
    cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
    assert 2 < np.degrees(np.arccos(cosine)) < 3 * disturbances.DEGREES


def test_intensities_come_back_through_slope_and_intercept(make_head, tmp_path):
    head = make_head(6.0)
    nib.save(disturb(head, "intensity scaled, offset", "A"), tmp_path / "scan.nii")
    stored = nib.load(tmp_path / "scan.nii")
    assert stored.get_data_dtype() == np.int16
    array = np.asarray(head.dataobj)
    expected = disturbances.GAIN * (array + disturbances.OFFSET * array.max())
    read = np.asarray(load_scan(tmp_path / "scan.nii").dataobj)
    np.testing.assert_allclose(read, expected, atol=expected.max() / 2**15)


def test_every_case_is_the_same_again_for_a_scan_and_leaves_the_original_alone(make_head):
    head = make_head(6.0)
    before = np.array(head.dataobj)
    for case in CASES:
        first, second = (np.asarray(disturb(head, case, "A").dataobj) for _ in range(2))
        np.testing.assert_array_equal(first, second, err_msg=case)
        assert first.shape != before.shape or not np.array_equal(first, before), case
        np.testing.assert_array_equal(head.dataobj, before, err_msg=case)
    assert not np.array_equal(disturb(head, "noise", "A").dataobj, disturb(head, "noise", "B").dataobj)


def test_a_contrast_curve_rises_and_keeps_air_and_the_brightest(make_head):
    head = make_head(6.0)
    before = np.asarray(head.dataobj, dtype=np.float32)
    level = np.percentile(before[before > before.mean()], 99)
    within = np.sort(before[(before > 0) & (before < level)])
    for curve in (disturbances.s_curve, lambda x: x**0.7, lambda x: x**1.4):
        after = np.asarray(disturbances.contrasted(head, curve).dataobj)
        assert (np.diff(after.ravel()[np.argsort(before.ravel())]) >= -1e-3).all()
        assert not after[before == 0].any()
        np.testing.assert_allclose(after[before == level], level, rtol=1e-5)
        assert np.abs(level * curve(within / level) - within).max() > 0.04 * level
    np.testing.assert_allclose(
        disturbances.s_curve(np.array([0, 0.25, 0.5, 1, 2])), [0, 0.203125, 0.5, 1, 1.5]
    )


@pytest.fixture
def labelled(tmp_path):
    """A scan whose reference labels are a ball towards the back and the top, and that mask."""
    for folder in ("images", "dlmuse"):
        (tmp_path / folder).mkdir()
    image = blob((30, 50, 40), [(15, 25, 20)])
    array = np.asarray(image.dataobj) + np.float32(1)
    squared = ((world(image) - world(image)[12, 30, 20]) ** 2).sum(axis=-1)
    labels = np.where(squared < 12**2, 47, 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(array, PSR), tmp_path / "images" / "S1.nii.gz")
    nib.save(nib.Nifti1Image(labels, PSR), tmp_path / "dlmuse" / "S1_DLMUSE.nii.gz")
    return load_scan(tmp_path / "images" / "S1.nii.gz"), labels > 0


def test_stripping_follows_the_reference_mask_and_touches_no_voxel_of_the_brain(labelled):
    scan, brain = labelled
    for case, wider in (("stripped", 0), ("stripped, one voxel wider", 1)):
        after = np.asarray(disturb(scan, case, "S1").dataobj)
        kept = binary_dilation(brain, iterations=wider) if wider else brain
        np.testing.assert_array_equal(after[kept], np.asarray(scan.dataobj)[kept])
        assert not after[~kept].any()


def test_a_cut_face_lies_before_and_below_the_brain_and_leaves_it_whole(labelled):
    scan, brain = labelled
    before, after = np.asarray(scan.dataobj), np.asarray(disturb(scan, "defaced", "S1").dataobj)
    cut = after != before
    assert not after[cut].any() and 0.02 < cut.mean() < 0.5
    np.testing.assert_array_equal(after[brain], before[brain])
    ahead = world(scan) @ disturbances.FACE_NORMAL
    plane = ahead[brain].max() + disturbances.FACE_MARGIN_MM
    assert ahead[~cut].max() - 1e-3 <= plane <= ahead[cut].min() + 1e-3
    assert world(scan)[cut][:, 1].mean() > world(scan)[brain][:, 1].mean()
    assert world(scan)[cut][:, 2].mean() < world(scan)[brain][:, 2].mean()


@pytest.fixture
def steadiness(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(Path(disturbances.__file__).parent))
    return importlib.import_module("steadiness")


def test_every_form_is_predicted_from_its_file_once_and_a_refused_one_keeps_its_reason(
    steadiness, tmp_path, monkeypatch
):
    from brainage_nb.predict.bundle import load_bundle

    blank = lambda image, random: nib.Nifti1Image(np.zeros(image.shape, np.float32), image.affine)  # noqa: E731
    monkeypatch.setitem(steadiness.CASES, "nothing left", blank)
    bundle = load_bundle(write_tiny_bundle(tmp_path / "bundle"))
    path = write_scan(tmp_path / "scan.nii", 7)
    scan = SimpleNamespace(scan_id="S1", subject_id="S1", age=40.0)
    rows = steadiness.predicted(scan, path, {"tiny": (bundle, tmp_path / "cache")})
    forms = pd.DataFrame(rows).set_index("case")
    expected = bundle.predict(path).predicted_age
    assert list(forms.index) == [steadiness.UNCHANGED, steadiness.AGAIN, *steadiness.CASES]
    assert forms.loc[steadiness.UNCHANGED, "predicted_age"] == pytest.approx(expected, abs=1e-4)
    assert forms.loc[steadiness.AGAIN, "predicted_age"] == forms.loc[steadiness.UNCHANGED, "predicted_age"]
    nib.save(disturb(load_scan(path), "noise", "S1"), tmp_path / "noisy.nii")
    noisy = bundle.predict(tmp_path / "noisy.nii").predicted_age
    assert forms.loc["noise", "predicted_age"] == pytest.approx(noisy, abs=1e-4) != pytest.approx(expected)
    assert forms.loc["nothing left", "refused"] == "blank" and forms["refused"].ne("").sum() == 1
    kept = {"tiny": (None, tmp_path / "cache")}  # no bundle: nothing is predicted again
    assert steadiness.predicted(scan, path, kept) == rows
    write_scan(path, 8)
    with pytest.raises(AttributeError):
        steadiness.predicted(scan, path, kept)


def rows_of(steadiness, change: float) -> pd.DataFrame:
    """Three scans whose age moves by -change, 0 and +change in every case."""
    cases = (steadiness.UNCHANGED, steadiness.AGAIN, *CASES)
    rows = [
        {
            "scan_id": f"S{k}",
            "subject_id": f"S{k}",
            "case": case,
            "predicted_age": 50.0 + 10 * k + (change * (k - 1) if case in CASES else 0.0),
            "refused": "",
        }
        for k in range(3)
        for case in cases
    ]
    return pd.DataFrame(rows)


def test_a_change_is_absolute_and_a_refusal_is_counted_and_misses_the_bar(steadiness):
    facts = {"best": {"n": 3}}
    rows = rows_of(steadiness, 1.2)
    table = steadiness.changes(rows)
    assert table.loc["neck cut", "value"] == pytest.approx(0.8)
    assert table.loc["neck cut", "mean_change"] == pytest.approx(0)
    assert steadiness.verdict_of({"best": table}, facts, quick=False)["holds"]
    refused = (rows["scan_id"] == "S0") & (rows["case"] == "neck cut")
    rows.loc[refused, ["predicted_age", "refused"]] = [None, "brain_not_found"]
    table = steadiness.changes(rows)
    assert (table.loc["neck cut", "n"], table.loc["neck cut", "refused"]) == (2, 1)
    assert not steadiness.verdict_of({"best": table}, facts, quick=False)["holds"]


def test_a_noise_floor_above_zero_misses_the_bar_and_other_than_geometric_changes_do_not(steadiness):
    facts = {"best": {"n": 3}}
    rows = rows_of(steadiness, 0.3)
    rows.loc[~rows["case"].isin([*GEOMETRIC, steadiness.UNCHANGED, steadiness.AGAIN]), "predicted_age"] += 9
    assert steadiness.verdict_of({"best": steadiness.changes(rows)}, facts, quick=False)["holds"]
    rows.loc[rows["case"] == steadiness.AGAIN, "predicted_age"] += 0.01
    outcome = steadiness.verdict_of({"best": steadiness.changes(rows)}, facts, quick=False)
    assert outcome["noise_floor"] == pytest.approx(0.01) and not outcome["holds"]
