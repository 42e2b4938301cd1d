"""One step: no loss broadcasts, the rate rises and falls, averages and statistics are what they say."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from brainage_nb.models.fit import (
    huber_loss,
    list_learning_rates,
    make_optimiser,
    predict_ages,
)
from brainage_nb.models.network import resnet18_regressor
from brainage_nb.models.settings import TrainingSettings

SMALL = {"widths": (4, 4, 8, 8), "blocks": (1, 1, 1, 1)}


def test_loss_is_square_within_a_year_and_linear_beyond():
    losses = huber_loss(torch.tensor([50.5, 53.0]), torch.tensor([50.0, 50.0]))
    assert torch.allclose(losses, torch.tensor([0.125, 2.5]))


def test_rate_rises_over_the_warm_up_then_falls_as_a_cosine():
    rates = list_learning_rates(TrainingSettings(epochs=50, learning_rate=1.0), 10)
    assert np.all(np.diff(rates[:50]) > 0) and np.all(np.diff(rates[51:]) < 0)
    assert rates.max() == pytest.approx(1.0, abs=1e-3)
    assert rates[275] == pytest.approx(0.505, abs=1e-3)
    assert rates[-1] < 0.011
    step = np.arange(450)
    assert rates[50:] == pytest.approx(0.01 + 0.99 * (1 + np.cos(np.pi * step / 450)) / 2, abs=1e-9)
    assert rates[:50] == pytest.approx((np.arange(50) + 1) / 51, abs=1e-9)


def test_a_short_run_warms_up_for_a_fifth_of_it_at_most():
    assert np.argmax(list_learning_rates(TrainingSettings(epochs=10), 10)) == 20
    assert len(list_learning_rates(TrainingSettings(epochs=1), 2)) == 2


def test_weight_decay_spares_norms_and_biases():
    optimiser = make_optimiser(resnet18_regressor(**SMALL), replace(TrainingSettings(), weight_decay=0.1))
    decayed, spared = optimiser.param_groups
    assert decayed["weight_decay"] == 0.1 and all(weight.ndim > 1 for weight in decayed["params"])
    assert spared["weight_decay"] == 0.0 and all(weight.ndim == 1 for weight in spared["params"])


def test_flip_averaging_makes_left_and_right_alike():
    model = resnet18_regressor(**SMALL)
    volumes = torch.randn(3, 1, 16, 16, 16)
    kwargs = {"autocast": contextlib.nullcontext, "flip_averaging": True}
    ages = predict_ages(model, [volumes], **kwargs)
    np.testing.assert_allclose(ages, predict_ages(model, [volumes.flip(2)], **kwargs), atol=1e-5)
    assert ages.shape == (3,) and ages.dtype == np.float64
    assert len(predict_ages(model, [], **kwargs)) == 0
