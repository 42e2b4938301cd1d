"""What a workspace holds for evaluation: each run's headline predictions, which rows may calibrate, and the
truth that was planted in a known-answer cohort. Stops where files contradict each other."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from brainage_nb.cohort.rules import count_diagnoses, judge_controls
from brainage_nb.demo.cohort import FEWEST_ATTAINABLE, attainable_ages
from brainage_nb.evaluation.correction import LEVEL, Calibration, CorrectionRefused, EvaluationError
from brainage_nb.evaluation.metrics import (
    Metrics,
    flat,
    has_folds,
    mean_training_age,
    mean_with_interval,
    regression_metrics,
)
from brainage_nb.workspace import MissingInput, Workspace, open_workspace, read_csv, read_json

OUT_OF_FOLD = "out_of_fold"
RECOVERED_KINDS = {
    "raw gap": "gap",
    "gap of the age-free corrected prediction": "corrected_gap",
    "gap adjusted by true age": "adjusted_gap",
}


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
        Headline rows, one per scan: `scan_id, subject_id, session_id, split, fold, age, predicted_age` and,
        from the cohort, `control` ("yes", "no" or "") and, where known, `sex, site, diagnosis, source`.
        `fold` >= 0 on train and validation rows marks an out-of-fold prediction.
    """

    name: str
    settings: dict[str, Any]
    history: pd.DataFrame
    predictions: pd.DataFrame

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
        return [name for name in ("train", "val", OUT_OF_FOLD, "test") if len(self.part(name))]

    def calibration_rows(self, *, controls_only: bool = True) -> pd.DataFrame:
        """Rows that may fit the bias correction (controls, see `pick_controls`) and the interval (everybody):
        out-of-fold where folds were run, else validation."""
        rows = self.part(OUT_OF_FOLD if self.folds else "val")
        return pick_controls(rows) if controls_only else rows


@dataclass
class RunEvaluation:
    """What was found for one run.

    Attributes
    ----------
    run : Run
    rows : DataFrame
        Headline rows with `gap`, `corrected_age`, `corrected_gap`, `adjusted_gap` and the interval's ends
        `low`, `high` (years). `predicted_age` stays raw.
    calibration : Calibration
        Bias correction and prediction interval, as the run's bundle has them.
    metrics, corrected : dict
        split -> figures (`regression_metrics`) of the raw and, kept apart, of the age-free corrected
        prediction (empty where the correction was refused).
    bias : DataFrame
        Slope and gap-age r before and after, on calibration and test scans.
    coverage : DataFrame
        Of that interval on test, by age bin.
    groups, diagnosis : DataFrame
        Test figures by age bin, sex, site and diagnosis; gap differences between diagnoses (empty without
        them).
    known : dict
        Known-answer checks (`check_known_answers`); empty where no truth was planted.
    planted : DataFrame
        The test rows behind them.
    """

    run: Run
    rows: pd.DataFrame
    calibration: Calibration
    metrics: dict[str, Metrics]
    corrected: dict[str, Metrics]
    bias: pd.DataFrame
    coverage: pd.DataFrame
    groups: pd.DataFrame
    diagnosis: pd.DataFrame
    known: dict[str, Any]
    planted: pd.DataFrame

    @property
    def test(self) -> pd.DataFrame:
        """The rows of test scans."""
        return self.rows[self.rows["split"] == "test"]


def read_run(workspace: Workspace | Path | str, name: str) -> Run:
    """Read `runs/<name>` and check it against the cohort.

    Raises
    ------
    MissingInput
        A file is not there; the message names the notebook that makes it.
    EvaluationError
        A subject is in two splits, or split or age differ from the workspace's tables.
    """
    ws = workspace if isinstance(workspace, Workspace) else open_workspace(workspace)
    members = read_csv(ws.need(f"runs/{name}/predictions.csv"))
    settings = read_json(ws.need(f"runs/{name}/settings.json"))
    history = ws.path("runs", name, "history.csv")
    cohort = ws.read("cohort.csv")
    cohort["control"] = judge_controls(cohort)
    about = cohort.filter(["scan_id", "sex", "site", "diagnosis", "source", "control"])
    if "diagnosis" in about:
        about["diagnosis"] = about["diagnosis"].fillna("").astype(str)
    run = Run(
        name=name,
        settings=settings,
        history=read_csv(history) if history.exists() else pd.DataFrame(),
        predictions=headline_rows(members, settings.get("variant", "")).merge(
            about.drop_duplicates("scan_id"), on="scan_id", how="left", validate="many_to_one"
        ),
    )
    _check(run, ws.read("splits.csv"))
    return run


def list_runs(workspace: Workspace) -> list[str]:
    """Names of the runs that have predictions, oldest first."""
    found = sorted(workspace.path("runs").glob("*/predictions.csv"), key=lambda path: path.stat().st_mtime)
    return [path.parent.name for path in found]


def reported_level(workspace: Workspace) -> float:
    """The level of the prediction interval in the workspace's report; `LEVEL` before there is one."""
    with suppress(MissingInput, KeyError, TypeError):
        return float(read_json(workspace.path("evaluation", "results.json"))["_parameters"]["level"])
    return LEVEL


def headline_rows(members: pd.DataFrame, variant: str) -> pd.DataFrame:
    """One row per scan from `predictions.csv`: the rows of the headline variant.

    A scan that several members predicted has their mean row where one was written (`fold` -1 on test scans),
    else the mean is taken here. Where the headline is `mean` and a scan has no such row (out-of-fold scans
    have one fold each), its members' mean stands for it.

    Raises
    ------
    EvaluationError
        No row has the headline variant, or a prediction is missing.
    """
    variant = _known_variant(members, variant)
    chosen = members[members["variant"] == variant]
    if variant == "mean":
        chosen = pd.concat([chosen, members[~members["scan_id"].isin(chosen["scan_id"])]])
    if lost := chosen.loc[chosen["predicted_age"].isna(), "scan_id"].tolist():
        raise EvaluationError(
            f"{len(lost)} scans have no predicted age (first: {lost[:5]}). Train or predict them again."
        )
    averaged = chosen.loc[(chosen["split"] == "test") & (chosen["fold"] == -1), "scan_id"]
    chosen = chosen[~chosen["scan_id"].isin(averaged) | (chosen["fold"] == -1)]
    keys = ["scan_id", "subject_id", "session_id", "split"]
    rows = chosen.groupby(keys, sort=False, dropna=False).agg(
        fold=("fold", "first"), age=("age", "first"), predicted_age=("predicted_age", "mean")
    )
    rows = rows.reset_index()
    rows.loc[rows["split"] == "test", "fold"] = -1
    return rows


def _known_variant(members: pd.DataFrame, variant: str) -> str:
    known = sorted(members["variant"].unique())
    if variant in known or (variant == "mean" and known):
        return variant
    if not variant and len(known) == 1:
        return known[0]
    raise EvaluationError(
        f"settings.json names the headline variant {variant!r}, but predictions.csv has {known}. Run the "
        "training notebook again, or set `variant` in settings.json to one of these."
    )


def _check(run: Run, dealt: pd.DataFrame) -> None:
    """Stop at the first contradiction within the run, or between it and `splits.csv`."""
    rows = run.predictions.merge(
        dealt[["scan_id", "split", "age"]], on="scan_id", how="left", suffixes=("", "_dealt")
    )
    n_splits = rows.groupby("subject_id")["split"].transform("nunique")
    moved = (rows["split"] != rows["split_dealt"]) | ((rows["age"] - rows["age_dealt"]).abs() > 0.01)
    for wrong, of, what in (
        (rows.duplicated("scan_id"), "scan_id", "scans appear in two splits or under two subjects{first}."),
        (
            n_splits > 1,
            "subject_id",
            "subjects are in more than one split{first}. What was trained on would be tested on; make "
            "splits.csv and the run again.",
        ),
        (
            rows["split_dealt"].isna(),
            "scan_id",
            "predicted scans are not in splits.csv{first}. They were dropped after training; train again on "
            "the cleaned scans.",
        ),
        (
            moved,
            "scan_id",
            "predicted scans differ from splits.csv in split or age{first}. The splits changed after "
            "training; train again, or restore the splits the run was trained with.",
        ),
    ):
        if wrong.any():
            names = rows.loc[wrong, of].unique().tolist()
            raise EvaluationError(f"{run.name}: {len(names)} {what.format(first=f' (first: {names[:5]})')}")


def pick_controls(rows: pd.DataFrame) -> pd.DataFrame:
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


# --- known answers: only meaningful where the truth was planted; nothing here is accuracy on people ------


def read_truth(workspace: Workspace, path: str | Path = "") -> pd.DataFrame | None:
    """The planted truth: from `path`, else `demo/truth.csv` (or another folder's) in the workspace; None
    where there is none.

    With `attainable` (years, see `attainable_ages`) where there are people enough to fit it on.
    """
    at = [workspace.path("demo", "truth.csv"), workspace.path("truth.csv")]
    at += sorted(workspace.root.glob("*/truth.csv"))
    found = Path(path) if str(path) else next((place for place in at if place.exists()), None)
    if found is None:
        return None
    truth = read_csv(found)
    if truth["subject_id"].nunique() >= FEWEST_ATTAINABLE:
        truth["attainable"] = attainable_ages(truth)
    return truth


def add_truth(rows: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Rows that have a planted gap, with `planted_gap`, `brain_age` and, where the truth has it, `attainable`
    (years).

    Matched by `scan_id`, or by subject and session where a scan goes by another name.
    """
    planted = truth.rename(columns={"gap": "planted_gap"})
    names = [name for name in ("planted_gap", "brain_age", "attainable") if name in planted]
    by_scan, by_session = (
        rows[keys].merge(planted[[*keys, *names]].drop_duplicates(keys), on=keys, how="left")[names]
        for keys in (["scan_id"], ["subject_id", "session_id"])
    )
    return rows.reset_index(drop=True).join(by_scan.fillna(by_session)).dropna(subset=["planted_gap"])


def check_known_answers(
    planted: pd.DataFrame, truth: pd.DataFrame | None, **bootstrap: int
) -> dict[str, Any]:
    """Errors beside those of the two references, and how much of the planted gap was recovered.

    Parameters
    ----------
    planted : DataFrame
        Test rows from `add_truth`; fewer than three say nothing.
    truth : DataFrame or None
        Of the whole cohort.

    Returns
    -------
    dict
        `mae` (`ours`, `oracle`, `attainable`), `mae_whole_cohort` and `recovered` (records); empty where
        nothing was planted.
    """
    if truth is None or len(planted) < 3:
        return {}
    ours = mean_with_interval(planted["gap"].abs(), planted["subject_id"], **bootstrap)
    return {
        "mae": {"ours": ours} | reference_errors(planted, **bootstrap),
        "mae_whole_cohort": reference_errors(truth, **bootstrap),
        "recovered": recovered_gap(planted, RECOVERED_KINDS, **bootstrap).to_dict("records"),
    }


def recovered_gap(planted: pd.DataFrame, kinds: dict[str, str], **bootstrap: int) -> pd.DataFrame:
    """How much of the planted gap is found: correlation and slope with 95 % subject bootstrap.

    Parameters
    ----------
    planted : DataFrame
        Test rows from `add_truth`, with the columns named in `kinds`.
    kinds : dict
        Name in words -> column of a recovered gap in years, such as {"raw": "gap"}; left out where it has
        gaps in it.

    Returns
    -------
    DataFrame
        Columns `kind`, `n`, `r`, `r_low`, `r_high`, `slope`, `slope_low`, `slope_high` (of recovered on
        planted; 1 is perfect).
    """
    table = []
    for kind, column in kinds.items():
        if planted[column].notna().all():
            figures = regression_metrics(
                planted["planted_gap"], planted[column], planted["subject_id"], **bootstrap
            )
            table.append({"kind": kind} | flat({name: figures[name] for name in ("n", "r", "slope")}))
    return pd.DataFrame(table)


def reference_errors(rows: pd.DataFrame, **bootstrap: int) -> dict[str, Any]:
    """MAE (years) of the two references of notebook 01 on the given scans.

    Parameters
    ----------
    rows : DataFrame
        From `add_truth`: the test rows, or those of the whole cohort.

    Returns
    -------
    dict
        `oracle`: knows the planted brain age and gives it as the age. `attainable`: the best regression of
        age on the planted anatomy, where there are people enough. Each {"value", "low", "high", "n",
        "n_subjects"}.
    """
    return {
        name: mean_with_interval((rows[column] - rows["age"]).abs(), rows["subject_id"], **bootstrap)
        for name, column in (("oracle", "brain_age"), ("attainable", "attainable"))
        if column in rows
    }
