"""A trained model applied to the scans of another workspace: predictions in, an external evaluation out.

Refuses people and files the model was trained on. Trains and calibrates nothing by itself.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from brainage_nb.cohort.rules import judge_controls
from brainage_nb.evaluation.external import ExternalEvaluation, evaluate_external, refuse_trained_on
from brainage_nb.models.bundles.prediction import KINDS, Prediction
from brainage_nb.volumes.scans import SCAN_FLAGS
from brainage_nb.workspace import Workspace, open_workspace

if TYPE_CHECKING:
    from brainage_nb.models.bundle import Bundle

ABOUT = ("scan_id", "subject_id", "session_id", "age", "sex", "site", "diagnosis", "control")


def named_subjects(text: str) -> list[str]:
    """Subject ids from a text with commas, or from a file with one id a line."""
    if text and Path(text).is_file():
        return [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [name.strip() for name in text.split(",") if name.strip()]


def apply_elsewhere(
    bundle: Bundle,
    workspace: str | Path,
    *,
    calibrate_on: Collection[str] = (),
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> ExternalEvaluation:
    """Predict every kept scan of another workspace and evaluate it as an external cohort.

    Parameters
    ----------
    bundle : Bundle
        The trained model.
    workspace : path
        A workspace in which notebooks 01 and 02 have run; nothing is written there.
    calibrate_on : subject ids
        Controls that may calibrate; reported apart from the rest. Empty: no calibration.

    Raises
    ------
    TrainedOnThem
        The model was trained on one of these subjects or files.
    """
    ws = open_workspace(workspace)
    scans = kept_scans(ws)
    files = [ws.resolve(image) for image in scans["image"]]
    subjects = scans["subject_id"].drop_duplicates().tolist()
    refuse_trained_on(subjects, bundle.trained_on(subjects), "subjects")
    refuse_trained_on([file.name for file in files], bundle.trained_on_files(files), "image files")
    predicted, notes = _predicted(bundle, scans, files)
    training = bundle.manifest["training"]
    found = evaluate_external(
        predicted,
        reference_age=training["age_mean"],
        trained_ages=(training["age_low"], training["age_high"]),
        calibrate_on=calibrate_on,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
    found.warnings += notes
    return found


def kept_scans(ws: Workspace) -> pd.DataFrame:
    """The scans of a workspace that cleaning kept, with all that `cohort.csv` knows of them."""
    cohort, cleaning = ws.read("cohort.csv"), ws.read("cleaning.csv")
    cohort["control"] = judge_controls(cohort)
    return cohort[cohort["scan_id"].isin(cleaning.loc[cleaning["kept"], "scan_id"])].reset_index(drop=True)


def _predicted(bundle: Bundle, scans: pd.DataFrame, files: list[Path]) -> tuple[pd.DataFrame, list[str]]:
    """Rows with `predicted_age` of the scans that have one; a sentence a failure and a kind of warning."""
    results = list(bundle.predict_many(files))
    found = [isinstance(result, Prediction) for result in results]
    predictions = [result for result in results if isinstance(result, Prediction)]
    rows = scans.loc[found, [name for name in ABOUT if name in scans]]
    notes = [f"{lost.scan}: no prediction. {lost.sentence}" for lost in results if lost not in predictions]
    said = pd.Series([caution.code for one in predictions for caution in one.warnings], dtype=str)
    meaning = SCAN_FLAGS | KINDS
    notes += [
        f"{n} of {len(results)} scans: {meaning.get(code, 'warning')} (`{code}`)."
        for code, n in said.value_counts().items()
    ]
    return rows.assign(predicted_age=[one.predicted_age for one in predictions]), notes
