"""One predicted age and everything that must be said beside it: interval, gap, warnings in plain words.

It judges numbers; reading scans and running networks is for `bundle` and `members`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from brainage_nb.volumes.heads import Head

NOT_A_DEVICE = (
    "For research only. This is not a medical device: it does not diagnose, and its result is no ground "
    "for a decision about a person's care. A brain age above or below the true age is a statistical "
    "finding with many harmless causes, among them the scanner."
)
KINDS = {  # what a caution's code means where scans are counted
    "unlike_training": "do not look like the training scans at all; do not use their ages",
    "unlike_training_image": "image further from the training scans than 99 % of scans like those (contrast, "
    "sharpness, noise, position, symmetry); expect larger errors",
    "unlike_training_features": "answered by the network unlike 99 % of scans like those of training; expect "
    "larger errors",
    "predicted_age_outside_training": "predicted age outside the ages of training",
    "true_age_outside_training": "true age outside the ages of training",
    "few_training_subjects_near": "few training subjects near the predicted age",
    "members_disagree": "the models of the ensemble disagree",
    "extreme_voxel_size": "voxel sizes that cannot be right for a head",
    "coarse_voxels": "voxels coarser or flatter than those of a structural T1 scan",
    "cut_off": "head cut off at the edge of the image",
    "skull_not_as_in_training": "skull-stripped where training scans were not, or the reverse",
    "few_calibration_subjects": "interval or correction rest on few subjects",
}
OLDEST = 120.0
COARSE_MM, THICK_TIMES = 2.5, 3.0
DISAGREE_YEARS = 5.0


class Caution(NamedTuple):
    """A warning: a short stable code, and a sentence for people."""

    code: str
    sentence: str


@dataclass(frozen=True)
class Prediction:
    """The result for one scan. Ages in years.

    Attributes
    ----------
    scan : str
        The file's name, without folders.
    predicted_age : float
        Raw: the mean over the members, uncorrected.
    low, high : float
        Ends of the prediction interval; infinite where nothing can be promised.
    level : float
        Share of people whose true age the interval should hold; NaN without an interval.
    corrected_age : float or None
        Age-free corrected prediction; None where the bundle carries no correction.
    members : tuple of float
        What each member says.
    age, gap, adjusted_gap : float or None
        True age where given; predicted minus true; the gap less the gap expected at that true age.
    warnings : tuple of Caution
    path : str
        Where the scan was read: tells scans of one name apart.
    volume : array (size, size, size), float16
        What the model saw: RAS, as stored.
    affine : array (4, 4)
        Voxel of `volume` to mm of the scan.
    """

    scan: str
    predicted_age: float
    low: float
    high: float
    level: float
    corrected_age: float | None
    members: tuple[float, ...]
    age: float | None = None
    gap: float | None = None
    adjusted_gap: float | None = None
    warnings: tuple[Caution, ...] = ()
    path: str = ""
    volume: np.ndarray = field(default=None, repr=False, compare=False)
    affine: np.ndarray = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """A flat row of plain values; None where unknown or infinite; warnings as sentences."""
        row = {name: _plain(getattr(self, name)) for name in COLUMNS[:-2]}
        codes = ";".join(caution.code for caution in self.warnings)
        return row | {"warnings": codes, "explanation": " ".join(w.sentence for w in self.warnings)}

    def frame(self) -> pd.DataFrame:
        """The same as a table of one column, for a notebook's output."""
        import pandas as pd

        rows = {
            "predicted age [years]": f"{self.predicted_age:.1f}",
            f"{self.level:.0%} interval [years]"
            if self.level == self.level
            else "interval": self.interval_text,
            "predicted age, bias-corrected [years]": _said(self.corrected_age),
            "true age [years]": _said(self.age),
            "gap: predicted minus true age [years]": _said(self.gap, sign=True),
            "gap, adjusted for the bias at this age [years]": _said(self.adjusted_gap, sign=True),
        }
        return pd.DataFrame({"value": {name: value for name, value in rows.items() if value}})

    @property
    def interval_text(self) -> str:
        """`41.2 to 63.0`, or that there is none."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "none: too few subjects to promise one"
        return f"{self.low:.1f} to {self.high:.1f}"


COLUMNS = (
    "scan",
    "path",
    "predicted_age",
    "low",
    "high",
    "level",
    "corrected_age",
    "age",
    "gap",
    "adjusted_gap",
    "warnings",
    "explanation",
)


@dataclass(frozen=True)
class Failure:
    """A scan without a result: its file name, a short code, the reason in a sentence, and its path."""

    scan: str
    code: str
    sentence: str
    path: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A row with the columns of `Prediction.to_dict`, empty but for the reason."""
        return dict.fromkeys(COLUMNS) | {
            "scan": self.scan,
            "path": self.path,
            "warnings": self.code,
            "explanation": self.sentence,
        }


def checked_age(age: float | None) -> float | None:
    """A true age in years, or None; anything that is no age is refused."""
    if age is None or (isinstance(age, float) and math.isnan(age)):
        return None
    value = float(age)
    if not 0 <= value <= OLDEST:
        raise ValueError(
            f"age = {age}: expected years from 0 to {OLDEST:.0f} (months and days must be converted)."
        )
    return value


# --- what to warn about ---------------------------------------------------------------------------------


def age_cautions(predicted: float, age: float | None, training: Mapping[str, Any]) -> list[Caution]:
    """Whether predicted and true age lie where the training subjects were.

    `training` holds `age_low`, `age_high` (years) and the histogram `age_edges`, `age_counts` (subjects).
    """
    low, high = training["age_low"], training["age_high"]
    found = []
    for name, value in (("predicted", predicted), ("true", age)):
        if value is not None and not low <= value <= high:
            found.append(
                Caution(
                    f"{name}_age_outside_training",
                    f"The {name} age, {value:.1f} years, lies outside the ages the model was trained on "
                    f"({low:.1f} to {high:.1f} years); it cannot know what a brain of that age looks like.",
                )
            )
    edges, counts = np.asarray(training["age_edges"]), np.asarray(training["age_counts"])
    near = int(counts[(edges[:-1] < predicted + 5) & (edges[1:] > predicted - 5)].sum())
    if not found and near < 10:
        found.append(
            Caution(
                "few_training_subjects_near",
                f"Only {near} training subjects were within about five years of the predicted age, so the "
                "model knows this age poorly.",
            )
        )
    return found


def member_cautions(members: Sequence[float]) -> list[Caution]:
    """Whether the members of an ensemble disagree."""
    spread = float(np.std(members))
    if spread < DISAGREE_YEARS:
        return []
    return [
        Caution(
            "members_disagree",
            f"The {len(members)} models of this ensemble disagree (from {min(members):.0f} to "
            f"{max(members):.0f} years): the scan is unusual for them.",
        )
    ]


def likeness_caution(correlation: float, lowest_usual: float) -> list[Caution]:
    """Whether the scan resembles the training scans at all."""
    if correlation >= lowest_usual:
        return []
    return [
        Caution(
            "unlike_training",
            "After preprocessing this scan does not look like the training scans (correlation with their "
            f"mean {correlation:.2f}, usual above {lowest_usual:.2f}). It may not be a T1-weighted head, "
            "may lie in an unexpected orientation, or may have been prepared otherwise (for example "
            "skull-stripped). Do not use the number.",
        )
    ]


def distance_cautions(times_too_far: Mapping[str, float]) -> list[Caution]:
    """Whether an image of the right kind still lies apart from the training scans; see `Reference.far`."""
    said = {
        "image": "In contrast, sharpness, noise, position or symmetry this image is unlike the training "
        "scans ({:.1f} times as far from them as 99 % of scans like those). Another scanner, motion or a "
        "damaged file does that; expect larger errors than the model's figures say.",
        "features": "The network answers this scan unlike its training scans ({:.1f} times as far from them "
        "as 99 % of scans like those): it has seen little of this kind; expect larger errors than the "
        "model's figures say.",
    }
    return [
        Caution(f"unlike_training_{kind}", said[kind].format(times)) for kind, times in times_too_far.items()
    ]


def voxel_cautions(voxel_size: Sequence[float], usual: Sequence[float] | None) -> list[Caution]:
    """Whether voxels are coarse, flat or far from those of training. Sizes in mm; `usual` is (smallest,
    largest).
    """
    small, large = min(voxel_size), max(voxel_size)
    size = " x ".join(f"{edge:.2g}" for edge in voxel_size)
    if small < 0.3 or large > 12:
        return [
            Caution(
                "extreme_voxel_size", f"Voxels of {size} mm cannot be right for a head; check the header."
            )
        ]
    coarse = large > COARSE_MM and (usual is None or large > 1.2 * usual[1])
    if coarse or (large > THICK_TIMES * small and large > 2):
        return [
            Caution(
                "coarse_voxels",
                f"Voxels of {size} mm are coarser or flatter than those of a structural T1 scan; sulci and "
                "ventricles blur and the age may be off by years.",
            )
        ]
    return []


def head_cautions(head: Head, *, trained_stripped: bool | None) -> list[Caution]:
    """Whether the head is whole, and prepared as the training scans were (None: not known how they were)."""
    found = []
    if head.cut_off:
        sides = ", ".join(head.cut_off)
        found.append(
            Caution(
                "cut_off",
                f"The head is cut off at the {sides} of the image; part of the brain may be missing.",
            )
        )
    if trained_stripped is not None and head.skull_stripped != trained_stripped:
        this, those = ("a whole head", "skull-stripped scans")
        if head.skull_stripped:
            this, those = ("a skull-stripped brain", "whole heads")
        found.append(
            Caution(
                "skull_not_as_in_training",
                f"This scan looks like {this}, but the model was trained on {those}. Give the scan prepared "
                "as the training scans were; the number is not to be trusted.",
            )
        )
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return round(value, 4) if isinstance(value, float) else value


def _said(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:+.1f}" if sign else f"{value:.1f}"
