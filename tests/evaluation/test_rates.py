"""Rates of ageing where the answer is known, and visits that give none: a sentence each, and nothing lost."""

import numpy as np
import pandas as pd
import pytest

from brainage_nb.evaluation import rates
from brainage_nb.evaluation.correction import AgeBiasCorrector, Calibration
from brainage_nb.evaluation.rates import (
    NOT_IN_BUNDLE,
    RateScale,
    bound_spread,
    measure_rates,
    rate_one_person,
)

SLOPE, ERROR = 0.8, 1.5


def cohort(n=40, *, rate_sd=0.4, sessions=3, years=8.0, seed=0, error=ERROR):
    """Predictions of people seen every `years / (sessions - 1)` years, and the rates planted."""
    rng = np.random.default_rng(seed)
    first, gap = rng.uniform(25, 75, n), rng.normal(0, 4, n)
    planted = pd.Series(rng.normal(1, rate_sd, n), index=[f"{i:03d}" for i in range(n)])
    rows = []
    for number, since in enumerate(np.linspace(0, years, sessions), start=1):
        brain_age = first + gap + planted.to_numpy() * since
        rows.append(
            pd.DataFrame(
                {
                    "subject_id": planted.index,
                    "session_id": f"{number:02d}",
                    "age": (first + since).round(2),
                    "predicted_age": 10 + SLOPE * brain_age + rng.normal(0, error, n),
                    "site": "north",
                    "diagnosis": "",
                }
            )
        )
    return pd.concat(rows, ignore_index=True), planted


def measure(rows, **options):
    corrector = AgeBiasCorrector().fit(rows["predicted_age"], rows["age"], subject_id=rows["subject_id"])
    return measure_rates(rows, Calibration(corrector, "", None), **options)


def said(found, words):
    return any(words in note for note in found.warnings + found.notes)


def test_mean_rate_error_and_spread_that_were_planted_are_found():
    rows, planted = cohort(90)
    found = measure(rows, truth=pd.DataFrame({"subject_id": planted.index, "rate": planted.to_numpy()}))
    group = found.groups.iloc[0]
    assert group["rate_low"] < 1 < group["rate_high"] and group["rate_high"] - group["rate_low"] < 0.45
    assert group["method"] == "mixed model, random intercept and slope"
    assert found.scale.error == pytest.approx(ERROR, rel=0.15)
    assert found.scale.spread == pytest.approx(0.4, rel=0.3)
    people = found.people.set_index("subject_id")
    of_errors = (people["rate"] - planted) / people["error"]
    assert found.scale.differs
    assert 0.8 < of_errors.std() < 1.25  # each standard error is what it says
    assert said(found, "Known answers: recovered on planted rate of 90 people")
    assert said(found, f"spread (standard deviation) {planted.std():.2f} years a year; found: mean")
    low, high = bound_spread(found.people)
    assert 0.2 < low < planted.std() < high < 0.8
    assert said(found, f"their errors allow {low:.2f} to {high:.2f}")


def test_visits_shuffled_within_a_person_give_no_rate():
    rows, _ = cohort(90)
    rng = np.random.default_rng(2)
    rows["predicted_age"] = rows.groupby("subject_id")["predicted_age"].transform(
        lambda part: rng.permutation(part)
    )
    group = measure(rows).groups.iloc[0]
    assert group["rate_low"] < 0 < group["rate_high"]


def test_two_visits_alone_cannot_part_error_from_real_differences_so_no_verdict_is_given():
    found = measure(cohort(30, sessions=2)[0])
    assert "one common rate" in found.scale.error_from and found.scale.spread is None
    assert set(found.people["verdict"]) == {"no verdict"}
    assert found.groups["method"][0] == "mixed model, random intercept"


def test_reliability_is_that_of_the_planted_spread_and_decides_whether_a_verdict_is_given():
    scale = RateScale(slope=0.8, error=1.6, error_from="", spread=0.5, differs=True, n_subjects=90)
    table = scale.table().set_index("years")
    assert table["error"][4] == pytest.approx(1.6 * 2**0.5 / 0.8 / 4)
    assert table["reliability"][4] == pytest.approx(0.25 / (0.25 + 0.5))
    assert list(table["verdict"]) == ["none on one person"] * 2 + ["can be given"]
    years = np.array([0.0, 3.0, 6.0, 9.0])
    for rate, verdict in ((3.0, "faster than the mean"), (1.2, "not told"), (-1.5, "slower than the mean")):
        text = rate_one_person(vars(scale), list(60 + years), list(60 + 0.8 * rate * years))
        assert f"{rate:.2f} years a year" in text and verdict in text
    near = rate_one_person(vars(scale), [60.0, 62.0], [60.0, 66.0])
    assert "No verdict on one person" in near
    doubted = RateScale(slope=0.8, error=1.6, error_from="", spread=0.5, n_subjects=90)
    assert set(doubted.table()["verdict"]) == {"none on one person"}
    assert "not shown to differ" in rate_one_person(vars(doubted), list(60 + years), list(60 + years))


def test_people_who_all_age_alike_are_not_told_apart():
    found = measure(cohort(90, rate_sd=0.0)[0])
    assert not found.scale.differs and set(found.people["verdict"]) == {"no verdict"}
    assert said(found, "not shown to be above 0")


def test_repeats_at_one_age_tell_the_error_and_the_larger_of_both_counts():
    rows, _ = cohort(40, sessions=3)
    repeats, _ = cohort(40, sessions=2, years=0.0, error=4.0, seed=5)
    repeats["subject_id"] = "r" + repeats["subject_id"]
    found = measure(pd.concat([rows, repeats], ignore_index=True))
    assert "repeated at one age, 40 people" in found.scale.error_from
    assert found.scale.error == pytest.approx(4.0, rel=0.25)
    assert said(found, "People with one age in all their sessions: 40") and len(found.people) == 40


def test_a_changed_scanner_is_named_its_bias_estimated_and_kept_out_of_the_group():
    rows, _ = cohort(80)
    moved = rows["subject_id"].isin([f"{i:03d}" for i in range(12)]) & (rows["session_id"] == "03")
    rows.loc[moved, "site"] = "south"
    rows.loc[moved, "predicted_age"] += 4.0
    found = measure(rows)
    (warning,) = found.warnings
    assert (
        "Scanner changed between visits of 12 people" in warning and "north to south, 12 (000, 001" in warning
    )
    low, high = map(float, warning.split("it adds ")[1].split("[")[1].split("]")[0].split(","))
    assert low < 4.0 / SLOPE < high
    assert found.groups["n_subjects"][0] == 68 and found.groups["rate_high"][0] < 1.3
    moved_people = found.people[found.people["scanner"] != ""]
    assert set(moved_people["verdict"]) == {"no verdict: another scanner"} and len(moved_people) == 12


def test_groups_are_compared_with_the_controls_in_any_spelling():
    rows, _ = cohort(90)
    rows["diagnosis"] = np.where(rows["subject_id"] < "060", "Healthy_Control", "AD")
    since = rows["age"] - rows.groupby("subject_id")["age"].transform("min")
    rows["predicted_age"] += SLOPE * 0.8 * since * (rows["diagnosis"] == "AD")
    groups = measure(rows).groups.set_index("who")
    difference = groups.loc["AD minus (controls)"]
    assert difference["rate_low"] < 0.8 < difference["rate_high"] and difference["rate_low"] > 0


def test_a_mixed_model_that_does_not_converge_is_replaced_in_words(monkeypatch):
    monkeypatch.setattr(rates, "fit_mixed", lambda *_, **__: (None, "the mixed model did not converge"))
    group = measure(cohort()[0]).groups.iloc[0]
    assert group["method"] == "the mixed model did not converge; people's own rates pooled instead"
    assert group["rate_low"] < 1 < group["rate_high"]


def break_one_visit(rows):
    return rows[rows["session_id"] == "01"]


def break_one_day(rows):
    return rows.assign(age=rows.groupby("subject_id")["age"].transform("first"))


def break_months(rows):
    first = rows.groupby("subject_id")["age"].transform("first")
    return rows.assign(age=first + (rows["age"] - first) / 16)


def break_scanners(rows):
    return rows.assign(site=rows["session_id"])


def break_order(rows):
    return rows.assign(age=100 - rows["age"])


@pytest.mark.parametrize(
    ("breaking", "sentences"),
    [
        (break_one_visit, ["no person has two predicted sessions at different ages"]),
        (break_one_day, ["People with one age in all their sessions: 40", "no person has two predicted"]),
        (break_scanners, ["visits on one scanner are too few"]),
        (break_order, ["People younger at a later session: 40", "no person has two predicted"]),
        (break_months, ["People with less than 1 years between their visits: 40"]),
    ],
)
def test_visits_that_give_no_rate_are_said_to(breaking, sentences):
    corrector = AgeBiasCorrector().fit([40, 50, 61], [40, 50, 60])
    found = measure_rates(breaking(cohort()[0]), Calibration(corrector, "", None))
    assert found.people.empty and found.scale is None and found.to_dict()["notes"]
    for words in sentences:
        assert said(found, words)


@pytest.mark.parametrize("labels", [("01", "02", "03"), ("bl", "m24", "m48"), ("ses-W1", "ses-W2", "ses-W3")])
def test_ages_that_go_backwards_are_named_and_left_out(labels):
    rows, _ = cohort()
    rows["session_id"] = rows["session_id"].map(dict(zip(("01", "02", "03"), labels, strict=True)))
    assert measure(rows).warnings == []
    own = rows.index[rows["subject_id"] == "007"]
    rows.loc[own, "age"] = rows.loc[own, "age"].to_numpy()[[1, 0, 2]]
    found = measure(rows)
    (warning,) = found.warnings
    assert warning.startswith("People younger at a later session: 1 (first: 007)")
    assert len(found.people) == 39 and "007" not in set(found.people["subject_id"])


def test_labels_without_an_order_are_not_taken_for_one():
    rows, _ = cohort()
    rows["session_id"] = rows["session_id"].map({"01": "x9a", "02": "retest", "03": "b1c"})
    assert measure(rows).warnings == []


def test_whole_ages_ask_for_two_years_since_one_may_be_a_day():
    rows, _ = cohort(sessions=2, years=0.9)
    rows["age"] = np.floor(rows["age"])
    found = measure(rows)
    assert said(found, "Ages are whole years") and found.people.empty


@pytest.mark.parametrize(
    ("ages", "words"),
    [
        ([60.0, 60.0], "0.0 years apart"),
        ([60.0, 60.4], "0.4 years apart"),
        ([60.0], "0.0 years apart"),
        ([60.0, 61.0], "expected are 2 to 40, as the ages are whole years"),
        ([5.5, 66.5], "61.0 years apart"),  # months
        ([60.5, 64.5], "they are one scan given twice"),
    ],
)
def test_scans_of_one_age_give_one_person_no_rate(ages, words):
    known = vars(RateScale(slope=0.8, error=1.6, error_from="repeats"))
    assert words in rate_one_person(known, ages, [50.0] * len(ages))
    assert rate_one_person(None, ages, [50.0] * len(ages)) == NOT_IN_BUNDLE


def test_without_a_slope_there_is_no_rate_and_it_is_said_why():
    found = measure_rates(cohort()[0], Calibration(None, "The slope is 0.01.", None))
    assert said(found, "No rate of ageing: The slope is 0.01.") and found.people.empty


def test_a_visit_in_months_gives_no_rate_and_moves_no_other():
    rows, _ = cohort()
    own = (rows["subject_id"] == "007") & (rows["session_id"] == "03")
    rows.loc[own, "age"] += 60
    found = measure(rows)
    assert said(found, "People with more than 40 years between their visits: 1 (first: 007)")
    assert len(found.people) == 39 and "007" not in set(found.people["subject_id"])


def test_who_gets_a_diagnosis_later_is_counted_and_numbers_of_sites_are_names():
    rows, _ = cohort()
    last = (rows["session_id"] == "03") & (rows["subject_id"] < "005")
    rows = rows.assign(diagnosis=np.where(last, "AD", "control"), site=np.where(last, 2, 1))
    found = measure(rows)
    assert said(found, "Diagnosis changes between visits of 5 people: they count as what they were first.")
    assert "1 to 2, 5 (000, 001" in found.warnings[0]
