"""What the training scans looked like, so that a scan unlike them is noticed. It predicts nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

COARSE = 24  # voxels a side of the blurred volumes compared: anatomy drops out, contrast and pose stay
FILE = "reference.safetensors"


@dataclass(frozen=True)
class Reference:
    """Mean of the training volumes, and how much each of them resembled it.

    Attributes
    ----------
    mean : float32 array (n, n, n)
        Blurred to about 24 voxels a side, RAS.
    likeness : (float, float, float)
        Lowest, 5 % and median correlation of training volumes with the mean.
    n_volumes : int
        Volumes behind it.
    """

    mean: np.ndarray
    likeness: tuple[float, float, float]
    n_volumes: int

    @classmethod
    def fit(cls, volumes: Iterable[np.ndarray]) -> Reference:
        """From training volumes (size, size, size), z-scored, RAS."""
        coarse = np.stack([blurred(volume) for volume in volumes])
        n = len(coarse)
        total = coarse.sum(axis=0)
        # Each volume is compared with the mean of the others: alone among few, it would resemble itself.
        values = [_correlation(each, total - each if n > 1 else total) for each in coarse]
        low, five, median = (float(np.quantile(values, share)) for share in (0.0, 0.05, 0.5))
        return cls((total / n).astype(np.float32), (low, five, median), n)

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

    def to_dict(self) -> dict[str, Any]:
        """All but the mean volume, as plain JSON values."""
        return {"likeness": list(self.likeness), "n_volumes": self.n_volumes}

    def arrays(self) -> dict[str, np.ndarray]:
        """The mean volume, in half precision."""
        return {"mean": self.mean.astype(np.float16)}

    @classmethod
    def from_parts(cls, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray], size: int) -> Reference:
        """From `to_dict` and `arrays`; `size` is the side of the volumes to be compared, voxels."""
        mean = arrays["mean"].astype(np.float32)
        side = size // block(size)
        if mean.shape != (side, side, side) or not np.isfinite(mean).all():
            raise ValueError(f"the reference volume has shape {mean.shape}, expected {(side,) * 3}, finite")
        low, five, median = (float(value) for value in content["likeness"])
        return cls(mean, (low, five, median), int(content["n_volumes"]))


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
