import json

import numpy as np
import pytest

from brainage_nb.predict.cautions import DistanceFromTraining


@pytest.fixture(params=[6, 200], ids=["statistics", "features"])
def training(request):
    rng = np.random.default_rng(0)
    mixing = rng.normal(0, 1, (4, request.param))
    return lambda n, seed: (
        np.random.default_rng(seed).normal(0, 1, (n, 4)) @ mixing
        + np.random.default_rng(seed + 1).normal(0, 0.1, (n, request.param))
    )


def test_scans_like_those_of_training_are_rarely_called_far(training):
    measure = DistanceFromTraining().fit(training(200, 1))
    assert (measure.distance(training(400, 5)) > measure.limit_).mean() < 0.06


def test_scans_from_elsewhere_are_called_far(training):
    measure = DistanceFromTraining().fit(training(200, 1))
    shifted = training(50, 7) * 3 + 8
    assert "of 50 scans are further" in measure.warnings(shifted)[0]
    assert (measure.distance(shifted) > measure.limit_).mean() > 0.9


def test_a_distance_survives_json(training):
    measure = DistanceFromTraining().fit(training(60, 1))
    again = DistanceFromTraining.from_dict(json.loads(json.dumps(measure.to_dict())))
    assert again.distance(training(5, 2)) == pytest.approx(measure.distance(training(5, 2)))
    assert again.limit_ == measure.limit_


@pytest.mark.parametrize(("name", "value"), [("whiten", [[1.0]]), ("limit", float("nan")), ("axes", [1.0])])
def test_content_that_does_not_fit_together_is_refused(name, value, training):
    content = DistanceFromTraining().fit(training(60, 1)).to_dict()
    with pytest.raises(ValueError, match="a distance"):
        DistanceFromTraining.from_dict(content | {name: value})


def test_a_constant_feature_does_no_harm():
    features = np.random.default_rng(0).normal(0, 1, (40, 3))
    features[:, 1] = 7.0
    assert np.isfinite(DistanceFromTraining().fit(features).distance(features)).all()


def test_too_few_training_scans_are_refused():
    with pytest.raises(ValueError, match="at least 20"):
        DistanceFromTraining().fit(np.zeros((19, 3)))
