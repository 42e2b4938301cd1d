"""Cleaning: every drop has one reason that names what was found, every oddity a flag, good scans neither."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainage_nb.cohort.cleaning import FLAGS, REASONS, CleaningRules, clean, counts_by_reason
from brainage_nb.cohort.inspection import FACTS, inspect_scans

GOOD = {
    "error": "",
    "error_detail": "",
    "file_flags": {},
    "shape": (180, 240, 200),
    "voxel_mm": (1.0, 1.0, 1.0),
    "field_of_view_mm": (180.0, 240.0, 200.0),
    "orientation": "RAS",
    "dtype": "int16",
    "oblique_degrees": 3.0,
    "nonfinite_fraction": 0.0,
    "intensity_p1": 0.0,
    "intensity_p50": 100.0,
    "intensity_p99": 900.0,
    "n_values": 800,
    "equal_neighbours": 0.05,
    "at_maximum": 0.001,
    "head_ml": 4000.0,
    "head_mm": 180.0,
    "brightness": 0.5,
    "edge_fractions": (0.0, 0.02, 0.0, 0.0, 0.0),
    "bottom_cut": False,
    "skull_stripped": False,
}


def cohort_of(n, **columns):
    ids = [f"s{number:02d}" for number in range(n)]
    frame = pd.DataFrame({"scan_id": ids, "subject_id": ids, "session_id": "", "image": ids})
    return frame.assign(age=[30.0 + 2 * number for number in range(n)]).assign(**columns)


def facts_of(n, changes=()):
    """Facts of `n` good scans; `changes` maps a scan's number to what differs in it."""
    changes = dict(changes)
    rows = [
        GOOD | {"scan_id": f"s{i:02d}", "sha256": f"f{i}", "voxels_sha256": f"v{i}"} | changes.get(i, {})
        for i in range(n)
    ]
    return pd.DataFrame(rows, columns=list(FACTS))


def outcome(change=None, *, age=40.0, rules=None, **columns):
    table = clean(cohort_of(1, age=age, **columns), facts_of(1, {0: change or {}}), rules)
    return table.iloc[0]


def test_a_good_scan_is_kept_without_a_word():
    row = outcome()
    assert row["kept"]
    assert (row["reason"], row["flags"], row["detail"]) == ("", "", "")


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        ({"error": "truncated", "error_detail": "ends early"}, "truncated", ["ends early"]),
        ({"shape": (180, 240, 9)}, "too_small", ["180 x 240 x 9", "16"]),
        ({"voxel_mm": (1.0, 1.0, 9.0)}, "voxel_size", ["1 x 1 x 9 mm", "7 mm"]),
        ({"voxel_mm": (0.01, 1.0, 1.0)}, "voxel_size", ["0.01 x 1 x 1 mm", "0.2"]),
        ({"field_of_view_mm": (84.0, 103.0, 64.0)}, "field_of_view", ["84 x 103 x 64 mm", "95 mm", "animal"]),
        ({"field_of_view_mm": (180.0, 240.0, 900.0)}, "field_of_view", ["900", "600 mm"]),
        ({"equal_neighbours": 0.8, "n_values": 46}, "label_map", ["80%", "46 values", "50%"]),
        ({"intensity_p1": -1024.0}, "negative", ["-1024", "-500", "CT"]),
        ({"head_ml": 117.0}, "head_size", ["117 ml", "600", "animal"]),
        ({"head_ml": 20000.0}, "head_size", ["20000 ml", "12000"]),
    ],
)
def test_a_scan_is_dropped_with_one_reason_that_names_what_was_found_and_the_limit(change, reason, said):
    row = outcome(change)
    assert not row["kept"]
    assert (row["reason"], row["flags"]) == (reason, "")
    assert reason in REASONS
    for words in said:
        assert words.lower() in row["detail"].lower()


def test_a_scan_dropped_for_its_size_says_what_was_odd_about_its_header():
    flags = {"header_disagrees": "The sform says 1 mm, the qform 2.5 mm."}
    row = outcome({"field_of_view_mm": (84.0, 103.0, 64.0), "file_flags": flags})
    assert (row["reason"], row["flags"]) == ("field_of_view", "")
    assert row["detail"].endswith("an animal? The sform says 1 mm, the qform 2.5 mm.")


def test_a_float_scan_with_mildly_negative_values_is_kept():
    assert outcome({"intensity_p1": -610.0, "intensity_p99": 30000.0})["kept"]
    assert outcome({"intensity_p1": -1.1, "intensity_p99": 3.0})["kept"]


@pytest.mark.parametrize(
    ("age", "reason"),
    [(np.nan, "no_age"), (-3.0, "impossible_age"), (145.0, "impossible_age"), (0.0, ""), (96.0, "")],
)
def test_an_age_is_missing_impossible_or_fine(age, reason):
    assert outcome(age=age)["reason"] == reason


@pytest.mark.parametrize(
    ("change", "flag", "said"),
    [
        ({"file_flags": {"no_affine": "A default is assumed."}}, "no_affine", "assumed"),
        ({"file_flags": {"one_volume_4d": "It was taken as 3-D."}}, "one_volume_4d", "taken as 3-D"),
        ({"head_ml": 1400.0, "skull_stripped": True}, "skull_stripped", "1400 ml"),
        ({"edge_fractions": (0.0, 0.1, 0.0, 0.0, 0.6)}, "head_cut_off", "head: top (60% of"),
        ({"bottom_cut": True}, "head_cut_off", "bottom"),
        ({"bottom_cut": True, "skull_stripped": True}, "skull_stripped", "skull"),
        ({"voxel_mm": (1.0, 1.0, 5.0)}, "coarse", "1 x 1 x 5 mm"),
        ({"oblique_degrees": 31.0}, "oblique", "31 degrees"),
        ({"n_values": 20}, "few_values", "20 grey levels"),
        ({"at_maximum": 0.06}, "clipped", "6.0%"),
    ],
)
def test_an_odd_scan_is_kept_and_flagged_in_words(change, flag, said):
    row = outcome(change)
    assert row["kept"]
    assert row["flags"] == flag
    assert flag in FLAGS
    assert said in row["detail"]


def test_a_child_is_flagged_and_kept():
    row = outcome(age=9.0)
    assert (row["kept"], row["flags"]) == (True, "age_outside_adult")


def test_a_note_of_the_table_about_an_age_is_passed_on():
    row = outcome(age_note="mean of 61.8 and 62.1 years")
    assert row["flags"] == "age_note"
    assert row["detail"] == "Mean of 61.8 and 62.1 years."


def test_two_flags_stand_beside_each_other():
    row = outcome({"file_flags": {"sheared": "Sheared."}, "n_values": 20})
    assert row["flags"] == "sheared;few_values"


def test_limits_can_be_changed():
    assert outcome({"head_ml": 117.0}, rules=CleaningRules(min_head_ml=50))["kept"]
    assert outcome(age=40, rules=CleaningRules(max_age=39))["reason"] == "impossible_age"


def test_one_picture_under_two_ids_with_two_ages_loses_both():
    table = clean(cohort_of(4), facts_of(4, {1: {"voxels_sha256": "x"}, 3: {"voxels_sha256": "x"}}))
    assert list(table["reason"]) == ["", "ambiguous", "", "ambiguous"]
    assert "s01 (age 32.0), s03 (age 36.0)" in table["detail"][1]
    assert "4.0 years apart" in table["detail"][1]


def test_one_picture_listed_twice_with_one_age_is_kept_once():
    twice = {number: {"voxels_sha256": "x"} for number in (0, 2, 3)}
    table = clean(cohort_of(4, age=50.0), facts_of(4, twice))
    assert list(table["reason"]) == ["", "", "duplicate", "duplicate"]
    assert "s00" in table["detail"][3]
    assert list(table["flags"]) == ["same_picture", "", "", ""]
    assert "s02, s03" in table["detail"][0]


def test_a_dropped_copy_carries_no_flags():
    odd = {"voxels_sha256": "x", "n_values": 9}
    table = clean(cohort_of(2, age=50.0), facts_of(2, {0: odd, 1: odd}))
    assert list(table["flags"]) == ["few_values;same_picture", ""]


def test_a_copy_that_is_dropped_for_its_age_takes_no_other_with_it():
    ages = cohort_of(2, age=[50.0, np.nan])
    table = clean(ages, facts_of(2, {0: {"voxels_sha256": "x"}, 1: {"voxels_sha256": "x"}}))
    assert list(table["reason"]) == ["", "no_age"]


def test_unreadable_scans_are_not_each_others_duplicates():
    broken = {"error": "unreadable", "error_detail": "broken", "voxels_sha256": None, "shape": None}
    table = clean(cohort_of(2), facts_of(2, {0: broken, 1: broken}))
    assert list(table["reason"]) == ["unreadable", "unreadable"]


def test_several_scans_of_a_session_are_said_and_their_ages_compared():
    cohort = cohort_of(3, subject_id=["a", "a", "b"], session_id="1", age=[40.0, 42.0, 50.0])
    table = clean(cohort, facts_of(3))
    assert list(table["flags"]) == ["several_scans;age_conflict", "several_scans;age_conflict", ""]
    assert "2 scans of subject a, session 1" in table["detail"][0]
    two_sessions = cohort.assign(session_id=["1", "2", "1"])
    assert (clean(two_sessions, facts_of(3))["flags"] == "").all()


def test_a_person_with_one_age_in_months_is_dropped_and_named():
    cohort = cohort_of(3, subject_id=["a", "a", "b"], session_id=["1", "2", "1"], age=[6.0, 84.0, 7.0])
    table = clean(cohort, facts_of(3))
    assert list(table["reason"]) == ["ages_apart", "ages_apart", ""]
    assert "subject a have the ages 6, 84, more than 40 years apart" in table["detail"][0]
    assert clean(cohort, facts_of(3), CleaningRules(max_years_between=80))["kept"].all()


@pytest.mark.parametrize(("fact", "flag"), [("head_mm", "size_outlier"), ("brightness", "intensity_outlier")])
def test_a_scan_unlike_the_cohort_is_flagged_and_only_that_one(fact, flag):
    rng = np.random.default_rng(0)
    changes = {n: {fact: GOOD[fact] * (1 + 0.05 * rng.normal())} for n in range(29)}
    changes[29] = {fact: GOOD[fact] * 0.6}
    flags = clean(cohort_of(30), facts_of(30, changes))["flags"]
    assert flags[29] == flag
    assert (flags[:29] == "").all()


def test_few_scans_or_a_very_even_cohort_give_no_outliers():
    small = facts_of(5, {4: {"head_mm": 100.0}})
    assert (clean(cohort_of(5), small)["flags"] == "").all()
    even = facts_of(30, {29: {"head_mm": 190.0}})
    assert (clean(cohort_of(30), even)["flags"] == "").all()


def test_rows_follow_the_cohort_and_facts_stand_in_plain_text():
    cohort = cohort_of(3).iloc[::-1]
    table = clean(cohort, facts_of(3))
    assert list(table["scan_id"]) == ["s02", "s01", "s00"]
    assert list(table.columns[:8]) == [
        "scan_id", "subject_id", "session_id", "image", "kept", "reason", "flags", "detail",
    ]  # fmt: skip
    assert table["shape"][0] == "180 x 240 x 200"
    assert table["kept"].dtype == bool


def test_facts_of_another_cohort_are_refused():
    with pytest.raises(ValueError, match="Inspect this cohort again"):
        clean(cohort_of(3), facts_of(2))


def test_counts_name_every_code_with_its_meaning():
    changes = {
        0: {"error": "blank", "error_detail": "blank"},
        1: {"n_values": 9, "file_flags": {"no_affine": "Assumed."}},
        2: {"n_values": 9},
    }
    counts = counts_by_reason(clean(cohort_of(5), facts_of(5, changes)))
    assert counts[["outcome", "code", "scans"]].to_numpy().tolist() == [
        ["kept", "", 4],
        ["dropped", "blank", 1],
        ["flagged", "few_values", 2],
        ["flagged", "no_affine", 1],
    ]
    assert counts["meaning"][0] == "of which 2 without any flag"
    assert counts["meaning"][1] == REASONS["blank"]


ODD = {
    "AIL": "kept",
    "anatomical": "field_of_view",
    "complex": "not_scalar",
    "example4d": "not_3d",
    "functional": "not_3d",
    "inia19-t1-brain": "field_of_view",
    "low_res": "too_small",
    "minimal": "too_small",
    "nifti1": "header_only",
    "resampled_anat_moved": "too_small",
    "row_major": "not_volume",
    "shear": "negative",
    "test": "not_3d",
}


def real_outcome(shared_data, every):
    files = sorted((shared_data / "ixi_hh" / "images").glob("*.nii.gz"))[::every]
    files += [path for path in sorted((shared_data / "odd_nifti").iterdir()) if path.suffix != ".tsv"]
    names = [path.name.split(".")[0] for path in files]
    ages = np.linspace(20, 80, len(files))
    cohort = cohort_of(
        len(files), scan_id=names, subject_id=names, image=[str(path) for path in files], age=ages
    )
    return clean(cohort, inspect_scans(cohort, Path)).set_index("scan_id")


def assert_real_outcome(table, n_real):
    real = table[table.index.str.startswith("IXI")]
    assert len(real) == n_real
    assert real["kept"].all()
    assert (real["flags"] == "").all()
    odd = table.loc[list(ODD)]
    assert odd["reason"].where(~odd["kept"], "kept").to_dict() == ODD
    assert {"coarse", "clipped"} <= set(odd.loc["AIL", "flags"].split(";"))
    assert odd["detail"].str.len().gt(20).all()


def test_some_real_scans_are_kept_and_odd_files_dropped_or_flagged(shared_data):
    assert_real_outcome(real_outcome(shared_data, every=8), 16)


@pytest.mark.slow
def test_all_real_scans_are_kept_and_odd_files_dropped_or_flagged(shared_data):
    assert_real_outcome(real_outcome(shared_data, every=1), 121)
