"""The estimate before training: near the truth, and without a trace."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from brainage_nb.models.train import forecast, train


def seconds_of(text: str) -> float:
    number, unit = re.search(r"about ([\d.e+-]+) (s|min|h)", text).groups()
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


@pytest.mark.slow  # a busy machine may stall either of the two
def test_it_is_within_a_factor_of_three_of_what_training_takes(tiny, tiny_settings, tmp_path):
    # a network with work to do, so that steps and not the loop around them take the time
    settings = dataclasses.replace(tiny_settings, widths=(32, 32, 64, 64))
    told = forecast(*tiny, tmp_path / "run", settings)["value"]
    history = train(*tiny, tmp_path / "run", settings).history
    assert 1 / 3 < seconds_of(told["one epoch"]) / history["seconds"].median() < 3


def test_it_leaves_no_file_and_changes_no_result(tiny, tiny_settings, whole, tmp_path):
    torch.manual_seed(123)
    random = torch.get_rng_state()
    forecast(*tiny, tmp_path / "run", tiny_settings)
    assert not (tmp_path / "run").exists()
    assert torch.equal(torch.get_rng_state(), random)
    after = train(*tiny, tmp_path / "run", tiny_settings).predictions
    np.testing.assert_array_equal(after["predicted_age"], whole[1].predictions["predicted_age"])


def test_finished_models_are_not_counted_and_sessions_follow_from_the_limit(
    tiny, tiny_settings, run, tmp_path
):
    assert "nothing is left" in forecast(*tiny, run, tiny_settings).loc["time", "value"]
    again = forecast(*tiny, run, tiny_settings, fresh=True)["value"]
    assert "4 steps over 20 scans" in again["one epoch is"] and "Huber" in again["loss"]
    assert again["models to train"] == "1 of 1"
    long = dataclasses.replace(tiny_settings, epochs=10**6, max_minutes=30, seeds=(1, 2))
    told = forecast(*tiny, tmp_path / "other", long)["value"]
    sessions, hours = re.match(r"(\d+) of ([\d.]+) h", told["sessions"]).groups()
    total = seconds_of(told["all"]) / 3600
    assert abs(total / (2 * 10**6 * seconds_of(told["one epoch"]) / 3600) - 1) < 0.1
    assert told["models to train"] == "2 of 2"
    assert (float(hours), abs(int(sessions) * 0.5 - total) < 0.1 * total + 0.5) == (0.5, True)
