"""The settings of a training run, flat and in one place. No behaviour beyond checking them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from brainage_nb.models.views import averaging_of
from brainage_nb.parameters import check_fields
from brainage_nb.volumes.augment import AugmentationSettings
from brainage_nb.volumes.recipes import name_recipe, recipe_defaults

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
