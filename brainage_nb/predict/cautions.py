"""How unlike the training scans a new scan is, from numbers that describe scans; says nothing about how wrong
a prediction is.

What the training scans looked like, so that a scan unlike them is noticed. It predicts nothing.

One predicted age and everything that must be said beside it: interval, gap, warnings in plain words.

It judges numbers; reading scans and running networks is for `bundle` and `members`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from brainage_nb.volumes.heads import Head


class DistanceFromTraining:
    """How unlike the training scans a scan is: Mahalanobis distance of numbers that describe it.

    Give it image statistics or penultimate features, a row a scan. More than 20 numbers a scan are first
    reduced to their leading principal components; the covariance is shrunk (Ledoit & Wolf 2004).

    Attributes
    ----------
    limit_ : float
        Distance that 99 % of unseen training-like scans stay below, from five-fold distances of the training
        scans.
    """

    components = 20

    def fit(self, features: np.ndarray) -> DistanceFromTraining:
        """Learn from training scans: array (n_scans, n_features), at least 20 scans."""
        features = np.asarray(features, dtype=float)
        if features.ndim != 2 or len(features) < 20:
            raise ValueError(f"features {features.shape}: give a row a scan, for at least 20 training scans.")
        fold = np.random.default_rng(0).permutation(len(features)) % 5
        unseen = np.empty(len(features))
        for k in range(5):
            unseen[fold == k] = self._learn(features[fold != k]).distance(features[fold == k])
        self._learn(features)
        self.limit_ = float(np.quantile(unseen, 0.99))
        return self

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Distance (n,) of each scan from the middle of the training scans, in their standard deviations."""
        scaled = (np.asarray(features, dtype=float) - self.mean_) / self.scale_
        return np.sqrt((((scaled @ self.axes_) @ self.whiten_) ** 2).sum(axis=1) / self.whiten_.shape[1])

    def warnings(self, features: np.ndarray, what: str = "image statistics") -> list[str]:
        """A sentence where scans lie beyond `limit_`."""
        far = self.distance(features) > self.limit_
        if not far.any():
            return []
        return [
            f"{int(far.sum())} of {len(far)} scans are further from the training scans (by {what}) than 99 % "
            "of scans like those would be; expect larger errors there."
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything `from_dict` needs, as plain JSON values."""
        arrays = {name: getattr(self, f"{name}_").tolist() for name in ("mean", "scale", "axes", "whiten")}
        return arrays | {"limit": self.limit_}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> DistanceFromTraining:
        """A fitted distance from `to_dict` (values may be arrays); refuses what does not fit together."""
        self = cls()
        for name in ("mean", "scale", "axes", "whiten"):
            setattr(self, f"{name}_", np.asarray(content[name], dtype=float))
        self.limit_ = float(content["limit"])
        arrays = (self.mean_, self.scale_, self.axes_, self.whiten_)
        shapes = [array.shape for array in arrays]
        n, k = shapes[2] if len(shapes[2]) == 2 else (0, 0)
        if not k or shapes != [(n,), (n,), (n, k), (k, k)]:
            raise ValueError(f"a distance has arrays {shapes}; expected (n,), (n,), (n, k), (k, k)")
        finite = all(np.isfinite(array).all() for array in arrays)
        if not (finite and (self.scale_ > 0).all() and 0 < self.limit_ < np.inf):
            raise ValueError("a distance holds values that are not finite or not positive")
        return self

    def _learn(self, features: np.ndarray) -> DistanceFromTraining:
        from sklearn.covariance import ledoit_wolf

        self.mean_, spread = features.mean(axis=0), features.std(axis=0)
        self.scale_ = np.where(spread > 0, spread, 1.0)
        scaled = (features - self.mean_) / self.scale_
        k = min(self.components, scaled.shape[1], len(scaled) // 4)
        self.axes_ = np.linalg.svd(scaled, full_matrices=False)[2][:k].T
        values, vectors = np.linalg.eigh(ledoit_wolf(scaled @ self.axes_, assume_centered=True)[0])
        self.whiten_ = vectors / np.sqrt(np.maximum(values, 1e-9))
        return self


COARSE = 24  # voxels a side of the blurred volumes compared: anatomy drops out, contrast and pose stay
FEWEST = 20  # training scans from which a distance can be learned
PERCENTILES = (5, 25, 50, 75, 95, 99)
N_STATISTICS = len(PERCENTILES) + 11
FILE = "reference.safetensors"


@dataclass(frozen=True)
class Reference:
    """Mean of the training volumes, how much each of them resembled it, and how far scans lie from them.

    Attributes
    ----------
    mean : float32 array (n, n, n)
        Blurred to about 24 voxels a side, RAS.
    likeness : (float, float, float)
        Lowest, 5 % and median correlation of training volumes with the mean.
    n_volumes : int
        Volumes behind it.
    distances : dict of DistanceFromTraining
        `image` by `image_statistics`, `features` by what the network's last layer sees; empty where fewer
        than 20 training scans gave them.
    """

    mean: np.ndarray
    likeness: tuple[float, float, float]
    n_volumes: int
    distances: dict[str, DistanceFromTraining] = field(default_factory=dict)

    @classmethod
    def fit(cls, volumes: Iterable[np.ndarray], features: Sequence[np.ndarray] = ()) -> Reference:
        """From training volumes (size, size, size), as stored, RAS, and the features of some of them (k,)."""
        seen = [(blurred(volume), image_statistics(volume)) for volume in volumes]
        coarse, numbers = np.stack([pair[0] for pair in seen]), [pair[1] for pair in seen]
        n = len(coarse)
        total = coarse.sum(axis=0)
        # Each volume is compared with the mean of the others: alone among few, it would resemble itself.
        values = [_correlation(each, total - each if n > 1 else total) for each in coarse]
        low, five, median = (float(np.quantile(values, share)) for share in (0.0, 0.05, 0.5))
        distances = {
            kind: DistanceFromTraining().fit(np.stack(rows))
            for kind, rows in (("image", numbers), ("features", features))
            if len(rows) >= FEWEST
        }
        return cls((total / n).astype(np.float32), (low, five, median), n, distances)

    @property
    def lowest_usual(self) -> float:
        """Correlation below which a scan counts as unlike the training scans.

        Half the way again below the lowest training scan, seen from the median, so that new sites pass and
        another contrast, orientation or kind of image does not.
        """
        low, _, median = self.likeness
        return low - 0.5 * (median - low) - 0.02

    def correlation(self, volume: np.ndarray) -> float:
        """Correlation of one volume (size, size, size), blurred, with the mean."""
        return _correlation(blurred(volume), self.mean)

    def far(self, volume: np.ndarray, features: np.ndarray | None) -> dict[str, float]:
        """Where a scan is beyond what 99 % of scans like those of training stay within, and how many times.

        Keys as in `distances`; `features` (k,) is None where the model gives none.
        """
        rows = {"image": image_statistics(volume), "features": features}
        times = {
            kind: float(measure.distance(rows[kind][None])[0]) / measure.limit_
            for kind, measure in self.distances.items()
        }
        return {kind: value for kind, value in times.items() if value > 1}

    def to_dict(self) -> dict[str, Any]:
        """All but the arrays, as plain JSON values."""
        return {"likeness": list(self.likeness), "n_volumes": self.n_volumes}

    def arrays(self) -> dict[str, np.ndarray]:
        """The mean volume, in half precision, and what the distances learned."""
        return {"mean": self.mean.astype(np.float16)} | {
            f"{kind}.{name}": np.asarray(value, dtype=np.float32)
            for kind, measure in self.distances.items()
            for name, value in measure.to_dict().items()
        }

    @classmethod
    def from_parts(
        cls, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray], size: int, n_features: int = 0
    ) -> Reference:
        """From `to_dict` and `arrays`; `size` is the side of the volumes to be compared, voxels, `n_features`
        how many the model gives.
        """
        mean = arrays["mean"].astype(np.float32)
        side = size // block(size)
        if mean.shape != (side, side, side) or not np.isfinite(mean).all():
            raise ValueError(f"the reference volume has shape {mean.shape}, expected {(side,) * 3}, finite")
        low, five, median = (float(value) for value in content["likeness"])
        distances = {}
        for kind, expected in (("image", N_STATISTICS), ("features", n_features)):
            named = {name.partition(".")[2]: arrays[name] for name in arrays if name.startswith(f"{kind}.")}
            if not named:
                continue
            distances[kind] = DistanceFromTraining.from_dict(named)
            if len(distances[kind].mean_) != expected:
                raise ValueError(f"{len(distances[kind].mean_)} {kind} numbers; expected {expected}")
        return cls(mean, (low, five, median), int(content["n_volumes"]), distances)


def image_statistics(volume: np.ndarray) -> np.ndarray:
    """Numbers (17,) that describe an image, not the age: contrast, sharpness, noise, position, symmetry.

    Of a volume (size, size, size), as stored, RAS: percentiles 5 to 99 of brightness; share of voxels above
    the mean; log of the mean step between neighbours along each axis (sharpness, thick slices); log of the
    mean departure of a voxel from its neighbours along the first axis (noise); and of the blurred volume,
    along each axis, the centre of what is above the mean (shares of the side) and the asymmetry (0 to 1).
    """
    volume = np.asarray(volume, dtype=np.float32)
    steps = [np.abs(np.diff(volume, axis=axis)).mean() for axis in range(3)]
    noise = np.abs(np.diff(volume, n=2, axis=0)).mean()
    coarse = blurred(volume)
    bright = np.maximum(coarse - coarse.mean(), 0)
    spread, weight, place = coarse.std() + 1e-6, bright.sum() + 1e-6, np.linspace(0, 1, len(coarse))
    centres = [bright.sum(axis=others) @ place / weight for others in ((1, 2), (0, 2), (0, 1))]
    uneven = [(coarse - np.flip(coarse, axis)).std() / (2 * spread) for axis in range(3)]
    return np.array(
        [
            *np.percentile(volume, PERCENTILES),
            (volume > volume.mean()).mean(),
            *np.log(np.array([*steps, noise]) + 1e-4),
            *centres,
            *uneven,
        ]
    )


def block(size: int) -> int:
    """Side in voxels of the blocks that are averaged."""
    return max(1, size // COARSE)


def blurred(volume: np.ndarray) -> np.ndarray:
    """Block means of a cube (size, size, size): float32, about 24 voxels a side; what is left over is cut."""
    step = block(len(volume))
    side = len(volume) // step
    cut = np.asarray(volume[: side * step, : side * step, : side * step], dtype=np.float32)
    return cut.reshape(side, step, side, step, side, step).mean(axis=(1, 3, 5))


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    spread = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / spread) if spread > 0 else 0.0


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
