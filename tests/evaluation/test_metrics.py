import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics as sk

from brainage_nb.evaluation.metrics import (
    METRICS,
    age_bins,
    metrics_by_group,
    paired_difference,
    regression_metrics,
    with_interval,
)


@pytest.fixture
def made():
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 86, 150)
    return age, 12 + 0.8 * age + rng.normal(0, 5, 150)


def test_figures_equal_those_of_scikit_learn_and_scipy(made):
    age, predicted = made
    found = regression_metrics(age, predicted, reference_age=50.0, n_bootstrap=10)
    expected = {
        "mae": sk.mean_absolute_error(age, predicted),
        "rmse": sk.root_mean_squared_error(age, predicted),
        "r": stats.pearsonr(age, predicted).statistic,
        "r2": sk.r2_score(age, predicted),
        "slope": stats.linregress(age, predicted).slope,
        "gap_age_r": stats.pearsonr(predicted - age, age).statistic,
        "mean_gap": (predicted - age).mean(),
        "mean_predictor_mae": np.abs(50.0 - age).mean(),
    }
    assert set(expected) == set(METRICS)
    assert {name: found[name]["value"] for name in METRICS} == pytest.approx(expected, rel=1e-9)
    assert found["n"] == found["n_subjects"] == 150


def test_intervals_equal_those_of_a_plain_loop_over_resampled_subjects(made):
    age, predicted = made
    subjects = np.repeat(np.arange(75), 2)
    found = regression_metrics(age, predicted, subjects, reference_age=50.0, n_bootstrap=3000)
    rng, draws = np.random.default_rng(9), []
    for _ in range(3000):
        rows = np.concatenate([[2 * s, 2 * s + 1] for s in rng.integers(0, 75, 75)])
        draws.append(
            [np.abs(predicted[rows] - age[rows]).mean(), stats.pearsonr(age[rows], predicted[rows])[0]]
        )
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    assert [found["mae"]["low"], found["mae"]["high"]] == pytest.approx([low[0], high[0]], rel=0.02)
    assert [found["r"]["low"], found["r"]["high"]] == pytest.approx([low[1], high[1]], abs=0.004)


def test_repeated_scans_of_a_subject_do_not_narrow_the_interval(made):
    age, predicted = made
    subjects = np.arange(len(age))
    once = regression_metrics(age, predicted, subjects)
    doubled = regression_metrics(np.tile(age, 2), np.tile(predicted, 2), np.tile(subjects, 2))
    width = {
        name: fig["mae"]["high"] - fig["mae"]["low"] for name, fig in (("once", once), ("doubled", doubled))
    }
    assert doubled["n"] == 300 and doubled["n_subjects"] == 150
    assert width["doubled"] == pytest.approx(width["once"], rel=1e-9)


def test_constant_predictions_have_no_correlation_and_the_mean_predictors_error():
    age = np.linspace(20, 80, 30)
    found = regression_metrics(age, np.full(30, 47.0), reference_age=47.0, n_bootstrap=50)
    assert np.isnan(found["r"]["value"]) and np.isnan(found["r"]["low"])
    assert found["mae"] == found["mean_predictor_mae"]
    assert found["gap_age_r"]["value"] == pytest.approx(-1)


def test_the_mean_predictor_is_never_taken_from_the_evaluated_subjects(made):
    assert np.isnan(regression_metrics(*made, n_bootstrap=10)["mean_predictor_mae"]["value"])


def test_a_column_of_predictions_is_refused_rather_than_broadcast(made):
    age, predicted = made
    with pytest.raises(ValueError, match=r"\(150, 1\)"):
        regression_metrics(age, predicted[:, None])


def test_missing_predictions_are_refused_with_their_number(made):
    age, predicted = made
    predicted[:3] = np.nan
    with pytest.raises(ValueError, match="3 of 150"):
        regression_metrics(age, predicted)


def test_one_subject_has_a_value_and_no_interval():
    found = regression_metrics(np.array([40.0, 41.0]), np.array([45.0, 46.0]), ["a", "a"], n_bootstrap=20)
    assert found["mae"]["value"] == 5 and np.isnan(found["mae"]["low"])


def test_the_same_seed_gives_the_same_interval(made):
    one, two, other = (regression_metrics(*made, n_bootstrap=50, seed=seed)["mae"] for seed in (3, 3, 4))
    assert one == two != other


def test_groups_hold_each_scan_once_and_leave_out_the_unnamed(made):
    age, predicted = made
    site = np.where(np.arange(150) < 60, "A", np.where(np.arange(150) < 100, "B", ""))
    rows = pd.DataFrame({"age": age, "predicted_age": predicted, "subject_id": np.arange(150), "site": site})
    by_site = metrics_by_group(rows, "site", n_bootstrap=20)
    assert by_site[["group", "n"]].to_numpy().tolist() == [["A", 60], ["B", 40]]
    assert by_site["mae"][0] == pytest.approx(np.abs(predicted - age)[:60].mean())
    assert metrics_by_group(rows, "age_bin", n_bootstrap=20)["n"].sum() == 150


def test_age_bins_are_decades_with_their_ends_named():
    assert age_bins(np.array([5, 20, 29.99, 30])).tolist() == ["00-09", "20-29", "20-29", "30-39"]


def test_a_paired_difference_is_sharper_than_two_separate_intervals(made):
    age, predicted = made
    worse = predicted + np.sign(predicted - age)
    found = paired_difference(age, predicted, worse)
    assert found["value"] == pytest.approx(-1) and found["n"] == 150
    noisy = worse + np.random.default_rng(1).normal(0, 0.5, 150)
    found = paired_difference(age, predicted, noisy)
    apart = regression_metrics(age, predicted)["mae"]
    assert found["high"] < 0 and found["high"] - found["low"] < 0.3 * (apart["high"] - apart["low"])


def test_text_of_a_figure_shows_what_is_known():
    assert with_interval({"value": 7.123, "low": 6.0, "high": 8.006}) == "7.12 [6.00, 8.01]"
    assert with_interval({"value": -0.001, "low": None, "high": None}) == "0.00"
    assert with_interval({"value": None, "low": None, "high": None}) == "not defined"
