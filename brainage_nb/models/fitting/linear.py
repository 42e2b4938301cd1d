"""A ridge regression on smoothed voxels beside a network: what hundreds of scans say in a straight line.

It and a network err differently, and among few scans the mean of both errs less than either
(`benchmarks/accuracy.py`). The smoothing and the scaling are folded into one map of weights, so that a
prediction is a sum of products.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from brainage_nb.models.resnet import VoxelRegression, cubes
from brainage_nb.volumes.resampling import FWHM_PER_SD

EDGE_MM = 4.0  # of a cube; finer than what the smoothing leaves
SMOOTH_MM = 12.0  # full width at half maximum, usual in morphometry
LEAST_SPREAD = 0.1  # of the largest spread over scans: voxels that vary less say nothing and are left out
PENALTIES = np.logspace(-4, 1, 16)  # in mean squared lengths of a scan
FOLDS = 5
MOST_SCANS = 3000  # more are drawn from at random: all are held in memory at once


def fit_linear(
    volumes: Iterable[Tensor], age: np.ndarray, subjects: np.ndarray, spacing_mm: float
) -> VoxelRegression:
    """Fit the regression, on the CPU; its penalty is chosen by cross-validation over subjects.

    Parameters
    ----------
    volumes : iterable of Tensor (batch, 1, size, size, size)
        The training volumes in batches, axes RAS.
    age : (n,) array
        Years, in the order of the volumes.
    subjects : (n,) array
        Whose scans they are.
    spacing_mm : float
        Edge of a voxel.
    """
    smooth, sd, total = [], 0.0, 0.0
    for batch in volumes:
        size = batch.shape[-1]
        edge = max(1, min(size, round(size * spacing_mm / EDGE_MM)))
        sd = SMOOTH_MM / FWHM_PER_SD / (size * spacing_mm / edge)  # in cubes
        means = cubes(batch, edge)
        means = (means + means.flip(1)) / 2  # left and right count alike
        total = total + means.sum(dim=0)
        smooth.extend(_smoothed(volume, sd) for volume in means.cpu().numpy())
    smooth = np.stack(smooth)
    centre, spread = smooth.mean(axis=0), smooth.std(axis=0)
    used = spread > LEAST_SPREAD * spread.max()
    scaled = (smooth[:, used] - centre[used]) / spread[used]
    del smooth
    coefficients, intercept = _ridge(scaled, age, subjects)
    weight = np.zeros(centre.shape)
    weight[used] = coefficients / spread[used]
    # The smoothing is its own adjoint: smoothing the weights does what smoothing each volume would do.
    weight = torch.from_numpy(_smoothed(weight, sd).astype(np.float32))
    return VoxelRegression(weight, (total / len(age)).cpu(), intercept)


def _ridge(scaled: np.ndarray, age: np.ndarray, subjects: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients (n_voxels,) and intercept, from as many principal components as there are scans."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold

    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    kept = values > 1e-9 * values[-1]
    lengths = np.sqrt(values[kept])
    components = vectors[:, kept] * lengths
    penalties = PENALTIES * values.mean()
    model = Ridge(alpha=penalties[-1])
    folds = min(FOLDS, len(np.unique(subjects)))
    if folds > 1:
        grid, cut = {"alpha": penalties}, GroupKFold(folds)
        search = GridSearchCV(model, grid, scoring="neg_mean_absolute_error", cv=cut, refit=False)
        model.alpha = search.fit(components, age, groups=subjects).best_params_["alpha"]
    model.fit(components, age)
    return scaled.T @ (vectors[:, kept] @ (model.coef_ / lengths)), float(model.intercept_)


def _smoothed(volume: np.ndarray, sd: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(volume, sd, mode="constant")
