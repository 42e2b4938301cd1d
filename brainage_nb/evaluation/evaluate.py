"""All runs of a workspace evaluated and compared: raw figures, correction, interval, groups, known answers.
Computes; draws and writes nothing (see `report`). Raw figures are never replaced by corrected ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.rules import judge_controls
from brainage_nb.evaluation.cautions import find_cautions
from brainage_nb.evaluation.correction import (
    HELD_OUT,
    LEVEL,
    OUT_OF_FOLD,
    AgeBiasCorrector,
    Calibration,
    ConformalInterval,
    CorrectionRefused,
    EvaluationError,
    coverage,
)
from brainage_nb.evaluation.external import ExternalEvaluation
from brainage_nb.evaluation.metrics import (
    Metrics,
    flat,
    measure_rows,
    metrics_by_group,
    paired_difference,
    text_table,
    titled,
)
from brainage_nb.evaluation.runs import (
    Run,
    RunEvaluation,
    add_truth,
    check_known_answers,
    list_runs,
    read_run,
    read_truth,
)
from brainage_nb.workspace import MissingInput, Workspace, open_workspace

FEWEST = 3  # subjects a diagnosis needs to be compared at all
CONTROLS = "(controls)"  # all of them together, however their diagnosis is written
GROUPINGS = ("age_bin", "sex", "site", "diagnosis")
HEADLINE = ("mae", "mean_predictor_mae", "rmse", "r", "r2", "slope", "gap_age_r")


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
    warnings: list[str]
    parameters: dict[str, Any]
    external: dict[str, ExternalEvaluation] = field(default_factory=dict)

    @property
    def predictions(self) -> pd.DataFrame:
        """All runs' headline rows; `predicted_age` is raw."""
        rows = pd.concat({name: found.rows for name, found in self.runs.items()}, names=["run", None])
        return rows.reset_index(level="run").reset_index(drop=True)

    @property
    def results(self) -> dict[str, Any]:
        """{run: {split: {metric: {"value", "low", "high"}}}}; keys that start with `_` hold what is not a raw
        figure."""
        each = self.runs.items()
        tables = {
            f"_{table}": {name: getattr(found, table).to_dict("records") for name, found in each}
            for table in ("coverage", "groups", "diagnosis")
        }
        return {
            **{name: found.metrics for name, found in each},
            "_age_free_corrected": {
                name: found.corrected or {"refused": found.calibration.refused} for name, found in each
            },
            "_calibration": {name: found.calibration.to_dict() for name, found in each},
            **tables,
            "_known_answers": {name: found.known for name, found in each if found.known},
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
    EvaluationError
        A run contradicts the cohort.

    Examples
    --------
    >>> evaluation = evaluate_runs("workspace", "resnet18,vgg16_svr")
    >>> headline_table(evaluation.results)
    """
    ws = workspace if isinstance(workspace, Workspace) else open_workspace(workspace)
    names = [name.strip() for name in runs.split(",")] if isinstance(runs, str) else list(runs)
    names = [name for name in names if name] or list_runs(ws)
    if not names:
        raise MissingInput(f"No run in {ws.path('runs')} has predictions. Run notebook 04 or 05 first.")
    planted, bootstrap = read_truth(ws, truth), {"n_bootstrap": n_bootstrap, "seed": seed}
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
        warnings=find_cautions(found, comparisons, ws, is_test_object=is_test_object),
        parameters={"runs": names, "level": level} | bootstrap,
    )


def evaluate_run(
    run: Run,
    *,
    level: float = LEVEL,
    truth: pd.DataFrame | None = None,
    controls: str | None = None,
    **bootstrap: int,
) -> RunEvaluation:
    """Evaluate one run; see `evaluate_runs` for the parameters."""
    if not len(run.part("test")):
        raise EvaluationError(
            f"{run.name} has no test predictions, so there is nothing to evaluate honestly."
        )
    calibration = calibrate(run, level)
    corrector, rows = calibration.corrector, _with_gaps(run, calibration)
    test = rows[rows["split"] == "test"]
    by = [name for name in GROUPINGS if name == "age_bin" or (name in test and test[name].ne("").any())]
    planted = pd.DataFrame() if truth is None else add_truth(test, truth)
    return RunEvaluation(
        run=run,
        rows=rows,
        calibration=calibration,
        metrics=_measure_splits(run, rows, "predicted_age", bootstrap),
        corrected=_measure_splits(run, rows, "corrected_age", bootstrap) if corrector else {},
        bias=_bias_before_and_after(run, corrector) if corrector else pd.DataFrame(),
        coverage=coverage(test["age"], test["low"], test["high"]),
        groups=pd.concat(
            [metrics_by_group(test, name, reference_age=run.reference_age, **bootstrap) for name in by],
            ignore_index=True,
        ),
        diagnosis=diagnosis_differences(test, "adjusted_gap" if corrector else "gap", controls),
        known=check_known_answers(planted, truth, **bootstrap),
        planted=planted,
    )


def calibrate(run: Run, level: float = LEVEL) -> Calibration:
    """Fit the bias correction on a run's calibration controls and the interval on all its calibration scans.

    Calibration scans are validation, or out-of-fold where folds were run. Test scans take no part. The one
    place where both are fitted, for the report and the bundle alike.
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
                subject_id=controls["subject_id"],
            )
    except CorrectionRefused as refused:
        reason = str(refused)
    rows = run.calibration_rows(controls_only=False)
    interval = ConformalInterval(level, OUT_OF_FOLD if run.folds else HELD_OUT)
    fitted = interval.fit(rows["predicted_age"], rows["age"], rows["split"]) if len(rows) else None
    return Calibration(corrector, reason, fitted)


def _with_gaps(run: Run, calibration: Calibration) -> pd.DataFrame:
    """Headline rows with raw, corrected and adjusted gaps and the ends of the interval."""
    corrector, interval, rows = calibration.corrector, calibration.interval, run.predictions
    predicted, age = rows["predicted_age"], rows["age"]
    low, high = interval.predict(predicted) if interval else (-np.inf, np.inf)
    corrected = corrector.transform(predicted) if corrector else np.nan
    return rows.assign(
        gap=predicted - age,
        corrected_age=corrected,
        corrected_gap=corrected - age,
        adjusted_gap=corrector.adjust_gap(predicted, age) if corrector else np.nan,
        low=low,
        high=high,
    )


def _measure_splits(
    run: Run, rows: pd.DataFrame, column: str, bootstrap: dict[str, int]
) -> dict[str, Metrics]:
    return {
        split: measure_rows(
            rows.loc[run.part(split).index], column, reference_age=run.reference_age, **bootstrap
        )
        for split in run.splits()
    }


def _bias_before_and_after(run: Run, corrector: AgeBiasCorrector) -> pd.DataFrame:
    fitted_on = f"{OUT_OF_FOLD if run.folds else HELD_OUT} (fitted on)"
    parts = {fitted_on: run.calibration_rows(), "test": run.part("test")}
    tables = {name: corrector.summary(part["predicted_age"], part["age"]) for name, part in parts.items()}
    return pd.concat(tables, names=["split", "kind"]).reset_index()


def diagnosis_differences(rows: pd.DataFrame, gap: str = "gap", controls: str | None = None) -> pd.DataFrame:
    """Mean gap of each diagnosis minus that of controls, plain and adjusted for age, sex and site.

    Ordinary least squares with standard errors that count subjects, not scans (cluster-robust, statsmodels).
    The adjusted form takes care of groups of different age, which the age bias of a model would otherwise
    turn into a gap.

    Parameters
    ----------
    rows : DataFrame
        One row per scan of test subjects: `subject_id, age, diagnosis`, the column `gap` (years) and, where
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
    rows = rows[rows["diagnosis"].fillna("") != ""] if "diagnosis" in rows else rows.iloc[:0]
    if not len(rows):
        return pd.DataFrame()
    if controls is None:
        controls = CONTROLS
        rows = rows.assign(diagnosis=rows["diagnosis"].mask(judge_controls(rows) == "yes", CONTROLS))
    elif controls not in (known := sorted(rows["diagnosis"].unique())):
        raise ValueError(f"controls = {controls!r} is not a diagnosis here; there are {known}.")
    counts = rows.groupby("diagnosis")["subject_id"].nunique()[lambda n: n >= FEWEST]
    others = counts.drop(controls, errors="ignore")
    if len(others) == len(counts) or others.empty:
        return pd.DataFrame()
    rows = rows[rows["diagnosis"].isin(counts.index)].assign(gap=rows[gap])
    covariates = ["age", *(name for name in ("sex", "site") if _varies(rows, name))]
    table = {"diagnosis": others.index, "n_subjects": others.to_numpy(), "n_controls": counts[controls]}
    table |= _differences(rows, controls, "difference", [])
    table |= _differences(rows, controls, "adjusted", covariates)
    return pd.DataFrame(table | {"adjusted_for": ", ".join(covariates)})


def _differences(
    rows: pd.DataFrame, controls: str, name: str, covariates: list[str]
) -> dict[str, np.ndarray]:
    """{name, name_low, name_high}: the difference of each other diagnosis, in alphabetical order."""
    import statsmodels.formula.api as smf

    terms = [f"C(diagnosis, Treatment({controls!r}))"]
    terms += [covariate if covariate == "age" else f"C({covariate})" for covariate in covariates]
    fitted = smf.ols(f"gap ~ {' + '.join(terms)}", rows).fit(
        cov_type="cluster", cov_kwds={"groups": pd.factorize(rows["subject_id"])[0]}, use_t=True
    )
    found = fitted.conf_int(0.05).assign(value=fitted.params).filter(like="C(diagnosis", axis=0)
    return {
        name: found["value"].to_numpy(),
        f"{name}_low": found[0].to_numpy(),
        f"{name}_high": found[1].to_numpy(),
    }


def _varies(rows: pd.DataFrame, name: str) -> bool:
    return name in rows and rows[name].fillna("").ne("").all() and len(set(rows[name])) > 1


def compare_runs(found: dict[str, RunEvaluation], **bootstrap: int) -> pd.DataFrame:
    """Paired MAE differences (years) on the test scans two runs share, and of each run with the mean
    predictor.

    Returns
    -------
    DataFrame
        Columns `a`, `b`, `value`, `low`, `high` (MAE of a minus MAE of b; negative: a is nearer), `n`,
        `n_subjects`.
    """
    tests = {name: one.test[["scan_id", "subject_id", "age", "predicted_age"]] for name, one in found.items()}
    pairs = [
        (name, "mean predictor", tests[name].assign(other=one.run.reference_age))
        for name, one in found.items()
    ]
    for a, b in combinations(found, 2):
        other = tests[b][["scan_id", "predicted_age"]].rename(columns={"predicted_age": "other"})
        pairs.append((a, b, tests[a].merge(other, on="scan_id")))
    return pd.DataFrame(
        [
            {"a": a, "b": b}
            | paired_difference(
                both["age"], both["predicted_age"], both["other"], both["subject_id"], **bootstrap
            )
            for a, b, both in pairs
            if len(both)
        ]
    )


def headline_table(results: dict[str, Any], split: str = "test") -> pd.DataFrame:
    """The raw figures of one split as text, one row per run: `7.10 [6.20, 8.00]`, each MAE beside the mean
    predictor's."""
    rows = {
        name: flat(parts[split])
        for name, parts in results.items()
        if not name.startswith("_") and split in parts
    }
    columns = {"scans": "n", "subjects": "n_subjects", **titled(*HEADLINE)}
    return text_table(rows.values(), columns).set_axis(list(rows)).rename_axis(f"run, {split}")
