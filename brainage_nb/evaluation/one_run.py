"""One training run, evaluated: raw figures, correction, intervals, groups and known answers. Writes
nothing."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation import intervals as conformal
from brainage_nb.evaluation.bias import AgeBiasCorrector, CorrectionRefused
from brainage_nb.evaluation.groups import diagnosis_differences
from brainage_nb.evaluation.known_answers import (
    recovered_gap,
    reference_errors,
    two_session_reliability,
    with_truth,
)
from brainage_nb.evaluation.metrics import mean_with_interval, metrics_by_group, regression_metrics
from brainage_nb.evaluation.runs import InconsistentRun, Run

GROUPINGS = ("age_bin", "sex", "site", "diagnosis")
LEVELS = np.round(np.arange(0.1, 1.0, 0.1), 2)
RECOVERED_KINDS = {
    "raw gap": "gap",
    "gap of the age-free corrected prediction": "corrected_gap",
    "gap adjusted by true age": "adjusted_gap",
}


@dataclass
class RunEvaluation:
    """What was found for one run.

    Attributes
    ----------
    run : Run
    metrics : dict
        split -> raw figures (`regression_metrics`).
    corrector : AgeBiasCorrector or None
        None where the correction was refused; `refused` then says why.
    corrected : dict
        split -> figures of the age-free corrected prediction. Kept apart from `metrics`.
    bias : DataFrame
        Slope and gap-age r before and after, on calibration and test scans.
    intervals : dict
        `plain`, `scaled` -> fitted ConformalInterval.
    coverage : DataFrame
        On test, by form and age bin.
    curve : DataFrame
        Promised against observed share over many levels, on test.
    rows : DataFrame
        Headline rows with gaps, corrected prediction, adjusted gap and interval ends.
    groups, diagnosis : DataFrame
        Test figures by age bin, sex, site and diagnosis; gap differences between diagnoses (empty without
        them).
    known : dict
        Known-answer checks; empty where no truth was planted. `planted` holds the test rows behind them.
    reliability : dict or None
        Two-session reliability of the gap.
    """

    run: Run
    metrics: dict[str, dict[str, Any]]
    corrector: AgeBiasCorrector | None = None
    refused: str = ""
    corrected: dict[str, dict[str, Any]] = field(default_factory=dict)
    bias: pd.DataFrame = field(default_factory=pd.DataFrame)
    intervals: dict[str, conformal.ConformalInterval] = field(default_factory=dict)
    coverage: pd.DataFrame = field(default_factory=pd.DataFrame)
    curve: pd.DataFrame = field(default_factory=pd.DataFrame)
    rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    groups: pd.DataFrame = field(default_factory=pd.DataFrame)
    diagnosis: pd.DataFrame = field(default_factory=pd.DataFrame)
    known: dict[str, Any] = field(default_factory=dict)
    planted: pd.DataFrame = field(default_factory=pd.DataFrame)
    reliability: dict[str, Any] | None = None


def evaluate_run(
    run: Run,
    *,
    level: float = conformal.LEVEL,
    truth: pd.DataFrame | None = None,
    controls: str | None = None,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> RunEvaluation:
    """Evaluate one run; see `evaluate_runs` for the parameters."""
    if not len(run.part("test")):
        raise InconsistentRun(
            f"{run.name} has no test predictions, so there is nothing to evaluate honestly."
        )
    bootstrap = {"n_bootstrap": n_bootstrap, "seed": seed}
    found = RunEvaluation(run=run, metrics=_metrics_of(run, run.predictions, bootstrap))
    found.rows = run.predictions.assign(gap=run.predictions["predicted_age"] - run.predictions["age"])
    _correct(found, bootstrap)
    _add_intervals(found, level)
    test = found.rows[found.rows["split"] == "test"]
    tables = [
        metrics_by_group(test, by, reference_age=run.reference_age, **bootstrap)
        for by in GROUPINGS
        if _has(test, by)
    ]
    found.groups = pd.concat(tables, ignore_index=True)
    fair_gap = "adjusted_gap" if found.corrector else "gap"
    if _has(test, "diagnosis"):
        found.diagnosis = diagnosis_differences(test, fair_gap, controls)
    if truth is not None and len(known := with_truth(test, truth)) > 2:
        found.planted = known
        found.known = _known_answers(known, truth, found, bootstrap)
    found.reliability = two_session_reliability(test, column=fair_gap, **bootstrap)
    return found


def _metrics_of(run: Run, rows: pd.DataFrame, bootstrap: dict[str, int]) -> dict[str, dict[str, Any]]:
    figures = {}
    for split in run.splits():
        part = rows.loc[run.part(split).index]
        figures[split] = regression_metrics(
            part["age"],
            part["predicted_age"],
            part["subject_id"].to_numpy(),
            reference_age=run.reference_age,
            **bootstrap,
        )
    return figures


def _correct(found: RunEvaluation, bootstrap: dict[str, int]) -> None:
    rows, cal = found.rows, found.run.calibration_rows()
    rows["corrected_age"], rows["corrected_gap"], rows["adjusted_gap"] = np.nan, np.nan, np.nan
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `support_` goes into the report's warnings instead
            corrector = AgeBiasCorrector().fit(
                cal["predicted_age"], cal["age"], cal["split"], subject_id=cal["subject_id"].to_numpy()
            )
    except CorrectionRefused as refused:
        found.refused = str(refused)
        return
    found.corrector = corrector
    rows["corrected_age"] = corrector.transform(rows["predicted_age"])
    rows["corrected_gap"] = rows["corrected_age"] - rows["age"]
    rows["adjusted_gap"] = corrector.adjust_gap(rows["predicted_age"], rows["age"])
    found.corrected = _metrics_of(found.run, rows.assign(predicted_age=rows["corrected_age"]), bootstrap)
    test = found.run.part("test")
    fitted_on = "out-of-fold" if found.run.folds else "validation"
    found.bias = pd.concat(
        {
            f"{fitted_on} (fitted on)": corrector.before_after_,
            "test": corrector.summary(test["predicted_age"], test["age"]),
        },
        names=["split", "kind"],
    ).reset_index()


def _add_intervals(found: RunEvaluation, level: float) -> None:
    cal, rows = found.run.calibration_rows(controls_only=False), found.rows
    test = rows["split"] == "test"
    tables = []
    for form in ("plain", "scaled"):
        interval = conformal.ConformalInterval(level, scaled=form == "scaled")
        if len(cal):
            interval.fit(cal["predicted_age"], cal["age"], cal["split"])
            found.intervals[form] = interval
            low, high = interval.predict(rows["predicted_age"])
        else:
            low, high = np.full(len(rows), -np.inf), np.full(len(rows), np.inf)
        rows[f"{form}_low"], rows[f"{form}_high"] = low, high
        if form == "plain" and (members := _fold_members(found.run, cal)) is not None:
            low, high = conformal.cv_plus_interval(*members, level)
            rows.loc[test, "plain_low"], rows.loc[test, "plain_high"] = low, high
        part = rows[test]
        tables.append(
            conformal.coverage(part["age"], part[f"{form}_low"], part[f"{form}_high"]).assign(form=form)
        )
    found.coverage = pd.concat(tables, ignore_index=True)
    found.curve = _calibration_curve(cal, rows[test])


def _fold_members(run: Run, cal: pd.DataFrame) -> tuple[np.ndarray, ...] | None:
    """(test predictions by fold, out-of-fold predictions, ages, folds) where every fold model predicted every
    test scan."""
    if not run.folds:
        return None
    test = run.members[(run.members["split"] == "test") & (run.members["fold"] >= 0)]
    table = test.pivot_table(index="scan_id", columns="fold", values="predicted_age", aggfunc="mean")
    table = table.reindex(run.part("test")["scan_id"])
    if table.isna().any(axis=None) or not set(cal["fold"]) <= set(table.columns):
        return None
    fold = np.searchsorted(table.columns.to_numpy(), cal["fold"].to_numpy())
    return table.to_numpy(), cal["predicted_age"].to_numpy(), cal["age"].to_numpy(), fold


def _calibration_curve(cal: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    if not len(cal):
        return pd.DataFrame()
    error = np.abs(cal["predicted_age"] - cal["age"]).to_numpy()
    half = np.array([conformal.conformal_quantile(error, level) for level in LEVELS])
    inside = np.abs(test["gap"].to_numpy()) <= half[:, None]
    return pd.DataFrame({"level": LEVELS, "coverage": inside.mean(axis=1), "n": len(test)})


def _known_answers(
    known: pd.DataFrame, truth: pd.DataFrame, found: RunEvaluation, bootstrap: dict[str, int]
) -> dict[str, Any]:
    kinds = {kind: column for kind, column in RECOVERED_KINDS.items() if known[column].notna().all()}
    not_test = found.rows["split"] != "test"
    training = with_truth(found.rows[not_test], truth)
    ours = mean_with_interval(known["gap"].abs(), known["subject_id"].to_numpy(), **bootstrap)
    errors = reference_errors(known, training, **bootstrap)
    return {
        "mae": {"ours": ours} | errors,
        "recovered": recovered_gap(known, kinds, **bootstrap).to_dict("records"),
    }


def _has(rows: pd.DataFrame, by: str) -> bool:
    return by == "age_bin" or (by in rows and bool((rows[by].fillna("").astype(str) != "").any()))
