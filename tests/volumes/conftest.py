"""A made-up head: ellipsoids with the right order of bright and dark, in a known place."""

from collections.abc import Callable

import nibabel as nib
import numpy as np
import pytest

BRAIN_CENTRE = np.array([4.0, -6.0, 10.0])  # world, mm
BRAIN_RADII = np.array([66.0, 82.0, 62.0])


def head_array(affine: np.ndarray, shape: tuple[int, ...], *, brain_only: bool = False) -> np.ndarray:
    """Intensities (i, j, k) float32 of the head at each voxel centre of a grid."""
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    world = voxels @ affine[:3, :3].T + affine[:3, 3] - BRAIN_CENTRE
    radius = np.sqrt(((world / BRAIN_RADII) ** 2).sum(axis=-1))
    made = np.zeros(shape)
    if not brain_only:
        neck = (np.hypot(world[..., 0], world[..., 1] + 20) < 55) & (world[..., 2] < -40)
        made[neck] = 500
        made += 900 * _soft(radius, 1.24)
        made -= made * 0.85 * _soft(radius, 1.14)
    brain = 700 + 80 * np.sin(world[..., 0] / 9) * np.cos(world[..., 1] / 11) + world[..., 2]
    inside = _soft(radius, 1.0)
    return ((1 - inside) * made + inside * brain).astype(np.float32)


def _soft(radius: np.ndarray, edge: float) -> np.ndarray:
    return np.clip((edge - radius) / 0.04 + 0.5, 0, 1)


@pytest.fixture
def make_head() -> Callable[..., nib.Nifti1Image]:
    """Function (voxel_mm, brain_only, neck_mm) -> RAS image that ends `neck_mm` below the brain's centre."""

    def make(voxel_mm: float = 3.0, *, brain_only: bool = False, neck_mm: float = 110.0) -> nib.Nifti1Image:
        low = BRAIN_CENTRE - np.array([96, 114, neck_mm])
        high = BRAIN_CENTRE + np.array([96, 114, 96])
        affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
        affine[:3, 3] = low
        shape = tuple(np.ceil((high - low) / voxel_mm).astype(int))
        return nib.Nifti1Image(head_array(affine, shape, brain_only=brain_only), affine)

    return make
