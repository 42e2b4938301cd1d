"""Smooth a scan to the target resolution and sample it on a new grid.

The same numbers as MONAI's GaussianSmooth followed by SpatialResample (bilinear, zeros outside), at a
fraction of the time. Where to put the grid is not decided here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from math import erf, prod, sqrt

import numpy as np

from brainage_nb.volumes.scans import voxel_sizes

FWHM_PER_SD = 2.0 * sqrt(2.0 * np.log(2.0))
KERNEL_SDS = 4.0  # the Gaussian is cut here, as in MONAI
# Grids whose axes deviate from the scan's by less than this many voxels over their length count as parallel.
PARALLEL_VOXELS = 1e-3
BLOCK = 48  # rows of a banded matrix multiplied at a time; the product stays small and one BLAS call large


def smoothing_sd(voxel_size: np.ndarray, spacing_mm: float) -> np.ndarray:
    """Standard deviation, in voxels an axis, of the Gaussian that brings a scan to a resolution.

    A voxel's edge is taken as the full width at half maximum of what it sees; widths add in squares. An axis
    that is already as coarse as the target is left alone.

    Parameters
    ----------
    voxel_size : (3,) array
        mm.
    spacing_mm : float
        Target.

    Returns
    -------
    (3,) array
    """
    voxel_size = np.asarray(voxel_size, dtype=float)
    width = np.sqrt(np.maximum(0.0, spacing_mm**2 - voxel_size**2))
    sd = width / FWHM_PER_SD / voxel_size
    return np.where(sd < 0.05, 0.0, sd)  # below, the kernel is the identity to float32


def gaussian_kernel(sd: float) -> np.ndarray:
    """Gaussian integrated over each voxel, odd length, cut at four deviations: MONAI's default kernel."""
    if sd == 0.0:
        return np.ones(1)
    tail = int(max(sd * KERNEL_SDS, 0.5) + 0.5)
    edges = [erf((x - 0.5) / (sd * sqrt(2.0))) for x in range(-tail, tail + 2)]
    return 0.5 * np.diff(edges)


def resample(
    array: np.ndarray, affine: np.ndarray, grid_affine: np.ndarray, size: int, sd: np.ndarray | None = None
) -> np.ndarray:
    """Smooth, then sample a volume linearly on a cubic grid; outside of the volume is 0.

    Parameters
    ----------
    array : (i, j, k) float32 array
        In any memory order and orientation.
    affine : (4, 4) array
        Voxel to world, mm.
    grid_affine : (4, 4) array
        Voxel of the result to world, mm.
    size : int
        Edge of the result in voxels.
    sd : (3,) array, optional
        Of the Gaussian, in voxels along i, j, k; none where left out.

    Returns
    -------
    (size, size, size) float32 array
        Axes as in `grid_affine`.
    """
    sd = np.zeros(3) if sd is None else np.asarray(sd, dtype=float)
    to_scan = np.linalg.inv(affine) @ grid_affine
    axes, tilt = find_main_axes(to_scan)
    if sorted(axes) == [0, 1, 2] and tilt.sum(axis=1).max() * size < PARALLEL_VOXELS:
        return _resample_parallel(array, to_scan, axes, size, sd)
    return _resample_tilted(array, to_scan, size, sd)


def find_main_axes(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The axis (3,) along which each axis of a grid mainly runs, and how far (3, 3) it strays."""
    strays = np.abs(affine[:3, :3])
    axes = strays.argmax(axis=0)
    strays[axes, range(3)] = 0
    return axes, strays


def resample_to(
    resolution_mm: float, array: np.ndarray, affine: np.ndarray, grid_affine: np.ndarray, size: int
) -> np.ndarray:
    """`resample` after smoothing to a resolution, mm."""
    sd = smoothing_sd(voxel_sizes(affine), resolution_mm)
    return resample(array, affine, grid_affine, size, sd)


def along_axes(array: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    """Apply one matrix along each axis: result[a, b, c] = sum A[a, i] B[b, j] C[c, k] array[i, j, k].

    Parameters
    ----------
    array : (i, j, k) float32 array
    matrices : three arrays (a, i), (b, j), (c, k)
        Columns that are zero throughout cost nothing.

    Returns
    -------
    (a, b, c) float32 array
    """
    order = np.argsort(array.strides)[::-1]  # slowest axis first, so that every product reads memory in order
    work = array.transpose(order)
    used = [_used_columns(matrices[axis]) for axis in order]
    work = work[tuple(used)]
    slow, middle, fast = (
        matrices[axis][:, columns].astype(np.float32) for axis, columns in zip(order, used, strict=True)
    )
    with one_thread():
        work = np.matmul(work, fast.T)
        work = np.matmul(middle, work)
        work = np.matmul(slow, work.reshape(len(work), -1)).reshape(len(slow), len(middle), len(fast))
    return work.transpose(np.argsort(order))


class LinearSampler:
    """Linear interpolation of several volumes at once; beyond their border its value goes on.

    Eight times faster than `scipy.ndimage.map_coordinates` on each of four volumes.

    Parameters
    ----------
    volumes : (i, j, k, n) array
        n volumes on one grid, each axis at least 2 long.
    """

    def __init__(self, volumes: np.ndarray) -> None:
        *self.shape, self.n = volumes.shape
        flat = np.ascontiguousarray(volumes, np.float32).ravel()
        # one read gives a voxel and its neighbour along the last axis, all n values of both
        self.pairs = np.lib.stride_tricks.sliding_window_view(flat, 2 * self.n)[:: self.n]

    def __call__(self, voxels: np.ndarray) -> np.ndarray:
        """Values (m, n), float32, at voxel coordinates (m, 3)."""
        last = np.array(self.shape) - 1.0
        voxels = np.clip(voxels, 0, last)
        first = np.minimum(np.floor(voxels), last - 1)
        share = (voxels - first).astype(np.float32)
        row, plane = self.shape[2], self.shape[1] * self.shape[2]
        place = (first @ [plane, row, 1]).astype(np.intp)
        near, far = (self._on_plane(at, row, share) for at in (place, place + plane))
        return near + share[:, :1] * (far - near)

    def _on_plane(self, place: np.ndarray, row: int, share: np.ndarray) -> np.ndarray:
        low, high = self.pairs[place], self.pairs[place + row]
        line = low + share[:, 1:2] * (high - low)
        return line[:, : self.n] + share[:, 2:] * (line[:, self.n :] - line[:, : self.n])


def upsample(volume: np.ndarray, factor: int, shape: tuple[int, ...]) -> np.ndarray:
    """A volume at `factor` times its resolution, linear; its voxel k is voxel factor * k of the result."""
    matrices = []
    for length, n in zip(shape, volume.shape, strict=True):
        matrices.append(_interpolation(np.minimum(np.arange(length) / factor, n - 1), n))
    return along_axes(np.asarray(volume, np.float32), matrices)


def _used_columns(matrix: np.ndarray) -> slice:
    columns = np.flatnonzero(matrix.any(axis=0))
    return slice(columns[0], columns[-1] + 1) if len(columns) else slice(0, 1)


def _resample_parallel(
    array: np.ndarray, to_scan: np.ndarray, axes: np.ndarray, size: int, sd: np.ndarray
) -> np.ndarray:
    """Grid axes run along scan axes: smoothing and interpolation are one small matrix an axis."""
    matrices: list[np.ndarray] = [np.empty(0)] * 3
    for grid_axis, axis in enumerate(axes):
        positions = to_scan[axis, grid_axis] * np.arange(size) + to_scan[axis, 3]
        n = array.shape[axis]
        matrices[axis] = _interpolation(positions, n) @ _smoothing(n, sd[axis])
    return np.ascontiguousarray(along_axes(array, matrices).transpose(axes))


def _interpolation(positions: np.ndarray, n: int) -> np.ndarray:
    """Weights (len(positions), n) of linear interpolation at voxel coordinates; 0 beyond the ends."""
    distance = np.abs(positions[:, None] - np.arange(n))
    return np.maximum(0.0, 1.0 - distance)


def _smoothing(n: int, sd: float) -> np.ndarray:
    """The Gaussian as a banded matrix (n, n); outside of the volume is 0."""
    from scipy.linalg import toeplitz

    kernel = gaussian_kernel(sd)
    tail = len(kernel) // 2
    below, above = np.zeros((2, n))
    below[: tail + 1], above[: tail + 1] = kernel[tail::-1][:n], kernel[tail:][:n]
    return toeplitz(below, above)


def _resample_tilted(array: np.ndarray, to_scan: np.ndarray, size: int, sd: np.ndarray) -> np.ndarray:
    """Any affine: smooth the part that is needed, then interpolate in three dimensions."""
    from scipy.ndimage import affine_transform

    corners = np.array(np.meshgrid(*[[0, size - 1]] * 3)).reshape(3, -1)
    reached = to_scan[:3, :3] @ corners + to_scan[:3, 3:]
    low = np.maximum(0, np.floor(reached.min(axis=1)).astype(int) - 1)
    high = np.minimum(array.shape, np.ceil(reached.max(axis=1)).astype(int) + 2)
    if np.any(low >= high):
        return np.zeros((size,) * 3, np.float32)
    part = _smoothed(array, sd, low, high)
    # With the scan's slowest axis first, affine_transform reads memory in order.
    order = np.argsort(part.strides)[::-1]
    matrix, offset = to_scan[:3, :3][order], (to_scan[:3, 3] - low)[order]
    part, shape = part.transpose(order), (size,) * 3
    return affine_transform(part, matrix, offset, shape, np.float32, order=1, mode="grid-constant")


def _smoothed(array: np.ndarray, sd: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The box [low, high) of the smoothed volume, same axes as `array`."""
    order = np.argsort(array.strides)[::-1]
    tails = [len(gaussian_kernel(s)) // 2 for s in sd]
    start = [max(0, low[a] - tails[a]) for a in range(3)]
    stop = [min(array.shape[a], high[a] + tails[a]) for a in range(3)]
    work = array[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))].transpose(order)
    with one_thread():
        for place, axis in enumerate(order):
            rows = slice(low[axis] - start[axis], high[axis] - start[axis])
            band = _smoothing(stop[axis] - start[axis], sd[axis])[rows]
            work = _multiply_along(place, band.astype(np.float32), work)
    return work.transpose(np.argsort(order))


def _multiply_along(axis: int, band: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Multiply a banded matrix along one axis of a volume, a block of rows at a time."""
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    work = array.reshape(-1, array.shape[axis], prod(after))
    made = np.empty((len(work), len(band), prod(after)), np.float32)
    for first in range(0, len(band), BLOCK):
        rows, target = band[first : first + BLOCK], made[:, first : first + BLOCK]
        columns = _used_columns(rows)
        if after:
            np.matmul(rows[:, columns], work[:, columns], out=target)
        else:  # one large product instead of many by a vector
            target[..., 0] = work[:, columns, 0] @ rows[:, columns].T
    return made.reshape(*before, len(band), *after)


def one_thread() -> AbstractContextManager:
    """Keep BLAS to one thread: on a busy CPU, threads that wait for each other cost ten times the work."""
    return _blas().limit(limits=1, user_api="blas")


@lru_cache(maxsize=1)
def _blas():
    import scipy.linalg  # noqa: F401 - brings a BLAS of its own, which has to be loaded to be limited
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
