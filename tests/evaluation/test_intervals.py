import json

import numpy as np
import pytest
from sklearn.base import BaseEstimator, RegressorMixin

from brainage_nb.evaluation.bias import CorrectionRefused
from brainage_nb.evaluation.intervals import ConformalInterval, conformal_quantile, coverage, cv_plus_interval


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


def test_the_cv_plus_interval_is_that_of_mapie():
    from mapie.regression import CrossConformalRegressor
    from sklearn.linear_model import LinearRegression
    from sklearn.model_selection import KFold

    rng = np.random.default_rng(1)
    x, new = rng.normal(0, 1, (60, 2)), rng.normal(0, 1, (5, 2))
    age = 50 + x @ [9.0, -4.0] + rng.normal(0, 3, 60)
    folds = list(KFold(4, shuffle=True, random_state=0).split(x))
    theirs = CrossConformalRegressor(
        LinearRegression(), confidence_level=0.9, method="plus", cv=KFold(4, shuffle=True, random_state=0)
    ).fit_conformalize(x, age)
    expected = theirs.predict_interval(new)[1][:, :, 0]
    fold, held_out, members = np.empty(60, int), np.empty(60), np.empty((5, 4))
    for k, (inside, outside) in enumerate(folds):
        model = LinearRegression().fit(x[inside], age[inside])
        fold[outside], held_out[outside], members[:, k] = k, model.predict(x[outside]), model.predict(new)
    found = cv_plus_interval(members, held_out, age, fold, 0.9)
    assert np.column_stack(found) == pytest.approx(expected)


@pytest.mark.parametrize("scaled", [False, True])
def test_nine_of_ten_unseen_ages_lie_inside(scaled):
    rng, inside = np.random.default_rng(2), []
    for _ in range(60):
        predicted, age = simulated(60, rng)
        new_predicted, new_age = simulated(200, rng)
        low, high = ConformalInterval(0.9, scaled=scaled).fit(predicted, age, "val").predict(new_predicted)
        inside.append(((new_age >= low) & (new_age <= high)).mean())
    assert np.mean(inside) == pytest.approx(0.9, abs=0.025)


def test_the_scaled_form_is_wide_where_errors_are_large_and_covers_there():
    rng = np.random.default_rng(3)
    difficulty = rng.choice([1.0, 8.0], 3000)
    predicted, age = simulated(3000, rng, difficulty)
    half = slice(0, 1500), slice(1500, None)
    interval = ConformalInterval(0.9, scaled=True).fit(
        predicted[half[0]], age[half[0]], "val", difficulty=difficulty[half[0]]
    )
    low, high = interval.predict(predicted[half[1]], difficulty[half[1]])
    hard = difficulty[half[1]] == 8
    inside = (age[half[1]] >= low) & (age[half[1]] <= high)
    assert [inside[hard].mean(), inside[~hard].mean()] == pytest.approx([0.9, 0.9], abs=0.035)
    assert (high - low)[hard].mean() == pytest.approx(8 * (high - low)[~hard].mean(), rel=0.01)


def test_a_learned_difficulty_follows_the_predicted_age():
    rng = np.random.default_rng(4)
    predicted = rng.uniform(20, 86, 800)
    age = predicted + rng.normal(0, 1, 800) * np.where(predicted > 60, 9, 2)
    low, high = ConformalInterval(0.9, scaled=True).fit(predicted, age, "val").predict(np.array([25.0, 80.0]))
    assert (high - low)[1] > 2 * (high - low)[0]


def test_too_few_subjects_give_an_infinite_interval_that_says_so():
    rng = np.random.default_rng(5)
    assert conformal_quantile(np.ones(18), 0.95) == np.inf
    assert conformal_quantile(np.ones(19), 0.95) == 1
    eight = ConformalInterval(0.9).fit(*simulated(8, rng), "val")
    assert eight.predict([50.0])[1][0] == np.inf and "at least 9" in eight.support_
    assert ConformalInterval(0.9).fit(*simulated(9, rng), "val").support_ == ""
    low, high = cv_plus_interval(np.full((2, 1), 50.0), np.zeros(8), np.zeros(8), np.zeros(8, int), 0.9)
    assert np.isinf(low).all() and np.isinf(high).all()


def test_test_scans_cannot_calibrate():
    with pytest.raises(CorrectionRefused, match="Test scans"):
        ConformalInterval().fit([1.0, 2.0], [1.0, 2.0], ["val", "test"])


@pytest.mark.parametrize("n", [5, 50])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_interval_survives_json(scaled, n):
    interval = ConformalInterval(0.9, scaled=scaled).fit(*simulated(n, np.random.default_rng(6)), "val")
    again = ConformalInterval.from_dict(json.loads(json.dumps(interval.to_dict(), allow_nan=False)))
    new = np.array([30.0, 70.0])
    assert np.array_equal(again.predict(new), interval.predict(new))


def test_a_given_difficulty_is_needed_again():
    rng = np.random.default_rng(7)
    interval = ConformalInterval(scaled=True).fit(
        *simulated(30, rng), "val", difficulty=rng.uniform(1, 2, 30)
    )
    with pytest.raises(ValueError, match="give it for these scans too"):
        interval.predict([50.0])


def test_coverage_counts_each_age_bin():
    age = np.array([25.0, 26.0, 27.0, 45.0])
    table = coverage(age, age - np.array([1, -1, 5, 1]), age + np.array([2, 2, -1, 2]))
    assert table["group"].tolist() == ["all", "20-29", "40-49"]
    assert table["coverage"].tolist() == pytest.approx([1 / 2, 1 / 3, 1])
    assert table["mean_width"].tolist() == pytest.approx([11 / 4, 8 / 3, 3])
    assert (table["coverage_low"] < table["coverage"]).all()
