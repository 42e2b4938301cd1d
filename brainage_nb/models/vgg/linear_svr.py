"""Linear support vector regression on many features and few scans, with an honest inner cross-validation.

Arrays in, arrays out: it knows no volumes and no files. Whoever calls passes training rows only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

INNER_FOLDS = 5
# A feature's standard deviation counts as at least this share of the root mean square over all features.
# Behind a ReLU some features are active in one or two scans only; divided by their tiny deviation, such a
# feature of a new scan throws its prediction off by decades.
SCALE_FLOOR = 0.3


class Choice(NamedTuple):
    """Hyper-parameters of an SVR. Both are in years, since ages are not scaled: C bounds a scan's pull on the
    fit (the kernel's mean diagonal is 1), and an error below epsilon costs nothing."""

    C: float
    epsilon: float


PUBLISHED = Choice(98.0, 0.064)
GRID = tuple(
    Choice(c, epsilon)
    for c in (0.1, 1.0, 10.0, PUBLISHED.C, 1000.0)
    for epsilon in (PUBLISHED.epsilon, 1.0, 3.0)
)


@dataclass(frozen=True)
class LinearSvr:
    """A fitted SVR with linear kernel, as one weight a standardised feature (support vectors are not kept).

    Attributes
    ----------
    mean, scale : float32 arrays (features,)
        Of the training rows, from `standardisation`.
    weight : float32 array (features,)
        Years a standard deviation of the feature.
    intercept : float
        Years; the prediction at the training rows' mean.
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    intercept: float

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, features) to ages in years (n,); NaN for a NaN row."""
        return self.contribution(features) + self.intercept

    def contribution(self, features: np.ndarray) -> np.ndarray:
        """Years by which (n, features) move the prediction away from the intercept: (n,)."""
        return ((features - self.mean) / self.scale @ self.weight).astype(np.float64)


def fit_svr(features: np.ndarray, age: np.ndarray, choice: Choice) -> LinearSvr:
    """Standardise, scale the linear kernel to a mean diagonal of 1, fit.

    Parameters
    ----------
    features : float32 array (n, features)
        Training rows only.
    age : array (n,)
        Years.
    """
    mean, scale = standardisation(features)
    rows = (features - mean) / scale
    kernel, unit = scaled_kernel(rows)
    svr = SVR(kernel="precomputed", C=choice.C, epsilon=choice.epsilon).fit(kernel, age)
    dual = np.zeros(len(rows), dtype=np.float64)
    dual[svr.support_] = svr.dual_coef_[0]
    weight = ((dual / unit) @ rows).astype(np.float32)
    return LinearSvr(mean, scale, weight, intercept=float(svr.intercept_[0]))


def standardisation(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale of each feature over (training) rows, float32: the standard deviation, with a floor."""
    scaler = StandardScaler().fit(features)
    floor = SCALE_FLOOR * np.sqrt(scaler.var_.mean())
    scale = np.maximum(np.sqrt(scaler.var_), floor if floor > 0 else 1.0)
    return scaler.mean_.astype(np.float32), scale.astype(np.float32)


def scaled_kernel(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Linear kernel (n, n) divided by its mean diagonal, and that divisor.

    Without it the kernel of 25,088 standardised features has a diagonal near 25,088, every C from 0.01 to
    1000 gives the same fit, and the grid chooses nothing.
    """
    kernel = rows @ rows.T
    unit = float(kernel.diagonal().mean())
    if unit <= 0:
        raise ValueError(
            "All features are constant over the training scans: nothing can be learned from them."
        )
    return kernel / unit, unit


def inner_folds(subject_id: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers (train, held out) of the inner cross-validation; a subject's scans stay together.

    Raises
    ------
    ValueError
        Fewer than five subjects.
    """
    subjects = np.asarray(subject_id, dtype=str)
    n_subjects = len(np.unique(subjects))
    if n_subjects < INNER_FOLDS:
        raise ValueError(
            f"{n_subjects} training subjects with features; expected at least {INNER_FOLDS}, since the "
            "settings are chosen by cross-validation over them. Add subjects, or see why scans were left out."
        )
    return GroupKFold(INNER_FOLDS).split(subjects, groups=subjects)


def out_of_fold(
    features: np.ndarray, age: np.ndarray, subject_id: Sequence[str], grid: Sequence[Choice] = GRID
) -> np.ndarray:
    """Inner cross-validated predictions in years for every choice: (choices, n).

    The scaler, the kernel's unit and the SVR are learned anew in every fold. A NaN row (a scan without these
    features) takes no part and stays NaN.
    """
    predicted = np.full((len(grid), len(age)), np.nan)
    usable = np.isfinite(features[:, 0])
    for train, held_out in inner_folds(subject_id):
        train, held_out = train[usable[train]], held_out[usable[held_out]]
        if not len(held_out):
            continue
        mean, scale = standardisation(features[train])
        rows = (features[train] - mean) / scale
        kernel, unit = scaled_kernel(rows)
        kernel_held_out = (features[held_out] - mean) / scale @ rows.T / unit
        for row, choice in zip(predicted, grid, strict=True):
            svr = SVR(kernel="precomputed", C=choice.C, epsilon=choice.epsilon).fit(kernel, age[train])
            row[held_out] = svr.predict(kernel_held_out)
    return predicted


def score_grid(predicted: np.ndarray, age: np.ndarray, grid: Sequence[Choice] = GRID) -> pd.DataFrame:
    """Inner cross-validated MAE in years, a row a choice: `C, epsilon, mae`. `predicted` is (choices, n) or
    (choices, n, positions)."""
    target = age if predicted.ndim == 2 else age[:, None]
    mae = np.nanmean(np.abs(predicted - target).reshape(len(grid), -1), axis=1)
    return pd.DataFrame(grid, columns=["C", "epsilon"]).assign(mae=mae)


def best_choice(scores: pd.DataFrame) -> int:
    """Row number of the lowest MAE; among equals (to 0.001 years) the first, which has the smallest C."""
    return int(np.flatnonzero(scores["mae"] <= scores["mae"].min() + 1e-3)[0])
