"""The age bias of brain-age models (old read too young, young too old), its linear correction, and conformal
intervals that hold the true age in a stated share of people. Promises nothing from few subjects."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from brainage_nb.evaluation.metrics import age_bins, regression_metrics

ENOUGH_SUBJECTS = 40
LEVEL = 0.9


class EvaluationError(ValueError):
    """A figure would mislead: files contradict each other, or people were seen in training."""


class CorrectionRefused(EvaluationError):
    """The correction would be fitted on subjects, or from a slope, that cannot carry it."""


class _Fitted:
    """What is fitted on held-out scans, and can be kept as plain JSON values (an infinite one as None)."""

    _KEPT: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything `from_dict` needs."""
        kept = {name.rstrip("_"): getattr(self, name) for name in self._KEPT}
        return {name: None if value == np.inf else value for name, value in kept.items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The fitted object from `to_dict`."""
        self = cls()
        for name in cls._KEPT:
            value = content[name.rstrip("_")]
            setattr(self, name, np.inf if value is None else value)
        return self

    def _need_fit(self) -> None:
        if not hasattr(self, self._KEPT[-1]):
            raise RuntimeError(
                f"{type(self).__name__} is not fitted; call fit(predicted, age, split) on validation scans."
            )


class AgeBiasCorrector(_Fitted):
    """Linear age-bias correction, fitted as `predicted = intercept + slope * age`.

    Fit it on controls of the validation part, or on out-of-fold predictions of train and validation; never on
    test subjects (de Lange & Cole 2020, Butler et al. 2021). Two kinds follow, kept apart: `transform` needs
    no true age, and its result is a prediction; `adjust_gap` uses each subject's true age, and its result
    describes a gap and is never an accuracy (pure noise so adjusted would correlate with age at 0.95).

    Attributes
    ----------
    intercept_ : float
        Years.
    slope_ : float
        Years of predicted age per year of true age; 1 means no age bias.
    slope_interval_ : [float, float]
        95 % t-interval of the slope.
    n_subjects_ : int
        Subjects behind the fit.
    age_range_ : [float, float]
        Youngest and oldest of them, years; outside it the correction extrapolates.
    support_ : str
        What so few subjects support; empty with 40 or more.

    Examples
    --------
    >>> age = np.linspace(20, 80, 41)  # of validation subjects, on whom the model was not trained
    >>> predicted = 10 + 0.8 * age
    >>> corrector = AgeBiasCorrector().fit(predicted, age, "val")
    >>> corrector.transform([26.0, 50.0, 74.0]).round(1)  # no true age is needed
    array([20., 50., 80.])
    >>> corrector.adjust_gap([76.0], [80.0]).round(1)  # a gap of -4 years, where -6 was expected at 80
    array([2.])
    """

    _KEPT = ("intercept_", "slope_", "slope_interval_", "n_subjects_", "age_range_", "support_")

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

        _refuse_test_rows(split)
        scans = pd.DataFrame({"predicted": np.asarray(predicted, float), "age": np.asarray(age, float)})
        if not np.isfinite(scans).all(axis=None):
            raise ValueError("predicted and age must be finite; drop scans without age or prediction first.")
        people = scans if subject_id is None else scans.groupby(np.asarray(subject_id)).mean()
        n = len(people)
        if n < 3 or people["age"].nunique() < 2:
            raise CorrectionRefused(
                f"{n} subjects are too few to fit a slope and say how sure it is; give 3 or more."
            )
        line = stats.linregress(people["age"], people["predicted"])
        low, high = line.slope + np.array([-1, 1]) * stats.t.ppf(0.975, n - 2) * line.stderr
        if not low > 0:
            raise CorrectionRefused(
                f"The slope of predicted on true age is {line.slope:.2f} [{low:.2f}, {high:.2f}] in {n} "
                "subjects; the interval is not above 0, so the predictions carry no age that could be "
                "rescaled. Improve the model, or add subjects."
            )
        self.intercept_, self.slope_ = float(line.intercept), float(line.slope)
        self.slope_interval_, self.n_subjects_ = [float(low), float(high)], n
        self.age_range_ = [float(scans["age"].min()), float(scans["age"].max())]
        self.support_ = self._say_support()
        if self.support_:
            warnings.warn(self.support_, stacklevel=2)
        return self

    def transform(self, predicted: np.ndarray) -> np.ndarray:
        """Corrected predictions (n,) in years: (predicted - intercept) / slope. Uses no true age."""
        self._need_fit()
        return (np.asarray(predicted, dtype=float) - self.intercept_) / self.slope_

    def adjust_gap(self, predicted: np.ndarray, age: np.ndarray) -> np.ndarray:
        """Gap (n,) in years minus the gap expected at each true age. For gaps only, never for accuracy."""
        self._need_fit()
        expected = self.intercept_ + self.slope_ * np.asarray(age, dtype=float)
        return np.asarray(predicted, dtype=float) - expected

    def summary(self, predicted: np.ndarray, age: np.ndarray) -> pd.DataFrame:
        """Slope and gap-age r before and after, on any scans: those of the fit, or test scans to see whether
        the correction carries over.

        Returns
        -------
        DataFrame
            Index `raw`, `corrected, age-free`, `gap adjusted by true age`; columns `slope`, `gap_age_r`. The
            adjusted gap is no prediction and has no slope.
        """
        ages = {
            "raw": predicted,
            "corrected, age-free": self.transform(predicted),
            "gap adjusted by true age": self.adjust_gap(predicted, age) + np.asarray(age, dtype=float),
        }
        figures = [regression_metrics(age, values, n_bootstrap=0) for values in ages.values()]
        table = {name: [one[name]["value"] for one in figures] for name in ("slope", "gap_age_r")}
        table["slope"][-1] = np.nan
        return pd.DataFrame(table, index=list(ages))

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


class ConformalInterval(_Fitted):
    """Split-conformal interval around a predicted age (Vovk 2005; Lei et al. 2018): one width for everybody.

    Half-width: the least error below which (n + 1) * level of the n calibration subjects lie, each subject's
    scans sharing one vote; infinite where there are too few. With one scan each, the k-th smallest absolute
    error, k = ceil((n + 1) * level). With `kind` out-of-fold, each error is that of the one fold's model
    that had not seen the scan, while the interval stands around the mean of all folds' models. That mean errs
    no more on average, so the interval tends to hold at least `level`; no theorem promises it. (MAPIE gives
    the same interval from validation scans, but would train the folds' models again.)

    Parameters
    ----------
    level : float
        Share of people whose true age the interval should hold.
    kind : str
        Who calibrates it: "validation", "out-of-fold", and whether they also chose the epoch.

    Attributes
    ----------
    quantile_ : float
        Half the width, years.
    n_calibration_ : int
        Subjects behind it.
    support_ : str
        Why the interval is infinite; empty where it is not.
    """

    _KEPT = ("level", "kind", "quantile_", "n_calibration_", "support_")

    def __init__(self, level: float = LEVEL, kind: str = "validation"):
        if not 0 < level < 1:
            raise ValueError(f"level = {level}: give a share between 0 and 1, such as 0.9.")
        self.level, self.kind = level, kind

    @property
    def title(self) -> str:
        """Level, who calibrated it, and what so many subjects can promise (95 %, by chance alone), in
        words."""
        from scipy.special import betaincinv

        n, k = self.n_calibration_, conformal_rank(self.n_calibration_, self.level)
        words = f"{self.level:.0%} conformal interval, calibrated on {n} subjects ({self.kind})"
        if k > n:
            return f"{words}, which is infinite: so few can promise nothing"
        low, high = betaincinv(k, n + 1 - k, [0.025, 0.975])  # of the Beta distribution of coverage
        return f"{words}; by chance alone it may hold {low:.0%} to {high:.0%} of new people"

    def fit(
        self,
        predicted: np.ndarray,
        age: np.ndarray,
        split: np.ndarray | str | None = None,
        subject_id: np.ndarray | None = None,
    ) -> ConformalInterval:
        """Calibrate on scans the model did not train on.

        Parameters
        ----------
        predicted, age : array (n,)
            Years.
        split : array (n,) or str, optional
            Part of each scan; any `test` is refused.
        subject_id : array (n,), optional
            Whose scans they are; by default each is another person's.

        Raises
        ------
        CorrectionRefused
            Test scans among the rows.
        """
        _refuse_test_rows(split)
        error = np.abs(np.asarray(age, dtype=float) - np.asarray(predicted, dtype=float))
        subjects = np.arange(len(error)) if subject_id is None else np.asarray(subject_id)
        self.n_calibration_, self.support_ = len(np.unique(subjects)), ""
        self.quantile_ = conformal_quantile(error, self.level, subjects)
        if np.isinf(self.quantile_):
            needed = int(np.ceil(self.level / (1 - self.level) - 1e-9))
            self.support_ = (
                f"{self.n_calibration_} calibration subjects cannot support a {self.level:.0%} interval (at "
                f"least {needed} are needed), so it is infinite: nothing is promised. Use more validation "
                "subjects, or folds."
            )
        return self

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """A calibrated interval from `to_dict`; bundles of the first release name no kind."""
        return super().from_dict({"kind": "held-out"} | content)

    def predict(self, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end (n,) of each interval in years; infinite where the calibration cannot support
        the level."""
        self._need_fit()
        predicted = np.asarray(predicted, dtype=float)
        return predicted - self.quantile_, predicted + self.quantile_


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

    def add_gaps(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows with `gap`, `corrected_age`, `corrected_gap`, `adjusted_gap` (NaN where the correction was
        refused) and the ends `low`, `high` of the interval (infinite without one), all in years."""
        corrector, predicted, age = self.corrector, rows["predicted_age"], rows["age"]
        corrected = corrector.transform(predicted) if corrector else np.nan
        low, high = self.interval.predict(predicted) if self.interval else (-np.inf, np.inf)
        return rows.assign(
            gap=predicted - age,
            corrected_age=corrected,
            corrected_gap=corrected - age,
            adjusted_gap=corrector.adjust_gap(predicted, age) if corrector else np.nan,
            low=low,
            high=high,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the names they have in a bundle."""
        return {
            "correction": self.corrector.to_dict() if self.corrector else None,
            "correction_refused": self.refused,
            "interval": self.interval.to_dict() if self.interval else None,
        }


def conformal_rank(n: int, level: float) -> int:
    """Which of n calibration errors, counted from the smallest, is the half-width; above n there is none."""
    return int(np.ceil((n + 1) * level - 1e-9))


def conformal_quantile(
    error: np.ndarray, level: float = LEVEL, subject_id: np.ndarray | None = None
) -> float:
    """The least error below which (n + 1) * level of n subjects lie; infinite where there are too few.

    A subject's scans share one vote: two scans of one person are not two people.
    """
    people = np.arange(len(error)) if subject_id is None else np.unique(subject_id, return_inverse=True)[1]
    votes, order = 1 / np.bincount(people)[people], np.argsort(error)
    enough = np.cumsum(votes[order]) >= conformal_rank(people.max(initial=-1) + 1, level) - 1e-9
    return float(np.asarray(error)[order][enough.argmax()]) if enough.any() else np.inf


def coverage(age: np.ndarray, low: np.ndarray, high: np.ndarray) -> pd.DataFrame:
    """Share of true ages inside their intervals, and interval width, over all scans and by age bin.

    Returns
    -------
    DataFrame
        Columns `group` (`all`, then decades), `n`, `coverage`, `coverage_low`, `coverage_high` (95 % Wilson)
        and `mean_width` in years.
    """
    from statsmodels.stats.proportion import proportion_confint

    age, low, high = (np.asarray(values, dtype=float) for values in (age, low, high))
    scans = pd.DataFrame(
        {"group": age_bins(age), "inside": (age >= low) & (age <= high), "width": high - low}
    ).sort_values("group")
    groups = pd.concat([scans.assign(group="all"), scans]).groupby("group", sort=False)
    table = groups.agg(n=("inside", "size"), coverage=("inside", "mean"), mean_width=("width", "mean"))
    ends = proportion_confint(groups["inside"].sum(), table["n"], method="wilson")
    return table.assign(coverage_low=ends[0], coverage_high=ends[1]).reset_index()


def _refuse_test_rows(split: np.ndarray | str | None) -> None:
    n_test = 0 if split is None else int((np.atleast_1d(np.asarray(split, dtype=str)) == "test").sum())
    if n_test:
        raise CorrectionRefused(
            f"{n_test} of the given scans are test scans. What is fitted on test scans would flatter the "
            "test figures; fit it on validation scans, or on out-of-fold predictions of train and validation."
        )
