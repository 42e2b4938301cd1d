"""The settings of a training run, flat and in one place. No behaviour beyond checking them.

Which models a job trains (folds, seeds), who trains each, and how their predictions become one table.

Works on tables of scans; trains nothing itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.splits import deal_folds
from brainage_nb.parameters import check_fields
from brainage_nb.volumes.settings import AugmentationSettings, name_recipe, recipe_defaults

# How and where a run is computed. These may differ when a run is continued; all others decide its result.
RUNTIME = (
    "precision",
    "device",
    "processes",
    "micro_batch",
    "resident_share",
    "max_minutes",
    "checkpoint_minutes",
    "require_gpu",
    "scratch",
    "cluster",
)
# How each named recipe is learned, beside how its scans are prepared (`volumes.recipes`): `best` is what the
# ablation on real scans chose (`benchmarks/accuracy.py`).
RECIPES: dict[str, dict[str, Any]] = {
    "reference": {"loss": "huber", "keep": "best", "inner_fraction": 0.15, "linear": False},
    "best": {"loss": "distribution", "keep": "last", "inner_fraction": 0.0, "linear": True},
}

# Settings that do nothing unless another is like this.
COUNTS_WITH = {
    "huber_delta": ("loss", "huber"),
    "label_sd": ("loss", "distribution"),
    "inner_fraction": ("folds", "[^0].*"),
}


class SettingsDiffer(ValueError):
    """A run was begun with other settings; the message names them."""


@dataclass(frozen=True)
class TrainingSettings:
    """Every number that decides a training run.

    Parameters
    ----------
    epochs : int
        Passes over the training set.
    batch_size : int
        Volumes a step, all processes together; kept when memory forces smaller pieces.
    learning_rate : float
        Peak of AdamW's learning rate, after the warm-up.
    weight_decay : float
        Of AdamW; norms and biases are spared.
    warmup_epochs : int
        Epochs of linear rise before the cosine; at most a fifth of all epochs is used.
    loss : {"huber", "distribution"}
        What is learned: the age (Huber), or a distribution of ages around it (Kullback-Leibler divergence
        from a normal curve of `label_sd`), whose mean is the predicted age; the recipe's if not set.
    huber_delta : float
        With "huber": where the loss turns from square to linear, years.
    label_sd : float
        With "distribution": standard deviation of the curve around each true age, years.
    gradient_clip : float
        Largest norm of the gradient; 0 for none.
    ema_epochs : float
        Time constant of the weight average, epochs; the average is what is evaluated. 0 for none.
    keep : {"best", "last"}
        Which epoch's weights are kept: that with the least validation MAE, or the last; the recipe's if not
        set. A handful of validation subjects chooses by luck; with the cosine at its end the last epoch
        is a fair choice.
    linear : bool
        Average each predicted age with that of a ridge regression on the smoothed training volumes
        (`fitting.linear`), fitted in seconds once the network is trained; the recipe's if not set.
    patience : int
        Stop after so many epochs without a better validation MAE; 0 for never.
    norm : {"batch", "group", "instance"}
        Normalisation of the network; batch learns fastest.
    shortcut : {"A", "B"}
        Of the residual blocks; A where MedicalNet's weights are to be loaded.
    widths : ints
        Channels of the four stages; 64,128,256,512 is ResNet-18, halves of these train four times as fast.
    blocks : ints
        Residual blocks of the four stages; 2,2,2,2 is ResNet-18, 1,1,1,1 is ResNet-10.
    dropout : float
        Share of the pooled features dropped at random in training.
    augmentation : AugmentationSettings or None
        Random variation of training volumes; None for none.
    flip_averaging : bool
        Predict each scan and its mirror image and average.
    shift_averaging : int
        Predict each scan also moved by so many voxels to and fro along each axis and average; 0 for not.
        Takes seven times as long.
    init_from : str
        Bundle or file of weights to start from (`starting.load_pretrained`); empty for random ones.
    seeds : ints
        One model a seed; several are an ensemble.
    folds : int
        Cross-validation folds over train and validation; 0 for none.
    inner_fraction : float
        With folds, the share of each fold's training subjects that chooses the best epoch. 0 with
        `keep="last"`: all are trained on, and the held-out fold is only watched.
    precision : {"auto", "fp32", "fp16", "bf16"}
        "auto" is what the device does natively: bf16 from compute capability 8.0, else fp16; fp32 on a CPU.
    device : {"auto", "cpu", "cuda"}
        Where to train; "auto" is a GPU where there is one.
    processes : int
        Processes, one a GPU; 0 for all GPUs seen.
    micro_batch : int
        Volumes computed at once on a device; 0 for as many as fit.
    resident_share : float
        Volumes stay on the device where they take at most this share of its free memory.
    max_minutes : float
        Save and end cleanly after so many minutes; 0 for no limit.
    checkpoint_minutes : float
        Time between checkpoints, minutes; 0 for every step.
    require_gpu : bool
        Refuse to train without a GPU.
    scratch : str
        A fast local folder where checkpoints are written first, for a run folder on a slow or unsafe file
        system such as Drive: the run folder then receives verified copies. Empty to write there directly.
    cluster : str
        Dask workers that train the models of a run side by side, see `open_cluster`; empty for one after
        the other here.
    """

    epochs: int = 60
    batch_size: int = 8
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    warmup_epochs: int = 5
    loss: str = "huber"
    huber_delta: float = 1.0
    label_sd: float = 3.0
    gradient_clip: float = 20.0
    ema_epochs: float = 1.0
    keep: str = "best"
    linear: bool = False
    patience: int = 0
    norm: str = "batch"
    shortcut: str = "B"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    dropout: float = 0.0
    augmentation: AugmentationSettings | None = field(default_factory=AugmentationSettings)
    flip_averaging: bool = True
    shift_averaging: int = 0
    init_from: str = ""
    seeds: tuple[int, ...] = (0,)
    folds: int = 0
    inner_fraction: float = 0.15
    precision: str = "auto"
    device: str = "auto"
    processes: int = 0
    micro_batch: int = 0
    resident_share: float = 0.5
    max_minutes: float = 0.0
    checkpoint_minutes: float = 5.0
    require_gpu: bool = False
    scratch: str = ""
    cluster: str = ""

    def __post_init__(self):
        check_fields(self)  # JSON brings lists
        for name in ("epochs", "batch_size", "learning_rate", "huber_delta", "label_sd"):
            _require(self, name, getattr(self, name) > 0, "a number above 0")
        for name, value in vars(self).items():
            _require(self, name, not isinstance(value, int | float) or value >= 0, "no number below 0")
        _require(self, "dropout", self.dropout < 1, "a share below 1")
        _require(self, "folds", self.folds == 0 or self.folds >= 2, "0 (none) or at least 2")
        _require(self, "seeds", 0 < len(set(self.seeds)) == len(self.seeds), "one or more different numbers")
        watched = self.inner_fraction > 0 or self.keep == "last"
        share = "a share from 0 to below 1, and above 0 with keep='best'"
        _require(self, "inner_fraction", watched and 0 <= self.inner_fraction < 1, share)
        _require(self, "patience", not (self.patience and self.keep == "last"), "0 with keep='last'")
        averaging_of(vars(self))

    @classmethod
    def of_recipe(cls, recipe: str, **numbers: Any) -> TrainingSettings:
        """Settings of a named recipe, save for those given.

        Parameters
        ----------
        recipe : {"reference", "best"}
        **numbers
            Any settings; they go before the recipe's. ValueError for one that would change nothing beside
            the others.
        """
        settings = cls(**recipe_defaults(recipe, RECIPES) | numbers)
        for name in set(numbers) & set(COUNTS_WITH):
            other, wanted = COUNTS_WITH[name]
            if not re.fullmatch(wanted, str(getattr(settings, other))):
                raise ValueError(
                    f"{name} = {numbers[name]!r} would change nothing: {other} is "
                    f"{getattr(settings, other)!r} (recipe {recipe}). Set {other} too, or leave {name} out."
                )
        return settings

    @property
    def recipe(self) -> str:
        """The recipe that these settings are learned by, with what differs, see `name_recipe`."""
        return name_recipe(self, RECIPES)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, text and lists; `from_json` reads them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainingSettings:
        """Settings from `to_json`'s form; unknown names raise ValueError."""
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(set(content) - set(known)):
            raise ValueError(f"Unknown training settings {unknown}. Available: {known}")
        content = dict(content)
        if isinstance(content.get("augmentation"), dict):
            content["augmentation"] = AugmentationSettings(**content["augmentation"])
        return cls(**content)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result, in `to_json`'s form."""
        return {name: value for name, value in self.to_json().items() if name not in RUNTIME}


def _require(settings: TrainingSettings, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {getattr(settings, name)!r}: expected {expected}.")


def refuse_difference(before: dict[str, Any], now: dict[str, Any], place: Path) -> None:
    """Raise `SettingsDiffer` naming every setting that is not what `place` was begun with.

    A setting that is younger than the run counts as its default, which does what was done before it.
    """
    now = json.loads(json.dumps(now))
    before = {name: value for name, value in TrainingSettings().to_json().items() if name in now} | before
    names = [name for name in sorted(set(before) | set(now)) if before.get(name) != now.get(name)]
    if names:
        listed = "; ".join(f"{name}: was {before.get(name)!r}, now {now.get(name)!r}" for name in names)
        raise SettingsDiffer(
            f"{place} was begun with other settings ({listed}). Go on with those, choose another run "
            "name, or set fresh=True to delete it and start anew."
        )


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


MOST_SHIFT = 4  # voxels


def averaging_of(facts: Mapping[str, Any]) -> dict[str, int]:
    """What `views` is to do, from the settings of a run or a bundle's manifest; ValueError out of bounds."""
    shift = facts.get("shift_averaging", 0)
    if type(shift) is not int or not 0 <= shift <= MOST_SHIFT:
        raise ValueError(f"shift_averaging = {shift!r}: expected 0 (none) to {MOST_SHIFT} voxels.")
    return {"flip_averaging": bool(facts["flip_averaging"]), "shift_averaging": shift}


NORMS = ("batch", "group", "instance")
