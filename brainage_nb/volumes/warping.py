"""Bend the template, already laid onto a scan, to that brain's shape: smooth polynomials in three dimensions.

It finds the brain's surface, it does not match gyri: about a hundred coefficients, with a prior on bending.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np

from .alignment import BRIGHTEST, Target, correlation, fit_intensity, halved
from .mni import CENTRE_MM, HALF_MM, Template, template
from .resampling import LinearSampler, along_axes, upsample

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
