import numpy as np
import pandas as pd
import pytest

from brainage_nb.evaluation.evaluate import diagnosis_differences


def patients(n=400, effect=5.0, seed=0):
    """Patients are ten years older, and the gap falls by 0.3 years a year of age: the plain difference
    misleads."""
    rng = np.random.default_rng(seed)
    ill = rng.random(n) < 0.4
    age = rng.uniform(40, 70, n) + 10 * ill
    gap = effect * ill - 0.3 * (age - 55) + rng.normal(0, 3, n)
    return pd.DataFrame(
        {
            "subject_id": np.arange(n).astype(str),
            "age": age,
            "sex": rng.choice(["F", "M"], n),
            "site": "one",
            "diagnosis": np.where(ill, "AD", "CN"),
            "gap": gap,
        }
    )


def test_adjustment_for_age_recovers_the_planted_difference():
    found = diagnosis_differences(patients()).iloc[0]
    assert found["adjusted_low"] < 5 < found["adjusted_high"]
    assert found["difference_high"] < 4
    assert found["adjusted"] == pytest.approx(5, abs=0.8)
    assert found["adjusted_for"] == "age, sex"


def test_what_a_scanner_adds_is_not_taken_for_the_diagnosis_where_there_are_several():
    rows, rng = patients(), np.random.default_rng(1)
    ill = (rows["diagnosis"] == "AD").to_numpy()
    north = rng.random(len(rows)) < np.where(ill, 0.8, 0.2)
    rows = rows.assign(site=np.where(north, "north", "south"), gap=rows["gap"] + 6 * north)
    found, blind = (diagnosis_differences(each).iloc[0] for each in (rows, rows.drop(columns="site")))
    assert found["adjusted_for"] == "age, sex, site"
    assert found["adjusted_low"] < 5 < found["adjusted_high"] < blind["adjusted"]


def test_repeated_scans_of_a_subject_do_not_narrow_the_interval():
    rows = patients(100)
    once = diagnosis_differences(rows).iloc[0]
    thrice = diagnosis_differences(pd.concat([rows] * 3)).iloc[0]
    widths = [row["adjusted_high"] - row["adjusted_low"] for row in (once, thrice)]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert thrice["n_subjects"] == once["n_subjects"]


def test_nothing_is_compared_without_controls_or_with_too_few_patients():
    assert diagnosis_differences(patients().assign(diagnosis="AD")).empty
    assert diagnosis_differences(patients().drop(columns="diagnosis")).empty
    rows = patients()
    rows["diagnosis"] = "CN"
    rows.loc[:1, "diagnosis"] = "AD"
    assert diagnosis_differences(rows).empty


def test_unknown_controls_are_refused_with_the_known_diagnoses():
    with pytest.raises(ValueError, match=r"'HC'.*\['AD', 'CN'\]"):
        diagnosis_differences(patients(), controls="HC")


def test_controls_in_two_spellings_are_one_group():
    rows, once = patients(), diagnosis_differences(patients())
    rows.loc[(rows["diagnosis"] == "CN") & (rows.index % 2 == 0), "diagnosis"] = "healthy control"
    pd.testing.assert_frame_equal(diagnosis_differences(rows), once)
