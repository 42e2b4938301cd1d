"""Inspection: facts are right, and nothing a file does ends the run."""

import gzip
import os
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainage_nb.cohort.cleaning import clean
from brainage_nb.cohort.inspection import FACTS, each_in_parallel, inspect_scan, inspect_scans

AFFINE = np.diag([6.0, 5.0, 6.0, 1.0])


def head(shape=(32, 40, 32), seed=0):
    """A bright ellipsoid of 150 x 170 x 160 mm in noise, as int16."""
    rng = np.random.default_rng(seed)
    at = np.meshgrid(*[np.arange(n) - n / 2 for n in shape], indexing="ij")
    inside = sum((a * mm / r) ** 2 for a, mm, r in zip(at, (6, 5, 6), (75, 85, 80), strict=True)) < 1
    return (inside * 1000 + rng.normal(0, 20, shape) ** 2 / 20 + inside * rng.normal(0, 60, shape)).astype(
        "<i2"
    )


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def test_facts_of_a_scan_are_those_of_its_header_and_voxels(tmp_path):
    facts = inspect_scan(save(tmp_path / "a.nii.gz", head()))
    assert "error" not in facts
    assert set(facts) <= set(FACTS)
    assert facts["shape"] == (32, 40, 32)
    assert facts["voxel_mm"] == (6.0, 5.0, 6.0)
    assert facts["field_of_view_mm"] == (192.0, 200.0, 192.0)
    assert (facts["orientation"], facts["dtype"]) == ("RAS", "int16")
    assert facts["head_ml"] == pytest.approx(4 / 3 * np.pi * 7.5 * 8.5 * 8.0, rel=0.15)
    assert facts["head_mm"] == pytest.approx(np.sqrt(150 * 170), rel=0.1)
    assert facts["equal_neighbours"] < 0.1
    assert facts["at_maximum"] < 0.01
    assert max(facts["edge_fractions"]) < 0.1


def test_a_head_beyond_the_edge_is_measured_on_that_side(tmp_path):
    facts = inspect_scan(save(tmp_path / "a.nii.gz", head()[:, :, :20]))
    assert [share > 0.5 for share in facts["edge_fractions"]] == [False, False, False, False, True]
    assert inspect_scan(save(tmp_path / "b.nii.gz", head()[:, :, 16:]))["bottom_cut"]


def test_the_same_picture_has_the_same_voxel_hash_in_any_orientation_compression_and_number_type(tmp_path):
    image = nib.Nifti1Image(head(), AFFINE)
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt("PSR"))
    turned = image.as_reoriented(turn)
    save(tmp_path / "a.nii.gz", head())
    save(tmp_path / "b.nii", np.asarray(turned.dataobj).astype(np.float32), turned.affine)
    save(tmp_path / "c.nii.gz", head(seed=1))
    one, same, other = (inspect_scan(tmp_path / name) for name in ("a.nii.gz", "b.nii", "c.nii.gz"))
    assert same["orientation"] == "PSR"
    assert one["voxels_sha256"] == same["voxels_sha256"]
    assert one["sha256"] != same["sha256"]
    assert one["voxels_sha256"] != other["voxels_sha256"]
    array = head()
    save(tmp_path / "d.nii", array.reshape(32, 32, 40))
    assert inspect_scan(tmp_path / "d.nii")["voxels_sha256"] != one["voxels_sha256"]


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_a_header_that_claims_30000_cubed_is_refused_without_taking_memory(tmp_path, ending):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((30000, 30000, 30000))
    content = header.binaryblock + b"\0" * 1000
    path = tmp_path / f"huge.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    inspect_scan(save(tmp_path / "warm.nii.gz", head()))  # imports take memory too
    tracemalloc.start()
    facts = inspect_scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert facts["error"] == "too_large"
    assert "30000 x 30000 x 30000" in facts["error_detail"]
    assert peak < 5e6


def test_a_header_that_disagrees_or_is_in_metres_is_kept_and_flagged_in_its_own_words(tmp_path):
    image = nib.Nifti1Image(head(), AFFINE)
    image.set_sform(np.diag([-6.6, 5.5, 6.6, 1.0]), code=2)
    nib.save(image, tmp_path / "a.nii.gz")
    metres = np.diag([0.001, 0.001, 0.001, 1.0]) @ AFFINE
    image = nib.Nifti1Image(head(seed=1), metres)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "b.nii.gz")
    ids = ["a", "b"]
    cohort = pd.DataFrame({"scan_id": ids, "subject_id": ids, "session_id": "", "image": ids, "age": 40.0})
    facts = inspect_scans(cohort, lambda image: tmp_path / f"{image}.nii.gz")
    assert facts["voxel_mm"].tolist() == [(6.6, 5.5, 6.6), (6.0, 5.0, 6.0)]
    table = clean(cohort, facts).set_index("scan_id")
    assert table["kept"].all()
    assert "header_disagrees" in table["flags"]["a"]
    assert "the sform (code 2) says 6.6 x 5.5 x 6.6 mm, LAS" in table["detail"]["a"]
    assert "unit_not_mm" in table["flags"]["b"]
    assert "The header's unit is the metre" in table["detail"]["b"]


def test_pairs_with_equal_headers_are_told_apart_by_their_voxels(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        nib.save(nib.Nifti1Pair(head(seed=seed), AFFINE), tmp_path / f"{name}.img")
    assert (tmp_path / "a.hdr").read_bytes() == (tmp_path / "b.hdr").read_bytes()
    one, other = (inspect_scan(tmp_path / f"{name}.hdr") for name in "ab")
    assert one["sha256"] != other["sha256"]


def test_what_is_dropped_is_described_in_mm_too(tmp_path):
    image = nib.Nifti1Image(np.stack([head(), head()], axis=-1), np.diag([0.006, 0.005, 0.006, 1.0]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "series.nii.gz")
    facts = inspect_scan(tmp_path / "series.nii.gz")
    assert (facts["error"], facts["voxel_mm"]) == ("not_3d", (6.0, 5.0, 6.0))


def test_a_tilted_affine_is_measured_in_degrees(tmp_path):
    angle = np.radians(25)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    facts = inspect_scan(save(tmp_path / "a.nii.gz", head(), turn @ AFFINE))
    assert facts["oblique_degrees"] == pytest.approx(25, abs=0.2)


def test_label_maps_have_equal_neighbours_and_lettering_stands_at_the_maximum(tmp_path):
    labels = (head() > 500).astype(np.uint8) * 3
    assert inspect_scan(save(tmp_path / "labels.nii.gz", labels))["equal_neighbours"] > 0.9
    empty_around = head() * (head() > 500)
    assert inspect_scan(save(tmp_path / "empty_around.nii.gz", empty_around))["equal_neighbours"] < 0.1
    lettered = head()
    lettered[12:20, 10:30, 16:18] = 2000
    assert inspect_scan(save(tmp_path / "lettered.nii.gz", lettered))["at_maximum"] > 0.02


def test_bad_files_get_an_error_each_and_the_others_their_facts(tmp_path):
    save(tmp_path / "good.nii.gz", head())
    whole = (tmp_path / "good.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.nii.gz").write_text("not a scan")
    (tmp_path / "empty.nii").touch()
    (tmp_path / "folder.nii").mkdir()
    save(tmp_path / "series.nii.gz", np.stack([head(), head()], axis=-1))
    names = [
        "cut.nii.gz",
        "text.nii.gz",
        "good.nii.gz",
        "empty.nii",
        "folder.nii",
        "absent.nii",
        "series.nii.gz",
    ]
    cohort = pd.DataFrame({"scan_id": [name.split(".")[0] for name in names], "image": names})
    facts = inspect_scans(cohort, lambda image: tmp_path / image, n_jobs=2)
    assert list(facts["scan_id"]) == list(cohort["scan_id"])
    assert list(facts.columns) == list(FACTS)
    error = facts.set_index("scan_id")["error"].to_dict()
    assert error == {
        "cut": "truncated",
        "text": "unreadable",
        "good": "",
        "empty": "truncated",
        "folder": "missing",
        "absent": "missing",
        "series": "not_3d",
    }
    assert (facts["error_detail"] != "").equals(facts["error"] != "")
    assert facts.set_index("scan_id").loc["series", "shape"] == (32, 40, 32, 2)


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (ZeroDivisionError("deep inside"), "unreadable", "ZeroDivisionError: deep inside"),
        (MemoryError(), "too_large", "does not fit into memory"),
    ],
)
def test_a_fault_inside_a_reader_becomes_the_error_of_that_scan(tmp_path, monkeypatch, fault, error, said):
    def broken(path, **_):
        raise fault

    monkeypatch.setattr("brainage_nb.cohort.inspection.load_scan", broken)
    facts = inspect_scan(save(tmp_path / "a.nii.gz", head()))
    assert facts["error"] == error
    assert said in facts["error_detail"]


def test_a_voxel_without_extent_is_refused_before_it_is_smoothed_for_minutes(tmp_path):
    facts = inspect_scan(save(tmp_path / "a.nii.gz", head(), np.diag([6.0, 1e-7, 6.0, 1.0])))
    assert facts["error"] == "bad_affine"
    assert "1e-07 mm" in facts["error_detail"]


def test_a_process_that_dies_loses_only_its_own_task():
    def work(number):
        if number == 3:
            os._exit(1)
        return 10 * number

    found = dict(each_in_parallel(work, [(n,) for n in range(6)], 2, title="numbers", lost="lost"))
    assert found == {0: 0, 1: 10, 2: 20, 3: "lost", 4: 40, 5: 50}
    again = dict(
        each_in_parallel(lambda number: -number, [(n,) for n in range(3)], 2, title="numbers", lost="")
    )
    assert again == {0: 0, 1: -1, 2: -2}


def test_an_empty_cohort_gives_an_empty_table():
    facts = inspect_scans(pd.DataFrame({"scan_id": [], "image": []}), Path)
    assert list(facts.columns) == list(FACTS)
    assert facts.empty
