"""One predicted age and everything that must be said beside it: interval, gap, warnings in plain words.

It judges numbers and prepared volumes; reading scans and running networks is for `bundle` and `predictors`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from brainage_nb.volumes.scan_statistics import SCAN_STATISTICS

if TYPE_CHECKING:
    import pandas as pd

    from brainage_nb.volumes.heads import Head

NOT_A_DEVICE = (
    "For research only. This is not a medical device: it does not diagnose, and its result is no ground "
    "for a decision about a person's care. A brain age above or below the true age is a statistical "
    "finding with many harmless causes, among them the scanner."
)
# What a caution says, by its code: "counted" where scans are counted, "sentence" beside one age.
CAUTIONS = tomllib.loads(Path(__file__).with_name("cautions.toml").read_text(encoding="utf-8"))
OLDEST = 120.0
COARSE_MM, THICK_TIMES = 2.5, 3.0
DISAGREE_YEARS = 5.0


class Caution(NamedTuple):
    """A warning: a short stable code, and a sentence for people."""

    code: str
    sentence: str

    @classmethod
    def of(cls, code: str, **facts: Any) -> Caution:
        """The caution of this code, its sentence filled in."""
        return cls(code, CAUTIONS[code]["sentence"].format(**facts))

    @property
    def forbids_use(self) -> bool:
        """Whether the age beside it is not to be used."""
        return CAUTIONS.get(self.code, {}).get("forbids_use", False)


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
        (predicted - a) / b, for comparing gaps: it errs by more than `predicted_age` does. None where the
        bundle carries no correction.
    members : tuple of float
        What each model of the ensemble says.
    age, gap, adjusted_gap : float or None
        True age where given; predicted minus true; the gap less the gap expected at that true age.
    corrected_mae : float or None
        Mean absolute error of corrected ages on the scans that judged the run; None where not known.
    warnings : tuple of Caution
        Those for which the age is not to be used come first.
    alone : float or None
        Of a fused age: what the first model says of the T1w scan by itself, which is what heat maps explain.
    rates : dict or None
        By which ages made as this one give a rate of ageing (`rate_one_person`); None where not known.
    interval_title : str
        Level of the interval and who calibrated it, in words; empty without one.
    path : str
        Where the scan was read: tells scans of one name apart.
    volume : array (size, size, size), float16
        What the model saw: RAS, as stored.
    affine : array (4, 4)
        Voxel of `volume` to mm of the scan.
    stacked : array (channels, size, size, size) or None
        All that a network of several channels saw, `volume` first; 0 for a scan that it had to do without.
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
    corrected_mae: float | None = None
    warnings: tuple[Caution, ...] = ()
    alone: float | None = None
    rates: dict[str, Any] | None = field(default=None, repr=False)
    interval_title: str = ""
    path: str = ""
    volume: np.ndarray = field(default=None, repr=False, compare=False)
    affine: np.ndarray = field(default=None, repr=False, compare=False)
    stacked: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def do_not_use_because(self) -> str:
        """Why the age is not to be used, in sentences; empty where nothing speaks against it."""
        return " ".join(caution.sentence for caution in self.warnings if caution.forbids_use)

    def to_dict(self) -> dict[str, Any]:
        """A flat row of plain values; None where unknown or infinite; warnings as sentences."""
        row = {name: _round(getattr(self, name)) for name in COLUMNS[:-2]}
        codes = ";".join(caution.code for caution in self.warnings)
        return row | {"warnings": codes, "explanation": " ".join(w.sentence for w in self.warnings)}

    def frame(self) -> pd.DataFrame:
        """The same as a table of one column, for a notebook's output."""
        import pandas as pd

        interval = "interval" if math.isnan(self.level) else f"{self.level:.0%} interval [years]"
        corrected = _format_years(self.corrected_age)
        if self.corrected_mae is not None:
            corrected = f"{corrected} (such ages err by {self.corrected_mae:.1f} on average)"
        rows = {
            "read first": self.do_not_use_because,
            "predicted age [years]": f"{self.predicted_age:.1f}",
            interval: self.interval_text,
            "corrected for the age bias, to compare gaps [years]": corrected,
            "true age [years]": _format_years(self.age),
            "gap: predicted minus true age [years]": _format_years(self.gap, "+"),
            "gap, adjusted for the bias at this age [years]": _format_years(self.adjusted_gap, "+"),
        }
        return pd.DataFrame({"value": {name: value for name, value in rows.items() if value}})

    @property
    def interval_text(self) -> str:
        """`41.2 to 63.0`, or that there is none."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "none: too few subjects to promise one"
        return f"{self.low:.1f} to {self.high:.1f}"


COLUMNS = (
    "scan", "path", "do_not_use_because", "predicted_age", "low", "high", "level", "age", "gap",
    "adjusted_gap", "corrected_age", "corrected_mae", "warnings", "explanation",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A scan without a result: its file name, a short code, the reason in a sentence, and its path."""

    scan: str
    code: str
    sentence: str
    path: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A row with the columns of `Prediction.to_dict`, empty but for the reason."""
        row = {"scan": self.scan, "path": self.path, "warnings": self.code, "explanation": self.sentence}
        return dict.fromkeys(COLUMNS) | row


def check_age(age: float | None) -> float | None:
    """A true age in years, or None; ValueError for anything that is no age."""
    if age is None or (isinstance(age, float) and math.isnan(age)):
        return None
    if not 0 <= float(age) <= OLDEST:
        raise ValueError(
            f"age = {age}: expected years from 0 to {OLDEST:.0f} (months and days must be converted)."
        )
    return float(age)


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def _format_years(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.1f}"


# --- what the training scans looked like ----------------------------------------------------------------

COARSE = 24  # voxels a side of the blurred volumes compared: anatomy drops out, contrast and pose stay
FEWEST, MOST = 20, 1000  # training scans with which a scan can be compared
FALSE_ALARMS = 100  # of so many ordinary scans one may be called far
PERCENTILES = (5, 25, 50, 75, 95, 99)
STATISTICS = (
    *["contrast or tissue volume"] * (len(PERCENTILES) + 1), *["sharpness"] * 3, "noise", *["position"] * 3,
    *["symmetry"] * 3, "likeness to their mean",
)  # fmt: skip
"""What each number is about that `Reference.describe` gives of a volume; `SCAN_STATISTICS` may follow."""
SAME = 0.05  # scan statistics that differ by less count as equal: training scans may have one voxel size
REFERENCE_FILE = "reference.safetensors"


def name_reference(modality: str) -> str:
    """The file of the reference of another scan that a network reads beside the T1w scan."""
    return f"reference-{modality}.safetensors"


class Remoteness(NamedTuple):
    """How a scan lies to the training scans, beside which it was measured.

    Attributes
    ----------
    n_nearer, n : int
        How many of the n training scans lie nearer to the middle of them all.
    most_in : str
        One of `STATISTICS` or `SCAN_STATISTICS`: in what the scan differs most.
    """

    n_nearer: int
    n: int
    most_in: str

    @property
    def p_value(self) -> float:
        """Share of ordinary scans that lie as far out or further (conformal: exact, whatever the scans)."""
        return (1 + self.n - self.n_nearer) / (self.n + 1)

    @property
    def limit(self) -> float:
        """The p-value up to which a scan is called far: 0.01, or the least that n scans allow."""
        return max(1, (self.n + 1) // FALSE_ALARMS) / (self.n + 1)


def measure_remoteness(training: np.ndarray, scan: np.ndarray) -> Remoteness:
    """Where a scan stands among training scans by its distance from the middle of them and itself.

    Mahalanobis distance, covariance of Ledoit & Wolf (2004). Training scans and the new one are measured by
    one fit to all of them, so an ordinary scan is the furthest of n + 1 once in n + 1 times (full conformal
    prediction, Vovk 2005). Distances out of fold, the new scan outside of all fits, would raise too few
    alarms where n is small.

    Parameters
    ----------
    training : array (n, 18) or (n, 28)
        Of people who are not the scan's; one row each, as `Reference.describe` gives it.
    scan : array (18,) or (28,)
    """
    from sklearn.covariance import LedoitWolf
    from sklearn.preprocessing import StandardScaler

    everybody = np.vstack([training, scan])
    spread = everybody.std(axis=0)
    everybody = StandardScaler().fit_transform(everybody)
    everybody[:, len(STATISTICS) :] *= (spread / np.hypot(spread, SAME))[len(STATISTICS) :]
    distances = LedoitWolf(assume_centered=True).fit(everybody).mahalanobis(everybody)
    most_in = (*STATISTICS, *SCAN_STATISTICS)[int(np.abs(everybody[-1]).argmax())]
    return Remoteness(int((distances[:-1] < distances[-1]).sum()), len(training), most_in)


@dataclass(frozen=True)
class Distance:
    """How far a scan's `image_statistics` lie from those of training, in bundles that keep no rows.

    Attributes
    ----------
    mean : array (17,)
    precision : array (17, 17)
        Inverse covariance, over 17.
    limit : float
        Distance that 99 % of scans like those of training were said to stay below.
    """

    mean: np.ndarray
    precision: np.ndarray
    limit: float

    def times_too_far(self, statistics: np.ndarray) -> float:
        """Mahalanobis distance of the statistics (17,) of a scan, over the limit."""
        apart = statistics - self.mean
        return float(np.sqrt(apart @ self.precision @ apart)) / self.limit

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Distance:
        """From a bundle's arrays; release 0.1.0 kept scale, axes and whitening in place of the precision."""
        named = {name: np.asarray(array, dtype=float) for name, array in arrays.items()}
        if "precision" not in named:
            whiten = named["axes"] @ named["whiten"] / named["scale"][:, None]
            named["precision"] = whiten @ whiten.T / whiten.shape[1]
        shapes, n = [named[name].shape for name in ("mean", "precision", "limit")], len(STATISTICS) - 1
        if shapes != [(n,), (n, n), ()]:
            raise ValueError(f"distances from training have shapes {shapes}")
        self = cls(named["mean"], named["precision"], float(named["limit"]))
        finite = all(np.isfinite(value).all() for value in vars(self).values())
        least = -1e-6 * np.abs(self.precision).max()
        if not finite or self.limit <= 0 or np.linalg.eigvalsh(self.precision)[0] < least:
            raise ValueError("distances from training are not finite or not positive")
        return self


@dataclass(frozen=True)
class Reference:
    """Mean of the training volumes, how much each of them resembled it, and what describes each of them.

    Attributes
    ----------
    mean : float32 array (n, n, n)
        Blurred to about 24 voxels a side, RAS.
    likeness : (float, float, float)
        Lowest, 5 % and median correlation of training volumes with the mean.
    n_volumes : int
        Volumes behind it.
    rows : array (n, 18) or (n, 28) or None
        Each training scan, as `describe` gives it, the scan before preprocessing too where it was measured;
        None where there were fewer than 20, and in old bundles.
    distance : Distance or None
        Of old bundles only.
    mean_volume : float16 array (size, size, size) or None
        Mean of the training volumes, not blurred: where maps in years start. None in bundles that were saved
        without it.
    """

    mean: np.ndarray
    likeness: tuple[float, float, float]
    n_volumes: int
    rows: np.ndarray | None = None
    distance: Distance | None = None
    mean_volume: np.ndarray | None = None

    @classmethod
    def fit(cls, volumes: Iterable[np.ndarray], scans: np.ndarray | None = None) -> Reference:
        """From training volumes (size, size, size), as stored, RAS, one of each person, and, where they are
        known, the statistics (n, 10) of their scans (`measure_scan`).
        """
        described, whole = [], 0.0
        for volume in volumes:
            described.append((blur(volume), image_statistics(volume)))
            whole = whole + volume.astype(np.float32)
        coarse, statistics = (np.stack(part) for part in zip(*described, strict=True))
        n, total = len(coarse), coarse.sum(axis=0)
        # Each volume is compared with the mean of the others: alone among few, it would resemble itself.
        values = [_correlate(each, total - each if n > 1 else total) for each in coarse]
        likeness = tuple(float(np.quantile(values, share)) for share in (0.0, 0.05, 0.5))
        parts = [statistics, _stretch(values), *([] if scans is None else [scans])]
        rows = np.column_stack(parts) if n >= FEWEST else None
        mean_volume = (whole / n).astype(np.float16)
        return cls((total / n).astype(np.float32), likeness, n, rows, mean_volume=mean_volume)

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
        return _correlate(blur(volume), self.mean)

    def describe(self, volume: np.ndarray, scan: np.ndarray | None) -> np.ndarray:
        """Numbers to compare one volume (size, size, size) by, at most as many as a row has: its statistics
        and its likeness, then the statistics (10,) of its scan if given.
        """
        known = () if scan is None else scan
        numbers = [*image_statistics(volume), _stretch(self.correlation(volume)), *known]
        return np.array(numbers)[: self.rows.shape[1]]

    def to_dict(self) -> dict[str, Any]:
        """All but the arrays, as plain JSON values."""
        return {"likeness": list(self.likeness), "n_volumes": self.n_volumes}

    def arrays(self) -> dict[str, np.ndarray]:
        """The mean volumes, in half precision, and the rows."""
        kept = {
            "mean": self.mean.astype(np.float16),
            "mean_volume": self.mean_volume,
            "image.rows": self.rows,
        }
        return {name: array for name, array in kept.items() if array is not None}

    @classmethod
    def from_parts(cls, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray], size: int) -> Reference:
        """From `to_dict` and `arrays`; `size` is the side of the volumes to be compared, voxels."""
        sides = {"mean": size // _block(size)} | ({"mean_volume": size} if "mean_volume" in arrays else {})
        for name, side in sides.items():
            found = arrays[name]
            if found.shape != (side,) * 3 or found.dtype.kind != "f" or not np.isfinite(found).all():
                raise ValueError(
                    f"reference volume {name} has shape {found.shape}, expected {(side,) * 3}, finite"
                )
        image = {name.partition(".")[2]: arrays[name] for name in arrays if name.startswith("image.")}
        rows = _check_rows(image.pop("rows")) if "rows" in image else None
        distance = Distance.from_arrays(image) if image else None
        mean, likeness = arrays["mean"].astype(np.float32), tuple(content["likeness"])
        return cls(mean, likeness, content["n_volumes"], rows, distance, arrays.get("mean_volume"))


def _check_rows(rows: np.ndarray) -> np.ndarray:
    few, many = len(STATISTICS), len(STATISTICS) + len(SCAN_STATISTICS)
    expected = f"{FEWEST} to {MOST} rows of {few} or {many} numbers below a million"
    right = rows.ndim == 2 and FEWEST <= len(rows) <= MOST and rows.shape[1] in (few, many)
    if not (right and (np.abs(rows) < 1e6).all()):
        raise ValueError(f"what describes the training scans has shape {rows.shape}; expected {expected}")
    return rows.astype(float)


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
    coarse = blur(volume)
    bright = np.maximum(coarse - coarse.mean(), 0)
    spread, weight, place = coarse.std() + 1e-6, bright.sum() + 1e-6, np.linspace(0, 1, len(coarse))
    centres = [bright.sum(axis=others) @ place / weight for others in ((1, 2), (0, 2), (0, 1))]
    uneven = [(coarse - np.flip(coarse, axis)).std() / (2 * spread) for axis in range(3)]
    above = (volume > volume.mean()).mean()
    logs = np.log(np.array([*steps, noise]) + 1e-4)
    return np.array([*np.percentile(volume, PERCENTILES), above, *logs, *centres, *uneven])


def blur(volume: np.ndarray) -> np.ndarray:
    """Block means of a cube (size, size, size): float32, about 24 voxels a side; what is left over is cut."""
    step = _block(len(volume))
    side = len(volume) // step
    cut = np.asarray(volume[: side * step, : side * step, : side * step], dtype=np.float32)
    return cut.reshape(side, step, side, step, side, step).mean(axis=(1, 3, 5))


def _stretch(correlation: np.ndarray | float) -> np.ndarray | float:
    """Fisher's z of correlations, for which the step from 0.98 to 0.99 is as long as that from 0 to 0.6."""
    return np.arctanh(np.clip(correlation, -0.9999, 0.9999))


def _block(size: int) -> int:
    return max(1, size // COARSE)


def _correlate(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    spread = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / spread) if spread > 0 else 0.0


# --- what to warn about ---------------------------------------------------------------------------------


def find_likeness_cautions(
    reference: Reference, volume: np.ndarray, scan: np.ndarray | None
) -> list[Caution]:
    """Whether a volume, or its scan (statistics (10,)), is unlike the training scans, in one caution.

    Without the scan's statistics the volume alone is compared.
    """
    if reference.rows is not None:
        rows = reference.rows if scan is not None else reference.rows[:, : len(STATISTICS)]
        found = measure_remoteness(rows, reference.describe(volume, scan)[: rows.shape[1]])
        if found.p_value > found.limit:
            return []
        than = f"all {found.n}" if found.n_nearer == found.n else f"{found.n_nearer} of the {found.n}"
        facts = {"than": than, "n": found.n, "what": found.most_in, "odds": round(1 / found.limit)}
        return [Caution.of("far_from_training", **facts)]
    correlation, usual = reference.correlation(volume), reference.lowest_usual
    if correlation < usual:
        return [Caution.of("unlike_training", correlation=correlation, usual=usual)]
    distance = reference.distance
    times = distance.times_too_far(image_statistics(volume)) if distance else 0
    return [Caution.of("unlike_training_image", times=times)] if times > 1 else []


def find_age_cautions(predicted: float, age: float | None, training: Mapping[str, Any]) -> list[Caution]:
    """Whether predicted and true age lie where the training subjects were.

    `training` holds `age_low`, `age_high` (years) and the histogram `age_edges`, `age_counts` (subjects).
    """
    low, high = training["age_low"], training["age_high"]
    found = [
        Caution.of(f"{name}_age_outside_training", age=value, low=low, high=high)
        for name, value in (("predicted", predicted), ("true", age))
        if value is not None and not low <= value <= high
    ]
    edges, counts = np.asarray(training["age_edges"]), np.asarray(training["age_counts"])
    near = int(counts[(edges[:-1] < predicted + 5) & (edges[1:] > predicted - 5)].sum())
    return [Caution.of("few_training_subjects_near", near=near)] if not found and near < 10 else found


def find_member_cautions(members: Sequence[float]) -> list[Caution]:
    """Whether the models of an ensemble disagree."""
    if np.std(members) < DISAGREE_YEARS:
        return []
    return [Caution.of("members_disagree", n=len(members), low=min(members), high=max(members))]


def find_voxel_cautions(voxel_size: Sequence[float], usual: Sequence[float] | None) -> list[Caution]:
    """Whether voxels are coarse, flat or far from those of training.

    Sizes in mm; `usual` is (smallest, largest) of training.
    """
    small, large = min(voxel_size), max(voxel_size)
    size = " x ".join(f"{edge:.2g}" for edge in voxel_size)
    if small < 0.3 or large > 12:
        return [Caution.of("extreme_voxel_size", size=size)]
    coarse = large > COARSE_MM and (usual is None or large > 1.2 * usual[1])
    flat = large > THICK_TIMES * small and large > 2
    return [Caution.of("coarse_voxels", size=size)] if coarse or flat else []


def is_other_kind(head: Head, trained_stripped: bool | None) -> bool:
    """Whether a head is skull-stripped where training scans were not, or the reverse (None: not known)."""
    return trained_stripped is not None and head.skull_stripped != trained_stripped


def find_head_cautions(head: Head, *, trained_stripped: bool | None, by_core: bool = False) -> list[Caution]:
    """Whether the head is whole, and prepared as the training scans were (None: not known how they were).

    `by_core`: the volume comes from the core of the brain, which heads with and without skull have in common.
    """
    found = [Caution.of("cut_off", sides=", ".join(head.cut_off))] if head.cut_off else []
    if is_other_kind(head, trained_stripped):
        this, those = "a whole head", "skull-stripped scans"
        if head.skull_stripped:
            this, those = "a skull-stripped brain", "whole heads"
        code = "other_skull" if by_core else "skull_not_as_in_training"
        found.append(Caution.of(code, this=this, those=those))
    return found
