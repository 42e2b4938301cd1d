"""Which models a job trains (folds, seeds), who trains each, and how their predictions become one table.

Works on tables of scans; trains nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from brainage_nb.cohort.splits import deal_folds
from brainage_nb.models.settings import TrainingSettings

COLUMNS = (
    "scan_id",
    "subject_id",
    "session_id",
    "split",
    "fold",
    "seed",
    "variant",
    "age",
    "predicted_age",
)


@dataclass(frozen=True)
class Member:
    """One model of a job. Arrays hold row positions in the table of scans.

    Parameters
    ----------
    fold : int
        The held-out fold; -1 without folds.
    seed : int
    train, validation : array of int
        Who is trained on; who chooses the best epoch.
    predicted : array of int
        Whose predictions the model gives: everyone without folds, else the held-out fold and the test split.
    """

    fold: int
    seed: int
    train: np.ndarray
    validation: np.ndarray
    predicted: np.ndarray

    @property
    def name(self) -> str:
        """Folder name, as `fold0_seed1` or `seed1`."""
        return f"seed{self.seed}" if self.fold < 0 else f"fold{self.fold}_seed{self.seed}"


def members_of(scans: pd.DataFrame, settings: TrainingSettings) -> list[Member]:
    """The models to train, in order.

    Parameters
    ----------
    scans : DataFrame
        `subject_id, age, split, fold`, a row a scan. Folds of another number than the settings ask for are
        dealt anew here (by subject and age; the test split is never touched).
    settings : TrainingSettings
        Its `folds`, `seeds` and `inner_fraction`.

    Raises
    ------
    ValueError
        Where a member would have nobody to train on or to choose the best epoch by.
    """
    scans = scans.reset_index(drop=True)
    if not settings.folds:
        parts = [_parts(scans, -1, 0.0)]
    else:
        scans = scans.assign(fold=folds_of(scans, settings.folds))
        parts = [_parts(scans, fold, settings.inner_fraction) for fold in range(settings.folds)]
    members = [Member(fold, seed, *rows) for fold, *rows in parts for seed in settings.seeds]
    for member in members:
        if len(member.train) < 2 or not len(member.validation):
            raise ValueError(
                f"Model {member.name}: {len(member.train)} scans to train on and {len(member.validation)} "
                "to choose the best epoch by; expected at least 2 and 1. Use more subjects or fewer folds."
            )
    return members


def folds_of(scans: pd.DataFrame, folds: int) -> np.ndarray:
    """Fold of each scan: the table's own where it has `folds` of them, else dealt by subject and age."""
    dealt = scans.loc[scans["split"] != "test"]
    if "fold" in scans and set(dealt["fold"]) == set(range(folds)):
        return scans["fold"].to_numpy()
    age = dealt.groupby("subject_id", sort=True)["age"].mean()
    fold = scans["subject_id"].map(deal_folds(age, folds, seed=0))
    return fold.where(scans["split"] != "test", -1).fillna(-1).astype(int).to_numpy()


def _parts(scans: pd.DataFrame, fold: int, inner_fraction: float) -> tuple:
    """(fold, train, validation, predicted) as row positions."""
    test = (scans["split"] == "test").to_numpy()
    if fold < 0:
        train, validation = (scans["split"] == "train").to_numpy(), (scans["split"] == "val").to_numpy()
        predicted = np.ones(len(scans), dtype=bool)
    else:
        held_out = (scans["fold"] == fold).to_numpy() & ~test
        validation = held_out  # only watched; all others are trained on
        if inner_fraction:
            inner = _inner(scans[~test & ~held_out], inner_fraction, fold)
            validation = scans["subject_id"].isin(inner).to_numpy() & ~test & ~held_out
        train, predicted = ~test & ~held_out & ~validation, held_out | test
    return (fold, *(np.flatnonzero(part) for part in (train, validation, predicted)))


def _inner(scans: pd.DataFrame, fraction: float, fold: int) -> list[str]:
    """Subjects that choose the best epoch: one of every so many neighbours in age."""
    age = scans.groupby("subject_id", sort=True)["age"].mean()
    groups = max(2, min(len(age), round(1 / fraction)))
    dealt = deal_folds(age, groups, seed=fold)
    return list(dealt.index[dealt == 0])


def member_rows(scans: pd.DataFrame, member: Member, predicted_age: np.ndarray) -> pd.DataFrame:
    """Prediction rows of one model: `predicted_age` (years) belongs to the scans `member.predicted`."""
    rows = scans.iloc[member.predicted][["scan_id", "subject_id", "session_id", "split", "age"]]
    return rows.assign(fold=member.fold, seed=member.seed, variant="single", predicted_age=predicted_age)[
        list(COLUMNS)
    ]


def with_means(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """All prediction rows with the ensemble's `mean` rows added, and the name of the headline variant.

    A scan of train or val averages over seeds (with folds: of the models that held it out, whose fold the
    mean row carries); a test scan averages over all models, fold -1. A single model needs no mean rows.
    """
    if rows.groupby(["fold", "seed"]).ngroups == 1:
        return rows, "single"
    keys = ["scan_id", "subject_id", "session_id", "split", "age"]
    mean = rows.groupby(keys, sort=False, as_index=False).agg(
        predicted_age=("predicted_age", "mean"), fold=("fold", "max")
    )
    mean.loc[mean["split"] == "test", "fold"] = -1
    mean = mean.assign(seed=-1, variant="mean")[list(COLUMNS)]
    return pd.concat([rows, mean], ignore_index=True), "mean"
