"""The settings of a training run, and the models that follow from them: folds, seeds, who trains each.

Checks and counts only; nothing is trained here.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.splits import deal_folds
from brainage_nb.parameters import check_fields
from brainage_nb.volumes.settings import AugmentationSettings, check_modality, name_recipe, recipe_defaults
from brainage_nb.workspace import read_csv, read_json

# How and where a run is computed. These may differ when a run is continued; all others decide its result.
RUNTIME = {"precision", "device", "processes", "max_minutes", "checkpoint_minutes", "cluster"}
# How each named recipe is learned, beside how its scans are prepared (`volumes.settings`): `reference` is the
# published method, `best` is what the ablation on real scans chose (`benchmarks/accuracy.py`).
RECIPES: dict[str, dict[str, Any]] = {
    "reference": {"keep": "best", "inner_fraction": 0.15, "linear": False},
    "best": {"keep": "last", "inner_fraction": 0.0, "linear": True},
}
FINAL_FOLDS = 5
COLUMNS = [
    "scan_id", "subject_id", "session_id", "split", "fold",
    "seed", "variant", "age", "predicted_age",
]  # fmt: skip
TEXT = {"scan_id", "subject_id", "session_id", "split", "variant", "reason"}


class TrainingRefused(ValueError):
    """Training does not start as set; the message says why (folder, weights, machine) and what to do."""


class TrainingFailed(RuntimeError):
    """Training began and could not go on; the message says what is safe and what to set."""


@dataclass(frozen=True)
class TrainingSettings:
    """Every number that decides a training run.

    Parameters
    ----------
    epochs : int
        Passes over the training set.
    batch_size : int
        Volumes per step, all processes together.
    learning_rate : float
        Peak of AdamW's learning rate, after the warm-up.
    weight_decay : float
        Of AdamW; norms and biases are spared.
    loss : {"huber", "own"}
        What is minimised: the Huber loss in years, or (`own`) a function that was given to `train`.
    ema_epochs : float
        Time constant of the weight average, epochs; the average is what is evaluated. 0 for none.
    keep : {"best", "last"}
        Which epoch's weights are kept: that with the least validation MAE, or the last; the recipe's if not
        set. A handful of validation subjects chooses by luck; with the cosine at its end the last epoch
        is a fair choice.
    linear : bool
        Average each predicted age with that of a ridge regression on the smoothed training volumes
        (`fit_linear`), fitted in seconds once the network is trained; the recipe's if not set.
    channels : str
        Scans of a session that one network reads together, a channel each, with commas, as T1w,T2w; the first
        decides what the linear regression reads too. Empty: one scan. People who lack one are left out.
    channel_dropout : float
        With channels, the chance that each is blanked in a training step, though never all of them.
    shortcut : {"A", "B"}
        Of the residual blocks; A where MedicalNet's weights are to be loaded.
    widths : ints
        Channels of the four stages; 64,128,256,512 is ResNet-18, halves of these train four times as fast.
    blocks : ints
        Residual blocks of the four stages; 2,2,2,2 is ResNet-18, 1,1,1,1 is ResNet-10.
    augmentation : AugmentationSettings or None
        Random variation of training volumes; None for none.
    flip_averaging : bool
        Predict each scan and its mirror image and average.
    init_from : str
        Bundle, or file of MedicalNet's weights, to start from; empty for random ones.
    seeds : ints
        One model for each seed; several are an ensemble.
    folds : int
        Cross-validation folds over train and validation; 0 for none.
    final : bool
        Train on everybody: the folds (5 unless `folds` is set) go over all subjects, the test split too, and
        their models are used together. Such a run is judged out of fold, everybody once.
    inner_fraction : float
        With folds, the share of each fold's training subjects that chooses the best epoch. 0 with
        `keep="last"`: all are trained on, and the held-out fold is only watched.
    precision : {"auto", "fp32", "fp16", "bf16"}
        "auto" is what the device does natively: bf16 from compute capability 8.0, else fp16; fp32 on a CPU.
    device : {"auto", "cpu", "cuda"}
        Where to train; "auto" is a GPU where there is one, "cuda" refuses to train without.
    processes : int
        Processes, one for each GPU; 0 for all GPUs.
    max_minutes : float
        Save and end cleanly after so many minutes; 0 for no limit.
    checkpoint_minutes : float
        Time between checkpoints, minutes; 0 for every step.
    cluster : str
        Dask workers that train the models of a run side by side, see `open_cluster`; empty for one after
        the other here.
    modality : str
        What the volumes are of: T1w, or one that 01 had in `modalities` and 03 made volumes of (T2w, ...).
    """

    epochs: int = 60
    batch_size: int = 8
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    loss: str = "huber"
    ema_epochs: float = 1.0
    keep: str = "best"
    linear: bool = False
    channels: str = ""
    channel_dropout: float = 0.2
    shortcut: str = "B"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    augmentation: AugmentationSettings | None = field(default_factory=AugmentationSettings)
    flip_averaging: bool = True
    init_from: str = ""
    seeds: tuple[int, ...] = (0,)
    folds: int = 0
    final: bool = False
    inner_fraction: float = 0.15
    precision: str = "auto"
    device: str = "auto"
    processes: int = 0
    max_minutes: float = 0.0
    checkpoint_minutes: float = 5.0
    cluster: str = ""
    modality: str = "T1w"

    def __post_init__(self):
        check_fields(self)  # JSON brings lists
        for name in self.channel_names:
            check_modality(name, "channels" if self.channels else "modality")
        if self.final and not self.folds:
            object.__setattr__(self, "folds", FINAL_FOLDS)
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        names = self.channel_names if self.channels else ()
        share = 0 <= self.inner_fraction < 1 and (self.inner_fraction > 0 or self.keep == "last")
        checks = [
            *((name, numbers[name] > 0, "above 0") for name in ("epochs", "batch_size", "learning_rate")),
            *((name, value >= 0, "no number below 0") for name, value in numbers.items()),
            ("channel_dropout", self.channel_dropout < 1, "a share from 0 to below 1"),
            (
                "channels",
                len(set(names)) == len(names) != 1,
                "none, or two or more different names with commas",
            ),
            ("folds", self.folds != 1, "0 (none) or at least 2"),
            ("seeds", 0 < len(set(self.seeds)) == len(self.seeds), "one or more different numbers"),
            ("inner_fraction", share, "a share from 0 to below 1, and above 0 with keep='best'"),
        ]
        for name, holds, expected in checks:
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected {expected}.")

    @classmethod
    def of_recipe(cls, recipe: str, **numbers: Any) -> TrainingSettings:
        """Settings of a named recipe, save for those given.

        Parameters
        ----------
        recipe : {"reference", "best"}
        **numbers
            Any settings; they go before the recipe's. ValueError for one that would change nothing beside
            the others.

        >>> TrainingSettings.of_recipe("best", epochs=7).keep
        'last'
        """
        settings = cls(**recipe_defaults(recipe, RECIPES) | numbers)
        if "inner_fraction" in numbers and not settings.folds:
            raise ValueError(
                f"inner_fraction = {settings.inner_fraction!r} would change nothing: folds is 0. "
                "Set folds too, or leave inner_fraction out."
            )
        return settings

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Which scan each of the network's channels reads, as (T1w, T2w)."""
        return tuple(name.strip() for name in self.channels.split(",") if name.strip()) or (self.modality,)

    @property
    def recipe(self) -> str:
        """The recipe that these settings are learned by, with what differs, see `name_recipe`."""
        return name_recipe(self, RECIPES)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, text and lists; `from_json` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainingSettings:
        """Settings from `to_json`'s form; unknown names raise ValueError."""
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(set(content) - set(known)):
            raise ValueError(f"Unknown training settings {unknown}. Available: {known}")
        if isinstance(augmentation := content.get("augmentation"), dict):
            content = content | {"augmentation": AugmentationSettings(**augmentation)}
        return cls(**content)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result, in `to_json`'s form."""
        return {name: value for name, value in self.to_json().items() if name not in RUNTIME}


def refuse_difference(before: dict[str, Any], now: dict[str, Any], place: Path) -> None:
    """Raise `TrainingRefused` naming every setting that is not what `place` was begun with.

    A setting that is younger than the run counts as its default, which does what was done before it; the
    scan files of a run that did not record them count as unchanged.
    """
    now = json.loads(json.dumps(now))
    defaults = TrainingSettings().to_json() | {"scan_files": now.get("scan_files")}
    before = {name: value for name, value in defaults.items() if name in now} | before
    names = [name for name in sorted(set(before) | set(now)) if before.get(name) != now.get(name)]
    if names:
        of_data = {
            "scans_ages_splits": "scans, ages or splits in splits.csv have changed since",
            "scan_files": "scan files behind the volumes have changed since",
            "copies_1": "it learned from copies without skull as well, which are no longer made",
            **{f"channel_{n}": f"volumes of channel {n} have changed since" for n in range(2, 10)},
        }
        listed = "; ".join(
            of_data.get(name) or f"{name}: was {before.get(name)!r}, now {now.get(name)!r}" for name in names
        )
        raise TrainingRefused(
            f"{place} was begun with other settings ({listed}). Go on with those, choose another run "
            "name, or set fresh=True to delete it and start again."
        )


@dataclass(frozen=True)
class Member:
    """One model of a run. Arrays hold row positions in the table of scans.

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


def list_members(scans: pd.DataFrame, settings: TrainingSettings) -> list[Member]:
    """The models to train, in order.

    Parameters
    ----------
    scans : DataFrame
        `subject_id, age, split, fold`, one row per scan. Its folds are those that train; where it has none,
        they are dealt here (by subject and age; the test split is never touched).
    settings : TrainingSettings
        Its `folds`, `seeds` and `inner_fraction`.

    Raises
    ------
    ValueError
        Where a model would have nobody to train on or to choose the best epoch by, or the settings ask for
        another number of folds than the table has.
    """
    scans = scans.reset_index(drop=True)
    folds = [-1]
    if settings.folds:
        scans = scans.assign(fold=_deal_folds(scans, settings.folds))
        folds = sorted({*scans["fold"]} - {-1})
    parts = [(fold, *_split_scans(scans, fold, settings.inner_fraction)) for fold in folds]
    members = [Member(fold, seed, *rows) for fold, *rows in parts for seed in settings.seeds]
    for member in members:
        if len(member.train) < 2 or not len(member.validation):
            raise ValueError(
                f"Model {member.name}: {len(member.train)} scans to train on and {len(member.validation)} "
                "to choose the best epoch by; expected at least 2 and 1. Use more subjects or fewer folds."
            )
    return members


def _deal_folds(scans: pd.DataFrame, folds: int) -> pd.Series:
    """Fold of each scan: the table's own where it has any, else dealt by subject and age."""
    is_test = scans["split"] == "test"
    known = sorted({*scans.loc[~is_test, "fold"]} - {-1}) if "fold" in scans else []
    if len(known) == folds:
        return scans["fold"]
    if known:
        raise ValueError(
            f"folds = {folds}: in splits.csv the scans with a volume are in {len(known)} folds "
            f"({', '.join(map(str, known))}), and the folds of notebook 02 are those that train. Set folds = "
            f"{len(known)} here, or deal others in notebook 02 (folds = {folds}, folds_by = age)."
        )
    age = scans[~is_test].groupby("subject_id", sort=True)["age"].mean()
    return scans["subject_id"].map(deal_folds(age, folds, seed=0)).mask(is_test).fillna(-1).astype(int)


def _split_scans(scans: pd.DataFrame, fold: int, inner_fraction: float) -> list[np.ndarray]:
    """Row positions (train, validation, predicted)."""
    test = (scans["split"] == "test").to_numpy()
    if fold < 0:
        train, validation = (scans["split"] == "train").to_numpy(), (scans["split"] == "val").to_numpy()
        predicted = np.ones(len(scans), dtype=bool)
    else:
        held_out = (scans["fold"] == fold).to_numpy() & ~test
        validation = held_out  # only watched; all others are trained on
        if (
            inner_fraction
        ):  # the subjects of one of several folds inside of the training fold choose the epoch
            age = scans[~test & ~held_out].groupby("subject_id", sort=True)["age"].mean()
            dealt = deal_folds(age, max(2, min(len(age), round(1 / inner_fraction))), seed=fold)
            inner = scans["subject_id"].isin(dealt.index[dealt == 0]).to_numpy()
            validation = inner & ~test & ~held_out
        train, predicted = ~test & ~held_out & ~validation, held_out | test
    return [np.flatnonzero(part) for part in (train, validation, predicted)]


def tabulate_predictions(scans: pd.DataFrame, member: Member, predicted_age: np.ndarray) -> pd.DataFrame:
    """Prediction rows of one model: `predicted_age` (years) belongs to the scans `member.predicted`."""
    rows = scans.iloc[member.predicted].assign(fold=member.fold, seed=member.seed, variant="single")
    return rows.assign(predicted_age=predicted_age)[COLUMNS]


def add_means(rows: pd.DataFrame) -> pd.DataFrame:
    """All prediction rows and, where there are several models, the ensemble's rows of variant `mean`.

    A scan of train or val averages over seeds (with folds: of the models that held it out, whose fold the
    mean row carries); a test scan averages over all models, fold -1.
    """
    if rows.groupby(["fold", "seed"]).ngroups == 1:
        return rows
    keys = ["scan_id", "subject_id", "session_id", "split", "age"]
    mean = rows.groupby(keys, sort=False, as_index=False).agg(
        predicted_age=("predicted_age", "mean"), fold=("fold", "max")
    )
    mean.loc[mean["split"] == "test", "fold"] = -1
    return pd.concat([rows, mean.assign(seed=-1, variant="mean")[COLUMNS]], ignore_index=True)


def load_run_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A table of a run; ValueError where it is absent or not whole.

    Parameters
    ----------
    path : path
    columns : sequence of str
        What it must have; those not in `TEXT` are numbers, and the last is never empty.
    """
    try:
        table = read_csv(path)[list(columns)]
        table[[name for name in columns if name not in TEXT]].astype(float)
        if table[columns[-1]].isna().any():
            raise ValueError("it ends too early")
        return table
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error.__cause__ or error})") from error


def read_run_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """As `load_run_table`, but empty where the table is absent, or, with a warning, damaged."""
    try:
        return load_run_table(path, columns)
    except ValueError as error:
        if path.exists():
            warnings.warn(f"{error}: it is made again.", stacklevel=1)
        return pd.DataFrame(columns=columns)


def read_run_settings(run_folder: Path) -> dict[str, Any]:
    """A run's settings.json, empty where it is absent, or, with a warning, damaged."""
    path = run_folder / "settings.json"
    with suppress(OSError):  # absent or damaged, as `read_json` says it
        if content := read_json(path):
            return content
    if path.exists():
        warnings.warn(f"{path} is damaged: it is made again.", stacklevel=1)
    return {}
