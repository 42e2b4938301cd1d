"""Checks against what was planted in the known-answer cohort, and between two sessions of one person.

Only meaningful where the truth is known (a test object) or where people came twice; says nothing about
accuracy on people.

What a workspace holds for evaluation: each run's headline predictions, and which rows may calibrate.

Reads; computes no figure. Stops where the files contradict each other (a subject in two splits, an age that
differs).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.rules import count_diagnoses, judge_controls
from brainage_nb.demo.cohort import FEWEST_ATTAINABLE, attainable_ages
from brainage_nb.evaluation.correction import LEVEL, Calibration, CorrectionRefused
from brainage_nb.evaluation.metrics import (
    correlation_with_interval,
    has_folds,
    mean_training_age,
    mean_with_interval,
)
from brainage_nb.workspace import Workspace, open_workspace, read_csv, read_json

FEWEST_TWICE = 10  # subjects with two sessions, below which a reliability means little


def read_truth(workspace: Workspace, path: str | Path = "") -> pd.DataFrame | None:
    """The planted truth: from `path`, else `demo/truth.csv` (or another folder's) in the workspace; None
    where there is none.

    With `attainable` (years, see `attainable_ages`) where there are people enough to fit it on.
    """
    places = [Path(path)] if str(path) else []
    if not places:
        places = [workspace.path("demo", "truth.csv"), workspace.path("truth.csv")]
        places += sorted(workspace.root.glob("*/truth.csv"))
    found = next((place for place in places if str(path) or place.exists()), None)
    if found is None:
        return None
    truth = read_csv(found)
    if truth["subject_id"].nunique() >= FEWEST_ATTAINABLE:
        truth["attainable"] = attainable_ages(truth)
    return truth


def with_truth(rows: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Rows that have a planted gap, with `planted_gap`, `brain_age` and, where the truth has it, `attainable`
    (years).

    Matched by `scan_id`, or by subject and session where a scan goes by another name.
    """
    planted = truth.rename(columns={"gap": "planted_gap"})
    found = [name for name in ("planted_gap", "brain_age", "attainable") if name in planted]
    by_scan = rows[["scan_id"]].merge(planted[["scan_id", *found]].drop_duplicates("scan_id"), how="left")
    keys = ["subject_id", "session_id"]
    by_session = rows[keys].merge(planted[[*keys, *found]].drop_duplicates(keys), on=keys, how="left")
    known = by_scan[found].fillna(by_session[found])
    return rows.reset_index(drop=True).join(known).dropna(subset=["planted_gap"])


def recovered_gap(
    rows: pd.DataFrame, kinds: dict[str, str], *, n_bootstrap: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How much of the planted gap is found: correlation and slope with 95 % subject bootstrap.

    Parameters
    ----------
    rows : DataFrame
        Test rows from `with_truth`, with the columns named in `kinds`.
    kinds : dict
        Name in words -> column of a recovered gap in years, such as {"raw": "gap"}.

    Returns
    -------
    DataFrame
        Columns `kind`, `n`, `r`, `r_low`, `r_high`, `slope`, `slope_low`, `slope_high` (of recovered on
        planted; 1 is perfect).
    """
    table = []
    for kind, column in kinds.items():
        known = rows.dropna(subset=[column])
        found = correlation_with_interval(
            known["planted_gap"],
            known[column],
            known["subject_id"].to_numpy(),
            n_bootstrap=n_bootstrap,
            seed=seed,
        )
        row = {"kind": kind, "n": len(known)}
        for name in ("r", "slope"):
            row |= {
                name: found[name]["value"],
                f"{name}_low": found[name]["low"],
                f"{name}_high": found[name]["high"],
            }
        table.append(row)
    return pd.DataFrame(table)


def reference_errors(rows: pd.DataFrame, *, n_bootstrap: int = 2000, seed: int = 0) -> dict[str, Any]:
    """MAE (years) of the two references of notebook 01 on the given scans.

    Parameters
    ----------
    rows : DataFrame
        From `with_truth`: the test rows, or those of the whole cohort.

    Returns
    -------
    dict
        `oracle`: knows the planted brain age and gives it as the age. `attainable`: the best regression of
        age on the planted anatomy, where there are people enough. Each {"value", "low", "high", "n",
        "n_subjects"}.
    """
    subjects = rows["subject_id"].to_numpy()
    return {
        name: mean_with_interval(
            (rows[column] - rows["age"]).abs(), subjects, n_bootstrap=n_bootstrap, seed=seed
        )
        for name, column in (("oracle", "brain_age"), ("attainable", "attainable"))
        if column in rows
    }


def two_session_reliability(
    rows: pd.DataFrame, *, column: str = "gap", n_bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any] | None:
    """Two-session reliability of a gap in test subjects: ICC(2,1), absolute agreement (Shrout & Fleiss 1979).

    Of the gap, not the predicted age: ages differ so much between people that any model's predicted ages
    agree.

    Returns
    -------
    dict or None
        `icc` and `difference` (mean absolute, years) as {"value", "low", "high"} and `n_subjects`; None with
        fewer than ten subjects who came twice.
    """
    sessions = rows.groupby(["subject_id", "session_id"], sort=True)[column].mean()
    twice = (
        sessions.groupby("subject_id").filter(lambda values: len(values) >= 2).groupby("subject_id").head(2)
    )
    pairs = twice.to_numpy().reshape(-1, 2)
    if len(pairs) < FEWEST_TWICE:
        return None
    rng = np.random.default_rng(seed)
    draws = [icc(pairs[rng.integers(0, len(pairs), len(pairs))]) for _ in range(n_bootstrap)]
    low, high = np.percentile(draws, [2.5, 97.5]) if draws else (np.nan, np.nan)
    return {
        "icc": {"value": icc(pairs), "low": float(low), "high": float(high)},
        "difference": mean_with_interval(
            np.abs(pairs[:, 0] - pairs[:, 1]), n_bootstrap=n_bootstrap, seed=seed
        ),
        "n_subjects": len(pairs),
    }


def icc(pairs: np.ndarray) -> float:
    """ICC(2,1) of an array (n_subjects, k sessions): two-way random effects, absolute agreement, single
    measure."""
    n, k = pairs.shape
    grand = pairs.mean()
    between_people = k * ((pairs.mean(axis=1) - grand) ** 2).sum() / (n - 1)
    between_sessions = n * ((pairs.mean(axis=0) - grand) ** 2).sum() / (k - 1)
    rest = pairs - pairs.mean(axis=1, keepdims=True) - pairs.mean(axis=0) + grand
    error = (rest**2).sum() / ((n - 1) * (k - 1))
    below = between_people + (k - 1) * error + k * (between_sessions - error) / n
    return float((between_people - error) / below) if below > 0 else float("nan")


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
