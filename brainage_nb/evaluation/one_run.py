"""One training run, evaluated: raw figures, correction, intervals, groups and known answers. Writes
nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation.groups import diagnosis_differences
from brainage_nb.evaluation.intervals import LEVEL, Calibration, calibrate, conformal_quantile, coverage
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
    calibration : Calibration
        Bias correction and prediction interval, as the run's bundle has them.
    corrected : dict
        split -> figures of the age-free corrected prediction. Kept apart from `metrics`.
    bias : DataFrame
        Slope and gap-age r before and after, on calibration and test scans.
    coverage : DataFrame
        Of that interval on test, by age bin.
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
    calibration: Calibration
    corrected: dict[str, dict[str, Any]] = field(default_factory=dict)
    bias: pd.DataFrame = field(default_factory=pd.DataFrame)
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
    level: float = LEVEL,
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
    found = RunEvaluation(run, _metrics_of(run, run.predictions, bootstrap), calibrate(run, level))
    found.rows = run.predictions.assign(gap=run.predictions["predicted_age"] - run.predictions["age"])
    _correct(found, bootstrap)
    _add_intervals(found)
    test = found.rows[found.rows["split"] == "test"]
    tables = [
        metrics_by_group(test, by, reference_age=run.reference_age, **bootstrap)
        for by in GROUPINGS
        if _has(test, by)
    ]
    found.groups = pd.concat(tables, ignore_index=True)
    fair_gap = "adjusted_gap" if found.calibration.corrector else "gap"
    if _has(test, "diagnosis"):
        found.diagnosis = diagnosis_differences(test, fair_gap, controls)
    if truth is not None and len(known := with_truth(test, truth)) > 2:
        found.planted = known
        found.known = _known_answers(known, truth, bootstrap)
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
    rows, corrector = found.rows, found.calibration.corrector
    rows["corrected_age"], rows["corrected_gap"], rows["adjusted_gap"] = np.nan, np.nan, np.nan
    if corrector is None:
        return
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


def _add_intervals(found: RunEvaluation) -> None:
    rows, interval = found.rows, found.calibration.interval
    rows["low"], rows["high"] = -np.inf, np.inf
    if interval is not None:
        rows["low"], rows["high"] = interval.predict(rows["predicted_age"])
    test = rows[rows["split"] == "test"]
    found.coverage = coverage(test["age"], test["low"], test["high"])
    found.curve = _calibration_curve(found.run.calibration_rows(controls_only=False), test)


def _calibration_curve(cal: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    if not len(cal):
        return pd.DataFrame()
    error = np.abs(cal["predicted_age"] - cal["age"]).to_numpy()
    half = np.array([conformal_quantile(error, level) for level in LEVELS])
    inside = np.abs(test["gap"].to_numpy()) <= half[:, None]
    return pd.DataFrame({"level": LEVELS, "coverage": inside.mean(axis=1), "n": len(test)})


def _known_answers(known: pd.DataFrame, truth: pd.DataFrame, bootstrap: dict[str, int]) -> dict[str, Any]:
    kinds = {kind: column for kind, column in RECOVERED_KINDS.items() if known[column].notna().all()}
    ours = mean_with_interval(known["gap"].abs(), known["subject_id"].to_numpy(), **bootstrap)
    return {
        "mae": {"ours": ours} | reference_errors(known, **bootstrap),
        "mae_whole_cohort": reference_errors(truth, **bootstrap),
        "recovered": recovered_gap(known, kinds, **bootstrap).to_dict("records"),
    }


def _has(rows: pd.DataFrame, by: str) -> bool:
    return by == "age_bin" or (by in rows and bool((rows[by].fillna("").astype(str) != "").any()))
