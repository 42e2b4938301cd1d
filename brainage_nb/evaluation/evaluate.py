"""All runs of a workspace, evaluated and compared; `results` is what `results.json` holds.

Computes; draws and writes nothing (see `report`). Raw figures are never replaced by corrected ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation.cautions import cautions
from brainage_nb.evaluation.external import ExternalEvaluation
from brainage_nb.evaluation.intervals import LEVEL
from brainage_nb.evaluation.known_answers import read_truth
from brainage_nb.evaluation.metrics import paired_difference, with_interval
from brainage_nb.evaluation.one_run import RunEvaluation, evaluate_run
from brainage_nb.evaluation.runs import list_runs, read_run
from brainage_nb.workspace import MissingInput, Workspace, open_workspace


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
