"""The MNI152 template (bundled with nilearn) as what a scan is laid onto: brain, fluid around it, bone.

nilearn's template is skull-stripped. A rim of fluid and bone is painted around its upper part, so that a
registration sees where the brain ends; nothing is invented below, where necks and faces differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .resampling import resample, smoothing_sd

CENTRE_MM = np.array([0.0, -17.0, 5.0])  # of the brain, MNI152
HALF_MM = np.array([75.0, 92.0, 82.0])  # half the brain's extent
FIELD_MM = 224.0  # edge of the cube that is looked at
FLUID, BONE = 0.27, 0.08  # where white matter is 0.88
FLUID_MM, RIM_MM = 2.0, 6.0  # outer surfaces of the painted fluid and bone, from the brain's
RIM_ABOVE_MM = -20.0  # MNI height above which the rim is used


@dataclass(frozen=True)
class Template:
    """The template on a cubic grid.

    Attributes
    ----------
    affine : (4, 4) array
        Voxel to MNI152, mm; no rotation.
    brain : (n, n, n) float32 array
        T1 intensities, 0 outside of the brain.
    painted : (n, n, n) float32 array
        The same with fluid and bone around it.
    depth_mm : (n, n, n) float32 array
        Signed distance to the brain's surface, negative inside.
    """

    affine: np.ndarray
    brain: np.ndarray
    painted: np.ndarray
    depth_mm: np.ndarray

    @property
    def spacing_mm(self) -> float:
        """Edge of a voxel."""
        return float(self.affine[0, 0])

    def points(self, step: int, *, rim: bool) -> tuple[np.ndarray, np.ndarray]:
        """World positions (n, 3) and painted intensities (n,) of every `step`-th voxel of the brain.

        With `rim`, of the painted fluid and bone of its upper part as well.
        """
        height = np.arange(self.brain.shape[2]) * self.spacing_mm + self.affine[2, 3]
        used = self.depth_mm < 0
        if rim:
            used |= (self.depth_mm < RIM_MM) & (height > RIM_ABOVE_MM)
        index = np.argwhere(used)
        index = index[(index % step == 0).all(axis=1)]
        return index * self.spacing_mm + self.affine[:3, 3], self.painted[tuple(index.T)].astype(float)

    def depth_at(self, points: np.ndarray) -> np.ndarray:
        """`depth_mm` (n,) at positions (n, 3) that are voxel centres."""
        index = np.round((points - self.affine[:3, 3]) / self.spacing_mm).astype(int)
        return self.depth_mm[tuple(index.T)]


def mni_grid(spacing_mm: float, size: int, centre_mm: np.ndarray = CENTRE_MM) -> np.ndarray:
    """Affine (4, 4) of a cube in MNI152 space: `size` voxels along each edge around a centre."""
    grid = np.diag([spacing_mm] * 3 + [1.0])
    grid[:3, 3] = np.asarray(centre_mm) - spacing_mm * (size - 1) / 2
    return grid


@lru_cache(maxsize=4)
def template(spacing_mm: float) -> Template:
    """nilearn's template at a spacing, smoothed to it; kept for the next scan."""
    from scipy import ndimage

    t1, mask, affine = _bundled()
    size = round(FIELD_MM / spacing_mm)
    grid = mni_grid(spacing_mm, size)
    sd = smoothing_sd(np.ones(3), spacing_mm)
    brain = resample(t1 * mask, affine, grid, size, sd)
    inside = resample(mask, affine, grid, size, sd) > 0.5
    # Distances run between voxel centres; the surface lies half a voxel before the next one.
    outer = ndimage.distance_transform_edt(~inside) - 0.5
    inner = ndimage.distance_transform_edt(inside) - 0.5
    depth = np.where(inside, -inner, outer) * spacing_mm
    painted = np.where(inside, brain, np.where(depth < FLUID_MM, FLUID, BONE))
    return Template(grid, brain, painted.astype(np.float32), depth.astype(np.float32))


@lru_cache(maxsize=1)
def _bundled() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T1 and brain mask at 1 mm, and their affine; both ship with nilearn."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    t1, mask = load_mni152_template(resolution=1), load_mni152_brain_mask(resolution=1)
    return t1.get_fdata(dtype=np.float32), mask.get_fdata(dtype=np.float32), t1.affine
