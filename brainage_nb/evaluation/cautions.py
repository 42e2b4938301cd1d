"""What a reader of an evaluation must be told first, in sentences. Judges figures; reports none of its
own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainage_nb.cohort.rules import count_diagnoses, judge_controls
from brainage_nb.evaluation.metrics import with_interval
from brainage_nb.workspace import Workspace

if TYPE_CHECKING:
    from brainage_nb.evaluation.runs import RunEvaluation

FEW_TEST_SUBJECTS = 30
TEST_OBJECT = (
    "These scans are a known-answer cohort: heads built by rule, with planted ageing. It is a test object; "
    "no figure on this page says how accurate a model is on people."
)


def cautions(
    found: dict[str, RunEvaluation],
    comparisons: pd.DataFrame,
    ws: Workspace,
    *,
    is_test_object: bool,
) -> list[str]:
    """Warnings of a whole evaluation, gravest first."""
    sentences = [TEST_OBJECT] if is_test_object else []
    for name, one in found.items():
        sentences += [f"{name}: {text}" for text in _of_run(one, comparisons[comparisons["a"] == name])]
    return sentences + _of_workspace(found, ws)


def _of_run(one: RunEvaluation, comparisons: pd.DataFrame) -> list[str]:
    test = one.metrics["test"]
    said = []
    against_mean = comparisons[comparisons["b"] == "mean predictor"].iloc[0]
    if not against_mean["high"] < 0:
        said.append(
            "not shown to be better than predicting the mean training age for everyone (MAE difference in "
            f"years, with its 95 % interval where there is one: {with_interval(against_mean)})."
        )
    if test["n_subjects"] < FEW_TEST_SUBJECTS:
        said.append(
            f"only {test['n_subjects']} test subjects, so every figure is uncertain; read the intervals."
        )
    if one.calibration.refused:
        said.append(f"no age-bias correction. {one.calibration.refused}")
    elif one.calibration.corrector.support_:
        said.append(one.calibration.corrector.support_)
    bias = test["gap_age_r"]
    if np.isfinite(bias["low"]) and (bias["high"] < 0 or bias["low"] > 0):
        said.append(
            f"the raw gap depends on age (r {bias['value']:.2f} [{bias['low']:.2f}, {bias['high']:.2f}] on "
            "test): do not compare raw gaps between people or groups of different age."
        )
    interval = one.calibration.interval
    if interval is None:
        said.append("no validation or out-of-fold predictions, so there are no prediction intervals.")
    else:
        said += [text for text in (interval.support_, _of_coverage(one)) if text]
    kept = one.run.settings.get("settings", {}).get("keep", "best")
    if not one.run.folds and "val_mae" in one.run.history and kept == "best":
        said.append(
            "validation figures are a little too good, since the best epoch was chosen on them; quote test."
        )
    return said


def _of_coverage(one: RunEvaluation) -> str:
    """A sentence where test coverage is lower than chance in calibration and test scans explains
    (beta-binomial, 2.5 %)."""
    from scipy import stats

    row = one.coverage[one.coverage["group"] == "all"].iloc[0]
    n, level = one.calibration.interval.n_calibration_, one.calibration.interval.level
    k = int(np.ceil((n + 1) * level - 1e-9))
    inside = round(row["coverage"] * row["n"])
    if k > n or stats.betabinom.cdf(inside, row["n"], k, n + 1 - k) >= 0.025:
        return ""
    return (
        f"prediction intervals hold {row['coverage']:.0%} of the test ages [{row['coverage_low']:.0%}, "
        f"{row['coverage_high']:.0%}], fewer than the {level:.0%} they promise and than chance explains: "
        "calibration and test subjects differ."
    )


def _of_workspace(found: dict[str, RunEvaluation], ws: Workspace) -> list[str]:
    cohort = ws.read("cohort.csv")
    control, said = judge_controls(cohort), []
    if (control == "yes").any() and (control == "no").any() and "diagnosis" in cohort:
        known, others = (count_diagnoses(cohort[control == verdict]) for verdict in ("yes", "no"))
        said.append(
            f"Controls are those with the diagnosis {known}; the others ({others}) take no part in bias "
            "correction and site offset. Where that is wrong, set control_words in notebook 01."
        )
    stores = {name: one.run.settings.get("fingerprint") for name, one in found.items()}
    if len({str(value) for value in stores.values() if value}) > 1:
        said.append(
            "The runs were trained on differently preprocessed volumes; differences between them may come "
            "from that."
        )
    tests = {frozenset(one.run.part("test")["scan_id"]) for one in found.values()}
    if len(tests) > 1:
        said.append(
            "The runs were tested on different scans; compare them only by the paired differences below."
        )
    dealt = ws.read("splits.csv")
    dealt = set(dealt.loc[dealt["split"] == "test", "scan_id"])
    for name, one in found.items():
        if lost := dealt - set(one.run.part("test")["scan_id"]):
            said.append(
                f"{name}: {len(lost)} of {len(dealt)} test scans have no prediction and are in no figure."
            )
    if ws.path("cleaning.csv").exists():
        said += _of_cleaning(ws.read("cleaning.csv"), found)
    return said


def _of_cleaning(cleaning: pd.DataFrame, found: dict[str, RunEvaluation]) -> list[str]:
    said = []
    kept = cleaning["kept"].astype(str).str.lower().isin(["true", "1"])
    if len(cleaning) and (share := 1 - kept.mean()) > 0.2:
        said.append(f"Cleaning dropped {share:.0%} of the scans; the figures hold for what was kept.")
    if "sha256" not in cleaning:
        return said
    for name, one in found.items():
        rows = one.run.predictions.merge(cleaning[["scan_id", "sha256"]], on="scan_id").dropna(
            subset=["sha256"]
        )
        splits = rows[rows["sha256"] != ""].groupby("sha256")["split"].nunique()
        if (splits > 1).any():
            said.append(
                f"{name}: {int((splits > 1).sum())} identical image files lie in more than one split under "
                "different names; the test figures are too good until they are removed."
            )
    return said
