"""The age bias of brain-age models (old read too young, young too old) and its linear correction.

Two kinds, kept apart. `transform` needs no true age: its result is a prediction. `adjust_gap` uses each
subject's true age: its result describes a gap and is never an accuracy (pure noise so adjusted would
correlate with age at 0.95).

Prediction intervals that hold the true age in a stated share of people (conformal), and how well they do;
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

from brainage_nb.evaluation.metrics import age_bins, regression_metrics

if TYPE_CHECKING:
    pass

ENOUGH_SUBJECTS = 40
WHY_GAP_ONLY = (
    "The age-dependent adjustment subtracts what the fit expects at each subject's true age; a number that "
    "was given the answer cannot say how well the answer is predicted, so it appears as a gap and never as "
    "an accuracy."
)


class CorrectionRefused(ValueError):
    """The correction would be fitted on subjects, or from a slope, that cannot carry it."""


class AgeBiasCorrector:
    """Linear age-bias correction, fitted as `predicted = intercept + slope * age`.

    Fit it on controls of the validation part, or on out-of-fold predictions of train and validation; never on
    test subjects (de Lange & Cole 2020, Butler et al. 2021).

    Attributes
    ----------
    intercept_ : float
        Years.
    slope_ : float
        Years of predicted age a year of true age; 1 means no age bias.
    slope_interval_ : (float, float)
        95 % t-interval of the slope.
    n_subjects_ : int
        Subjects behind the fit.
    age_range_ : (float, float)
        Youngest and oldest of them, years; outside it the correction extrapolates.
    support_ : str
        What so few subjects support; empty with 40 or more.
    before_after_ : DataFrame
        Slope and gap-age r on the fitted scans, before and after (see `summary`).
    """

    def fit(
        self,
        predicted: np.ndarray,
        age: np.ndarray,
        split: np.ndarray | str | None = None,
        *,
        subject_id: np.ndarray | None = None,
    ) -> AgeBiasCorrector:
        """Fit slope and intercept.

        Parameters
        ----------
        predicted, age : array (n,)
            Years. The predictions must come from models that did not train on these subjects.
        split : array (n,) or str, optional
            Which part each scan belongs to (`val`, `train` where out-of-fold); any `test` is refused.
        subject_id : array (n,), optional
            Scans of one subject are averaged first, so that a subject counts once.

        Raises
        ------
        CorrectionRefused
            Test subjects among the rows, fewer than 3 subjects, or a slope whose 95 % interval is not above
            0.
        """
        from scipy import stats

        predicted, age = np.asarray(predicted, dtype=float), np.asarray(age, dtype=float)
        _refuse_test_rows(split)
        by_subject = _one_row_a_subject(predicted, age, subject_id)
        n = len(by_subject)
        if n < 3 or by_subject["age"].nunique() < 2:
            raise CorrectionRefused(
                f"{n} subjects are too few to fit a slope and say how sure it is; give 3 or more."
            )
        line = stats.linregress(by_subject["age"], by_subject["predicted"])
        half = float(stats.t.ppf(0.975, n - 2) * line.stderr)
        low, high = line.slope - half, line.slope + half
        if not low > 0:
            raise CorrectionRefused(
                f"The slope of predicted on true age is {line.slope:.2f} [{low:.2f}, {high:.2f}] in {n} "
                "subjects; the interval is not above 0, so the predictions carry no age that could be "
                "rescaled. Improve the model, or add subjects."
            )
        self.intercept_, self.slope_ = float(line.intercept), float(line.slope)
        self.slope_interval_, self.n_subjects_ = (float(low), float(high)), n
        self.age_range_ = (float(age.min()), float(age.max()))
        self.support_ = self._say_support()
        if self.support_:
            warnings.warn(self.support_, stacklevel=2)
        self.before_after_ = self.summary(predicted, age)
        return self

    def transform(self, predicted: np.ndarray) -> np.ndarray:
        """Corrected predictions (n,) in years: (predicted - intercept) / slope. Uses no true age."""
        self._need_fit()
        return (np.asarray(predicted, dtype=float) - self.intercept_) / self.slope_

    def adjust_gap(self, predicted: np.ndarray, age: np.ndarray) -> np.ndarray:
        """Gap (n,) in years minus the gap expected at each true age. For gaps only, never for accuracy."""
        self._need_fit()
        return np.asarray(predicted, dtype=float) - (
            self.intercept_ + self.slope_ * np.asarray(age, dtype=float)
        )

    def summary(self, predicted: np.ndarray, age: np.ndarray) -> pd.DataFrame:
        """Slope and gap-age r before and after on any scans (give test scans to see whether the correction
        carries over).

        Returns
        -------
        DataFrame
            Index `raw`, `corrected, age-free`, `gap adjusted by true age`; columns `slope`, `gap_age_r`. The
            adjusted gap is no prediction and has no slope.
        """
        age = np.asarray(age, dtype=float)
        raw = regression_metrics(age, predicted, n_bootstrap=0)
        free = regression_metrics(age, self.transform(predicted), n_bootstrap=0)
        adjusted = regression_metrics(age, self.adjust_gap(predicted, age) + age, n_bootstrap=0)
        return pd.DataFrame(
            {
                "slope": [raw["slope"]["value"], free["slope"]["value"], np.nan],
                "gap_age_r": [figure["gap_age_r"]["value"] for figure in (raw, free, adjusted)],
            },
            index=["raw", "corrected, age-free", "gap adjusted by true age"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything `from_dict` needs, as plain JSON values."""
        self._need_fit()
        return {
            "intercept": self.intercept_,
            "slope": self.slope_,
            "slope_interval": list(self.slope_interval_),
            "n_subjects": self.n_subjects_,
            "age_range": list(self.age_range_),
            "support": self.support_,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> AgeBiasCorrector:
        """A fitted corrector from `to_dict`; `before_after_` stays behind with the fitted scans."""
        self = cls()
        self.intercept_, self.slope_ = content["intercept"], content["slope"]
        self.slope_interval_, self.age_range_ = tuple(content["slope_interval"]), tuple(content["age_range"])
        self.n_subjects_, self.support_ = content["n_subjects"], content["support"]
        return self

    def _say_support(self) -> str:
        if self.n_subjects_ >= ENOUGH_SUBJECTS:
            return ""
        low, high = self.slope_interval_
        return (
            f"The bias correction rests on {self.n_subjects_} subjects (fewer than {ENOUGH_SUBJECTS}): the "
            f"slope may be anything from {low:.2f} to {high:.2f}, so a corrected age 20 years from the "
            f"middle may be off by {20 * max(abs(self.slope_ / low - 1), abs(self.slope_ / high - 1)):.0f} "
            "years from this alone."
        )

    def _need_fit(self) -> None:
        if not hasattr(self, "slope_"):
            raise RuntimeError(
                "AgeBiasCorrector is not fitted; call fit(predicted, age, split) on validation subjects."
            )


def _refuse_test_rows(split: np.ndarray | str | None) -> None:
    if split is None:
        return
    n_test = int((np.atleast_1d(np.asarray(split, dtype=str)) == "test").sum())
    if n_test:
        raise CorrectionRefused(
            f"{n_test} of the given scans are test scans. A correction fitted on them would flatter the test "
            "figures; fit it on validation scans, or on out-of-fold predictions of train and validation."
        )


def _one_row_a_subject(predicted: np.ndarray, age: np.ndarray, subject_id: np.ndarray | None) -> pd.DataFrame:
    frame = pd.DataFrame({"predicted": predicted, "age": age})
    if not np.isfinite(frame.to_numpy()).all():
        raise ValueError("predicted and age must be finite; drop scans without age or prediction first.")
    return frame if subject_id is None else frame.groupby(np.asarray(subject_id)).mean()


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
