"""Random variation of training volumes: MONAI's random transforms, and the two that MONAI lacks.

Never for preprocessing or prediction. Every sample draws from its own stream, so a volume is varied alike in
any batch, on any number of processes and after a resume. Only left and right are ever exchanged, since the
other two mirror images are no anatomy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from monai.data import get_track_meta, set_track_meta
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandFlip,
    RandGaussianSmooth,
    RandomizableTransform,
)
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from brainage_nb.volumes.resampling import FWHM_PER_SD
from brainage_nb.volumes.settings import NOTHING, PROBABILITIES, AugmentationSettings

KNOT_SPACING_MM = 32.0
BIAS_KNOTS = 4
TITLES = {
    "flip": "left-right flip",
    "pose": "pose: ±{rotation_deg:g}°, ±{shift_mm:g} mm, size ±{scale:.0%}",
    "deformation": "deformation: up to {deformation_mm:g} mm",
    "gamma": "contrast: log exponent ±{log_gamma:g}",
    "bias_field": "bias field: log ±{log_bias:g}",
    "blur": "blur: up to {blur_mm:g} mm FWHM",
    "noise": "noise: sd up to {noise_sd:g}",
}


def augment(
    volumes: Tensor, settings: AugmentationSettings, spacing_mm: float, streams: Sequence[Sequence[int]]
) -> Tensor:
    """Vary a batch at random, sample by sample.

    Parameters
    ----------
    volumes : Tensor, (batch, channels, size, size, size), float32
        Preprocessed volumes, axes RAS; may be overwritten. The channels of a sample take one pose, shape and
        side, and each its own brightness and noise.
    settings : AugmentationSettings
    spacing_mm : float
        Voxel size, mm.
    streams : sequence of sequences of int
        A key for each sample, such as (seed, epoch, sample): the same key draws the same change.

    Returns
    -------
    Tensor
        Of the same shape. A change of brightness leaves mean and spread of a volume as they were, and what
        is exactly 0, cut away around a brain, at 0.
    """
    if volumes.ndim != 5 or len(streams) != len(volumes):
        raise ValueError(
            f"volumes of shape {tuple(volumes.shape)} and {len(streams)} streams: expected (batch, channels, "
            "size, size, size) and one stream a sample."
        )
    chain, tracked = augmentation_chain(settings, spacing_mm), get_track_meta()
    set_track_meta(False)  # what was done to a volume is not asked for, and noting it takes half of the time
    try:
        for row, key in enumerate(streams):
            for channel, volume in enumerate(volumes[row].split(1)):
                _seed(chain, list(key), channel)
                volumes[row, channel] = chain(volume)[0]
    finally:
        set_track_meta(tracked)
    return volumes


@lru_cache(maxsize=4)
def augmentation_chain(settings: AugmentationSettings, spacing_mm: float) -> Compose:
    """The MONAI Compose that varies one volume (1, size, size, size); changes of probability 0 are left out.

    Examples
    --------
    >>> chain = augmentation_chain(AugmentationSettings(), spacing_mm=2.0).set_random_state(seed=0)
    >>> chain(torch.rand(1, 24, 24, 24)).shape
    torch.Size([1, 24, 24, 24])
    """
    s, sigma = settings, (0.0, settings.blur_mm / FWHM_PER_SD / spacing_mm)
    where = _used([RandFlip(s.flip, spatial_axis=0), RandWarp(s, spacing_mm)])
    colour = [
        RandGaussianSmooth(sigma, sigma, sigma, prob=s.blur),
        RandBias(s.log_bias, prob=s.bias_field),
        RandAdjustContrast(s.gamma, gamma=(np.exp(-s.log_gamma), np.exp(s.log_gamma) + 1e-6)),
    ]
    noise = [RandNoise(s.noise_sd, prob=s.noise)]
    return Compose([*where, *[KeepBrightness(part) for part in map(_used, (colour, noise)) if part]])


def augmentation_examples(
    volume: np.ndarray, settings: AugmentationSettings, spacing_mm: float, *, seed: int = 0
) -> list[tuple[str, np.ndarray]]:
    """One volume as it is, with each change alone, and with all together, for a preview figure.

    Parameters
    ----------
    volume : array, (size, size, size)
        A volume of the store, axes RAS.
    settings : AugmentationSettings
        Ranges as used in training; changes with probability 0 are left out.
    spacing_mm : float
        Voxel size, mm.
    seed : int
        Other examples of the same ranges.

    Returns
    -------
    list of (title, float32 array (size, size, size))
    """
    used = [name for name in PROBABILITIES if getattr(settings, name) > 0]
    alone = dict.fromkeys(PROBABILITIES, 0.0)
    shown = {"as stored": NOTHING}
    for name in used:
        shown[TITLES[name].format(**vars(settings))] = replace(settings, **alone | {name: 1.0})
    if used:
        shown["all together"] = replace(settings, **dict.fromkeys(used, 1.0))
    source = torch.from_numpy(np.array(volume, dtype=np.float32))[None, None]
    return [
        (title, augment(source.clone(), changes, spacing_mm, [(seed, row)])[0, 0].numpy())
        for row, (title, changes) in enumerate(shown.items())
    ]


class RandWarp(RandomizableTransform):
    """Pose and smooth bending of a volume (1, size, size, size) in one linear interpolation.

    MONAI's RandAffine and Rand3DElastic would be two, and the second takes five times as long. Bending is a
    cubic B-spline whose knots move at random. Beyond the border its value goes on: below the lowest slice
    the neck goes on, it does not end in air.
    """

    def __init__(self, settings: AugmentationSettings, spacing_mm: float) -> None:
        super().__init__(max(settings.pose, settings.deformation))
        self.settings, self.spacing_mm = settings, spacing_mm

    def __call__(self, volume: Tensor) -> Tensor:
        pose, deformation = self.R.rand(2) < (self.settings.pose, self.settings.deformation)
        if not (pose or deformation):
            return volume
        volume = torch.as_tensor(volume)
        size = volume.shape[-1]
        affine = self._draw_pose(size) if pose else torch.eye(3, 4)
        grid = affine_grid(affine[None].to(volume), (1, 1, *(size,) * 3), align_corners=False)
        if deformation:
            knots = max(4, round(size * self.spacing_mm / KNOT_SPACING_MM) + 1)
            most = self.settings.deformation_mm / self.spacing_mm * 2 / size
            grid += _spline_field(self.R.uniform(-most, most, (knots,) * 3 + (3,)), volume)
        # PyTorch gives each volume of a batch to one thread: two slabs of one volume keep two threads busy
        parts = grid.view(1 if size % 2 else 2, -1, size, size, 3)
        source = volume.expand(len(parts), *volume.shape)
        return grid_sample(source, parts, padding_mode="border", align_corners=False).view(volume.shape)

    def _draw_pose(self, size: int) -> Tensor:
        """A random pose (3, 4) as `affine_grid` takes it; one change of size for all three axes."""
        angles = self.R.uniform(-self.settings.rotation_deg, self.settings.rotation_deg, 3)
        shift = self.R.uniform(-self.settings.shift_mm, self.settings.shift_mm, 3) / self.spacing_mm
        turned = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
        turned *= 1 + self.R.uniform(-self.settings.scale, self.settings.scale)
        return torch.from_numpy(np.c_[turned, shift * 2 / size].astype(np.float32))


class RandNoise(RandomizableTransform):
    """Gaussian noise whose standard deviation is drawn up to `sd`.

    MONAI's RandGaussianNoise draws on the CPU: 25 ms at 96^3, three times a training step of a fast GPU.
    """

    def __init__(self, sd: float, prob: float) -> None:
        super().__init__(prob)
        self.sd = sd

    def __call__(self, volume: Tensor) -> Tensor:
        self.randomize(None)
        if not self._do_transform:
            return volume
        generator = torch.Generator(volume.device).manual_seed(int(self.R.randint(2**31)))
        noise = torch.randn(volume.shape, generator=generator, device=volume.device)
        return volume + noise * self.R.uniform(0, self.sd)


class RandBias(RandomizableTransform):
    """A slow field by which brightness (0 is air) is multiplied: its log, a spline, stays within ±`log_bias`.

    MONAI's RandBiasField bounds the coefficients of polynomials, not the field, and works on the CPU.
    """

    def __init__(self, log_bias: float, prob: float) -> None:
        super().__init__(prob)
        self.log_bias = log_bias

    def __call__(self, volume: Tensor) -> Tensor:
        self.randomize(None)
        if not self._do_transform:
            return volume
        knots = self.R.uniform(-self.log_bias, self.log_bias, (BIAS_KNOTS,) * 3)
        return volume * _spline_field(knots, volume).exp()


class KeepBrightness(Compose):
    """Transforms after which a volume has its mean and spread again, and 0 where it was exactly 0.

    They see it with standard deviation 1 and air at 0, as MONAI's smoothing continues it beyond the border.
    """

    def __call__(self, volume: Tensor, **options: object) -> Tensor:
        volume = torch.as_tensor(volume)
        shown = volume.ne(0).float()
        mean, sd = _moments(volume, shown)
        varied = torch.as_tensor(super().__call__((volume - volume.min()) / sd, **options))
        now, spread = _moments(varied, shown)
        return ((varied - now) * (sd / spread) + mean) * shown


def _list_transforms(chain: Compose) -> list[RandomizableTransform]:
    """The transforms of a chain and of the chains within it."""
    parts = [_list_transforms(part) if isinstance(part, Compose) else [part] for part in chain.transforms]
    return [transform for part in parts for transform in part]


def _seed(chain: Compose, key: list[int], channel: int) -> None:
    """Let all transforms draw from the stream of this key; those of brightness from the channel's own."""
    where, colour = (
        np.random.RandomState(np.random.MT19937(np.random.SeedSequence(words)))
        for words in (key, [*key, channel])
    )
    for transform in _list_transforms(chain):  # Compose's own way takes 2 ms to seed each one anew
        is_where = isinstance(transform, RandFlip | RandWarp) or channel == 0
        transform.set_random_state(state=where if is_where else colour)


def _used(transforms: list[RandomizableTransform]) -> list[RandomizableTransform]:
    return [transform for transform in transforms if transform.prob > 0]


def _moments(volume: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation where `shown` is 1."""
    flat, n = (volume * shown).reshape(-1), shown.sum().clamp_min(1)
    mean = flat.sum() / n
    return mean, (flat.dot(flat) / n - mean * mean).clamp_min(1e-6).sqrt()


def _spline_field(knots: np.ndarray, like: Tensor) -> Tensor:
    """Knots (k, k, k, ...) as a smooth field (size, size, size, ...), in size and device that of `like`."""
    spline = torch.from_numpy(_spline(len(knots), like.shape[-1])).to(like.device)
    field = torch.from_numpy(knots.astype(np.float32)).to(like.device)
    for axis in (2, 1, 0):  # the small products first
        field = torch.tensordot(spline, field, dims=([1], [axis])).movedim(0, axis)
    return field


@lru_cache
def _spline(knots: int, size: int) -> np.ndarray:
    """Cubic B-spline weights (size, knots) of the voxels along an axis; end knots lie on the borders."""
    position = (np.arange(size) + 0.5) / size * (knots - 1)
    distance = np.abs(position[:, None] - np.arange(knots))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)
