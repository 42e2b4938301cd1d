import json
import warnings

import numpy as np
import pytest

from brainage_nb.evaluation.correction import AgeBiasCorrector, CorrectionRefused


def predictions(n=300, slope=0.7, offset=15.0, noise=4.0, seed=0):
    rng = np.random.default_rng(seed)
    age = rng.uniform(20, 86, n)
    return offset + slope * age + rng.normal(0, noise, n), age


def test_slope_and_offset_are_recovered_with_the_axes_the_right_way_round():
    corrector = AgeBiasCorrector().fit(*predictions(2000), "val")
    assert corrector.slope_ == pytest.approx(0.7, abs=0.02)
    assert corrector.intercept_ == pytest.approx(15, abs=1)
    assert corrector.slope_interval_[0] < 0.7 < corrector.slope_interval_[1]


def test_both_kinds_remove_the_age_bias_of_unseen_subjects():
    corrector = AgeBiasCorrector().fit(*predictions(500), "val")
    predicted, age = predictions(500, seed=1)
    table = corrector.summary(predicted, age)
    assert table.loc["raw", "gap_age_r"] < -0.7
    assert np.abs(table.loc["corrected, age-free":, "gap_age_r"]).max() < 0.12
    assert table.loc["corrected, age-free", "slope"] == pytest.approx(1, abs=0.05)
    assert np.isnan(table.loc["gap adjusted by true age", "slope"])
    assert corrector.summary(*predictions(500)).loc["raw", "slope"] == pytest.approx(corrector.slope_)


def test_the_age_free_correction_depends_on_nothing_but_the_prediction():
    predicted, age = predictions()
    corrector = AgeBiasCorrector().fit(predicted, age, "val")
    assert corrector.transform(predicted) == pytest.approx(
        (predicted - corrector.intercept_) / corrector.slope_
    )
    assert corrector.adjust_gap([40.0], [30.0]) != corrector.adjust_gap([40.0], [60.0])


def test_test_subjects_are_refused_even_one_among_many():
    predicted, age = predictions()
    split = np.array(["val"] * 299 + ["test"])
    with pytest.raises(CorrectionRefused, match="1 of the given scans are test"):
        AgeBiasCorrector().fit(predicted, age, split)
    with pytest.raises(CorrectionRefused):
        AgeBiasCorrector().fit(predicted, age, "test")


@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_noise_and_reversed_predictions_are_refused(slope):
    with pytest.raises(CorrectionRefused, match="not above 0"):
        AgeBiasCorrector().fit(*predictions(100, slope=slope, noise=8), "val")


def test_two_subjects_are_refused():
    with pytest.raises(CorrectionRefused, match="too few"):
        AgeBiasCorrector().fit([30, 60, 31], [30, 60, 30], "val", subject_id=["a", "b", "a"])


def test_fewer_than_forty_subjects_are_said_to_support_little():
    with pytest.warns(UserWarning, match="39 subjects"):
        few = AgeBiasCorrector().fit(*predictions(39), "val")
    assert "fewer than 40" in few.support_
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AgeBiasCorrector().fit(*predictions(40), "val").support_ == ""


def test_a_subject_with_many_scans_counts_once():
    predicted, age = predictions(60)
    rows = np.concatenate([np.arange(60), np.full(500, 7)])
    repeated = AgeBiasCorrector().fit(predicted[rows], age[rows], "val", subject_id=rows)
    once = AgeBiasCorrector().fit(predicted, age, "val")
    assert repeated.slope_ == pytest.approx(once.slope_) and repeated.n_subjects_ == 60


def test_a_corrector_survives_json():
    corrector = AgeBiasCorrector().fit(*predictions(), "val")
    again = AgeBiasCorrector.from_dict(json.loads(json.dumps(corrector.to_dict())))
    assert again.transform([50.0]) == corrector.transform([50.0])
    assert again.adjust_gap([50.0], [40.0]) == corrector.adjust_gap([50.0], [40.0])
    assert again.to_dict() == corrector.to_dict()


def test_an_unfitted_corrector_says_what_to_do():
    with pytest.raises(RuntimeError, match="call fit"):
        AgeBiasCorrector().transform([50.0])
