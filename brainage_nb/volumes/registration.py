"""The MNI152 template laid onto a scan: a similarity from many poses, an affine map, then smooth bending.

Finds the brain's surface in the inside of the skull; it does not match gyri.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from brainage_nb.volumes.resampling import LinearSampler, along_axes, resample_to, upsample

CENTRE_MM = np.array([0.0, -17.0, 5.0])  # of the brain, MNI152
HALF_MM = np.array([75.0, 92.0, 82.0])  # half the brain's extent
TEMPLATE_MM, HEAD_MM = 208.0, 272.0  # edges of the cubes around the template's brain and around a head
# nilearn's template has no skull. Fluid and bone are painted around its upper part, so that a registration
# sees where the brain ends; nothing is invented below, where necks and faces differ.
FLUID, BONE = 0.27, 0.08  # where white matter is 0.88
FLUID_MM, RIM_MM = 2.0, 6.0  # their outer surfaces, from the brain's
RIM_ABOVE_MM = -20.0  # MNI height above which the rim is used
BRIGHTEST = 1.15  # of the level of white matter; fat above it is cut
LEVEL_MM, LEVEL_PERCENTILE = 45.0, 80  # that level: this percentile within this radius of the head's centre
# Poses the search starts from, degrees about the left-right, back-front and bottom-top axes.
POSES = tuple(itertools.product((-24, 0, 24), (-20, 0, 20), (-20, 0, 20)))
ROUNDS = ((4, 9), (6, 3))  # steps at 8 mm, and how many poses go on, at last at 4 mm
SAME_MM = 2.0  # two poses nearer than this at the corners of the brain are one
MOST_MM, LEAST_MM = 12.0, 0.1  # a step moves no point of the brain farther; one below ends the search
TUKEY, LOWEST_SPREAD = 4.685, 0.03  # residuals beyond so many deviations do not count
POINTS_PER_OBSERVATION = 100  # neighbouring voxels say the same thing
SCALE = 0.92  # template to a usual adult brain, which is smaller
SCALE_SD, SHAPE_SD = 0.10, 0.04  # of the logarithm of size, and of its stretch and shear
DEGREES = (1, 2, 4)  # of the polynomials that bend, fitted one after the other
BENDING_STEPS, LEAST_BENT_MM = 6, 0.3  # most steps for each degree; one that bends less ends it
CORE_DEGREE, LEAST_SETTLED_MM = 2, 0.05  # the same of the last bending, by the brain's core alone
DEEP_MM = 8.0  # below the cortex: nothing that surrounds a brain is seen there
STIFFNESS = 0.016  # prior precision of a coefficient of degree 2, 1/mm^2; grows with the degree squared
REACH = 1.2  # polynomials go on as constants beyond so many half-extents of the brain
BIAS_MM, INSIDE_MM = 20.0, 4.0  # brightness that varies more slowly, so deep inside the brain, is evened


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

    def points(self, step: int = 1, *, rim: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """World positions (n, 3), painted intensities (n,) and depths (n,) of the brain's voxels.

        Of every `step`-th voxel along each axis one colour of a chessboard; with `rim`, also of the painted
        fluid and bone.
        """
        used = self.depth_mm < 0
        if rim:
            height = np.arange(len(used)) * self.spacing_mm + self.affine[2, 3]
            used |= (self.depth_mm < RIM_MM) & (height > RIM_ABOVE_MM)
        index = np.argwhere(used[::step, ::step, ::step])
        index = step * index[index.sum(axis=1) % 2 == 0]
        at = tuple(index.T)
        positions = index * self.spacing_mm + self.affine[:3, 3]
        return positions, self.painted[at].astype(float), self.depth_mm[at]


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
    """A scan on a cubic grid with its gradient, sampled at world positions."""

    def __init__(self, volume: np.ndarray, affine: np.ndarray) -> None:
        gradient = np.gradient(volume, float(affine[0, 0]))
        self.sample = LinearSampler(np.stack([volume, *gradient], axis=-1))
        self.inverse = np.linalg.inv(affine)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Intensities (n,) and gradients (3, n) at world positions (n, 3)."""
        values = self.sample(positions @ self.inverse[:3, :3].T + self.inverse[:3, 3]).T
        return values[0].astype(float), values[1:]


def mni_grid(spacing_mm: float, size: int, centre_mm: np.ndarray = CENTRE_MM) -> np.ndarray:
    """Affine (4, 4) of a cube of `size` voxels along each edge around a centre, by default the brain's."""
    grid = np.diag([spacing_mm] * 3 + [1.0])
    grid[:3, 3] = np.asarray(centre_mm) - spacing_mm * (size - 1) / 2
    return grid


@lru_cache(maxsize=4)
def template(spacing_mm: float) -> Template:
    """nilearn's template at a spacing, smoothed to it; kept for the next scan."""
    t1, mask, affine = _read_template()
    size = round(TEMPLATE_MM / spacing_mm)
    grid = mni_grid(spacing_mm, size)
    brain = resample_to(spacing_mm, t1 * mask, affine, grid, size)
    inside = resample_to(spacing_mm, mask, affine, grid, size) > 0.5
    depth = signed_distance(inside, spacing_mm)
    painted = np.where(inside, brain, np.where(depth < FLUID_MM, FLUID, BONE))
    return Template(grid, brain, painted.astype(np.float32), depth)


def signed_distance(inside: np.ndarray, spacing_mm: float) -> np.ndarray:
    """Distance of each voxel to the surface of a mask, mm, negative inside, float32."""
    from scipy.ndimage import distance_transform_edt

    # Distances run between voxel centres; the surface lies half a voxel before the next one.
    outer, inner = distance_transform_edt(~inside), distance_transform_edt(inside)
    return (np.where(inside, 0.5 - inner, outer - 0.5) * spacing_mm).astype(np.float32)


@lru_cache(maxsize=1)
def _read_template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T1 and brain mask at 1 mm, and their affine; both ship with nilearn."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    t1, mask = load_mni152_template(resolution=1), load_mni152_brain_mask(resolution=1)
    return t1.get_fdata(dtype=np.float32), mask.get_fdata(dtype=np.float32), t1.affine


# --- similarity and affine map --------------------------------------------------------------------------


def align(array: np.ndarray, affine: np.ndarray, centre_mm: np.ndarray) -> Alignment:
    """Find the template in a scan: Gauss-Newton from many poses at 8 mm, the best of them at 4 mm.

    Minimises squared differences after the best linear scaling of intensity. Outliers (scalp, vessels,
    lesions) are weighted down, a prior keeps size and shape anatomical, nothing is random.

    Parameters
    ----------
    array : (i, j, k) float32 array
        A head, or a brain without its skull.
    affine : (4, 4) array
        Voxel to world, mm; heads are upright in the world to within about 35 degrees.
    centre_mm : (3,) array
        About the middle of the head (`heads.find_head`), world.
    """
    coarse, level = _head_at(8.0, array, affine, centre_mm)
    points, values, _ = template(8.0).points()
    maps = [_starting_map(centre_mm, pose) for pose in POSES]
    for steps, kept in ROUNDS:  # the poses that are worst after a few steps are given up
        found = [_search(coarse, points, values, start, steps=steps) for start in maps]
        maps = _best_apart(found, kept)
    fine, _ = _head_at(4.0, array, affine, centre_mm, level)
    points, values, _ = template(4.0).points()
    found = [_search(fine, points, values, start, steps=10) for start in maps]
    start = max(found, key=lambda pair: pair[1])[0]
    return Alignment(*_search(fine, points, values, start, steps=25, similarity=False), level)


def _head_at(
    spacing: float, array: np.ndarray, affine: np.ndarray, centre: np.ndarray, level: float = 0.0
) -> tuple[Target, float]:
    """The head at a spacing, as a share of the level of white matter, and that level."""
    size = round(HEAD_MM / spacing)
    grid = mni_grid(spacing, size, centre)
    cube = resample_to(spacing, array, affine, grid, size)
    if not level:
        away = (np.indices(cube.shape) - (size - 1) / 2) * spacing
        near = cube[(away**2).sum(axis=0) < LEVEL_MM**2]
        level = float(np.percentile(near, LEVEL_PERCENTILE)) or 1.0
    return Target(np.clip(cube / level, 0, BRIGHTEST), grid), level


def _starting_map(centre: np.ndarray, pose: tuple[int, int, int]) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    start = np.eye(4)
    start[:3, :3] = SCALE * Rotation.from_euler("xyz", pose, degrees=True).as_matrix()
    start[:3, 3] = centre - start[:3, :3] @ CENTRE_MM
    return start


def _best_apart(found: list[tuple[np.ndarray, float]], kept: int) -> list[np.ndarray]:
    """The maps of highest correlation, at most `kept`, none within `SAME_MM` of a better one."""
    corners = CENTRE_MM + HALF_MM * np.array(list(itertools.product((-1, 1), repeat=3)))
    apart: list[np.ndarray] = []
    for candidate, _ in sorted(found, key=lambda pair: -pair[1]):
        moved = [(candidate - other)[:3, :3] @ corners.T + (candidate - other)[:3, 3:] for other in apart]
        if all(np.linalg.norm(shift, axis=0).max() > SAME_MM for shift in moved):
            apart.append(candidate)
    return apart[:kept]


def _search(
    target: Target, points: np.ndarray, values: np.ndarray, start: np.ndarray, *, steps: int, similarity=True
) -> tuple[np.ndarray, float]:
    """Gauss-Newton from one start; the map (4, 4) and the correlation at the last but one step."""
    from scipy.linalg import expm

    moves, current, weights, last = _linear_moves(similarity), start, np.ones(len(points)), 0.0
    for _ in range(steps):
        positions = points @ current[:3, :3].T + current[:3, 3]
        scan, gradient = target.at(positions)
        slope, residual, weights = fit_intensity(scan, values, weights)
        centre = current[:3, :3] @ CENTRE_MM + current[:3, 3]
        products = gradient[:, None] * (positions - centre).T.astype(np.float32)
        linear = moves.reshape(-1, 9).astype(np.float32) @ products.reshape(9, -1)
        precision, away = _map_prior(current[:3, :3], similarity)
        step = solve_step(slope * np.r_[gradient, linear], scan, residual, weights, precision, away)
        if (step * last).sum() < 0:  # without, some scans swing between two maps for ever
            step /= 2
        last = step
        length = np.abs(step[:3]).max() + 80 * np.abs(step[3:]).max()
        step *= min(1.0, MOST_MM / max(length, 1e-9))
        change = np.zeros((4, 4))
        change[:3, :3], change[:3, 3] = np.tensordot(step[3:], moves, axes=1), step[:3]
        current = current.copy()
        current[:3, 3] -= centre
        current = expm(change) @ current
        current[:3, 3] += centre
        if length < LEAST_MM:
            break
    return current, correlation(scan, values)


@lru_cache(maxsize=2)
def _linear_moves(similarity: bool) -> np.ndarray:
    """Directions (k, 3, 3) of a small change besides shifts: three turns, then one scale or six stretches."""
    moves = np.zeros((9, 3, 3))
    for axis, pair in enumerate(([1, 2], [2, 0], [0, 1])):
        moves[axis, pair, pair[::-1]] = -1, 1
        moves[3 + axis, axis, axis] = 1
        moves[6 + axis, pair, pair[::-1]] = 1
    return np.array([*moves[:3], np.eye(3)]) if similarity else moves


def _map_prior(matrix: np.ndarray, similarity: bool) -> tuple[np.ndarray, np.ndarray]:
    """Precision (k, k) of the parameters of a change, and how far a map (3, 3) is from a usual brain (k,)."""
    if similarity:
        precision, away = [[1 / SCALE_SD**2]], [np.log(np.linalg.det(matrix)) / 3 - np.log(SCALE)]
    else:
        values, vectors = np.linalg.eigh(matrix @ matrix.T)
        stretch = vectors * np.log(values) / 2 @ vectors.T
        away = np.r_[np.diag(stretch) - np.log(SCALE), stretch[[1, 2, 0], [2, 0, 1]]]
        precision = np.eye(6) * 2 / SHAPE_SD**2
        precision[:3, :3] = (np.eye(3) - 1 / 3) / SHAPE_SD**2 + np.ones((3, 3)) / 9 / SCALE_SD**2
    return np.pad(precision, (6, 0)), np.r_[np.zeros(6), away]  # shifts and turns are free


def fit_intensity(
    scan: np.ndarray, target: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Slope of target on scan intensities, residuals (n,) and outlier weights (n,), in two rounds."""
    for _ in range(2):
        share = weights / weights.sum()
        scan, target = scan - share @ scan, target - share @ target
        weighted = share * scan
        slope = float(weighted @ target) / max(float(weighted @ scan), 1e-9)
        residual = target - slope * scan
        sd = max(1.4826 * float(np.median(np.abs(residual))), LOWEST_SPREAD)
        weights = np.maximum(1 - (residual / (TUKEY * sd)) ** 2, 0) ** 2 + 1e-3
    return max(slope, 0.05), residual, weights


def solve_step(
    columns: np.ndarray,
    scan: np.ndarray,
    residual: np.ndarray,
    weights: np.ndarray,
    precision: np.ndarray,
    away: np.ndarray,
) -> np.ndarray:
    """One Gauss-Newton step (k,): weighted least squares with a prior; intensity is scaled along with it.

    Parameters
    ----------
    columns : (k, n) float32 array
        Change of the scaled intensity at n points for a unit of each of k parameters.
    scan, residual, weights : (n,) arrays
        Intensities, what they miss of the template's, and outlier weights.
    precision, away : (k, k) and (k,) arrays
        Of the prior, and how far the parameters are from its mean.
    """
    root = np.sqrt(weights)
    design = np.concatenate([columns, [scan - scan.mean(), np.ones(len(scan))]], dtype=np.float32)
    design *= root.astype(np.float32)
    normal = (design @ design.T).astype(float)
    right = (design @ (root * residual).astype(np.float32)).astype(float)
    unit = weights @ residual**2 / POINTS_PER_OBSERVATION
    k = len(columns)
    normal[:k, :k] += unit * precision
    right[:k] -= unit * precision @ away
    normal += np.eye(len(normal)) * 1e-9 * np.trace(normal) / len(normal)
    return np.linalg.solve(normal, right)[:k]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two arrays (n,); 0 where one of them is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


# --- bending --------------------------------------------------------------------------------------------


def even_brightness(scan: np.ndarray, brain: np.ndarray, depth_mm: np.ndarray) -> np.ndarray:
    """Divide a scan by its slow ratio to the template; white matter comes near 0.88.

    Parameters
    ----------
    scan : (n, n, n) float32 array
        Intensities where white matter is about 1, on the template's grid.
    brain, depth_mm : (n, n, n) float32 arrays
        The template's, straight or bent.
    """
    from scipy.ndimage import gaussian_filter

    inside = (depth_mm < -INSIDE_MM) & (brain > 0.5)
    spacing = TEMPLATE_MM / len(scan)

    def slow(volume: np.ndarray) -> np.ndarray:
        picked = np.where(inside, volume, 0)[::2, ::2, ::2]
        return gaussian_filter(picked, BIAS_MM / (2 * spacing)) + 1e-3

    ratio = upsample(slow(scan * brain) / slow(brain**2), 2, scan.shape)
    return np.clip(scan / np.maximum(ratio, 1e-3), 0, BRIGHTEST).astype(np.float32)


def bend(scan: np.ndarray, onto: Template) -> tuple[np.ndarray, float]:
    """Bend the template, already laid onto a scan, to that brain's shape: polynomials, about 100 numbers.

    Parameters
    ----------
    scan : (n, n, n) float32 array
        On the template's grid, evenly bright.
    onto : Template

    Returns
    -------
    coefficients : (3, terms) float32 array
        Of `polynomials` up to the highest of `DEGREES`: how far each place of the template moves along x, y
        and z, mm. `carry` applies them.
    correlation : float
        Of the bent template with the scan, inside the brain: ventricles, deep grey, white matter. The painted
        rim does not count, since a plain ball has one too.
    """
    at, target = _bending_points(onto.spacing_mm), _smooth_target(scan, onto)
    coefficients, weights = np.zeros((3, len(at.basis)), np.float32), None
    for degree in DEGREES:
        coefficients, weights = _bend_more(target, at, coefficients, degree, weights)
    scanned, _ = target.at(at.moved(coefficients))
    inside = at.depth < -INSIDE_MM
    return coefficients, correlation(scanned[inside], at.values[inside])


def settle(scan: np.ndarray, onto: Template, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bend once more, by the core of the brain alone, which a whole head and a stripped one have in common.

    What lies around a brain moves its surface, and with it the size it seems to have: a stripped brain would
    lie on the template two percent larger than the same brain in its skull.

    Parameters
    ----------
    scan : (n, n, n) float32 array
        On the template's grid, evenly bright.
    onto : Template
    coefficients : (3, terms) array
        From `bend`, where the search begins.

    Returns
    -------
    affine : (4, 4) array
        From MNI152 to MNI152, mm: how the deep brain is placed.
    coefficients : (3, terms) float32 array
        Those up to `CORE_DEGREE` fitted again, by the whole core: how its surface lies.
    """
    target = _smooth_target(scan, onto)
    deep, core = (_bending_points(onto.spacing_mm, below_mm=below) for below in (DEEP_MM, INSIDE_MM))
    placed, _ = _bend_more(target, deep, coefficients, 1, least_mm=LEAST_SETTLED_MM)
    surface, _ = _bend_more(target, core, coefficients, CORE_DEGREE, least_mm=LEAST_SETTLED_MM)
    affine, ones = np.eye(4), np.ones(len(deep.points))
    affine[:3] = np.linalg.lstsq(np.c_[deep.points, ones], deep.moved(placed), rcond=None)[0].T
    return affine, surface


def _smooth_target(scan: np.ndarray, onto: Template) -> Target:
    from scipy.ndimage import gaussian_filter

    return Target(gaussian_filter(scan, 0.7), onto.affine)


def _bend_more(
    target: Target,
    at: _BendingPoints,
    coefficients: np.ndarray,
    degree: int,
    weights: np.ndarray | None = None,
    least_mm: float = LEAST_BENT_MM,
) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Newton over the polynomials up to a degree: coefficients (3, terms) and outlier weights (n,)."""
    total = exponents(DEGREES[-1]).sum(axis=1)
    used, coefficients = total <= degree, coefficients.copy()
    stiff, terms = np.where(total <= 1, 1e-3, STIFFNESS * (total / 2) ** 2)[used], at.basis[used]
    weights = np.ones(len(at.points)) if weights is None else weights
    for _ in range(BENDING_STEPS):
        scanned, gradient = target.at(at.moved(coefficients))
        slope, residual, weights = fit_intensity(scanned, at.values, weights)
        columns = (np.float32(slope) * gradient[:, None] * terms).reshape(-1, len(at.points))
        prior = np.diag(np.tile(stiff, 3)), coefficients[:, used].ravel()
        change = solve_step(columns, scanned, residual, weights, *prior).reshape(3, -1)
        coefficients[:, used] += change
        if np.abs(change.astype(np.float32) @ terms).max() < least_mm:
            break
    return coefficients, weights


class _BendingPoints(NamedTuple):
    """Where it is fitted: positions (n, 3), template values and depths (n,), polynomials (terms, n)."""

    points: np.ndarray
    values: np.ndarray
    depth: np.ndarray
    basis: np.ndarray

    def moved(self, coefficients: np.ndarray) -> np.ndarray:
        """Where a bending (3, terms) moves the positions, mm."""
        return self.points + (coefficients @ self.basis).T


@lru_cache(maxsize=3)
def _bending_points(spacing_mm: float, below_mm: float | None = None) -> _BendingPoints:
    """The same points for every scan: of brain and rim, or those so deep below the brain's surface."""
    points, values, depth = template(spacing_mm).points(2, rim=True)
    used = np.full(len(points), True) if below_mm is None else depth < -below_mm
    basis = polynomials(points[used], exponents(DEGREES[-1])).T
    basis = np.ascontiguousarray(basis, np.float32)
    return _BendingPoints(points[used].astype(np.float32), values[used], depth[used], basis)


def carry(onto: Template, coefficients: np.ndarray, *maps: np.ndarray) -> list[np.ndarray]:
    """Maps on the template's grid, bent with it: where x moves to x + u(x), a voxel y looks at x."""
    from scipy.ndimage import map_coordinates

    shape = tuple(n // 2 for n in onto.brain.shape)
    coarse = onto.affine @ np.diag([2, 2, 2, 1])
    terms = exponents(DEGREES[-1])
    field = [polynomial_field(coarse, shape, terms, part) for part in coefficients / coarse[0, 0]]
    moved = LinearSampler(np.stack(field, axis=-1))
    here = np.stack(np.indices(shape, np.float32), axis=-1).reshape(-1, 3)
    back = np.stack(field, axis=-1).reshape(-1, 3)
    for _ in range(3):  # the inverse of a smooth small displacement, by repetition
        back = moved(here - back)
    look = np.indices(onto.brain.shape, np.float32)
    for axis, part in enumerate(back.T):
        look[axis] -= 2 * upsample(part.reshape(shape), 2, onto.brain.shape)
    return [map_coordinates(one, look, order=1, mode="nearest") for one in maps]


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

    return legvander(np.clip((positions - CENTRE_MM[axis]) / HALF_MM[axis], -REACH, REACH), terms.max())
