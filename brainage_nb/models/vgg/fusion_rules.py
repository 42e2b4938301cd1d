"""How the predictions of several regressors become one: rules, and weights learned on training subjects only.

Used by late fusion, one regressor a triplet position. Learns from out-of-fold predictions; fits no regressor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from brainage_nb.models.vgg.linear_svr import inner_folds

LINEAR_RULES = ("inverse_error", "nnls")
RULES = (*LINEAR_RULES, "median")
DEFAULT_RULE = "nnls"
# Neighbouring positions say nearly the same, so plain least squares gives all weight to a few, by luck.
# A pull towards equal weights, as strong as this many typical scans, keeps them together where data are few.
EQUAL_SCANS = 10


@dataclass(frozen=True)
class Fusion:
    """age = centre + slope * (weighted mean of (prediction - centre) over the regressors that have one).

    Attributes
    ----------
    rule : str
    centre : float
        Mean age of the training scans, years.
    slope : float
        Above 1 where the regressors all pull towards the mean, as SVRs with little to go by do.
    weights : float array (regressors,)
        Not negative, summing to 1. A regressor without a prediction is left out and the others' weights are
        scaled up to 1 again.
    """

    rule: str
    centre: float
    slope: float
    weights: np.ndarray

    def combine(self, predicted: np.ndarray) -> np.ndarray:
        """(n, regressors) in years, NaN where there is none, to (n,); NaN where none with weight is left."""
        contributions = self.contributions(predicted)
        lost = np.isnan(contributions).all(axis=1)
        return np.where(lost, np.nan, self.centre + np.nansum(contributions, axis=1))

    def contributions(self, predicted: np.ndarray) -> np.ndarray:
        """Years by which each regressor moves the result away from the centre: (n, regressors), NaN kept."""
        weights = np.where(np.isfinite(predicted), self.weights, 0.0)
        total = weights.sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            return self.slope * (weights / np.where(total > 0, total, np.nan)) * (predicted - self.centre)


def learn_fusion(predicted: np.ndarray, age: np.ndarray, rule: str = DEFAULT_RULE) -> Fusion:
    """Learn the weights from out-of-fold predictions.

    Parameters
    ----------
    predicted : array (n, regressors)
        Out-of-fold predictions of training scans, years; NaN where a regressor has none.
    age : array (n,)
        Their ages, years.
    rule : {"inverse_error", "nnls"}
        Weights proportional to 1 / MAE^2 and one least-squares slope for their mean; or non-negative least
        squares of the ages on all predictions, pulled towards equal weights. Both work on differences from
        the mean age.
    """
    centre = float(np.mean(age))
    deviation = predicted - centre
    # A missing cell takes the mean of the same scan's others: it neither favours nor punishes its regressor.
    deviation = np.where(np.isnan(deviation), np.nanmean(deviation, axis=1, keepdims=True), deviation)
    if rule == "inverse_error":
        weights = np.nanmean(np.abs(predicted - age[:, None]), axis=0) ** -2.0
        weights *= _slope(deviation @ weights, age - centre)
    elif rule == "nnls":
        weights = _nnls(deviation, age - centre)
    else:
        raise ValueError(f"rule = {rule!r}: expected one of {', '.join(LINEAR_RULES)}.")
    slope = float(weights.sum())
    if slope <= 0:  # no regressor knows anything about age: everyone gets the mean
        return Fusion(rule, centre, 0.0, np.full(len(weights), 1 / len(weights)))
    return Fusion(rule, centre, slope, weights / slope)


def _nnls(deviation: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Non-negative least squares with a ridge penalty on the weights' differences from their own mean."""
    n_regressors = deviation.shape[1]
    strength = np.sqrt(EQUAL_SCANS * (deviation**2).mean())
    penalty = strength * (np.eye(n_regressors) - 1 / n_regressors)
    weights, _ = nnls(np.vstack([deviation, penalty]), np.concatenate([target, np.zeros(n_regressors)]))
    return weights


def _slope(deviation: np.ndarray, target: np.ndarray) -> float:
    """Least-squares slope through the origin, 0 where it would be negative."""
    return max(0.0, float(deviation @ target) / max(float(deviation @ deviation), 1e-12))


def compare_rules(predicted: np.ndarray, age: np.ndarray, subject_id: Sequence[str]) -> pd.DataFrame:
    """Cross-validated MAE (years) of every rule over training subjects: `rule, mae, default`.

    The weights are learned on some subjects' out-of-fold predictions and scored on the others', so that a
    rule with many weights gains nothing by fitting its own noise.
    """
    combined = {rule: np.full(len(age), np.nan) for rule in RULES}
    for train, held_out in inner_folds(subject_id):
        for rule in LINEAR_RULES:
            fusion = learn_fusion(predicted[train], age[train], rule)
            combined[rule][held_out] = fusion.combine(predicted[held_out])
        centre, median = age[train].mean(), np.nanmedian(predicted, axis=1)
        slope = _slope(median[train] - centre, age[train] - centre)
        combined["median"][held_out] = centre + slope * (median[held_out] - centre)
    mae = [np.nanmean(np.abs(combined[rule] - age)) for rule in RULES]
    return pd.DataFrame({"rule": RULES, "mae": mae, "default": [rule == DEFAULT_RULE for rule in RULES]})
