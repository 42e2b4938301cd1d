import json

import numpy as np
import pytest
from sklearn.base import BaseEstimator, RegressorMixin

from brainage_nb.evaluation.correction import (
    ConformalInterval,
    CorrectionRefused,
    conformal_quantile,
    coverage,
)


class SaysItsInput(RegressorMixin, BaseEstimator):
    """A model whose prediction is its only feature, so that MAPIE can be given finished predictions."""

    def fit(self, X, y):
        self.is_fitted_ = True
        return self

    def predict(self, X):
        return np.asarray(X)[:, 0]


def simulated(n, rng, spread=5.0):
    age = rng.uniform(20, 86, n)
    return age + rng.normal(0, 1, n) * spread, age


def test_the_plain_interval_is_that_of_mapie():
    from mapie.regression import SplitConformalRegressor

    rng = np.random.default_rng(0)
    predicted, age = simulated(57, rng)
    new = np.array([30.0, 55.5, 80.0])
    theirs = SplitConformalRegressor(SaysItsInput().fit(None, None), confidence_level=0.9, prefit=True)
    theirs.conformalize(predicted[:, None], age)
    expected = theirs.predict_interval(new[:, None])[1][:, :, 0]
    found = ConformalInterval(0.9).fit(predicted, age, "val").predict(new)
    assert np.column_stack(found) == pytest.approx(expected)


def test_around_the_mean_of_fold_models_at_least_the_level_lies_inside():
    rng, inside = np.random.default_rng(1), []
    for _ in range(60):
        age, new_age = rng.uniform(20, 86, 80), rng.uniform(20, 86, 200)
        shared = rng.normal(0, 4, 200)  # what all folds' models get wrong alike
        members = new_age + shared + rng.normal(0, 3, (5, 200))
        interval = ConformalInterval(0.9, "out-of-fold").fit(age + rng.normal(0, 5, 80), age, "train")
        low, high = interval.predict(members.mean(axis=0))
        inside.append(((new_age >= low) & (new_age <= high)).mean())
    assert 0.9 < np.mean(inside) < 0.97


def test_nine_of_ten_unseen_ages_lie_inside():
    rng, inside = np.random.default_rng(2), []
    for _ in range(60):
        predicted, age = simulated(60, rng)
        new_predicted, new_age = simulated(200, rng)
        low, high = ConformalInterval(0.9).fit(predicted, age, "val").predict(new_predicted)
        inside.append(((new_age >= low) & (new_age <= high)).mean())
    assert np.mean(inside) == pytest.approx(0.9, abs=0.025)


@pytest.mark.parametrize("n_subjects", [20, 100])
def test_two_scans_of_a_person_are_one_vote(n_subjects):
    rng, inside = np.random.default_rng(3), []
    for _ in range(400):
        errors = np.repeat(rng.normal(0, 5, n_subjects), 2) + rng.normal(0, 0.5, 2 * n_subjects)
        people = np.repeat(np.arange(n_subjects), 2)
        interval = ConformalInterval(0.9).fit(errors, np.zeros(2 * n_subjects), "val", people)
        new = rng.normal(0, 5, 50) + rng.normal(0, 0.5, 50)
        inside.append((np.abs(new) <= interval.quantile_).mean())
    assert interval.n_calibration_ == n_subjects
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)


def test_too_few_subjects_give_an_infinite_interval_that_says_so():
    rng = np.random.default_rng(5)
    assert conformal_quantile(np.ones(18), 0.95) == np.inf
    assert conformal_quantile(np.ones(19), 0.95) == 1
    eight = ConformalInterval(0.9).fit(*simulated(8, rng), "val")
    assert eight.predict([50.0])[1][0] == np.inf and "at least 9" in eight.support_
    assert ConformalInterval(0.9).fit(*simulated(9, rng), "val").support_ == ""


def test_test_scans_cannot_calibrate():
    with pytest.raises(CorrectionRefused, match="1 of the given scans are test scans"):
        ConformalInterval().fit([1.0, 2.0], [1.0, 2.0], ["val", "test"])


@pytest.mark.parametrize("n", [5, 50])
def test_an_interval_survives_json(n):
    interval = ConformalInterval(0.8, "out-of-fold").fit(*simulated(n, np.random.default_rng(6)), "val")
    again = ConformalInterval.from_dict(json.loads(json.dumps(interval.to_dict(), allow_nan=False)))
    new = np.array([30.0, 70.0])
    assert np.array_equal(again.predict(new), interval.predict(new))
    reach = {5: "48% to 99%", 50: "69% to 90%"}[n]
    assert again.title == (
        f"80% conformal interval, calibrated on {n} subjects (out-of-fold); by chance alone it may hold "
        f"{reach} of new people"
    )


def test_an_interval_of_the_first_release_is_read():
    kept = {"level": 0.9, "scaled": False, "quantile": 8.0, "n_calibration": 50, "support": ""}
    kept |= {"learned": False, "difficulty": None, "floor": 0.0}
    assert np.ravel(ConformalInterval.from_dict(kept).predict([50.0])).tolist() == [42, 58]


def test_coverage_counts_each_age_bin():
    age = np.array([25.0, 26.0, 27.0, 45.0])
    table = coverage(age, age - np.array([1, -1, 5, 1]), age + np.array([2, 2, -1, 2]))
    assert table["group"].tolist() == ["all", "20-29", "40-49"]
    assert table["coverage"].tolist() == pytest.approx([1 / 2, 1 / 3, 1])
    assert table["mean_width"].tolist() == pytest.approx([11 / 4, 8 / 3, 3])
    assert (table["coverage_low"] < table["coverage"]).all()
