"""Early fusion: one network whose channels are scans of one session."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from brainage_nb.models.fit import VolumeDataset, blank_channels
from brainage_nb.models.network import fit_linear, resnet18_regressor
from brainage_nb.models.run import Job
from brainage_nb.models.settings import TrainingRefused, TrainingSettings
from brainage_nb.models.train import train
from brainage_nb.volumes.augment import augment
from brainage_nb.volumes.settings import AugmentationSettings
from tests.models.conftest import make_tiny_cohort

COLOURLESS = AugmentationSettings(pose=1, gamma=0, bias_field=0, blur=0, noise=0)


@pytest.fixture
def pair(tmp_path, tiny):
    """Two stores, of which the second lacks the last six people, and the splits."""
    second, _ = make_tiny_cohort(tmp_path / "second", n=24, modality="T2w")
    return [tiny[0], second], tiny[1]


def test_one_network_reads_all_channels_and_who_lacks_one_is_left_out_by_name(pair, tmp_path, tiny_settings):
    settings = replace(tiny_settings, channels="T1w,T2w", linear=True, keep="last", epochs=1)
    with pytest.warns(UserWarning, match=r"6 of 30 scans have no volume in one of the 2 stores.*S024"):
        result = train(*pair, tmp_path / "run", settings)
    assert result.complete and result.predictions["scan_id"].nunique() == 24
    again = train(*pair, tmp_path / "run", settings)
    assert "nothing was trained again" in again.notes[0]
    pair[0][1].index["source_sha256"] = "a" * 64  # of other files
    with pytest.raises(TrainingRefused, match="volumes of channel 2 have changed since"):
        train(*pair, tmp_path / "run", settings)


def test_a_channel_is_where_its_store_has_it(pair):
    known = pair[1].head(24)
    batch = VolumeDataset(pair[0], known).read([3, 1])
    assert batch.shape == (2, 2, 16, 16, 16)
    for channel, store in enumerate(pair[0]):
        assert np.array_equal(batch[0, channel], store[known["scan_id"].iloc[3]])


def test_all_channels_take_one_pose_and_each_its_own_noise():
    volume = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    same = volume.repeat(1, 2, 1, 1, 1)
    moved = augment(same.clone(), COLOURLESS, 8.0, [(1, 2, 3)])
    assert torch.equal(moved[0, 0], moved[0, 1]) and not torch.equal(moved, same)
    noisy = augment(same.clone(), AugmentationSettings(noise=1.0), 8.0, [(1, 2, 3)])
    assert not torch.equal(noisy[0, 0], noisy[0, 1])
    alone = augment(volume.clone(), AugmentationSettings(noise=1.0), 8.0, [(1, 2, 3)])
    assert torch.equal(noisy[:, :1], alone)  # as in a network of one channel


def test_channels_are_blanked_by_chance_alike_each_time_and_never_all():
    streams = [(0, 1, row) for row in range(300)]
    blanked = blank_channels(torch.ones(300, 2, 1, 1, 1), 0.6, streams)[:, :, 0, 0, 0]
    assert torch.equal(blanked, blank_channels(torch.ones(300, 2, 1, 1, 1), 0.6, streams)[:, :, 0, 0, 0])
    assert (blanked.sum(dim=1) > 0).all() and 0.2 < (1 - blanked).mean() < 0.4
    assert torch.equal(blank_channels(torch.ones(3, 2, 1, 1, 1), 0.0, streams[:3]), torch.ones(3, 2, 1, 1, 1))


def test_the_regression_beside_the_network_reads_every_channel():
    rng, age = np.random.default_rng(0), np.linspace(20, 80, 40)
    volumes = torch.from_numpy(rng.normal(0, 1, (40, 2, 8, 8, 8)).astype(np.float32))
    volumes[:, 1] += torch.from_numpy(age / 20).float()[:, None, None, None]  # only the second one knows
    fitted = fit_linear([volumes], age, np.arange(40), spacing_mm=8.0)
    assert np.corrcoef(fitted(volumes).numpy(), age)[0, 1] > 0.9
    blind = fit_linear([volumes[:, :1]], age, np.arange(40), spacing_mm=8.0)
    assert blind.weight.shape == (8, 8, 8) and fitted.weight.shape == (16, 8, 8)


@pytest.mark.parametrize("channels", ["T1w", "T1w,T1w", "T1w,"])
def test_channels_that_are_none_are_refused(channels):
    with pytest.raises(ValueError, match=r"channels = .*two or more different names"):
        TrainingSettings(channels=channels)


def test_stores_and_channels_must_agree(pair, tmp_path, tiny_settings):
    with pytest.raises(TrainingRefused, match="modality = 'T1w', and these volumes are of T1w,T2w"):
        Job(*pair, tmp_path / "run", tiny_settings)
    with pytest.raises(TrainingRefused, match="channels = 'T2w,T1w', and these volumes are of T1w,T2w"):
        Job(*pair, tmp_path / "run", replace(tiny_settings, channels="T2w,T1w"))
    network = resnet18_regressor(channels=2, linear_edge=4, widths=(4, 4, 8, 8)).eval()
    assert network(torch.zeros(3, 2, 16, 16, 16)).shape == (3,)
