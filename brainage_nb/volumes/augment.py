"""Random variation of training volumes, made in batches on the device. Never for preprocessing or prediction.

Every range is in physical units and every sample draws from its own stream, so a volume is varied alike in
any batch, on any number of processes and after a resume. All spatial changes are one interpolation; only left
and right are ever exchanged, since the other two mirror images are no anatomy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from brainage_nb.parameters import check_fields

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SFC64 = np.random.SFC64
KNOT_SPACING_MM = 32.0
BIAS_KNOTS = 4
FWHM_PER_SIGMA = 2.3548200450309493


@dataclass(frozen=True)
class AugmentationSettings:
    """Ranges and probabilities of the random changes; a probability of 0 turns one off.

    Parameters
    ----------
    flip : float
        Probability of exchanging left and right.
    rotation_deg : float
        Largest rotation about each axis, degrees.
    scale : float
        Largest isotropic change of size, share (0.08 is 8 % smaller to 8 % larger).
    shift_mm : float
        Largest shift along each axis, mm.
    pose : float
        Probability of rotation, scale and shift, drawn together.
    deformation_mm : float
        Largest displacement of a control point along each axis, mm (control points lie about 32 mm apart).
    deformation : float
        Probability of the smooth deformation.
    log_gamma : float
        Largest log of the contrast exponent: 0.25 draws exponents from 0.78 to 1.28.
    gamma : float
        Probability of the contrast change.
    log_bias : float
        Largest log of the smooth multiplicative field: 0.2 makes places 18 % darker to 22 % brighter.
    bias_field : float
        Probability of the bias field.
    blur_mm : float
        Largest full width at half maximum of the Gaussian blur, mm.
    blur : float
        Probability of the blur.
    noise_sd : float
        Largest standard deviation of the white noise, in standard deviations of the volume.
    noise : float
        Probability of the noise.
    """

    flip: float = 0.5
    rotation_deg: float = 10.0
    scale: float = 0.08
    shift_mm: float = 5.0
    pose: float = 0.7
    deformation_mm: float = 3.0
    deformation: float = 0.3
    log_gamma: float = 0.25
    gamma: float = 0.3
    log_bias: float = 0.2
    bias_field: float = 0.3
    blur_mm: float = 4.0
    blur: float = 0.2
    noise_sd: float = 0.1
    noise: float = 0.3

    def __post_init__(self):
        check_fields(self)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value < 0 or (entry.name in PROBABILITIES and value > 1):
                expected = "a probability from 0 to 1" if entry.name in PROBABILITIES else "a number from 0"
                raise ValueError(f"augmentation {entry.name}={value}: expected {expected}.")


PROBABILITIES = ("flip", "pose", "deformation", "gamma", "bias_field", "blur", "noise")
NOTHING = AugmentationSettings(**dict.fromkeys(PROBABILITIES, 0.0))


def augment(
    volumes: Tensor, settings: AugmentationSettings, spacing_mm: float, streams: Sequence[Sequence[int]]
) -> Tensor:
    """Vary a batch at random, sample by sample.

    Parameters
    ----------
    volumes : Tensor, (batch, 1, size, size, size), float32
        Preprocessed volumes, axes RAS; may be overwritten.
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
    if volumes.ndim != 5 or volumes.shape[1] != 1 or len(streams) != len(volumes):
        raise ValueError(
            f"volumes of shape {tuple(volumes.shape)} and {len(streams)} streams: expected (batch, 1, size, "
            "size, size) and one stream a sample."
        )
    draws = [np.random.Generator(SFC64(np.random.SeedSequence(list(key)))) for key in streams]
    volumes = _move(volumes, settings, spacing_mm, draws)
    for volume, draw in zip(volumes[:, 0], draws, strict=True):
        volume[...] = _recolour(volume, settings, spacing_mm, draw)
    return volumes


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
    import torch

    used = [name for name in PROBABILITIES if getattr(settings, name) > 0]
    recipes = {"as stored": NOTHING}
    for name in used:
        recipes[TITLES[name].format(**vars(settings))] = replace(settings, **_only(name))
    if used:
        recipes["all together"] = replace(settings, **dict.fromkeys(used, 1.0))
    source = torch.from_numpy(np.array(volume, dtype=np.float32))[None, None]
    return [
        (title, augment(source.clone(), recipe, spacing_mm, [(seed, row)])[0, 0].numpy())
        for row, (title, recipe) in enumerate(recipes.items())
    ]


TITLES = {
    "flip": "left-right flip",
    "pose": "pose: ±{rotation_deg:g}°, ±{shift_mm:g} mm, size ±{scale:.0%}",
    "deformation": "deformation: up to {deformation_mm:g} mm",
    "gamma": "contrast: log exponent ±{log_gamma:g}",
    "bias_field": "bias field: log ±{log_bias:g}",
    "blur": "blur: up to {blur_mm:g} mm FWHM",
    "noise": "noise: sd up to {noise_sd:g}",
}


def _only(name: str) -> dict[str, float]:
    return dict.fromkeys(PROBABILITIES, 0.0) | {name: 1.0}


# --- where: one interpolation for everything spatial -----------------------------------------------------


def _move(volumes: Tensor, settings: AugmentationSettings, spacing_mm: float, draws) -> Tensor:
    """Flip, pose and deformation of those samples that drew one."""
    import torch

    size = volumes.shape[-1]
    grid = torch.empty((size, size, size, 3), device=volumes.device)  # one for all: it stays in the cache
    for row, draw in enumerate(draws):
        flip, pose, deformation = draw.random(3) < (settings.flip, settings.pose, settings.deformation)
        if pose or deformation:
            affine = _pose(settings, size * spacing_mm, draw) if pose else np.eye(3, 4)
            if flip:
                affine[0] *= -1
            knots = _displaced(settings, size, spacing_mm, draw) if deformation else None
            volumes[row] = _sampled(volumes[row], _fill(grid, affine, knots))
        elif flip:
            volumes[row] = volumes[row].flip(1)
    return volumes


def _sampled(volume: Tensor, grid: Tensor) -> Tensor:
    """One volume (1, size, size, size) interpolated linearly at `grid`; the border's value goes on beyond it.

    Below the lowest slice the neck goes on, it does not end in air. On a CPU, PyTorch gives each volume of a
    batch to one thread: two slabs of one volume keep two threads busy.
    """
    import torch

    size = volume.shape[-1]
    slabs = 1 if size % 2 else 2
    parts = grid.view(slabs, size // slabs, size, size, 3)
    source = volume.expand(slabs, 1, size, size, size)
    made = torch.nn.functional.grid_sample(source, parts, padding_mode="border", align_corners=False)
    return made.view(volume.shape)


def _pose(settings: AugmentationSettings, extent_mm: float, draw) -> np.ndarray:
    """3x4 matrix from output to input positions, both in half extents of the volume (-1 to 1), axes RAS."""
    angles = np.deg2rad(draw.uniform(-1, 1, 3) * settings.rotation_deg)
    size = 1 + settings.scale * draw.uniform(-1, 1)
    shift = settings.shift_mm * draw.uniform(-1, 1, 3)
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        first, second = [other for other in range(3) if other != axis]
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return np.column_stack([matrix / size, -shift / (extent_mm / 2)])


def _displaced(settings: AugmentationSettings, size: int, spacing_mm: float, draw) -> np.ndarray:
    """Displacements (knots, knots, knots, 3) of the control points, in half extents of the volume."""
    extent_mm = size * spacing_mm
    knots = max(4, round(extent_mm / KNOT_SPACING_MM) + 1)
    return draw.uniform(-1, 1, (knots,) * 3 + (3,)) * settings.deformation_mm / (extent_mm / 2)


def _fill(grid: Tensor, affine: np.ndarray, knots: np.ndarray | None) -> Tensor:
    """Fill `grid` (size, size, size, 3) with the input position of every output voxel; returns it.

    The last axis is in grid_sample's order (S, A, R). An affine position is linear along the first axis, and
    a spline is a weighted sum of its knots along it: one matrix product along that axis makes both at once,
    ten times faster than interpolating a coarse grid.
    """
    import torch

    size = grid.shape[0]
    affine = affine[::-1].astype(np.float32)
    line = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)
    terms = np.empty((2 if knots is None else 2 + len(knots), size, size, 3), np.float32)
    terms[0] = affine[:, 0]
    terms[1] = affine[:, 1] * line[:, None, None] + affine[:, 2] * line[:, None] + affine[:, 3]
    basis = [line, np.ones_like(line)]
    if knots is not None:
        spline = _spline(len(knots), size)
        across = np.einsum("kc,abcx->abkx", spline, knots[..., ::-1].astype(np.float32))
        terms[2:] = np.matmul(spline, across.reshape(len(knots), len(knots), -1)).reshape(terms[2:].shape)
        basis.extend(spline.T)
    left = torch.from_numpy(np.stack(basis, axis=1)).to(grid.device)
    right = torch.from_numpy(terms).to(grid.device)
    torch.matmul(left, right.flatten(1), out=grid.view(size, -1))
    return grid


@lru_cache
def _spline(knots: int, size: int) -> np.ndarray:
    """Cubic B-spline weights (size, knots) of the voxels along an axis; end knots lie on the borders."""
    position = (np.arange(size) + 0.5) / size * (knots - 1)
    distance = np.abs(position[:, None] - np.arange(knots))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


# --- what: brightness, resolution, noise -----------------------------------------------------------------


def _recolour(volume: Tensor, settings: AugmentationSettings, spacing_mm: float, draw) -> Tensor:
    """Blur, bias field, contrast and noise of one volume (size, size, size), in that order."""
    wanted = (settings.blur, settings.bias_field, settings.gamma, settings.noise)
    blur, bias_field, gamma, noise = draw.random(4) < wanted
    if not (blur or bias_field or gamma or noise):
        return volume
    shown = volume.ne(0).float()
    mean, sd = _moments(volume, shown)
    if blur:
        volume = _blurred(volume, draw.uniform(0, settings.blur_mm) / FWHM_PER_SIGMA / spacing_mm)
    if bias_field or gamma:
        low, high = volume.aminmax()
        volume = (volume - low) / (high - low).clamp_min(1e-6)  # air is 0, where a scanner's signal starts
    if bias_field:
        volume = volume * _bias_field(settings.log_bias, volume.shape[0], volume.device, draw)
    if gamma:
        volume = volume.pow(float(np.exp(settings.log_gamma * draw.uniform(-1, 1))))
    volume = _rescaled(volume, shown, mean, sd)
    if noise:
        noisy = _noisy(volume, settings.noise_sd * draw.uniform() * sd, draw)
        volume = _rescaled(noisy, shown, mean, sd)
    return volume


def _moments(volume: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation where `shown` is 1."""
    flat, n = (volume * shown).reshape(-1), shown.sum().clamp_min(1)
    mean = flat.sum() / n
    return mean, (flat.dot(flat) / n - mean * mean).clamp_min(1e-6).sqrt()


def _rescaled(volume: Tensor, shown: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """The volume with this mean and standard deviation where `shown` is 1, and 0 elsewhere."""
    now, spread = _moments(volume, shown)
    return ((volume - now) * (sd / spread) + mean) * shown


def _blurred(volume: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, `sigma` in voxels: three matrix products, faster on a CPU than three convolutions."""
    import torch

    size = volume.shape[0]
    offset = np.subtract.outer(np.arange(size), np.arange(size))
    weights = np.exp(-0.5 * (offset / max(sigma, 1e-3)) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = torch.from_numpy(weights.astype(np.float32)).to(volume.device)
    volume = (matrix @ volume.reshape(size, -1)).view_as(volume)
    volume = matrix @ volume
    return volume @ matrix.T


def _bias_field(log_bias: float, size: int, device: torch.device, draw) -> Tensor:
    """A smooth positive field (size, size, size) whose log stays within ±`log_bias`."""
    import torch

    spline = torch.from_numpy(_spline(BIAS_KNOTS, size)).to(device)
    knots = torch.from_numpy(draw.uniform(-log_bias, log_bias, (BIAS_KNOTS,) * 3).astype(np.float32)).to(
        device
    )
    field = torch.einsum("bj,ck,ijk->ibc", spline, spline, knots)
    return (spline @ field.flatten(1)).view(size, size, size).exp_()


def _noisy(volume: Tensor, sd: Tensor, draw) -> Tensor:
    import torch

    generator = torch.Generator(volume.device).manual_seed(int(draw.integers(2**62)))
    return volume + sd * torch.randn(volume.shape, generator=generator, device=volume.device)
