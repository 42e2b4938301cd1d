"""Prediction intervals that hold the true age in a stated share of people (conformal), and how well they do;
and the one place where a run's bias correction and interval are fitted, for its report and its bundle alike.

They widen nothing to look safe and promise nothing from few subjects: where the calibration subjects cannot
support the level, the interval is infinite and says so.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation.bias import AgeBiasCorrector, CorrectionRefused
from brainage_nb.evaluation.metrics import age_bins

if TYPE_CHECKING:
    from brainage_nb.evaluation.runs import Run

LEVEL = 0.9
HELD_OUT, OUT_OF_FOLD = "validation", "out-of-fold"


@dataclass(frozen=True)
class Calibration:
    """What a run's held-out predictions say about its predictions of new people.

    Attributes
    ----------
    corrector : AgeBiasCorrector or None
        None where the correction was refused; `refused` then says why.
    refused : str
    interval : ConformalInterval or None
        None where nothing was held out.
    """

    corrector: AgeBiasCorrector | None
    refused: str
    interval: ConformalInterval | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the names they have in a bundle."""
        return {
            "correction": self.corrector.to_dict() if self.corrector else None,
            "correction_refused": self.refused,
            "interval": self.interval.to_dict() if self.interval else None,
        }


def calibrate(run: Run, level: float = LEVEL) -> Calibration:
    """Fit the bias correction on a run's calibration controls and the interval on all its calibration scans.

    Calibration scans are validation, or out-of-fold where folds were run. Test scans take no part.
    """
    corrector, reason = None, ""
    try:
        controls = run.calibration_rows()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what few subjects support is kept in the fitted corrector
            corrector = AgeBiasCorrector().fit(
                controls["predicted_age"],
                controls["age"],
                controls["split"],
                subject_id=controls["subject_id"].to_numpy(),
            )
    except CorrectionRefused as refused:
        reason = str(refused)
    rows = run.calibration_rows(controls_only=False)
    interval = ConformalInterval(level, OUT_OF_FOLD if run.folds else HELD_OUT)
    fitted = interval.fit(rows["predicted_age"], rows["age"], rows["split"]) if len(rows) else None
    return Calibration(corrector, reason, fitted)


class ConformalInterval:
    """Split-conformal interval around a predicted age (Vovk 2005; Lei et al. 2018): one width for everybody.

    Half-width: the k-th smallest absolute error of the calibration scans, k = ceil((n + 1) * level); infinite
    where k > n. With `kind` out-of-fold, each error is that of the one fold's model that had not seen the
    scan, while the interval stands around the mean of all folds' models. That mean errs no more on average,
    so the interval tends to hold at least `level`; no theorem promises it.

    Parameters
    ----------
    level : float
        Share of people whose true age the interval should hold.
    kind : {"validation", "out-of-fold"}
        Which scans calibrate it.

    Attributes
    ----------
    quantile_ : float
        Half the width, years.
    n_calibration_ : int
        Scans behind it.
    support_ : str
        Why the interval is infinite; empty where it is not.
    """

    def __init__(self, level: float = LEVEL, kind: str = HELD_OUT):
        if not 0 < level < 1:
            raise ValueError(f"level = {level}: give a share between 0 and 1, such as 0.9.")
        self.level, self.kind = level, kind

    @property
    def title(self) -> str:
        """Level and kind in words."""
        return f"{self.level:.0%} conformal interval, calibrated on {self.n_calibration_} {self.kind} scans"

    def fit(
        self, predicted: np.ndarray, age: np.ndarray, split: np.ndarray | str | None = None
    ) -> ConformalInterval:
        """Calibrate on scans the model did not train on.

        Parameters
        ----------
        predicted, age : array (n,)
            Years.
        split : array (n,) or str, optional
            Part of each scan; any `test` is refused.

        Raises
        ------
        CorrectionRefused
            Test scans among the rows.
        """
        if split is not None and (np.atleast_1d(np.asarray(split, dtype=str)) == "test").any():
            raise CorrectionRefused(
                "Test scans cannot calibrate an interval whose coverage is then measured on them."
            )
        error = np.abs(np.asarray(age, dtype=float) - np.asarray(predicted, dtype=float))
        self.n_calibration_ = len(error)
        self.quantile_ = conformal_quantile(error, self.level)
        self.support_ = _say_support(self.n_calibration_, self.level)
        return self

    def predict(self, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end (n,) of each interval in years; infinite where the calibration cannot support
        the level."""
        if not hasattr(self, "quantile_"):
            raise RuntimeError(
                "ConformalInterval is not fitted; call fit(predicted, age, split) on validation scans."
            )
        predicted = np.asarray(predicted, dtype=float)
        return predicted - self.quantile_, predicted + self.quantile_

    def to_dict(self) -> dict[str, Any]:
        """Everything `from_dict` needs, as plain JSON values (an infinite quantile as None)."""
        return {
            "level": self.level,
            "kind": self.kind,
            "quantile": self.quantile_ if np.isfinite(self.quantile_) else None,
            "n_calibration": self.n_calibration_,
            "support": self.support_,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ConformalInterval:
        """A calibrated interval from `to_dict`; bundles of the first release name no kind."""
        self = cls(content["level"], content.get("kind", "held-out"))
        self.quantile_ = np.inf if content["quantile"] is None else content["quantile"]
        self.n_calibration_, self.support_ = content["n_calibration"], content["support"]
        return self


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


def _say_support(n: int, level: float) -> str:
    needed = int(np.ceil(level / (1 - level) - 1e-9))
    if n >= needed:
        return ""
    return (
        f"{n} calibration scans cannot support a {level:.0%} interval (at least {needed} are needed), so it "
        "is infinite: nothing is promised. Use more validation subjects, or folds."
    )
