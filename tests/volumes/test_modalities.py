"""Other modalities: laid onto the T1w scan of their session where they fit, refused where not; stores."""

import shutil
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainage_nb.volumes import modalities
from brainage_nb.volumes.modalities import lay_onto_t1w, rigid_map
from brainage_nb.volumes.preprocessing import preprocess
from brainage_nb.volumes.scans import ScanError, load_scan
from brainage_nb.volumes.settings import PreprocessingSettings, name_of_modality
from brainage_nb.volumes.store import StoreError, build_modalities, build_store, current_store
from brainage_nb.volumes.transforms import preprocessing_chain
from brainage_nb.workspace import MissingInput, sha256_of
from tests.volumes.template_head import head, pose

SMALL = PreprocessingSettings(spacing_mm=8, size=24)
# fluid is bright, white matter dark
T2_OF_T1 = ([0, 60, 175, 350, 500, 600], [0, 25, 500, 275, 190, 350])


def as_t2w(image, *, to_scan=None):
    """The head as a T2w scan shows it, in other coordinates if asked: `to_scan` from the T1w scan's world."""
    voxels = np.interp(np.asarray(image.dataobj), *T2_OF_T1).astype(np.float32)
    return nib.Nifti1Image(voxels, (np.eye(4) if to_scan is None else to_scan) @ image.affine)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A T1w and a T2w file of one head, and the move (4, 4) from the one's world to the other's."""
    folder = tmp_path_factory.mktemp("pair")
    image, _ = head(pose((3, -4, 2), (5, -8, 12)))
    move = rigid_map(np.array([4.0, -7, 6, 5, -3, 4]), image.affine[:3, 3] + 120)
    nib.save(image, folder / "sub-1_T1w.nii.gz")
    nib.save(as_t2w(image, to_scan=move), folder / "sub-1_T2w.nii.gz")
    return folder / "sub-1_T1w.nii.gz", folder / "sub-1_T2w.nii.gz", move


@pytest.fixture(scope="module")
def laid(pair):
    """The T2w scan, laid onto the T1w scan."""
    return lay_onto_t1w(pair[1], pair[0], "T2w")


@pytest.fixture
def known_move(pair, monkeypatch):
    """Registration in no time, which finds that only files of the voxel size of `pair` fit."""
    right = load_scan(pair[1]).affine
    fits = lambda scan: 0.7 if np.allclose(scan.affine, right) else 0.3  # noqa: E731
    monkeypatch.setattr(modalities, "register", lambda t1w, scan: (pair[2], fits(scan), False))


def test_a_t2w_scan_that_moved_is_laid_back_within_two_mm_and_two_degrees(pair, laid):
    t1w, t2w, move = pair
    found = load_scan(t2w).affine @ np.linalg.inv(laid.affine)
    off = found @ np.linalg.inv(move)
    degrees = np.degrees(np.arccos((np.trace(off[:3, :3]) - 1) / 2))
    image = load_scan(t1w)
    corners = image.affine[:3, 3] + 132 + 80 * np.array([[1, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1]])
    apart = (found - move)[:3, :3] @ corners.T + (found - move)[:3, 3:]
    assert np.linalg.norm(apart, axis=0).max() < 2 and degrees < 2


def test_the_t1w_scan_decides_the_cube_and_voxels_are_sampled_once(pair, laid):
    t1w, t2w, _ = pair
    assert np.array_equal(np.asarray(laid.dataobj), np.asarray(load_scan(t2w).dataobj))
    volume, beside = preprocess(laid, SMALL.for_modality("T2w")), preprocess(t1w, SMALL)
    unmoved = as_t2w(load_scan(t1w))
    unmoved.extra.update(modality="T2w", t1w=load_scan(t1w))
    expected = preprocess(unmoved, SMALL.for_modality("T2w"))
    likeness = [np.corrcoef(volume.ravel(), other.ravel())[0, 1] for other in (expected, beside)]
    assert likeness[0] > 0.985 and likeness[1] < 0.96
    chain = preprocessing_chain(SMALL.for_modality("T2w"))
    assert np.array_equal(chain(laid)[0].numpy(), volume)


@pytest.mark.parametrize(
    "change",
    [
        np.diag([1, 1, 1.3, 1]),
        np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        np.diag([0.3, 0.3, 0.3, 1]),  # an animal's
    ],
)
def test_a_scan_with_a_wrong_voxel_size_or_turned_axes_is_refused_in_words(pair, tmp_path, change):
    t1w, t2w, _ = pair
    wrong = load_scan(t2w)
    nib.save(nib.Nifti1Image(wrong.dataobj, change @ wrong.affine), tmp_path / "wrong_T2w.nii.gz")
    with pytest.raises(
        ScanError, match=r"wrong_T2w.nii.gz cannot be laid onto sub-1_T1w.nii.gz: .* fit is 0"
    ):
        lay_onto_t1w(tmp_path / "wrong_T2w.nii.gz", t1w, "T2w")


def test_a_scan_with_left_and_right_swapped_is_refused_though_it_fits(pair, tmp_path):
    t1w, t2w, _ = pair
    right = load_scan(t2w)
    nib.save(nib.Nifti1Image(np.asarray(right.dataobj)[::-1], right.affine), tmp_path / "swapped_T2w.nii.gz")
    with pytest.raises(ScanError, match="better with left and right swapped"):
        lay_onto_t1w(tmp_path / "swapped_T2w.nii.gz", t1w, "T2w")


def test_a_scan_opened_as_another_modality_makes_no_volume(pair):
    _, t2w, _ = pair
    with pytest.raises(ScanError, match=r"a T2w scan, .* opened as T1w: give it with its T1w scan"):
        preprocess(t2w, SMALL.for_modality("T2w"))


def test_settings_of_t1w_are_what_they_were_and_others_tell_themselves_apart():
    assert PreprocessingSettings.of_recipe("best").fingerprint == "2mm-96-760d41b8f5"
    assert PreprocessingSettings.of_recipe("reference").fingerprint == "2mm-96-6d7d21ed87"
    best = PreprocessingSettings.of_recipe("best")
    names = {best.for_modality(name).fingerprint for name in ("T1w", "T2w", "FLAIR")}
    assert len(names) == 3 and not best.for_modality("T2w").grey_matter
    assert PreprocessingSettings.from_json(best.for_modality("T2w").to_json()) == best.for_modality("T2w")
    with pytest.raises(ValueError, match="modality: 'T3w' is none of T1w, T2w"):
        PreprocessingSettings(modality="T3w")
    with pytest.raises(ValueError, match="grey matter are read from T1w scans"):
        PreprocessingSettings(modality="T2w", grey_matter=True)
    assert name_of_modality("current", "T1w") == "current"


def test_each_modality_has_its_store_and_a_misfit_costs_no_other_scan(pair, known_move, tmp_path):
    t1w, t2w, _ = pair
    wrong = load_scan(t2w)
    nib.save(nib.Nifti1Image(wrong.dataobj, np.diag([1, 1, 1.3, 1]) @ wrong.affine), tmp_path / "b_T2w.nii")
    cohort = pd.DataFrame({"scan_id": ["a", "b", "c"], "image": str(t1w)})
    cohort["T2w"] = [str(t2w), str(tmp_path / "b_T2w.nii"), ""]
    plain = build_store(cohort, tmp_path, SMALL, n_jobs=1).store
    before = {path: sha256_of(path) for path in plain.folder.iterdir()}
    report = build_modalities(cohort, cohort.head(3), tmp_path, SMALL, n_jobs=1)["T2w"]
    assert report.failed[["scan_id", "code"]].values.tolist() == [["b", "not_registered"], ["c", "none"]]
    store = current_store(tmp_path, modality="T2w")
    assert store.scan_ids == ["a"] and store.settings.modality == "T2w"
    assert current_store(tmp_path).scan_ids == ["a", "b", "c"]
    assert {path: sha256_of(path) for path in plain.folder.iterdir()} == before
    (tmp_path / "current_T2w").write_text(plain.fingerprint)
    with pytest.raises(StoreError, match="holds T1w, not T2w"):
        current_store(tmp_path, modality="T2w")
    with pytest.raises(MissingInput, match=r"no FLAIR volumes .* notebook 01 was given modalities=T1w,FLAIR"):
        current_store(tmp_path, modality="FLAIR")


def test_another_t1w_scan_makes_the_volumes_that_were_laid_onto_it_anew(pair, known_move, tmp_path):
    t1w, t2w, _ = pair
    own = tmp_path / "own_T1w.nii.gz"
    own.write_bytes(t1w.read_bytes())
    cohort = pd.DataFrame({"scan_id": ["a"], "image": str(own), "T2w": str(t2w)})
    assert build_modalities(cohort, cohort, tmp_path, SMALL, n_jobs=1)["T2w"].n_new == 1
    assert build_modalities(cohort, cohort, tmp_path, SMALL, n_jobs=1)["T2w"].n_new == 0
    image = load_scan(t1w)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 1.1, image.affine), own)
    assert build_modalities(cohort, cohort, tmp_path, SMALL, n_jobs=1)["T2w"].n_new == 1


def test_a_modality_that_the_cohort_no_longer_names_trains_nothing(pair, known_move, tmp_path):
    t1w, t2w, _ = pair
    cohort = pd.DataFrame({"scan_id": ["a"], "image": str(t1w), "T2w": str(t2w)})
    build_modalities(cohort, cohort, tmp_path, SMALL, n_jobs=1)
    build_modalities(cohort.drop(columns="T2w"), cohort, tmp_path, SMALL, n_jobs=1)
    with pytest.raises(MissingInput, match="no T2w volumes"):
        current_store(tmp_path, modality="T2w")
    assert build_modalities(cohort, cohort, tmp_path, SMALL, n_jobs=1)["T2w"].n_new == 0
    assert current_store(tmp_path, modality="T2w").scan_ids == ["a"]


def test_the_t1w_scan_itself_is_no_other_modality_under_whatever_name(pair, tmp_path):
    copy = tmp_path / "sub-1_T2w.nii.gz"
    copy.write_bytes(pair[0].read_bytes())
    with pytest.raises(
        ScanError, match=r"sub-1_T2w.nii.gz was given as the T2w scan, and it is the T1w scan"
    ):
        lay_onto_t1w(copy, pair[0], "T2w")


# --- maps from series -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sub-2_T2w.nii.gz", "ses-2/sub-2_ses-1_T2w.nii.gz"])
def test_a_name_of_another_person_is_refused_however_well_the_scan_fits(pair, known_move, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(pair[1], tmp_path / name)
    with pytest.raises(ScanError, match=r"is of .*sub-2.*of sub-1.*same person") as refused:
        lay_onto_t1w(tmp_path / name, pair[0], "T2w")
    assert refused.value.code == "other_session"


@pytest.fixture
def series(tmp_path):
    """Function (volumes (n,) of 16^3, TR) -> file of a 4-D series."""

    def write(each, tr=2.0):
        data = np.stack(each, axis=-1).astype(np.float32)
        image = nib.Nifti1Image(data, np.diag([8.0, 8, 8, 1]))
        image.header.set_zooms((8, 8, 8, tr))
        image.header.set_xyzt_units("mm", "sec")
        nib.save(image, tmp_path / "x_dwi.nii.gz")
        return tmp_path / "x_dwi.nii.gz"

    return write


def test_falff_is_higher_where_the_fluctuation_is_slow(series):
    rng, seconds = np.random.default_rng(0), 2.0 * np.arange(120)
    slow, fast = np.sin(2 * np.pi * 0.04 * seconds), np.sin(2 * np.pi * 0.2 * seconds)
    base = np.zeros((16, 16, 16))
    base[3:13, 3:13, 3:13] = 1000
    each = []
    for n in range(120):
        volume = base + 5 * rng.normal(size=base.shape)
        volume[3:8, 3:13, 3:13] += 20 * slow[n]
        volume[8:13, 3:13, 3:13] += 20 * fast[n]
        each.append(volume)
    found, picture, _ = modalities.read_map(series(each), "bold-fALFF")
    assert found[3:8, 3:13, 3:13].mean() > 0.5 > 0.3 > found[8:13, 3:13, 3:13].mean()
    assert found[0].max() == 0 and picture[5, 5, 5] == pytest.approx(1000, abs=5)


def test_what_is_no_usable_series_is_refused_in_words(series, pair, monkeypatch):
    noise = np.random.default_rng(0).uniform(500, 900, (40, 16, 16, 16))
    with pytest.raises(ScanError, match="made from a series of volumes, and this has the shape"):
        modalities.read_map(pair[0], "bold-fALFF")
    with pytest.raises(ScanError, match="repetition time of 0 s"):
        modalities.read_map(series(noise, tr=0.0), "bold-fALFF")
    path = series(noise)
    with pytest.raises(ScanError, match="lasts 80 s"):
        modalities.read_map(path, "bold-fALFF")
    with pytest.raises(ScanError, match=r"x_dwi\.bval is missing beside it"):
        modalities.read_map(path, "dwi-FA")
    with pytest.raises(ScanError, match="expected one 3-D volume"):
        lay_onto_t1w(path, pair[0], "T2w")
    path.with_name("x_dwi.bval").write_text(" ".join(["0"] * 4 + ["1000"] * 36))
    path.with_name("x_dwi.bvec").write_text("1 0 0\n" * 39)
    with pytest.raises(ScanError, match="40 volumes, and 40 b-values and 39 directions"):
        modalities.read_map(path, "dwi-FA")
    path.with_name("x_dwi.bvec").write_text("1 0 0\n" * 40)
    monkeypatch.setitem(sys.modules, "dipy.core.gradients", None)
    with pytest.raises(ScanError, match=r"needs dipy: pip install 'brainage-nb\[dwi\]'"):
        modalities.read_map(path, "dwi-FA")


def test_anisotropy_and_diffusivity_of_a_known_tensor_come_back(series):
    pytest.importorskip("dipy")
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(30, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    tensor = np.diag([1.7e-3, 0.3e-3, 0.3e-3])
    inside = np.zeros((16, 16, 16))
    inside[3:13, 3:13, 3:13] = 1000
    weighted = np.exp(-1000 * np.einsum("ni,ij,nj->n", directions, tensor, directions))
    path = series([inside, *(inside * share for share in weighted)])
    path.with_name("x_dwi.bval").write_text(" ".join(["0"] + ["1000"] * 30))
    np.savetxt(path.with_name("x_dwi.bvec"), np.vstack([np.zeros(3), directions]).T)
    assert modalities.read_map(path, "dwi-FA")[0][6, 6, 6] == pytest.approx(0.8, abs=0.02)
    assert modalities.read_map(path, "dwi-MD")[0][6, 6, 6] == pytest.approx(0.767, abs=0.01)
