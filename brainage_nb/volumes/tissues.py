"""How much of each voxel of a brain is grey and white matter.

A mixture of three normals (fluid, grey, white) over the logarithm of brightness, with the template's tissue
maps as prior and a slow field of brightness fitted along with it: the idea of unified segmentation (Ashburner
and Friston 2005, doi:10.1016/j.neuroimage.2005.02.018) on a brain that already lies on the template. Means,
variances and field come from the brain's core, which a whole head and a skull-stripped one have in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from brainage_nb.volumes.registration import exponents, mni_grid, polynomial_field, polynomials
from brainage_nb.volumes.resampling import one_thread, resample_to

VERSION = 3  # raised whenever the same scan gives other tissues than before; part of fingerprints
SPACING_MM, SIZE = 2.0, 96  # grid in MNI152 space on which tissues are told apart
# Scans are brought to this resolution first: blur makes grey matter of white and fluid, so that the same head
# at 1 mm and with slices of 3 mm would differ by years.
RESOLUTION_MM = 3.0
PRIOR_MM = 6.0  # full width at half maximum by which the template's maps are smoothed
LOWEST_PRIOR = 0.02  # no tissue is impossible anywhere
CORE_MM = 4.0  # deeper than this below the mask's surface (about 3 mm outside of the cortex) is fitted
RIM_MM = 2.0  # nothing nearer to the surface is grey or white matter
MOST_EMPTY = 0.3  # a voxel of which more was cut away is not fitted
FIELD_DEGREE = 4  # of the polynomials of the field of brightness
FIELD_PRIOR = 1e-3  # keeps it even where little speaks for a field
# Brightness is put on a scale of the brain's own before its logarithm is taken: an offset of the scanner's
# would change that. These percentiles of the inside become 0 and 1, and so much is added.
DARK_PERCENTILE, BRIGHT_PERCENTILE, ADDED = 1.0, 95.0, 0.2
DARKEST = 0.05  # what is darker is fluid or bone all the same
ROUNDS = 24
STEP = 2  # every second voxel along each axis is fitted; all are then told apart
LOWEST_CONTRAST = 1.5  # means of neighbouring tissues differ by so many standard deviations at least; the
# least of 121 real scans was 2.9 at a finer resolution
SHARES = (0.25, 0.75)  # of grey matter among grey and white


@dataclass(frozen=True)
class Tissues:
    """The tissues of one brain, on the grid of `grid()`.

    Attributes
    ----------
    grey, white : (96, 96, 96) float32 arrays
        Probability of each, 0 outside of the brain; what is missing to 1 inside is fluid.
    contrast : float
        Smallest distance of the mean brightness of two neighbouring tissues, in standard deviations.
    problems : tuple of str
        Why they should not be used; empty where nothing speaks against them.
    """

    grey: np.ndarray
    white: np.ndarray
    contrast: float
    problems: tuple[str, ...]


def grid() -> np.ndarray:
    """Affine (4, 4) from a voxel of `Tissues` to MNI152, mm."""
    return mni_grid(SPACING_MM, SIZE)


def tissues_of(brightness: np.ndarray, depth_mm: np.ndarray, empty: np.ndarray | float = 0.0) -> Tissues:
    """Tell the tissues of a T1-weighted brain apart.

    Parameters
    ----------
    brightness : (96, 96, 96) float32 array
        The scan on `grid()`, in any unit.
    depth_mm : (96, 96, 96) float32 array
        Signed distance to the surface of the brain with the fluid around it, mm, negative inside.
    empty : (96, 96, 96) float32 array, optional
        Share of each voxel that was cut away (exactly 0 in the scan), as around a stripped brain. Inside, it
        counts as the fluid that other tools cut away between the folds.
    """
    core = (depth_mm < -CORE_MM) & (empty < MOST_EMPTY)
    if not core.any():
        nothing = np.zeros((2, *brightness.shape), np.float32)
        return Tissues(*nothing, 0.0, ("there is no brain in the template",))
    prior, scale = _prior(), np.percentile(brightness[core], [DARK_PERCENTILE, BRIGHT_PERCENTILE])
    few = np.argwhere(core)
    few = few[(few % STEP == 0).all(axis=1)].T
    with one_thread():
        logs = _logs(brightness[*few], scale)
        means, variances, field = _fit(logs, prior[:, *few], _basis(brightness.shape)[:, *(few // STEP)])
    slow = polynomial_field(grid(), brightness.shape, exponents(FIELD_DEGREE)[1:], field)
    deep = depth_mm < -RIM_MM
    slow, cut = slow[deep], np.broadcast_to(empty, deep.shape)[deep]
    # What was cut away inside of a brain is mostly the fluid between its folds.
    filled = brightness[deep] + cut * _brightness_of(means[0], scale) * np.exp(slow)
    probability = _probabilities(_logs(filled, scale) - slow, prior[:, deep], means, variances)
    maps = np.zeros((2, *brightness.shape), np.float32)
    maps[:, deep] = probability[1:]
    contrast = float(np.min(np.diff(means) / np.sqrt(variances[1:])))
    return Tissues(*maps, contrast, _problems(contrast, *probability[1:].sum(axis=1)))


@lru_cache(maxsize=1)
def _basis(shape: tuple[int, ...]) -> np.ndarray:
    """The field's polynomials (terms, …) at every `STEP`-th voxel of `grid()`."""
    index = np.indices(shape)[:, ::STEP, ::STEP, ::STEP]
    points = index.reshape(3, -1).T * SPACING_MM + grid()[:3, 3]
    basis = polynomials(points, exponents(FIELD_DEGREE)[1:]).T
    return np.ascontiguousarray(basis, np.float32).reshape(-1, *index.shape[1:])


def _logs(brightness: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Logarithms of brightness on a scale whose two values, dark and bright, become 0 and 1."""
    dark, bright = scale
    scaled = ADDED + (brightness - dark) / max(bright - dark, 1e-6)
    return np.log(np.maximum(scaled, DARKEST)).astype(np.float32)


def _brightness_of(log: float, scale: np.ndarray) -> float:
    """The brightness whose logarithm this is, see `_logs`."""
    dark, bright = scale
    return float((np.exp(log) - ADDED) * max(bright - dark, 1e-6) + dark)


def _fit(logs: np.ndarray, prior: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and variances (3,) of the tissues and the field's coefficients, by expectation-maximisation."""
    weights, field = prior, np.zeros(len(basis), np.float32)
    for turn in range(ROUNDS):
        even = logs - field @ basis
        total = weights.sum(axis=1)
        means = weights @ even / total
        variances = (weights * (even - means[:, None]) ** 2).sum(axis=1) / total + np.float32(1e-4)
        weights = _probabilities(even, prior, means, variances)
        if turn % 2:
            precision = (1 / variances) @ weights
            aim = logs * precision - (means / variances) @ weights  # precision times what the field explains
            normal = (basis * precision) @ basis.T
            stiff = FIELD_PRIOR * precision.sum() * np.eye(len(normal), dtype=np.float32)
            field = np.linalg.solve(normal + stiff, basis @ aim)
    return means, variances, field


def _probabilities(
    even: np.ndarray, prior: np.ndarray, means: np.ndarray, variances: np.ndarray
) -> np.ndarray:
    """Probability (3, n) of each tissue given evenly bright logs (n,)."""
    joint = (even - means[:, None]) ** 2
    joint *= (-0.5 / variances)[:, None]
    np.exp(joint, out=joint)
    joint *= prior / np.sqrt(variances)[:, None]
    joint += np.float32(1e-12)
    return joint / joint.sum(axis=0)


def _problems(contrast: float, grey: float, white: float) -> tuple[str, ...]:
    share, found = grey / (grey + white), []
    if not contrast >= LOWEST_CONTRAST:
        hardly = f"hardly told apart (contrast {contrast:.2f}, at least {LOWEST_CONTRAST})"
        found.append(f"grey and white matter are {hardly}: is it T1-weighted?")
    if not SHARES[0] <= share <= SHARES[1]:
        found.append(f"{share:.0%} of its tissue is grey matter ({SHARES[0]:.0%} to {SHARES[1]:.0%})")
    return tuple(found)


@lru_cache(maxsize=1)
def _prior() -> np.ndarray:
    """Probability (3, 96, 96, 96) of fluid, grey and white in the template; maps that nilearn ships."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template

    maps = (load_mni152_gm_template(resolution=1), load_mni152_wm_template(resolution=1))
    maps = [resample_to(PRIOR_MM, one.get_fdata(dtype=np.float32), one.affine, grid(), SIZE) for one in maps]
    grey, white = np.clip(maps, 0, 1)
    prior = np.stack([1 - grey - white, grey, white]).clip(LOWEST_PRIOR)
    return (prior / prior.sum(axis=0)).astype(np.float32)
