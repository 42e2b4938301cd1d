"""Random variation: each sample by itself, in physical units, left and right only."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from brainage_nb.volumes.augment import augment, augmentation_examples
from brainage_nb.volumes.settings import NOTHING, PROBABILITIES, AugmentationSettings

EVERYTHING = replace(AugmentationSettings(), **dict.fromkeys(PROBABILITIES, 1.0))


def smooth_volume(size=24, seed=0):
    """A smooth z-scored volume (size, size, size), float32."""
    volume = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(size,) * 3), 2.5)
    return ((volume - volume.mean()) / volume.std()).astype(np.float32)


def batch_of(volume, n=1):
    return torch.from_numpy(np.stack([volume] * n))[:, None].clone()


def only(**changes):
    return replace(NOTHING, **changes)


def varied(volume, settings, spacing_mm=2.0, key=(0, 0, 0)):
    return augment(batch_of(volume), settings, spacing_mm, [key])[0, 0].numpy()


def test_nothing_changes_without_probability():
    volume = smooth_volume()
    assert np.array_equal(varied(volume, NOTHING), volume)


def test_a_flip_exchanges_left_and_right_and_nothing_else():
    volume = smooth_volume()
    assert np.array_equal(varied(volume, only(flip=1.0)), volume[::-1])


def test_a_flip_within_a_pose_is_the_same_flip():
    volume = smooth_volume()
    still = only(flip=1.0, pose=1.0, rotation_deg=0.0, scale=0.0, shift_mm=0.0)
    np.testing.assert_allclose(varied(volume, still), volume[::-1], atol=1e-4)


def test_same_stream_gives_same_change_in_any_batch():
    volume = smooth_volume()
    keys = [(7, 3, i) for i in range(4)]
    together = augment(batch_of(volume, 4), EVERYTHING, 2.0, keys)
    alone = torch.cat([augment(batch_of(volume), EVERYTHING, 2.0, [key]) for key in keys])
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])


def test_shift_is_in_millimetres():
    size = 24
    blob = np.exp(-((np.indices((size,) * 3) - 11.5) ** 2).sum(0) / 8).astype(np.float32)
    settings = only(pose=1.0, rotation_deg=0.0, scale=0.0, shift_mm=6.0)

    def shifts(spacing_mm):
        moved = [varied(blob, settings, spacing_mm, key=(0, 0, i)) for i in range(20)]
        return np.array([ndimage.center_of_mass(volume) for volume in moved]) - 11.5

    assert 2.5 < np.abs(shifts(2.0)).max() <= 3.01  # voxels of 2 mm
    np.testing.assert_allclose(shifts(2.0), 2 * shifts(4.0), atol=0.02)


def test_rotation_stays_within_its_degrees():
    size = 32
    line = np.zeros((size,) * 3, np.float32)
    line[size // 2 - 1 : size // 2 + 1, :, size // 2 - 1 : size // 2 + 1] = 1  # a bar along anterior
    settings = only(pose=1.0, rotation_deg=10.0, scale=0.0, shift_mm=0.0)
    angles = []
    for i in range(20):
        turned = varied(line, settings, key=(1, 1, i))
        ends = [ndimage.center_of_mass(turned[:, part]) for part in (slice(2, 6), slice(size - 6, size - 2))]
        across = np.hypot(ends[1][0] - ends[0][0], ends[1][2] - ends[0][2])
        angles.append(np.degrees(np.arctan2(across, size - 8)))
    assert 3 < max(angles) < 10 * np.sqrt(2) + 1
    assert np.std(angles) > 0.5


def test_deformation_is_smooth_and_bounded():
    size, spacing = 32, 4.0
    position = np.broadcast_to(np.arange(size, dtype=np.float32)[:, None, None], (size,) * 3).copy()
    settings = only(deformation=1.0, deformation_mm=6.0)
    displaced = varied(position, settings, spacing_mm=spacing, key=(0, 0, 5)) - position
    inner = displaced[4:-4, 4:-4, 4:-4] * spacing
    assert 0.5 < np.abs(inner).max() <= 6.0 + 1e-3
    assert np.abs(np.diff(inner, axis=1)).max() < 1.5


def test_blur_is_in_millimetres():
    volume = np.pad(smooth_volume(24) + 5, 4)  # air around
    point = np.ones((33,) * 3, np.float32)  # 0 would be what was cut away
    point[16, 16, 16] = 2.0
    fine = varied(point, only(blur=1.0, blur_mm=8.0), spacing_mm=1.0, key=(0, 0, 3))
    coarse = varied(point, only(blur=1.0, blur_mm=8.0), spacing_mm=4.0, key=(0, 0, 3))
    half = [(made.max() + np.median(made)) / 2 for made in (fine, coarse)]
    assert (fine > half[0]).sum() > (coarse > half[1]).sum()
    blurred = varied(volume, only(blur=1.0, blur_mm=8.0))
    steps = [sum(np.abs(step).mean() for step in np.gradient(made)) for made in (blurred, volume)]
    assert steps[0] < steps[1]


@pytest.mark.parametrize("change", ["gamma", "bias_field", "blur", "noise"])
def test_brightness_changes_keep_mean_and_spread_and_what_was_cut_away(change):
    whole = smooth_volume()
    brain = np.where(np.abs(whole) < 1, whole + 1.5, 0).astype(np.float32)
    for volume in (whole, brain):
        changed = varied(volume, only(**{change: 1.0}))
        shown = volume != 0
        assert (changed[~shown] == 0).all()
        assert abs(changed[shown].mean() - volume[shown].mean()) < 1e-4
        assert abs(changed[shown].std() - volume[shown].std()) < 1e-3
        assert np.abs(changed - volume).max() > 1e-3


def test_contrast_change_keeps_the_order_of_brightness():
    volume = smooth_volume(12)
    changed = varied(volume, only(gamma=1.0))
    order = np.argsort(volume.ravel())
    assert np.all(np.diff(changed.ravel()[order]) >= -1e-5)


def test_probability_is_the_share_of_samples():
    volume = smooth_volume(8)
    changed = augment(batch_of(volume, 400), only(flip=0.3), 2.0, [(0, 0, i) for i in range(400)])
    share = (changed[:, 0].numpy() != volume).any(axis=(1, 2, 3)).mean()
    assert 0.22 < share < 0.38


def test_examples_show_each_change_alone_then_all():
    examples = augmentation_examples(smooth_volume().astype(np.float16), AugmentationSettings(noise=0.0), 2.0)
    titles = [title for title, _ in examples]
    assert titles[0] == "as stored"
    assert titles[-1] == "all together"
    assert len(titles) == len(PROBABILITIES) + 1
    assert all(array.shape == (24, 24, 24) for _, array in examples)


def test_impossible_ranges_are_refused():
    with pytest.raises(ValueError, match=r"flip=1\.5"):
        AugmentationSettings(flip=1.5)
    with pytest.raises(ValueError, match="blur_mm=-1"):
        AugmentationSettings(blur_mm=-1)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="one stream a sample"):
        augment(torch.zeros(2, 1, 8, 8, 8), NOTHING, 2.0, [(0,)])
