"""Lay the MNI152 template onto a scan: a similarity from many poses, then an affine map, by Gauss-Newton.

The sum of squared differences after the best linear intensity scaling, with outliers (scalp, vessels,
lesions) weighted down, and with a prior that keeps size and shape anatomical. No random sampling: the same
scan gives the same map. SimpleITK's regular-step descent was tried first and let scales run away.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from .mni import CENTRE_MM, HALF_MM, template
from .resampling import LinearSampler, resample, smoothing_sd
from .scans import voxel_sizes

FIELD_MM = 272.0  # cube around the head that is looked at
SCALE = 0.92  # template to a usual adult brain, which is smaller
SCALE_SD, SHAPE_SD = 0.10, 0.04  # of the logarithm of size, and of its stretch and shear
POINTS_PER_OBSERVATION = 100  # neighbouring voxels say the same thing
# Poses the search starts from, degrees about the left-right, back-front and bottom-top axes.
POSES = tuple(itertools.product((-24, 0, 24), (-20, 0, 20), (-20, 0, 20)))
ROUNDS = ((4, 9), (6, 3))  # steps at 8 mm, and how many poses go on, at last at 4 mm
SAME_MM = 2.0  # two poses nearer than this at the corners of the brain are one
MOST_MM = 12.0  # a step moves no point of the brain farther
BRIGHTEST = 1.15  # of the level of white matter; fat above it is cut
LEVEL_MM, LEVEL_PERCENTILE = 45.0, 80  # that level: this percentile within this radius of the head's centre
TUKEY = 4.685  # residuals beyond so many deviations do not count
LOWEST_SPREAD = 0.03
SMALL_MM = 0.1  # a step below ends the search


@dataclass(frozen=True)
class Alignment:
    """Where the template lies in a scan.

    Attributes
    ----------
    to_scan : (4, 4) array
        MNI152 position to the scan's world position, mm.
    correlation : float
        Of the template's intensities with the scan's, inside the brain.
    level : float
        Intensity of white matter, about.
    """

    to_scan: np.ndarray
    correlation: float
    level: float

    @property
    def scales(self) -> np.ndarray:
        """Stretch along the three main axes, largest first; 1 is the template's size."""
        return np.linalg.svd(self.to_scan[:3, :3], compute_uv=False)


class Target:
    """A scan at one resolution, with its gradient, sampled at world positions."""

    def __init__(self, volume: np.ndarray, affine: np.ndarray) -> None:
        gradient = np.gradient(volume, float(affine[0, 0]))
        self.sample = LinearSampler(np.stack([volume, *gradient], axis=-1))
        self.inverse = np.linalg.inv(affine)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Intensities (n,) and gradients (n, 3) at world positions (n, 3)."""
        values = self.sample(positions @ self.inverse[:3, :3].T + self.inverse[:3, 3]).astype(float)
        return values[:, 0], values[:, 1:]


def align(array: np.ndarray, affine: np.ndarray, centre_mm: np.ndarray) -> Alignment:
    """Find the template in a scan.

    Parameters
    ----------
    array : (i, j, k) float32 array
        A head, or a brain without its skull.
    affine : (4, 4) array
        Voxel to world, mm; heads are upright in the world to within about 35 degrees.
    centre_mm : (3,) array
        About the middle of the head (`heads.find_head`), world.
    """
    coarse, level = _target(array, affine, centre_mm, 8.0)
    points, values = template(8.0).points(1, rim=False)
    starts = [_start(centre_mm, pose) for pose in POSES]
    for steps, kept in ROUNDS:  # the poses that are worst after a few steps are given up
        found = [_search(coarse, points, values, start, similarity=True, steps=steps) for start in starts]
        starts = _best_apart(found, kept)
    fine, _ = _target(array, affine, centre_mm, 4.0, level)
    points, values = halved(*template(4.0).points(1, rim=False), 4.0)
    found = [_search(fine, points, values, start, similarity=True, steps=10) for start in starts]
    start = max(found, key=lambda pair: pair[1])[0]
    return Alignment(*_search(fine, points, values, start, similarity=False, steps=25), level)


def _best_apart(found: list[tuple[np.ndarray, float]], kept: int) -> list[np.ndarray]:
    """The maps of highest correlation, at most `kept`, none within `SAME_MM` of a better one."""
    corners = CENTRE_MM + HALF_MM * np.array(list(itertools.product((-1, 1), repeat=3)))
    apart: list[np.ndarray] = []
    for candidate, _ in sorted(found, key=lambda pair: -pair[1]):
        moved = [(candidate - other)[:3, :3] @ corners.T + (candidate - other)[:3, 3:] for other in apart]
        if all(np.linalg.norm(shift, axis=0).max() > SAME_MM for shift in moved):
            apart.append(candidate)
    return apart[:kept]


def halved(points: np.ndarray, values: np.ndarray, spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Every second point (n, 3) of a grid, as the fields of one colour on a chessboard, and its values."""
    half = (points / spacing_mm).round().astype(int).sum(axis=1) % 2 == 0
    return points[half], values[half]


def fit_intensity(
    scan: np.ndarray, target: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Slope of target on scan intensities, residuals (n,) and outlier weights (n,), in two rounds."""
    for _ in range(2):
        mean, wanted = np.average(scan, weights=weights), np.average(target, weights=weights)
        spread = max(float(np.average((scan - mean) ** 2, weights=weights)), 1e-9)
        slope = float(np.average((scan - mean) * (target - wanted), weights=weights)) / spread
        residual = target - wanted - slope * (scan - mean)
        sd = max(1.4826 * float(np.median(np.abs(residual))), LOWEST_SPREAD)
        weights = np.clip(1 - (residual / (TUKEY * sd)) ** 2, 0, 1) ** 2 + 1e-3
    return max(slope, 0.05), residual, weights


def _target(
    array: np.ndarray, affine: np.ndarray, centre: np.ndarray, spacing: float, level: float = 0.0
) -> tuple[Target, float]:
    size = round(FIELD_MM / spacing)
    grid = np.diag([spacing] * 3 + [1.0])
    grid[:3, 3] = np.asarray(centre) - spacing * (size - 1) / 2
    cube = resample(array, affine, grid, size, smoothing_sd(voxel_sizes(affine), spacing))
    if not level:
        away = (np.arange(size) - (size - 1) / 2) * spacing
        x, y, z = np.meshgrid(away, away, away, indexing="ij", sparse=True)
        near = cube[x**2 + y**2 + z**2 < LEVEL_MM**2]
        level = float(np.percentile(near, LEVEL_PERCENTILE)) or 1.0
    return Target(np.clip(cube / level, 0, BRIGHTEST), grid), level


def _start(centre: np.ndarray, pose: tuple[int, int, int]) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    start = np.eye(4)
    start[:3, :3] = SCALE * Rotation.from_euler("xyz", pose, degrees=True).as_matrix()
    start[:3, 3] = centre - start[:3, :3] @ CENTRE_MM
    return start


def _search(
    target: Target, points: np.ndarray, values: np.ndarray, start: np.ndarray, *, similarity: bool, steps: int
) -> tuple[np.ndarray, float]:
    """Gauss-Newton from one start; the map (4, 4) and the correlation there."""
    from scipy.linalg import expm

    moves = _moves(similarity)
    current, weights = start, np.ones(len(points))
    for _ in range(steps):
        positions = points @ current[:3, :3].T + current[:3, 3]
        scan, gradient = target.at(positions)
        slope, residual, weights = fit_intensity(scan, values, weights)
        centre = current[:3, :3] @ CENTRE_MM + current[:3, 3]
        away = np.c_[positions - centre, np.ones(len(positions))]
        columns = [slope * np.einsum("ij,ij->i", gradient, (away @ move.T)[:, :3]) for move in moves]
        columns += [scan - scan.mean(), np.ones(len(scan))]
        design = np.stack(columns, axis=1)
        weighted = (design * weights[:, None]).T
        normal, right = weighted @ design, weighted @ residual
        unit = weights.sum() / POINTS_PER_OBSERVATION * np.average(residual**2, weights=weights)
        precision, pull = _prior(current[:3, :3], similarity)
        n = len(moves)
        normal[6:n, 6:n] += unit * precision
        right[6:n] -= unit * pull
        normal += np.eye(len(normal)) * 1e-9 * np.trace(normal) / len(normal)
        step = np.linalg.solve(normal, right)[:n]
        length = np.abs(step[:3]).max() + 80 * np.abs(step[3:]).max()
        turn = expm(np.tensordot(step * min(1.0, MOST_MM / max(length, 1e-9)), moves, axes=1))
        to, back = np.eye(4), np.eye(4)
        to[:3, 3], back[:3, 3] = centre, -centre
        current = to @ turn @ back @ current
        if length < SMALL_MM:
            break
    return current, correlation(scan, values)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two arrays (n,); 0 where one of them is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def _moves(similarity: bool) -> np.ndarray:
    """Directions (n, 4, 4) of a small change: three shifts, three turns, then one scale or six stretches."""
    moves = np.zeros((7 if similarity else 12, 4, 4))
    for axis, (a, b) in enumerate(((1, 2), (2, 0), (0, 1))):
        moves[axis, axis, 3] = 1
        moves[3 + axis, a, b], moves[3 + axis, b, a] = -1, 1
        if not similarity:
            moves[6 + axis, axis, axis] = 1
            moves[9 + axis, a, b] = moves[9 + axis, b, a] = 1
    if similarity:
        moves[6, :3, :3] = np.eye(3)
    return moves


def _prior(matrix: np.ndarray, similarity: bool) -> tuple[np.ndarray, np.ndarray]:
    """Precision of the scale or stretch parameters, and precision times distance from a usual brain."""
    from scipy.linalg import polar

    values, vectors = np.linalg.eigh(polar(matrix, side="left")[1])
    stretch = vectors @ np.diag(np.log(values)) @ vectors.T
    away = np.diag(stretch) - np.log(SCALE)
    if similarity:
        precision = np.array([[1 / SCALE_SD**2]])
        return precision, precision @ [away.mean()]
    precision = np.zeros((6, 6))
    precision[:3, :3] = (np.eye(3) - 1 / 3) / SHAPE_SD**2 + np.ones((3, 3)) / 9 / SCALE_SD**2
    precision[3:, 3:] = np.eye(3) * 2 / SHAPE_SD**2
    return precision, precision @ np.r_[away, stretch[1, 2], stretch[2, 0], stretch[0, 1]]
