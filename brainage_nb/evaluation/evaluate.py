"""Do groups of people differ in their brain-age gap? Differences with intervals, plain and adjusted.

About gaps only; how accurate a model is within a group is `metrics.metrics_by_group`.

One training run, evaluated: raw figures, correction, intervals, groups and known answers. Writes
nothing.

All runs of a workspace, evaluated and compared; `results` is what `results.json` holds.

Computes; draws and writes nothing (see `report`). Raw figures are never replaced by corrected ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.rules import judge_controls
from brainage_nb.evaluation.cautions import cautions
from brainage_nb.evaluation.correction import (
    HELD_OUT,
    LEVEL,
    OUT_OF_FOLD,
    AgeBiasCorrector,
    Calibration,
    ConformalInterval,
    CorrectionRefused,
    conformal_quantile,
    coverage,
)
from brainage_nb.evaluation.external import ExternalEvaluation
from brainage_nb.evaluation.metrics import (
    mean_with_interval,
    metrics_by_group,
    paired_difference,
    regression_metrics,
    with_interval,
)
from brainage_nb.evaluation.runs import (
    InconsistentRun,
    Run,
    RunEvaluation,
    list_runs,
    read_run,
    read_truth,
    recovered_gap,
    reference_errors,
    two_session_reliability,
    with_truth,
)
from brainage_nb.workspace import MissingInput, Workspace, open_workspace

if TYPE_CHECKING:
    from brainage_nb.evaluation.runs import Run

FEWEST = 3  # subjects a diagnosis needs to be compared at all
CONTROLS = "(controls)"  # all of them together, however their diagnosis is written


def diagnosis_differences(rows: pd.DataFrame, gap: str = "gap", controls: str | None = None) -> pd.DataFrame:
    """Mean gap of each diagnosis minus that of controls, plain and adjusted for age, sex and site.

    Ordinary least squares with standard errors that count subjects, not scans (cluster-robust, statsmodels).
    The adjusted form takes care of groups of different age, which the age bias of a model would otherwise
    turn into a gap.

    Parameters
    ----------
    rows : DataFrame
        A row a scan of test subjects: `subject_id, age, diagnosis`, the column `gap` (years) and, where
        known, `sex, site`.
    gap : str
        Column to compare.
    controls : str, optional
        The diagnosis to compare with; by default all controls (`judge_controls`), in any spelling.

    Returns
    -------
    DataFrame
        Columns `diagnosis`, `n_subjects`, `n_controls`, `difference`, `difference_low`, `difference_high`,
        `adjusted`, `adjusted_low`, `adjusted_high` (years, 95 %) and `adjusted_for`. Empty where there is
        nothing to compare.
    """
    rows = rows[rows["diagnosis"].fillna("").astype(str) != ""] if "diagnosis" in rows else rows.iloc[:0]
    if not len(rows):
        return pd.DataFrame()
    if controls is None:
        named = CONTROLS
        rows = rows.assign(diagnosis=rows["diagnosis"].mask(judge_controls(rows) == "yes", CONTROLS))
    else:
        named = _checked_name(rows, controls)
    counts = rows.groupby("diagnosis")["subject_id"].nunique()
    others = [name for name in counts.index if name != named and counts[name] >= FEWEST]
    if counts.get(named, 0) < FEWEST or not others:
        return pd.DataFrame()
    rows = rows[rows["diagnosis"].isin([named, *others])].reset_index(drop=True)
    covariates = ["age", *(name for name in ("sex", "site") if _varies(rows, name))]
    plain = _differences(rows, gap, named, others, [])
    adjusted = _differences(rows, gap, named, others, covariates)
    return pd.DataFrame(
        {
            "diagnosis": others,
            "n_subjects": [int(counts[name]) for name in others],
            "n_controls": int(counts[named]),
            "difference": plain[:, 0],
            "difference_low": plain[:, 1],
            "difference_high": plain[:, 2],
            "adjusted": adjusted[:, 0],
            "adjusted_low": adjusted[:, 1],
            "adjusted_high": adjusted[:, 2],
            "adjusted_for": ", ".join(covariates),
        }
    )


def _checked_name(rows: pd.DataFrame, controls: str) -> str:
    if controls not in set(rows["diagnosis"]):
        known = sorted(rows["diagnosis"].unique())
        raise ValueError(f"controls = {controls!r} is not a diagnosis here; there are {known}.")
    return controls


def _varies(rows: pd.DataFrame, name: str) -> bool:
    return (
        name in rows
        and rows[name].notna().all()
        and (rows[name] != "").all()
        and len(rows[name].unique()) > 1
    )


def _differences(
    rows: pd.DataFrame, gap: str, named: str, others: list[str], covariates: list[str]
) -> np.ndarray:
    """(len(others), 3): difference, low, high in years."""
    from statsmodels.regression.linear_model import OLS

    columns = {f"is {name}": (rows["diagnosis"] == name).astype(float) for name in others}
    design = pd.DataFrame({"constant": 1.0} | columns, index=rows.index)
    for name in covariates:
        if name == "age":
            design["age"] = rows["age"] - rows["age"].mean()
        else:
            design = design.join(pd.get_dummies(rows[name], prefix=name, drop_first=True, dtype=float))
    fitted = OLS(rows[gap], design).fit(
        cov_type="cluster", cov_kwds={"groups": pd.factorize(rows["subject_id"])[0]}, use_t=True
    )
    interval = fitted.conf_int(0.05)
    return np.array([[fitted.params[f"is {name}"], *interval.loc[f"is {name}"]] for name in others])


GROUPINGS = ("age_bin", "sex", "site", "diagnosis")
LEVELS = np.round(np.arange(0.1, 1.0, 0.1), 2)
RECOVERED_KINDS = {
    "raw gap": "gap",
    "gap of the age-free corrected prediction": "corrected_gap",
    "gap adjusted by true age": "adjusted_gap",
}


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


@dataclass
class Evaluation:
    """Everything `write_report` needs; `results` is what goes into `results.json`.

    `external` is filled by whoever applied a model to another cohort: its name -> what `evaluate_external`
    found.
    """

    workspace: Workspace
    runs: dict[str, RunEvaluation]
    comparisons: pd.DataFrame
    is_test_object: bool
    level: float
    warnings: list[str]
    parameters: dict[str, Any]
    external: dict[str, ExternalEvaluation] = field(default_factory=dict)

    @property
    def predictions(self) -> pd.DataFrame:
        """All runs' headline rows; `predicted_age` is raw."""
        parts = [found.rows.assign(run=name) for name, found in self.runs.items()]
        rows = pd.concat(parts, ignore_index=True)
        return rows[["run", *(column for column in rows if column != "run")]]

    @property
    def results(self) -> dict[str, Any]:
        """{run: {split: {metric: {"value", "low", "high"}}}}; keys that start with `_` hold what is not a raw
        figure."""
        raw: dict[str, Any] = {name: found.metrics for name, found in self.runs.items()}
        each = self.runs.items()
        return raw | {
            "_age_free_corrected": {
                name: found.corrected or {"refused": found.calibration.refused} for name, found in each
            },
            "_calibration": {name: found.calibration.to_dict() for name, found in each},
            "_coverage": {name: found.coverage.to_dict("records") for name, found in each},
            "_groups": {name: found.groups.to_dict("records") for name, found in each},
            "_diagnosis": {name: found.diagnosis.to_dict("records") for name, found in each},
            "_known_answers": {name: found.known for name, found in each if found.known},
            "_reliability": {name: found.reliability for name, found in each if found.reliability},
            "_external": {name: found.summary() for name, found in self.external.items()},
            "_comparisons": self.comparisons.to_dict("records"),
            "_test_object": self.is_test_object,
            "_warnings": self.warnings,
            "_parameters": self.parameters,
        }


def evaluate_runs(
    workspace: Workspace | Path | str = "",
    runs: Sequence[str] | str = (),
    *,
    truth: str | Path = "",
    controls: str | None = None,
    level: float = LEVEL,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """Evaluate training runs of a workspace.

    Parameters
    ----------
    workspace : Workspace or path
    runs : names, or one string with commas
        By default every run that has predictions.
    truth : path, optional
        `truth.csv` of the known-answer cohort; looked for in the workspace where not given.
    controls : str, optional
        The diagnosis to compare others with.
    level : float
        Share of people whose age the prediction interval should hold.
    n_bootstrap, seed : int
        Of the subject bootstrap.

    Raises
    ------
    MissingInput
        A file is missing; the message names the notebook that makes it.
    InconsistentRun
        A run contradicts the cohort.
    """
    ws = workspace if isinstance(workspace, Workspace) else open_workspace(workspace)
    names = (
        [name.strip() for name in runs.split(",") if name.strip()] if isinstance(runs, str) else list(runs)
    )
    names = names or list_runs(ws)
    if not names:
        raise MissingInput(f"No run in {ws.path('runs')} has predictions. Run notebook 04 or 05 first.")
    planted = read_truth(ws, truth)
    bootstrap = {"n_bootstrap": n_bootstrap, "seed": seed}
    found = {
        name: evaluate_run(read_run(ws, name), level=level, truth=planted, controls=controls, **bootstrap)
        for name in names
    }
    sources = ws.read("cohort.csv").get("source", pd.Series(dtype=str))
    is_test_object = planted is not None or bool((sources == "demo").any())
    comparisons = compare_runs(found, **bootstrap)
    return Evaluation(
        workspace=ws,
        runs=found,
        comparisons=comparisons,
        is_test_object=is_test_object,
        level=level,
        warnings=cautions(found, comparisons, ws, is_test_object=is_test_object),
        parameters={"runs": names, "level": level} | bootstrap,
    )


def compare_runs(found: dict[str, RunEvaluation], *, n_bootstrap: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Paired MAE differences (years) on the test scans two runs share, and of each run with the mean
    predictor.

    Returns
    -------
    DataFrame
        Columns `a`, `b`, `value`, `low`, `high` (MAE of a minus MAE of b; negative: a is nearer), `n`,
        `n_subjects`.
    """
    bootstrap = {"n_bootstrap": n_bootstrap, "seed": seed}
    rows = []
    for name, one in found.items():
        test = one.run.part("test")
        constant = np.full(len(test), one.run.reference_age)
        difference = paired_difference(
            test["age"], test["predicted_age"], constant, test["subject_id"], **bootstrap
        )
        rows.append({"a": name, "b": "mean predictor"} | difference)
    for a, b in combinations(found, 2):
        shared = (
            found[a]
            .run.part("test")
            .merge(found[b].run.part("test")[["scan_id", "predicted_age"]], on="scan_id", suffixes=("", "_b"))
        )
        if len(shared):
            difference = paired_difference(
                shared["age"],
                shared["predicted_age"],
                shared["predicted_age_b"],
                shared["subject_id"],
                **bootstrap,
            )
            rows.append({"a": a, "b": b} | difference)
    return pd.DataFrame(rows)


def headline_table(results: dict[str, Any], split: str = "test") -> pd.DataFrame:
    """The raw figures of one split as text, a row a run: `7.10 [6.20, 8.00]`, each MAE beside the mean
    predictor's."""
    columns = {
        "mae": "MAE [years]",
        "mean_predictor_mae": "mean predictor's MAE [years]",
        "rmse": "RMSE [years]",
        "r": "r",
        "r2": "R²",
        "slope": "slope",
        "gap_age_r": "gap-age r",
    }
    runs = {
        name: parts[split] for name, parts in results.items() if not name.startswith("_") and split in parts
    }
    rows = {
        name: {"scans": figures["n"], "subjects": figures["n_subjects"]}
        | {title: with_interval(figures[key]) for key, title in columns.items()}
        for name, figures in runs.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(f"run, {split}")


def calibrate(run: Run, level: float = LEVEL) -> Calibration:
    """Fit the bias correction on a run's calibration controls and the interval on all its calibration scans.

    Calibration scans are validation, or out-of-fold where folds were run. Test scans take no part.
    """
    corrector, reason = None, ""
    try:
        controls = run.calibration_rows()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what few subjects support is kept in the fitted corrector
            corrector = AgeBiasCorrector().fit(
                controls["predicted_age"],
                controls["age"],
                controls["split"],
                subject_id=controls["subject_id"].to_numpy(),
            )
    except CorrectionRefused as refused:
        reason = str(refused)
    rows = run.calibration_rows(controls_only=False)
    interval = ConformalInterval(level, OUT_OF_FOLD if run.folds else HELD_OUT)
    fitted = interval.fit(rows["predicted_age"], rows["age"], rows["split"]) if len(rows) else None
    return Calibration(corrector, reason, fitted)
