"""What a model can reach on the known-answer cohort: the oracle, the attainable MAE, and a plain baseline.

None of them uses a network. Oracle and attainable MAE are defined here alone, for notebooks 01 and 06: the
oracle knows the brain age that drives the anatomy, the attainable regression sees the anatomy, which departs
from it. So the oracle errs less over many people; among the few of a test split chance may turn them round.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from brainage_nb.cohort.phantom_subject import ANATOMY
from brainage_nb.workspace import n_workers, read_csv

FEWEST_ATTAINABLE = 20  # subjects: two a fold
BASELINE_FWHM_MM, BASELINE_SPACING_MM = 8.0, 6.0
BASELINE_BOX_MM = (120.0, 156.0, 114.0)  # left-right, back-front, up-down: the middle of the brain
BASELINE_BELOW_CROWN_MM = 18.0  # where that box begins: below scalp and skull


def oracle_mae(truth: pd.DataFrame) -> float:
    """MAE in years of who knows every brain age and reports it as the age: the mean absolute planted gap."""
    return float(truth["gap"].abs().mean())


def mean_predictor_mae(truth: pd.DataFrame) -> float:
    """MAE in years of always saying the mean age; a subject counts once in that mean."""
    mean_age = truth.groupby("subject_id")["age"].mean().mean()
    return float((truth["age"] - mean_age).abs().mean())


def attainable_mae(truth: pd.DataFrame) -> float:
    """MAE in years of `attainable_ages`."""
    return float(np.abs(attainable_ages(truth) - truth["age"]).mean())


def attainable_ages(truth: pd.DataFrame) -> np.ndarray:
    """Ages (n,) in years that the best regression on the planted anatomy reads off each scan, cross-validated
    by subject over the whole cohort.

    The parameters carry each person's own departure, so a model that reads them without error is still off by
    this much. Tried: a straight line, splines, products of two parameters, each with a penalty chosen by
    itself; the best of them over all scans counts.

    Parameters
    ----------
    truth : DataFrame
        The content of `truth.csv`, of at least `FEWEST_ATTAINABLE` subjects.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, SplineTransformer, StandardScaler

    if (n := truth["subject_id"].nunique()) < FEWEST_ATTAINABLE:
        raise ValueError(f"{n} subjects are too few for ten folds: at least {FEWEST_ATTAINABLE}.")
    ridge = RidgeCV(np.logspace(-4, 3, 15))
    splines = SplineTransformer(n_knots=4, knots="quantile", extrapolation="linear")
    models = (
        make_pipeline(StandardScaler(), ridge),
        make_pipeline(splines, StandardScaler(), ridge),
        make_pipeline(StandardScaler(), PolynomialFeatures(2), StandardScaler(), ridge),
    )
    planted, age = truth[[name for name in ANATOMY if name in truth]].to_numpy(), truth["age"].to_numpy()
    cut = GroupKFold(10, shuffle=True, random_state=0)
    ages = [cross_val_predict(model, planted, age, groups=truth["subject_id"], cv=cut) for model in models]
    return min(ages, key=lambda read: np.abs(read - age).mean())


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
    from joblib import Parallel, delayed
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from tqdm import tqdm

    from brainage_nb.cohort.phantom import TRUTH, image_path

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
    import nibabel as nib
    from scipy import ndimage

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
