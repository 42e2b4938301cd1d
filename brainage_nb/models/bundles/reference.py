"""What the training scans looked like, so that a scan unlike them is noticed. It predicts nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from brainage_nb.evaluation.distance import DistanceFromTraining

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
