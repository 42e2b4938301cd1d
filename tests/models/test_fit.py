"""One step: no loss broadcasts, the rate rises and falls, averages and statistics are what they say."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from brainage_nb.models.fit import (
    SharedBatchNorm3d,
    WeightAverage,
    distribution_loss,
    huber_loss,
    learning_rate_at,
    make_optimiser,
    precise_statistics,
    predict_ages,
    share_batchnorm,
)
from brainage_nb.models.network import resnet18_regressor, views
from brainage_nb.models.settings import TrainingSettings

SMALL = {"widths": (4, 4, 8, 8), "blocks": (1, 1, 1, 1)}


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 1\), true ages \(4,\)"):
        huber_loss(torch.zeros(4, 1), torch.zeros(4), 1.0)
    with pytest.raises(ValueError, match="expected both"):
        huber_loss(torch.zeros(1), torch.zeros(4), 1.0)


def test_loss_is_square_within_a_year_and_linear_beyond():
    losses = huber_loss(torch.tensor([50.5, 53.0]), torch.tensor([50.0, 50.0]), 1.0)
    assert torch.allclose(losses, torch.tensor([0.125, 2.5]))


def test_rate_rises_over_the_warm_up_then_falls_as_a_cosine():
    settings = TrainingSettings(epochs=50, warmup_epochs=5, learning_rate=1.0)
    rates = np.array([learning_rate_at(step, 10, settings) for step in range(500)])
    assert np.all(np.diff(rates[:50]) > 0) and np.all(np.diff(rates[51:]) < 0)
    assert rates.max() == pytest.approx(1.0, abs=1e-3)
    assert rates[275] == pytest.approx(0.505, abs=1e-3)
    assert rates[-1] < 0.011


def test_a_short_run_warms_up_for_a_fifth_of_it_at_most():
    settings = TrainingSettings(epochs=10, warmup_epochs=5, learning_rate=1.0)
    rates = [learning_rate_at(step, 10, settings) for step in range(100)]
    assert int(np.argmax(rates)) == 20


def test_weight_decay_spares_norms_and_biases():
    optimiser = make_optimiser(resnet18_regressor(**SMALL), replace(TrainingSettings(), weight_decay=0.1))
    decayed, spared = optimiser.param_groups
    assert decayed["weight_decay"] == 0.1 and all(weight.ndim > 1 for weight in decayed["params"])
    assert spared["weight_decay"] == 0.0 and all(weight.ndim == 1 for weight in spared["params"])


def test_the_average_follows_the_weights_with_its_time_constant():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.0)
    average = WeightAverage(model, time_constant=100.0)
    torch.nn.init.constant_(model.weight, 1.0)
    for _ in range(100):
        average.update(model, step=10**6)
    assert average.model.weight.item() == pytest.approx(1 - np.exp(-1), abs=1e-3)
    follower = WeightAverage(model, time_constant=0.0)
    torch.nn.init.constant_(model.weight, 5.0)
    follower.update(model, step=0)
    assert follower.model.weight.item() == 5.0


def test_precise_statistics_are_those_of_the_data_where_running_ones_lag():
    torch.manual_seed(0)
    model = resnet18_regressor(**SMALL, norm="batch", age_mean=50.0, age_sd=15.0)
    batches = [3 + 5 * torch.randn(6, 1, 24, 24, 24) for _ in range(4)]
    stem = model.conv1(torch.cat(batches)).detach()
    for batch in batches:
        model.train()(batch)
    assert (model.bn1.running_var < 0.9 * stem.var((0, 2, 3, 4))).any()  # four steps of a tenth lag behind
    precise_statistics(model, batches, contextlib.nullcontext)
    assert not model.training
    assert model.bn1.momentum == 0.1
    assert torch.allclose(model.bn1.running_mean, stem.mean((0, 2, 3, 4)), atol=1e-3)
    assert torch.allclose(model.bn1.running_var, stem.var((0, 2, 3, 4)), rtol=0.01)


def test_flip_averaging_makes_left_and_right_alike():
    model = resnet18_regressor(**SMALL, norm="group")
    volumes = torch.randn(3, 1, 16, 16, 16)
    kwargs = {"autocast": contextlib.nullcontext, "flip_averaging": True}
    ages = predict_ages(model, [volumes], **kwargs)
    np.testing.assert_allclose(ages, predict_ages(model, [volumes.flip(2)], **kwargs), atol=1e-5)
    assert ages.shape == (3,) and ages.dtype == np.float64
    assert len(predict_ages(model, [], **kwargs)) == 0


def test_shift_averaging_is_the_mean_over_seven_places():
    model = resnet18_regressor(**SMALL, norm="group").eval()
    volumes = torch.zeros(1, 1, 16, 16, 16)
    volumes[0, 0, 4:9, 5:11, 6:10] = torch.randn(5, 6, 4)
    places = [
        (0, 0, 0),
        *(tuple(step * (axis == k) for k in range(3)) for axis in range(3) for step in (1, -1)),
    ]
    with torch.no_grad():  # the edge is empty, so rolling is moving
        wanted = np.mean([float(model(volumes.roll(place, (2, 3, 4)))) for place in places])
    ages = predict_ages(model, [volumes], contextlib.nullcontext, flip_averaging=False, shift_averaging=1)
    np.testing.assert_allclose(ages, wanted, atol=1e-5)


def test_a_moved_view_repeats_the_edge():
    volumes = torch.arange(4.0).reshape(1, 1, 4, 1, 1).expand(1, 1, 4, 4, 4)
    seen = [view[0, 0, :, 0, 0].tolist() for view in views(volumes, flip_averaging=False, shift_averaging=1)]
    assert seen[:3] == [[0, 1, 2, 3], [0, 0, 1, 2], [1, 2, 3, 3]]
    assert len(seen) == 7 and seen[3:] == [[0, 1, 2, 3]] * 4


def test_a_distribution_starts_at_the_training_ages_and_learns_an_age():
    torch.manual_seed(0)
    model = resnet18_regressor(**SMALL, outputs=65, age_mean=50.0, age_sd=15.0)
    scores = model(torch.zeros(2, 1, 16, 16, 16), scores=True)
    shares = scores.softmax(dim=1)
    points = 50 + 15 * model.points()
    mean = shares @ points
    spread = (shares @ points.square() - mean.square()).sqrt()
    assert torch.allclose(mean, torch.full((2,), 50.0), atol=0.5)
    assert torch.allclose(spread, torch.full((2,), 15.0), atol=0.5)
    assert torch.allclose(model.ages(scores), mean)
    age = torch.tensor([30.0, 71.3])
    curve = -((points - age[:, None]) / 3).square() / 2
    assert torch.allclose(distribution_loss(model, curve, age, 3.0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(model.ages(curve), age, atol=0.01)
    moved = distribution_loss(model, curve, age + 3, 3.0)  # two normal curves one sd apart: 1/2
    assert torch.allclose(moved, torch.full((2,), 0.5), atol=0.01)


def test_shared_batchnorm_alone_is_plain_batchnorm():
    torch.manual_seed(0)
    plain = resnet18_regressor(**SMALL, norm="batch")
    shared = resnet18_regressor(**SMALL, norm="batch")
    shared.load_state_dict(plain.state_dict())
    share_batchnorm(shared, torch.device("cpu"))
    assert isinstance(shared.bn1, SharedBatchNorm3d)
    volumes = torch.randn(3, 1, 40, 40, 40)
    first, second = plain(volumes), shared(volumes)
    assert torch.allclose(first, second, atol=1e-5)
    first.sum().backward(), second.sum().backward()
    for one, other in zip(plain.parameters(), shared.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-4 * one.grad.abs().max().item() + 1e-6)
    for one, other in zip(plain.buffers(), shared.buffers(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
