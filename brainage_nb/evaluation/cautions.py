"""What a reader of an evaluation must be told first, in sentences. Judges figures; reports none of its
own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd

from brainage_nb.cohort.rules import count_diagnoses, judge_controls
from brainage_nb.cohort.splits import SPLITS
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
    found: dict[str, RunEvaluation], comparisons: pd.DataFrame, ws: Workspace, *, is_test_object: bool
) -> list[str]:
    """Warnings of a whole evaluation, gravest first."""
    sentences, splits = [TEST_OBJECT] if is_test_object else [], ws.read("splits.csv")
    cleaning = ws.read("cleaning.csv") if ws.path("cleaning.csv").exists() else None
    with_mean = comparisons[comparisons["b"] == "mean predictor"].set_index("a")
    for name, one in found.items():
        own = [_of_figures(one, with_mean.loc[name]), _of_calibration(one), _of_missing(one, splits)]
        own += [_of_twins(one, cleaning)]
        sentences += [f"{name}: {text}" for texts in own for text in texts if text]
    return sentences + [text for text in _of_workspace(found, ws.read("cohort.csv"), cleaning) if text]


def _of_figures(one: RunEvaluation, difference: pd.Series) -> list[str | bool]:
    """Sentences, and something false in place of each that does not hold."""
    test, bias = one.metrics["test"], one.metrics["test"]["gap_age_r"]
    chosen_on_val = one.run.settings.get("settings", {}).get("keep", "best") == "best"
    return [
        not difference["high"] < 0
        and "not shown to be better than predicting the mean training age for everyone (MAE difference in "
        f"years, with its 95 % interval where there is one: {with_interval(difference)}).",
        test["n_subjects"] < FEW_TEST_SUBJECTS
        and f"only {test['n_subjects']} test subjects, so every figure is uncertain; read the intervals.",
        (bias["high"] < 0 or bias["low"] > 0)
        and f"the raw gap depends on age (r {with_interval(bias)} on test): do not compare raw gaps between "
        "people or groups of different age.",
        (not one.run.folds and "val_mae" in one.run.history and chosen_on_val)
        and "validation figures are a little too good, since the best epoch was chosen on them; quote test.",
    ]


def _of_calibration(one: RunEvaluation) -> Iterator[str]:
    """Of correction and interval; coverage is doubted where chance in calibration and test scans does not
    explain it (beta-binomial, 2.5 %)."""
    from scipy import stats

    corrector, interval = one.calibration.corrector, one.calibration.interval
    yield corrector.support_ if corrector else f"no age-bias correction. {one.calibration.refused}"
    if interval is None:
        yield "no validation or out-of-fold predictions, so there are no prediction intervals."
        return
    yield interval.support_
    row, n, level = one.coverage.iloc[0], interval.n_calibration_, interval.level
    k, inside = conformal_rank(n, level), round(row["coverage"] * row["n"])
    if k <= n and stats.betabinom.cdf(inside, row["n"], k, n + 1 - k) < 0.025:
        yield (
            f"prediction intervals hold {row['coverage']:.0%} of the test ages [{row['coverage_low']:.0%}, "
            f"{row['coverage_high']:.0%}], fewer than the {level:.0%} they promise and than chance explains: "
            "calibration and test subjects differ."
        )


def _of_missing(one: RunEvaluation, splits: pd.DataFrame) -> Iterator[str]:
    for split in SPLITS:
        dealt = splits.loc[splits["split"] == split, "scan_id"]
        if n := int((~dealt.isin(one.rows["scan_id"])).sum()):
            yield f"{n} of {len(dealt)} {split} scans have no prediction and are in no figure."


def _of_twins(one: RunEvaluation, cleaning: pd.DataFrame | None) -> Iterator[str]:
    if cleaning is None or "sha256" not in cleaning:
        return
    pictures = cleaning.loc[cleaning["sha256"].fillna("") != "", ["scan_id", "sha256"]]
    splits = one.rows.merge(pictures, on="scan_id").groupby("sha256")["split"].nunique()
    if (splits > 1).any():
        yield (
            f"{(splits > 1).sum()} identical image files lie in more than one split under different names; "
            "the test figures are too good until they are removed."
        )


def _of_workspace(
    found: dict[str, RunEvaluation], cohort: pd.DataFrame, cleaning: pd.DataFrame | None
) -> Iterator[str]:
    control = judge_controls(cohort)
    if {"yes", "no"} <= set(control) and "diagnosis" in cohort:
        known, others = (count_diagnoses(cohort[control == verdict]) for verdict in ("yes", "no"))
        yield (
            f"Controls are those with the diagnosis {known}; the others ({others}) take no part in bias "
            "correction and site offset. Where that is wrong, set control_words in notebook 01."
        )
    if len({one.run.settings.get("fingerprint") for one in found.values()} - {None, ""}) > 1:
        yield (
            "The runs were trained on differently preprocessed volumes; differences between them may come "
            "from that."
        )
    if len({frozenset(one.test["scan_id"]) for one in found.values()}) > 1:
        yield "The runs were tested on different scans; compare them only by the paired differences below."
    kept = True if cleaning is None else cleaning["kept"].astype(str).str.lower().isin(["true", "1"]).mean()
    if kept < 0.8:
        yield f"Cleaning dropped {1 - kept:.0%} of the scans; the figures hold for what was kept."
