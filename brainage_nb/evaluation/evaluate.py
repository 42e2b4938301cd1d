"""All runs of a workspace evaluated and compared: raw figures, correction, interval, groups, known answers.
Computes; draws and writes nothing (see `report`). Raw figures are never replaced by corrected ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.rules import judge_controls
from brainage_nb.evaluation import metrics
from brainage_nb.evaluation.cautions import find_cautions
from brainage_nb.evaluation.correction import LEVEL, AgeBiasCorrector, EvaluationError, coverage
from brainage_nb.evaluation.external import ExternalEvaluation
from brainage_nb.evaluation.runs import (
    Run,
    RunEvaluation,
    add_truth,
    calibrate,
    check_known_answers,
    list_runs,
    read_run,
    read_truth,
)
from brainage_nb.workspace import MissingInput, Workspace, open_workspace

FEWEST = 3  # subjects a diagnosis needs to be compared at all
CONTROLS = "(controls)"  # all of them together, however their diagnosis is written
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
        corrected = {name: found.corrected or {"refused": found.calibration.refused} for name, found in each}
        return {
            **{name: found.metrics for name, found in each},
            "_age_free_corrected": corrected,
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
    asked = runs.split(",") if isinstance(runs, str) else runs
    names = [name.strip() for name in asked if name.strip()] or list_runs(ws)
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
    corrector, rows = calibration.corrector, calibration.add_gaps(run.predictions)
    test, options = rows[rows["split"] == "test"], {"reference_age": run.reference_age} | bootstrap
    raw, corrected = (
        {name: metrics.measure_rows(rows.loc[run.part(name).index], by, **options) for name in run.splits()}
        if corrector or by == "predicted_age"
        else {}
        for by in ("predicted_age", "corrected_age")
    )
    known = [name for name in ("sex", "site", "diagnosis") if name in test and test[name].ne("").any()]
    groups = [metrics.metrics_by_group(test, name, **options) for name in ("age_bin", *known)]
    planted = pd.DataFrame() if truth is None else add_truth(test, truth)
    return RunEvaluation(
        run=run,
        rows=rows,
        calibration=calibration,
        metrics=raw,
        corrected=corrected,
        bias=_bias_before_and_after(run, corrector) if corrector else pd.DataFrame(),
        coverage=coverage(test["age"], test["low"], test["high"]),
        groups=pd.concat(groups, ignore_index=True),
        diagnosis=diagnosis_differences(test, "adjusted_gap" if corrector else "gap", controls),
        known=check_known_answers(planted, truth, **bootstrap),
        planted=planted,
    )


def _bias_before_and_after(run: Run, corrector: AgeBiasCorrector) -> pd.DataFrame:
    parts = {f"{run.calibrated_on} (fitted on)": run.calibration_rows(), "test": run.part("test")}
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
    if rows.empty:
        return pd.DataFrame()
    if controls is None:
        controls = CONTROLS
        rows = rows.assign(diagnosis=rows["diagnosis"].mask(judge_controls(rows) == "yes", CONTROLS))
    elif controls not in (known := sorted(rows["diagnosis"].unique())):
        raise ValueError(f"controls = {controls!r} is not a diagnosis here; there are {known}.")
    counts = rows.groupby("diagnosis")["subject_id"].nunique()[lambda n: n >= FEWEST]
    if controls not in counts or len(counts) < 2:
        return pd.DataFrame()
    rows = rows[rows["diagnosis"].isin(counts.index)].assign(gap=rows[gap])
    covariates = ["age", *(name for name in ("sex", "site") if _varies(rows, name))]
    table = pd.DataFrame({"n_subjects": counts.drop(controls), "n_controls": counts[controls]})
    for name, others in (("difference", []), ("adjusted", covariates)):
        table[[name, f"{name}_low", f"{name}_high"]] = _fit_differences(rows, controls, others)
    return table.assign(adjusted_for=", ".join(covariates)).reset_index()


def _fit_differences(rows: pd.DataFrame, controls: str, covariates: list[str]) -> np.ndarray:
    """Difference, low and high (years) of each other diagnosis, in alphabetical order."""
    import statsmodels.formula.api as smf

    terms = [f"C(diagnosis, Treatment({controls!r}))"]
    terms += [covariate if covariate == "age" else f"C({covariate})" for covariate in covariates]
    subjects = {"groups": pd.factorize(rows["subject_id"])[0]}
    model = smf.ols(f"gap ~ {' + '.join(terms)}", rows)
    fitted = model.fit(cov_type="cluster", cov_kwds=subjects, use_t=True)
    table = pd.concat([fitted.params, fitted.conf_int(0.05)], axis=1)
    return table.filter(like="C(diagnosis", axis=0).to_numpy()


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
    rows, pairs = [], [*((name, "mean predictor") for name in found), *combinations(found, 2)]
    for a, b in pairs:
        both = found[a].test.assign(other=found[a].run.reference_age)
        if b in found:
            other = found[b].test.set_index("scan_id")["predicted_age"]
            both = both.assign(other=both["scan_id"].map(other)).dropna(subset=["other"])
        if len(both):
            ages = (both[name] for name in ("age", "predicted_age", "other", "subject_id"))
            rows.append({"a": a, "b": b} | metrics.paired_difference(*ages, **bootstrap))
    return pd.DataFrame(rows)


def headline_table(results: dict[str, Any], split: str = "test") -> pd.DataFrame:
    """The raw figures of one split as text, one row per run: `7.10 [6.20, 8.00]`, each MAE beside the mean
    predictor's."""
    rows = {
        name: metrics.flat(parts[split])
        for name, parts in results.items()
        if not name.startswith("_") and split in parts
    }
    table = metrics.text_table(rows.values(), ("n", "n_subjects", *HEADLINE))
    return table.set_axis(list(rows)).rename_axis(f"run, {split}")
