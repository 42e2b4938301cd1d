"""What a workspace holds for evaluation: each run's headline predictions, and which rows may calibrate.

Reads; computes no figure. Stops where the files contradict each other (a subject in two splits, an age that
differs).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from brainage_nb.cohort.rules import count_diagnoses, judge_controls
from brainage_nb.evaluation.bias import CorrectionRefused
from brainage_nb.evaluation.intervals import LEVEL
from brainage_nb.evaluation.metrics import has_folds, mean_training_age
from brainage_nb.workspace import Workspace, open_workspace, read_csv, read_json

OUT_OF_FOLD = "out_of_fold"


class InconsistentRun(ValueError):
    """A run's files contradict the cohort or each other; a figure from them would mislead."""


@dataclass
class Run:
    """One training run as evaluation sees it.

    Attributes
    ----------
    name : str
    settings : dict
        `settings.json`.
    history : DataFrame
        `history.csv`; empty where the run has none.
    predictions : DataFrame
        Headline rows, one a scan: `scan_id, subject_id, session_id, split, fold, age, predicted_age` and,
        from the cohort, `control` ("yes", "no" or "") and, where known, `sex, site, diagnosis, source`.
        `fold` >= 0 on train and validation rows marks an out-of-fold prediction.
    members : DataFrame
        All rows of `predictions.csv`, with every seed, fold and variant.
    """

    name: str
    settings: dict[str, Any]
    history: pd.DataFrame
    predictions: pd.DataFrame
    members: pd.DataFrame = field(repr=False)

    @property
    def folds(self) -> bool:
        """Whether train and validation rows are out-of-fold predictions."""
        return has_folds(self.predictions)

    @property
    def reference_age(self) -> float:
        """What the mean predictor says for everybody, in years (`mean_training_age`)."""
        return mean_training_age(self.predictions)

    def part(self, split: str) -> pd.DataFrame:
        """Rows of `train`, `val` or `test`, or all out-of-fold rows (`out_of_fold`)."""
        rows = self.predictions
        if split == OUT_OF_FOLD:
            return rows[(rows["split"] != "test") & (rows["fold"] >= 0)]
        return rows[rows["split"] == split]

    def splits(self) -> list[str]:
        """Names of the parts that have rows, test last."""
        names = ["train", "val", *([OUT_OF_FOLD] if self.folds else []), "test"]
        return [name for name in names if len(self.part(name))]

    def calibration_rows(self, *, controls_only: bool = True) -> pd.DataFrame:
        """Rows that may fit the bias correction and the interval: out-of-fold where folds were run, else
        validation.

        Of controls only (see `controls_of`), or of everybody.
        """
        rows = self.part(OUT_OF_FOLD if self.folds else "val")
        return controls_of(rows) if controls_only else rows


def read_run(workspace: Workspace | Path | str, name: str) -> Run:
    """Read `runs/<name>` and check it against the cohort.

    Raises
    ------
    MissingInput
        A file is not there; the message names the notebook that makes it.
    InconsistentRun
        A subject is in two splits, or split or age differ from the workspace's tables.
    """
    ws = workspace if isinstance(workspace, Workspace) else open_workspace(workspace)
    members = read_csv(ws.need(f"runs/{name}/predictions.csv"))
    settings = read_json(ws.need(f"runs/{name}/settings.json"))
    history = ws.path("runs", name, "history.csv")
    run = Run(
        name=name,
        settings=settings,
        history=pd.read_csv(history) if history.exists() and history.stat().st_size > 1 else pd.DataFrame(),
        predictions=_with_cohort(headline_rows(members, settings.get("variant", "")), ws),
        members=members,
    )
    _check(run, ws)
    return run


def list_runs(workspace: Workspace) -> list[str]:
    """Names of the runs that have predictions, oldest first."""
    found = sorted(workspace.path("runs").glob("*/predictions.csv"), key=lambda path: path.stat().st_mtime)
    return [path.parent.name for path in found]


def reported_level(workspace: Workspace) -> float:
    """The level of the prediction interval in the workspace's report; `LEVEL` before there is one."""
    results = workspace.path("evaluation", "results.json")
    return read_json(results)["_parameters"]["level"] if results.exists() else LEVEL


def headline_rows(members: pd.DataFrame, variant: str) -> pd.DataFrame:
    """One row a scan from `predictions.csv`: the rows of the headline variant.

    A scan that several members predicted has their mean row where one was written (`fold` -1 on test scans),
    else the mean is taken here. Where the headline is `mean` and a scan has no such row (out-of-fold scans
    have one fold each), its members' mean stands for it.

    Raises
    ------
    InconsistentRun
        No row has the headline variant, or a prediction is missing.
    """
    variant = _known_variant(members, variant)
    chosen = members[members["variant"] == variant]
    if variant == "mean":
        chosen = pd.concat([chosen, members[~members["scan_id"].isin(chosen["scan_id"])]])
    if chosen["predicted_age"].isna().any():
        lost = chosen.loc[chosen["predicted_age"].isna(), "scan_id"].tolist()
        raise InconsistentRun(
            f"{len(lost)} scans have no predicted age (first: {lost[:5]}). Train or predict them again."
        )
    averaged = chosen[(chosen["split"] == "test") & (chosen["fold"] == -1)]
    chosen = chosen[~(chosen["scan_id"].isin(averaged["scan_id"]) & (chosen["fold"] != -1))]
    keys = ["scan_id", "subject_id", "session_id", "split"]
    rows = chosen.groupby(keys, sort=False, dropna=False).agg(
        fold=("fold", "first"), age=("age", "first"), predicted_age=("predicted_age", "mean")
    )
    rows = rows.reset_index()
    rows.loc[rows["split"] == "test", "fold"] = -1
    return rows


def controls_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of controls (`control` is "yes"; everybody where there are no diagnoses).

    Raises
    ------
    CorrectionRefused
        There are diagnoses, and none of them is known to be a word for controls.
    """
    control = judge_controls(rows)
    if len(rows) and (control == "").all():
        raise CorrectionRefused(
            f"None of the diagnoses is a known word for controls ({count_diagnoses(rows)}), and nothing is "
            "fitted on patients. Set control_words to the word for controls in notebook 01 of that workspace "
            "and run from there again (controls_only = False keeps the patients in the cohort)."
        )
    return rows[control == "yes"]


def _known_variant(members: pd.DataFrame, variant: str) -> str:
    known = sorted(members["variant"].unique())
    if variant in known or (variant == "mean" and known):
        return variant
    if not variant and len(known) == 1:
        return known[0]
    raise InconsistentRun(
        f"settings.json names the headline variant {variant!r}, but predictions.csv has {known}. Run the "
        "training notebook again, or set `variant` in settings.json to one of these."
    )


def _with_cohort(rows: pd.DataFrame, ws: Workspace) -> pd.DataFrame:
    cohort = ws.read("cohort.csv")
    cohort["control"] = judge_controls(cohort)
    wanted = [name for name in ("scan_id", "sex", "site", "diagnosis", "source", "control") if name in cohort]
    cohort = cohort[wanted].drop_duplicates("scan_id")
    if "diagnosis" in cohort:
        cohort["diagnosis"] = cohort["diagnosis"].fillna("").astype(str)
    return rows.merge(cohort, on="scan_id", how="left", validate="many_to_one")


def _check(run: Run, ws: Workspace) -> None:
    rows = run.predictions
    doubled = rows[rows.duplicated("scan_id")]["scan_id"].tolist()
    if doubled:
        raise InconsistentRun(f"{run.name}: scans appear in two splits or under two subjects: {doubled[:5]}.")
    in_two = rows.groupby("subject_id")["split"].nunique()
    if (in_two > 1).any():
        names = in_two.index[in_two > 1].tolist()
        raise InconsistentRun(
            f"{run.name}: {len(names)} subjects are in more than one split (first: {names[:5]}). What was "
            "trained on would be tested on; make splits.csv and the run again."
        )
    dealt = ws.read("splits.csv")[["scan_id", "split", "age"]]
    both = rows.merge(dealt, on="scan_id", how="left", suffixes=("", "_dealt"))
    gone = both.loc[both["split_dealt"].isna(), "scan_id"].tolist()
    if gone:
        raise InconsistentRun(
            f"{run.name}: {len(gone)} predicted scans are not in splits.csv (first: {gone[:5]}). They were "
            "dropped after training; train again on the cleaned scans."
        )
    wrong = both[(both["split"] != both["split_dealt"]) | ((both["age"] - both["age_dealt"]).abs() > 0.01)]
    if len(wrong):
        raise InconsistentRun(
            f"{run.name}: split or age of {len(wrong)} scans differ from splits.csv (first: "
            f"{wrong['scan_id'].tolist()[:5]}). The splits changed after training; train again, or restore "
            "the splits the run was trained with."
        )
