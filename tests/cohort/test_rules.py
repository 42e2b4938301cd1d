"""Cohort rules: who is left out, by which rule, and that nobody vanishes."""

import pandas as pd
import pytest

from brainage_nb.cohort.rules import CohortRules, apply_rules, judge_controls
from brainage_nb.workspace import read_csv, write_csv


def cohort(rows, **more):
    """Rows of (subject, session, age) with further columns by name."""
    frame = pd.DataFrame(rows, columns=["subject_id", "session_id", "age"])
    ids = frame["subject_id"] + "_" + frame["session_id"]
    return frame.assign(
        scan_id=ids + frame.groupby(ids).cumcount().map(lambda n: f"_{n}" if n else ""), **more
    )


def test_every_scan_is_kept_or_dropped_once():
    frame = cohort(
        [("A", "1", 60), ("A", "2", 62), ("B", "1", 70), ("C", "1", 80), ("D", "1", 30)],
        cdr=["0", "0.5", "0", "", ""],
        diagnosis=["Control", "Control", "AD", "Control", ""],
    )
    ruled = apply_rules(frame, CohortRules())
    assert list(ruled.cohort["scan_id"]) == ["C_1"]
    assert sorted([*ruled.cohort["scan_id"], *ruled.dropped["scan_id"]]) == sorted(frame["scan_id"])
    told = dict(zip(ruled.dropped["scan_id"], ruled.dropped["detail"], strict=True))
    assert told["A_1"] == told["A_2"] == "CDR 0.5, above 0"
    assert told["B_1"] == "diagnosis 'AD', not a control"
    assert told["D_1"] == "no diagnosis given"
    assert list(ruled.summary["scans left out"]) == [2, 2, 0]
    assert list(ruled.summary["people left out"]) == [1, 2, 0]


def test_a_blank_rating_is_no_dementia_and_is_counted():
    ruled = apply_rules(cohort([("A", "", 20), ("B", "", 70)], cdr=["", "1"]), CohortRules())
    assert list(ruled.cohort["subject_id"]) == ["A"]
    assert ruled.summary["remark"][0] == "1 scans have no rating and stay"


def test_rules_that_are_switched_off_drop_nobody():
    frame = cohort([("A", "", 70), ("A", "2", 71)], cdr=["2", "2"], diagnosis=["AD", "AD"])
    off = CohortRules(max_cdr=-1, controls_only=False)
    ruled = apply_rules(frame, off)
    assert len(ruled.cohort) == 2 and ruled.dropped.empty
    assert list(ruled.summary["remark"][:2]) == ["switched off", "switched off"]


CONTROLS = """
    Control|CTL|HC|TD|HV|CN|NL|healthy control|Healthy_Control|HealthyControls|Cognitively normal|Nondemented
    |non-demented|not demented|Typically Developing Children|No_Known_Disorder|cognitively unimpaired
    |HC (young)|age- and sex-matched controls|normal aging|0: control|Control 2|Gesunde Kontrolle|témoin
    |sujet sain|control sano|健常者|健康对照|контрольная группа|정상"""
PATIENTS = """
    AD|MCI|abnormal|uncontrolled|non-control|not healthy|not normal|Normal pressure hydrocephalus|AD control
    |CU+|NT1|young|group 1|2|cognitively impaired|diseased control|healthy carrier|患者|disorder|conversion"""


@pytest.mark.parametrize("word", [word.strip() for word in CONTROLS.split("|")])
def test_common_words_for_controls_are_known(word):
    ruled = apply_rules(cohort([("A", "", 70), ("B", "", 70)], diagnosis=[word, "patient"]), CohortRules())
    assert list(ruled.cohort["subject_id"]) == ["A"]


def test_words_that_only_hold_a_word_for_controls_are_patients():
    words = [word.strip() for word in PATIENTS.split("|")]
    frame = cohort([(f"S{n}", "", 50) for n in range(len(words) + 1)], diagnosis=[*words, "HC"])
    assert apply_rules(frame, CohortRules()).cohort["diagnosis"].tolist() == ["HC"]


@pytest.mark.parametrize(
    "word, other", [("被験者A", "被験者B"), ("1", "11"), ("Gruppe Ä", "Gruppe B"), ("g-1", "G2")]
)
def test_the_users_words_are_those_alone_in_any_script(word, other):
    frame = cohort([("A", "", 70), ("B", "", 70), ("C", "", 70)], diagnosis=[word, other, ""])
    rules = CohortRules(controls_only=False, control_words=f"{word}, ")
    assert apply_rules(frame, rules).cohort["control"].tolist() == ["yes", "no", "no"]


def test_who_is_a_control_is_kept_with_the_cohort_and_read_again(tmp_path):
    frame = cohort([("A", "", 70), ("B", "", 70)], diagnosis=["0", "1"])
    ruled = apply_rules(frame, CohortRules(controls_only=False, control_words="0"))
    again = read_csv(write_csv(ruled.cohort, tmp_path / "cohort.csv"))
    assert judge_controls(again).tolist() == ["yes", "no"]
    assert judge_controls(frame).tolist() == ["", ""]


def test_who_was_rated_demented_is_no_control_even_where_the_rule_lets_them_stay():
    frame = cohort([("A", "1", 70), ("A", "2", 71), ("B", "1", 70)], cdr=["0", "0.5", ""])
    assert apply_rules(frame, CohortRules(max_cdr=1)).cohort["control"].tolist() == ["no", "no", "yes"]
    assert "control" not in apply_rules(frame.drop(columns="cdr"), CohortRules()).cohort


def test_groups_without_a_word_for_controls_drop_nobody_and_say_so():
    frame = cohort([("A", "", 25), ("B", "", 70)], diagnosis=["young", "old"])
    ruled = apply_rules(frame, CohortRules())
    assert len(ruled.cohort) == 2
    assert "NOT APPLIED" in ruled.summary["remark"][1] and "young 1" in ruled.summary["remark"][1]
    told = apply_rules(frame, CohortRules(control_words="Young, middle"))
    assert list(told.cohort["subject_id"]) == ["A"]


def test_retests_are_kept_one_a_session_or_the_first():
    frame = cohort(
        [("A", "MR10", 70), ("A", "MR2", 70), ("A", "MR2", 70), ("B", "m06", 65.5), ("B", "bl", 65.5)]
    )
    kept = {name: list(apply_rules(frame, CohortRules(retests=name)).cohort["scan_id"]) for name in (
        "all", "per_session", "first")}  # fmt: skip
    assert len(kept["all"]) == 5
    assert kept["per_session"] == ["A_MR10", "A_MR2", "B_m06", "B_bl"]
    assert kept["first"] == ["A_MR2", "B_bl"]
    dropped = apply_rules(frame, CohortRules(retests="first")).dropped
    assert set(dropped["detail"]) == {"a repeat of A_MR2", "a repeat of B_bl"}


def test_the_earlier_age_is_the_first_visit_whatever_its_label():
    frame = cohort([("A", "1", 72.0), ("A", "2", 70.0)])
    assert list(apply_rules(frame, CohortRules(retests="first")).cohort["session_id"]) == ["2"]


def test_an_unknown_word_for_retests_is_refused():
    with pytest.raises(ValueError, match="all, per_session, first"):
        CohortRules(retests="last")
