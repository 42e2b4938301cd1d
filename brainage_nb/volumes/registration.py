"""The MNI152 template (bundled with nilearn) as what a scan is laid onto: brain, fluid around it, bone.

nilearn's template is skull-stripped. A rim of fluid and bone is painted around its upper part, so that a
registration sees where the brain ends; nothing is invented below, where necks and faces differ.

Bend the template, already laid onto a scan, to that brain's shape: smooth polynomials in three dimensions.

It finds the brain's surface, it does not match gyri: about a hundred coefficients, with a prior on bending.

Lay the MNI152 template onto a scan: a similarity from many poses, then an affine map, by Gauss-Newton.

The sum of squared differences after the best linear intensity scaling, with outliers (scalp, vessels,
lesions) weighted down, and with a prior that keeps size and shape anatomical. No random sampling: the same
scan gives the same map. SimpleITK's regular-step descent was tried first and let scales run away.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from brainage_nb.volumes.resampling import LinearSampler, along_axes, resample, smoothing_sd, upsample
from brainage_nb.volumes.scans import voxel_sizes

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


DEGREES = (1, 2, 4)  # fitted one after the other
STEPS = 6  # Gauss-Newton steps for each degree
STIFFNESS = 0.02  # prior precision of a coefficient of degree 2, 1/mm^2; grows with the degree squared
POINTS_PER_OBSERVATION = 150
STEP = 2  # every second voxel along each axis
REACH = 1.2  # polynomials go on as constants beyond so many half-extents of the brain
SMALL_MM = 0.3
BIAS_MM = 20.0  # brightness that varies more slowly is taken out
INSIDE_MM = 4.0


def even_brightness(scan: np.ndarray, against: Template) -> np.ndarray:
    """Divide a scan on the template's grid by its slow ratio to the template; white matter comes near 0.88.

    Parameters
    ----------
    scan : (n, n, n) float32 array
        Intensities where white matter is about 1.
    against : Template
        On the same grid.
    """
    from scipy.ndimage import gaussian_filter

    inside = (against.depth_mm < -INSIDE_MM) & (against.brain > 0.5)
    width = BIAS_MM / (2 * against.spacing_mm)

    def slow(volume: np.ndarray) -> np.ndarray:
        return gaussian_filter(np.where(inside, volume, 0)[::2, ::2, ::2], width) + 1e-3

    ratio = slow(scan * against.brain) / slow(against.brain**2)
    ratio = upsample(ratio, 2, scan.shape)
    return np.clip(scan / np.maximum(ratio, 1e-3), 0, BRIGHTEST).astype(np.float32)


def bend(scan: np.ndarray, onto: Template) -> tuple[np.ndarray, float]:
    """Fit the polynomials.

    Parameters
    ----------
    scan : (n, n, n) float32 array
        On the template's grid, evenly bright.
    onto : Template

    Returns
    -------
    depth_mm : (n, n, n) float32 array
        Signed distance to the bent template brain's surface at each voxel of the scan, negative inside.
    correlation : float
        Of the bent template with the scan, inside the brain: ventricles, deep grey, white matter. The painted
        rim does not count, since a plain ball has one too.
    """
    from scipy.ndimage import gaussian_filter

    points, values, every = _fitted_points(onto.spacing_mm)
    target = Target(gaussian_filter(scan, 0.7), onto.affine)
    coefficients = np.zeros((0, 3))
    weights = np.ones(len(points))
    for degree in DEGREES:
        terms = exponents(degree)
        basis = every[:, : len(terms)]  # the terms of a lower degree come first
        coefficients = np.r_[coefficients, np.zeros((len(terms) - len(coefficients), 3))]
        for _ in range(STEPS):
            scanned, gradient = target.at(points + basis @ coefficients)
            slope, residual, weights = fit_intensity(scanned, values, weights)
            change = _step(basis, terms, gradient * slope, scanned, residual, weights, coefficients)
            coefficients = coefficients + change
            if np.abs(basis @ change).max() < SMALL_MM:
                break
    scanned, _ = target.at(points + basis @ coefficients)
    inside = onto.depth_at(points) < -INSIDE_MM
    return _bent_depth(coefficients, onto), correlation(scanned[inside], values[inside])


@lru_cache(maxsize=1)
def _fitted_points(spacing_mm: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (n, 3), template values (n,) and polynomials (n, terms) that every scan is fitted at."""
    points, values = halved(*template(spacing_mm).points(STEP, rim=True), STEP * spacing_mm)
    return points, values, polynomials(points, exponents(DEGREES[-1])).astype(np.float32)


def exponents(degree: int) -> np.ndarray:
    """Degrees along x, y, z (n, 3) of the terms up to a total degree, lowest total first."""
    every = [term for term in itertools.product(range(degree + 1), repeat=3) if sum(term) <= degree]
    return np.array(sorted(every, key=lambda term: (sum(term), term)))


def polynomials(points: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Products of Legendre polynomials (n_points, n_terms) at MNI152 positions (n_points, 3)."""
    each = [_legendre(points[:, axis], axis, terms)[:, terms[:, axis]] for axis in range(3)]
    return each[0] * each[1] * each[2]


def polynomial_field(
    affine: np.ndarray, shape: tuple[int, ...], terms: np.ndarray, coefficients: np.ndarray
) -> np.ndarray:
    """Sum of `polynomials` weighted by coefficients (n_terms,), float32, on a grid along MNI152's axes."""
    weights = np.zeros((terms.max() + 1,) * 3, np.float32)
    weights[tuple(terms.T)] = coefficients
    lines = [affine[axis, axis] * np.arange(n) + affine[axis, 3] for axis, n in enumerate(shape)]
    return along_axes(weights, [_legendre(line, axis, terms) for axis, line in enumerate(lines)])


def _legendre(positions: np.ndarray, axis: int, terms: np.ndarray) -> np.ndarray:
    """Legendre polynomials (n, degrees) along one axis of MNI152, mm; constant far outside of the brain."""
    from numpy.polynomial.legendre import legvander

    scaled = np.clip((positions - CENTRE_MM[axis]) / HALF_MM[axis], -REACH, REACH)
    return legvander(scaled, terms.max())


def _step(
    basis: np.ndarray,
    terms: np.ndarray,
    gradient: np.ndarray,
    scanned: np.ndarray,
    residual: np.ndarray,
    weights: np.ndarray,
    coefficients: np.ndarray,
) -> np.ndarray:
    """One Gauss-Newton step (n_terms, 3), with the prior on bending."""
    n = basis.shape[1]
    columns = [basis * gradient[:, axis, None] for axis in range(3)]
    linear = np.c_[scanned - scanned.mean(), np.ones(len(scanned))]
    design = np.concatenate([*columns, linear], axis=1).astype(np.float32)
    weighted = (design * weights[:, None].astype(np.float32)).T
    normal, right = (weighted @ design).astype(float), weighted.astype(float) @ residual
    total = terms.sum(axis=1)
    stiff = np.where(total <= 1, 1e-3, STIFFNESS * (total / 2) ** 2)
    unit = len(scanned) / POINTS_PER_OBSERVATION * np.average(residual**2, weights=weights)
    precision = unit * np.tile(stiff, 3)
    normal[: 3 * n, : 3 * n] += np.diag(precision)
    right[: 3 * n] -= precision * coefficients.T.ravel()
    normal += np.eye(len(normal)) * 1e-9 * np.trace(normal) / len(normal)
    return np.linalg.solve(normal, right)[: 3 * n].reshape(3, n).T


def _bent_depth(coefficients: np.ndarray, onto: Template) -> np.ndarray:
    """The template's depth map carried along: where x moves to x + u(x), a voxel y looks at x."""
    from scipy.ndimage import map_coordinates

    shape = tuple(n // 2 for n in onto.brain.shape)
    coarse = onto.affine @ np.diag([2, 2, 2, 1])
    terms = exponents(DEGREES[-1])
    field = [polynomial_field(coarse, shape, terms, part) for part in coefficients.T / coarse[0, 0]]
    moved = LinearSampler(np.stack(field, axis=-1))
    here = np.stack(np.indices(shape, np.float32), axis=-1).reshape(-1, 3)
    back = np.zeros_like(here)
    for _ in range(5):  # the inverse of a smooth small displacement, by repetition
        back = moved(here - back)
    shift = [2 * upsample(part.reshape(shape), 2, onto.brain.shape) for part in back.T]
    full = np.indices(onto.brain.shape, dtype=np.float32)
    return map_coordinates(onto.depth_mm, full - np.stack(shift), order=1, mode="nearest")


FIELD_MM_ALIGNMENT = 272.0  # cube around the head that is looked at
SCALE = 0.92  # template to a usual adult brain, which is smaller
SCALE_SD, SHAPE_SD = 0.10, 0.04  # of the logarithm of size, and of its stretch and shear
POINTS_PER_OBSERVATION_ALIGNMENT = 100  # neighbouring voxels say the same thing
# Poses the search starts from, degrees about the left-right, back-front and bottom-top axes.
POSES = tuple(itertools.product((-24, 0, 24), (-20, 0, 20), (-20, 0, 20)))
ROUNDS = ((4, 9), (6, 3))  # steps at 8 mm, and how many poses go on, at last at 4 mm
SAME_MM = 2.0  # two poses nearer than this at the corners of the brain are one
MOST_MM = 12.0  # a step moves no point of the brain farther
BRIGHTEST = 1.15  # of the level of white matter; fat above it is cut
LEVEL_MM, LEVEL_PERCENTILE = 45.0, 80  # that level: this percentile within this radius of the head's centre
TUKEY = 4.685  # residuals beyond so many deviations do not count
LOWEST_SPREAD = 0.03
SMALL_MM_ALIGNMENT = 0.1  # a step below ends the search


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
    size = round(FIELD_MM_ALIGNMENT / spacing)
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
        unit = weights.sum() / POINTS_PER_OBSERVATION_ALIGNMENT * np.average(residual**2, weights=weights)
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
        if length < SMALL_MM_ALIGNMENT:
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
