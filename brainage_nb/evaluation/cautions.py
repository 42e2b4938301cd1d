"""What a reader of an evaluation must be told first, in sentences. Judges figures; reports none of its
own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from brainage_nb.cohort.rules import count_diagnoses, judge_controls
from brainage_nb.evaluation.correction import conformal_rank
from brainage_nb.evaluation.metrics import with_interval
from brainage_nb.workspace import Workspace

if TYPE_CHECKING:
    from brainage_nb.evaluation.runs import RunEvaluation

FEW_TEST_SUBJECTS = 30
TEST_OBJECT = (
    "These scans are a known-answer cohort: heads built by rule, with planted ageing. It is a test object; "
    "no figure on this page says how accurate a model is on people."
)


def find_cautions(
    found: dict[str, RunEvaluation],
    comparisons: pd.DataFrame,
    ws: Workspace,
    *,
    is_test_object: bool,
) -> list[str]:
    """Warnings of a whole evaluation, gravest first."""
    sentences = [TEST_OBJECT] if is_test_object else []
    for name, one in found.items():
        sentences += [
            f"{name}: {text}" for text in _of_run(one, comparisons[comparisons["a"] == name]) if text
        ]
    return sentences + [text for text in _of_workspace(found, ws) if text]


def _of_run(one: RunEvaluation, comparisons: pd.DataFrame) -> list[str | bool]:
    """Sentences, and something false in place of each that does not hold."""
    test, calibration, bias = one.metrics["test"], one.calibration, one.metrics["test"]["gap_age_r"]
    difference = comparisons[comparisons["b"] == "mean predictor"].iloc[0]
    chosen_on_val = one.run.settings.get("settings", {}).get("keep", "best") == "best"
    return [
        not difference["high"] < 0
        and "not shown to be better than predicting the mean training age for everyone (MAE difference in "
        f"years, with its 95 % interval where there is one: {with_interval(difference)}).",
        test["n_subjects"] < FEW_TEST_SUBJECTS
        and f"only {test['n_subjects']} test subjects, so every figure is uncertain; read the intervals.",
        f"no age-bias correction. {calibration.refused}"
        if calibration.refused
        else calibration.corrector.support_,
        (bias["high"] < 0 or bias["low"] > 0)
        and f"the raw gap depends on age (r {with_interval(bias)} on test): do not compare raw gaps between "
        "people or groups of different age.",
        "no validation or out-of-fold predictions, so there are no prediction intervals."
        if calibration.interval is None
        else calibration.interval.support_ or _of_coverage(one),
        (not one.run.folds and "val_mae" in one.run.history and chosen_on_val)
        and "validation figures are a little too good, since the best epoch was chosen on them; quote test.",
    ]


def _of_coverage(one: RunEvaluation) -> str:
    """A sentence where test coverage is lower than chance in calibration and test scans explains
    (beta-binomial, 2.5 %)."""
    from scipy import stats

    row, interval = one.coverage.iloc[0], one.calibration.interval
    n, level = interval.n_calibration_, interval.level
    k, inside = conformal_rank(n, level), round(row["coverage"] * row["n"])
    if stats.betabinom.cdf(inside, row["n"], k, n + 1 - k) >= 0.025:
        return ""
    return (
        f"prediction intervals hold {row['coverage']:.0%} of the test ages [{row['coverage_low']:.0%}, "
        f"{row['coverage_high']:.0%}], fewer than the {level:.0%} they promise and than chance explains: "
        "calibration and test subjects differ."
    )


def _of_workspace(found: dict[str, RunEvaluation], ws: Workspace) -> list[str | bool]:
    cohort, dealt, said = ws.read("cohort.csv"), ws.read("splits.csv"), []
    control = judge_controls(cohort)
    if (control == "yes").any() and (control == "no").any() and "diagnosis" in cohort:
        known, others = (count_diagnoses(cohort[control == verdict]) for verdict in ("yes", "no"))
        said.append(
            f"Controls are those with the diagnosis {known}; the others ({others}) take no part in bias "
            "correction and site offset. Where that is wrong, set control_words in notebook 01."
        )
    stores = {one.run.settings.get("fingerprint") for one in found.values()} - {None, ""}
    tests = {name: frozenset(one.test["scan_id"]) for name, one in found.items()}
    said += [
        len(stores) > 1
        and "The runs were trained on differently preprocessed volumes; differences between them may come "
        "from that.",
        len(set(tests.values())) > 1
        and "The runs were tested on different scans; compare them only by the paired differences below.",
    ]
    dealt = set(dealt.loc[dealt["split"] == "test", "scan_id"])
    said += [
        f"{name}: {len(lost)} of {len(dealt)} test scans have no prediction and are in no figure."
        for name, scans in tests.items()
        if (lost := dealt - scans)
    ]
    return said + (_of_cleaning(ws.read("cleaning.csv"), found) if ws.path("cleaning.csv").exists() else [])


def _of_cleaning(cleaning: pd.DataFrame, found: dict[str, RunEvaluation]) -> list[str | bool]:
    kept = cleaning["kept"].astype(str).str.lower().isin(["true", "1"])
    said = [
        kept.mean() < 0.8
        and f"Cleaning dropped {1 - kept.mean():.0%} of the scans; the figures hold for what was kept."
    ]
    if "sha256" not in cleaning:
        return said
    pictures = cleaning.loc[cleaning["sha256"].fillna("") != "", ["scan_id", "sha256"]]
    for name, one in found.items():
        splits = one.rows.merge(pictures, on="scan_id").groupby("sha256")["split"].nunique()
        said.append(
            (splits > 1).any()
            and f"{name}: {(splits > 1).sum()} identical image files lie in more than one split under "
            "different names; the test figures are too good until they are removed."
        )
    return said
