"""The age bias of brain-age models (old read too young, young too old) and its linear correction.

Two kinds, kept apart. `transform` needs no true age: its result is a prediction. `adjust_gap` uses each
subject's true age: its result describes a gap and is never an accuracy (pure noise so adjusted would
correlate with age at 0.95).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation.metrics import regression_metrics

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
