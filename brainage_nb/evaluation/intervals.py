"""Prediction intervals that hold the true age in a stated share of people (conformal), and how well they do.

They widen nothing to look safe and promise nothing from few subjects: where the calibration subjects cannot
support the level, the interval is infinite and says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation.bias import CorrectionRefused
from brainage_nb.evaluation.metrics import age_bins

LEVEL = 0.9
_DIFFICULTY_FOLDS = 5


class ConformalInterval:
    """Split-conformal interval around a predicted age (Vovk 2005; Lei et al. 2018).

    Half-width: the k-th smallest absolute error of the calibration subjects, k = ceil((n + 1) * level);
    infinite where k > n. The plain form gives everybody the same width. The scaled form divides each error by
    how hard that scan is expected to be and multiplies back, so that easy scans get narrower intervals.

    Parameters
    ----------
    level : float
        Share of people whose true age the interval should hold.
    scaled : bool
        Scale by difficulty. Difficulty is given (such as the spread of an ensemble, years) or, where it is
        not, learned as the size of the error at each predicted age; it never uses the true age of the scan at
        hand.

    Attributes
    ----------
    quantile_ : float
        Years (plain) or multiples of the difficulty (scaled).
    n_calibration_ : int
        Scans behind it.
    support_ : str
        Why the interval is infinite; empty where it is not.
    """

    def __init__(self, level: float = LEVEL, *, scaled: bool = False):
        if not 0 < level < 1:
            raise ValueError(f"level = {level}: give a share between 0 and 1, such as 0.9.")
        self.level, self.scaled = level, scaled

    def fit(
        self,
        predicted: np.ndarray,
        age: np.ndarray,
        split: np.ndarray | str | None = None,
        *,
        difficulty: np.ndarray | None = None,
    ) -> ConformalInterval:
        """Calibrate on scans the model did not train on: validation, or out-of-fold train and validation.

        Parameters
        ----------
        predicted, age : array (n,)
            Years.
        split : array (n,) or str, optional
            Part of each scan; any `test` is refused.
        difficulty : array (n,), optional
            Positive; used by the scaled form only, and then needed by `predict` too.

        Raises
        ------
        CorrectionRefused
            Test scans among the rows.
        """
        if split is not None and (np.atleast_1d(np.asarray(split, dtype=str)) == "test").any():
            raise CorrectionRefused(
                "Test scans cannot calibrate an interval whose coverage is then measured on them."
            )
        predicted, age = np.asarray(predicted, dtype=float), np.asarray(age, dtype=float)
        error = np.abs(age - predicted)
        self.learned_ = self.scaled and difficulty is None
        self.difficulty_, self.floor_ = None, 0.0
        if self.learned_:
            expected, self.difficulty_ = _learned_difficulty(predicted, error)
            error = error / expected
        elif self.scaled:
            self.floor_ = 0.1 * float(
                np.median(difficulty)
            )  # a spread near zero must not promise a width near zero
            error = error / np.maximum(difficulty, self.floor_)
        self.n_calibration_ = len(error)
        self.quantile_ = conformal_quantile(error, self.level)
        self.support_ = _say_support(self.n_calibration_, self.level)
        return self

    def predict(
        self, predicted: np.ndarray, difficulty: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end (n,) of each interval in years; infinite where the calibration cannot support
        the level."""
        if not hasattr(self, "quantile_"):
            raise RuntimeError(
                "ConformalInterval is not fitted; call fit(predicted, age, split) on validation scans."
            )
        predicted = np.asarray(predicted, dtype=float)
        half = self.quantile_ * self._difficulty_of(predicted, difficulty)
        return predicted - half, predicted + half

    def to_dict(self) -> dict[str, Any]:
        """Everything `from_dict` needs, as plain JSON values (an infinite quantile as None)."""
        return {
            "level": self.level,
            "scaled": self.scaled,
            "quantile": self.quantile_ if np.isfinite(self.quantile_) else None,
            "n_calibration": self.n_calibration_,
            "support": self.support_,
            "learned": self.learned_,
            "difficulty": self.difficulty_,
            "floor": self.floor_,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ConformalInterval:
        """A calibrated interval from `to_dict`."""
        self = cls(content["level"], scaled=content["scaled"])
        self.quantile_ = np.inf if content["quantile"] is None else content["quantile"]
        self.n_calibration_, self.support_ = content["n_calibration"], content["support"]
        self.learned_, self.difficulty_, self.floor_ = (
            content[key] for key in ("learned", "difficulty", "floor")
        )
        return self

    def _difficulty_of(self, predicted: np.ndarray, difficulty: np.ndarray | None) -> np.ndarray:
        if self.learned_:
            return np.interp(predicted, self.difficulty_["predicted_age"], self.difficulty_["error"])
        if not self.scaled:
            return np.ones(len(predicted))
        if difficulty is None:
            raise ValueError("This interval was scaled by a given difficulty; give it for these scans too.")
        return np.maximum(np.asarray(difficulty, dtype=float), self.floor_)


def cv_plus_interval(
    member_predictions: np.ndarray,
    out_of_fold: np.ndarray,
    age: np.ndarray,
    fold: np.ndarray,
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
    """CV+ interval of new scans from fold models (Barber et al. 2021, jackknife+ where every fold is one
    subject).

    Parameters
    ----------
    member_predictions : array (n_new, n_folds)
        Years; column k holds what fold k's model says.
    out_of_fold, age : array (n,)
        Out-of-fold predictions of train and validation and true ages, years.
    fold : array (n,) of int
        Which column of `member_predictions` belongs to the model that made each out-of-fold prediction.

    Returns
    -------
    low, high : array (n_new,)
        Years; infinite where n is too small for the level.
    """
    members = np.asarray(member_predictions, dtype=float)[:, np.asarray(fold, dtype=int)]
    error = np.abs(np.asarray(age, dtype=float) - np.asarray(out_of_fold, dtype=float))
    n = len(error)
    k = int(np.ceil((n + 1) * level - 1e-9))
    if k > n:
        return np.full(len(members), -np.inf), np.full(len(members), np.inf)
    return np.sort(members - error, axis=1)[:, n - k], np.sort(members + error, axis=1)[:, k - 1]


def conformal_quantile(error: np.ndarray, level: float = LEVEL) -> float:
    """The ceil((n + 1) * level)-th smallest error; infinite where there are not that many."""
    n = len(error)
    k = int(np.ceil((n + 1) * level - 1e-9))
    return float(np.sort(error)[k - 1]) if k <= n else np.inf


def coverage(age: np.ndarray, low: np.ndarray, high: np.ndarray) -> pd.DataFrame:
    """Share of true ages inside their intervals, and interval width, over all scans and by age bin.

    Returns
    -------
    DataFrame
        Columns `group` (`all`, then decades), `n`, `coverage`, `coverage_low`, `coverage_high` (95 % Wilson)
        and `mean_width` in years.
    """
    age, low, high = (np.asarray(values, dtype=float) for values in (age, low, high))
    frame = pd.DataFrame(
        {"group": age_bins(age), "inside": (age >= low) & (age <= high), "width": high - low}
    )
    rows = [_coverage_row("all", frame)]
    rows += [_coverage_row(name, part) for name, part in frame.groupby("group", sort=True)]
    return pd.DataFrame(rows)


def _coverage_row(name: str, part: pd.DataFrame) -> dict[str, Any]:
    from scipy import stats

    share = stats.binomtest(int(part["inside"].sum()), len(part)).proportion_ci(method="wilson")
    return {
        "group": name,
        "n": len(part),
        "coverage": float(part["inside"].mean()),
        "coverage_low": float(share.low),
        "coverage_high": float(share.high),
        "mean_width": float(part["width"].mean()),
    }


def _learned_difficulty(
    predicted: np.ndarray, error: np.ndarray
) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Expected error of each calibration scan, from the other folds' scans, and the curve over all of them.

    Errors scaled by a curve that saw them would look smaller than those of new scans, hence the folds.
    """
    n = len(error)
    fold = np.empty(n, dtype=int)
    fold[np.argsort(predicted, kind="stable")] = np.arange(n) % _DIFFICULTY_FOLDS
    expected = np.ones(n)
    for k in range(_DIFFICULTY_FOLDS):
        inside, outside = fold == k, fold != k
        if inside.any() and outside.any():
            curve = _error_curve(predicted[outside], error[outside])
            expected[inside] = np.interp(predicted[inside], curve["predicted_age"], curve["error"])
    return expected, _error_curve(predicted, error)


def _error_curve(predicted: np.ndarray, error: np.ndarray) -> dict[str, list[float]]:
    """Mean absolute error around each predicted age, smoothed (Gaussian, half the spread of predictions), on
    25 points."""
    points = np.linspace(predicted.min(), predicted.max(), 25)
    bandwidth = max(0.5 * float(predicted.std()), 1e-6)
    weight = np.exp(-0.5 * ((points[:, None] - predicted) / bandwidth) ** 2)
    overall = float(error.mean())
    # Two scans' worth of the overall error steadies the ends, where few scans speak.
    smooth = (weight @ error + 2 * overall) / (weight.sum(axis=1) + 2)
    return {"predicted_age": points.tolist(), "error": np.maximum(smooth, 0.1 * overall + 1e-9).tolist()}


def _say_support(n: int, level: float) -> str:
    needed = int(np.ceil(level / (1 - level) - 1e-9))
    if n >= needed:
        return ""
    return (
        f"{n} calibration scans cannot support a {level:.0%} interval (at least {needed} are needed), so it "
        "is infinite: nothing is promised. Use more validation subjects, or folds."
    )
