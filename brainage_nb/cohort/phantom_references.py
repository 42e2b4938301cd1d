"""What a model can reach on the known-answer cohort: the oracle, the attainable MAE, and a plain baseline.

All three are mean absolute errors in years over subjects dealt by themselves; none of them uses a network.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy import ndimage
from tqdm import tqdm

from brainage_nb.cohort.phantom import TRUTH, image_path
from brainage_nb.planted import ANATOMY, anatomy_regressions
from brainage_nb.workspace import n_workers, read_csv

BASELINE_FWHM_MM, BASELINE_SPACING_MM = 8.0, 6.0
BASELINE_BOX_MM = (120.0, 156.0, 114.0)  # left-right, back-front, up-down: the middle of the brain
BASELINE_BELOW_CROWN_MM = 18.0  # where that box begins: below scalp and skull


def oracle_mae(truth: pd.DataFrame) -> float:
    """MAE in years of who knows every brain age and reports it as the age: the mean absolute planted gap."""
    return float(truth["gap"].abs().mean())


def mean_predictor_mae(truth: pd.DataFrame) -> float:
    """MAE in years of always saying the mean age."""
    return float((truth["age"] - truth["age"].mean()).abs().mean())


def attainable_mae(truth: pd.DataFrame, *, folds: int = 10, seed: int = 0) -> float:
    """MAE in years of the best regression of age on the planted anatomy, cross-validated by subject.

    The parameters carry each person's own departure, so a model that reads them without error is still off by
    this much. Tried: a straight line, splines, splines with products of two parameters; the best counts.

    Parameters
    ----------
    truth : DataFrame
        The content of `truth.csv`; at least 2 subjects a fold.
    folds : int
        Folds of the cross-validation.
    seed : int
        Deals the subjects to folds.
    """
    from sklearn.model_selection import GroupKFold, cross_val_predict

    if truth["subject_id"].nunique() < 2 * folds:
        raise ValueError(
            f"{truth['subject_id'].nunique()} subjects are too few for {folds} folds: at least {2 * folds}."
        )
    planted, age = truth[list(ANATOMY)].to_numpy(), truth["age"].to_numpy()
    cut = GroupKFold(folds, shuffle=True, random_state=seed)
    guesses = (
        cross_val_predict(m, planted, age, groups=truth["subject_id"], cv=cut) for m in anatomy_regressions()
    )
    return float(min(np.abs(guess - age).mean() for guess in guesses))


def baseline_mae(folder: Path | str, *, folds: int = 5, n_jobs: int = 0, seed: int = 0) -> float:
    """MAE in years of ridge regression on smoothed, coarsely resampled voxels, cross-validated by subject.

    Parameters
    ----------
    folder : path
        A cohort that `make_cohort` wrote.
    folds, seed : int
        The cross-validation; alpha is chosen inside each fold.
    n_jobs : int
        Processes that read scans; 0 for as many as there are processors.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict

    truth = read_csv(Path(folder) / TRUTH)
    paths = [Path(folder) / image_path(row) for row in truth.to_dict("records")]
    reading = Parallel(n_jobs=n_workers(n_jobs), return_as="generator")(
        delayed(coarse_voxels)(p) for p in paths
    )
    voxels = np.stack(list(tqdm(reading, total=len(paths), desc="baseline", unit="scan")))
    voxels = (voxels - voxels.mean(axis=0)) / (voxels.std(axis=0) + 0.1)
    similarity = voxels @ voxels.T / voxels.shape[1]
    # Ridge in the basis of the scans themselves: as many columns as scans instead of as many as voxels.
    scale, basis = np.linalg.eigh(similarity.astype(float))
    scores = basis * np.sqrt(np.clip(scale, 0, None))
    cut = GroupKFold(folds, shuffle=True, random_state=seed)
    ridge = RidgeCV(np.logspace(-3, 3, 13))
    guess = cross_val_predict(ridge, scores, truth["age"], groups=truth["subject_id"], cv=cut)
    return float(np.abs(guess - truth["age"]).mean())


def coarse_voxels(path: Path | str) -> np.ndarray:
    """One scan as a vector: turned to RAS, z-scored, smoothed, sampled on a box hung below the crown.

    Returns
    -------
    (20 * 26 * 19,) float32 array
    """
    image = nib.as_closest_canonical(nib.load(path))
    head = image.get_fdata(dtype=np.float32)
    voxel_size = np.array(image.header.get_zooms()[:3])
    smooth = ndimage.gaussian_filter(head, BASELINE_FWHM_MM / 2.355 / voxel_size)
    inside = smooth > 0.25 * np.percentile(smooth, 95)
    crown = np.flatnonzero(inside.mean(axis=(0, 1)) > 0.01)[-1]
    top = inside[:, :, max(0, crown - int(140 / voxel_size[2])) : crown + 1]
    middle = [(np.flatnonzero(top.any(axis=others))[[0, -1]]).mean() for others in ((1, 2), (0, 2))]
    start = [
        middle[0] - BASELINE_BOX_MM[0] / 2 / voxel_size[0],
        middle[1] - BASELINE_BOX_MM[1] / 2 / voxel_size[1],
        crown - (BASELINE_BELOW_CROWN_MM + BASELINE_BOX_MM[2]) / voxel_size[2],
    ]
    counts = [int(length / BASELINE_SPACING_MM) for length in BASELINE_BOX_MM]
    axes = [
        s + np.arange(n) * BASELINE_SPACING_MM / v for s, n, v in zip(start, counts, voxel_size, strict=True)
    ]
    coarse = ndimage.map_coordinates(smooth, np.stack(np.meshgrid(*axes, indexing="ij")), order=1)
    return ((coarse - coarse.mean()) / coarse.std()).ravel().astype(np.float32)
