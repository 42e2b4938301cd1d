"""One volume to VGG16 features: triplets of consecutive axial slices, each as an image of three channels.

Knows no ages and no splits, so nothing here can leak. Features of many scans are kept by `cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from brainage_nb.models.vgg.network import REDUCTION, Vgg16Features
from brainage_nb.volumes.heads import head_in

if TYPE_CHECKING:
    from brainage_nb.volumes.recipes import PreprocessingSettings

SLICES = 3
GREY_WINDOW = (0.0, 1.0)


class FeatureError(ValueError):
    """A volume from which no features can be computed, and why."""


@dataclass(frozen=True)
class FeatureSettings:
    """How slices become images.

    Parameters
    ----------
    image_size : int
        Side of the images the network sees, pixels: 224 as published, giving 7 x 7 maps; 112 gives 3 x 3.
    window : (float, float)
        Values shown as black and white; what lies beyond is clipped. -1 lies below the background of a
        z-scored head, 4 above its brain; `for_volumes` takes 0 to 1 for shares of grey matter.
    brain_depth_mm : float
        Deeper than this below the crown lies neck, not brain: such triplets are skipped.
    head_fraction : float
        Share of a slice that must be brighter than the volume's mean for the slice to hold head at all.
    """

    image_size: int = 224
    window: tuple[float, float] = (-1.0, 4.0)
    brain_depth_mm: float = 160.0
    head_fraction: float = 0.02

    def __post_init__(self):
        if self.image_size < REDUCTION:
            raise ValueError(
                f"image_size = {self.image_size} pixels: expected at least {REDUCTION} (224 as published)."
            )
        object.__setattr__(self, "window", tuple(float(value) for value in self.window))

    @classmethod
    def for_volumes(cls, preprocessing: PreprocessingSettings, **numbers: Any) -> FeatureSettings:
        """Settings whose window fits volumes of this preprocessing; `numbers` are any other settings."""
        return cls(**({"window": GREY_WINDOW} if preprocessing.grey_matter else {}) | numbers)


def triplets_with_brain(volume: np.ndarray, spacing_mm: float, settings: FeatureSettings) -> np.ndarray:
    """Positions of the triplets that show brain, ascending from the lowest.

    Position p is the slices 3p, 3p+1, 3p+2 of the last (inferior to superior) axis, so a position means the
    same height in every volume of a store. Slices left over at the top are not used.

    Parameters
    ----------
    volume : array, (size, size, size), RAS
        As stored.
    spacing_mm : float
        Distance of neighbouring slices.
    """
    head = head_in(volume).mean(axis=(0, 1)) >= settings.head_fraction
    if not head.any():
        return np.empty(0, dtype=int)
    crown = np.flatnonzero(head)[-1]
    middle = np.arange(volume.shape[2] // SLICES) * SLICES + 1
    return np.flatnonzero(head[middle] & ((crown - middle) * spacing_mm <= settings.brain_depth_mm))


def triplet_images(
    volume: np.ndarray | Tensor,
    positions: Sequence[int],
    settings: FeatureSettings,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Triplets as images (n, 3, image_size, image_size), values 0 to 1; anterior up, left side at left."""
    low, high = settings.window
    whole = torch.as_tensor(volume).to(device)
    index = torch.as_tensor(np.asarray(positions)[:, None] * SLICES + np.arange(SLICES), device=whole.device)
    slices = whole[:, :, index.flatten()].permute(2, 1, 0).flip(1).float()
    slices = ((slices - low) / (high - low)).clamp(0, 1).unflatten(0, index.shape)
    size = (settings.image_size, settings.image_size)
    # Antialiasing matters only where images are made smaller than slices; it does nothing when enlarging.
    return functional.interpolate(slices, size=size, mode="bilinear", antialias=size[0] < slices.shape[-1])


@torch.inference_mode()
def volume_features(
    volume: np.ndarray,
    spacing_mm: float,
    network: Vgg16Features,
    settings: FeatureSettings,
    batch_size: int = 16,
) -> np.ndarray:
    """Features of all triplets of one volume: float16 (positions, features), NaN rows where no brain is.

    Raises
    ------
    FeatureError
        The volume is not finite, shows no brain, or its features overflow.
    """
    if volume.ndim != 3 or not np.isfinite(volume).all():
        raise FeatureError(
            f"expected a finite 3-D volume, got shape {volume.shape} with missing or infinite values"
        )
    positions = triplets_with_brain(volume, spacing_mm, settings)
    if not len(positions):
        raise FeatureError("no triplet of slices holds brain: the volume is empty or far off centre")
    batches = [
        network(images.contiguous(memory_format=torch.channels_last))
        for images in triplet_images(volume, positions, settings, network.device).split(batch_size)
    ]
    found = torch.cat(batches).to(torch.float16).cpu().numpy()
    if not np.isfinite(found).all():
        raise FeatureError("the network's output overflows half precision: the volume's values are too large")
    rows = np.full((volume.shape[2] // SLICES, found.shape[1]), np.nan, dtype=np.float16)
    rows[positions] = found
    return rows


# --- many scans, each as (positions, features) ---------------------------------------------------------


def present(scans: Sequence[np.ndarray]) -> np.ndarray:
    """Which triplets show brain: bool (scans, positions)."""
    return np.stack([np.isfinite(rows[:, 0]) for rows in scans])


def at_position(scans: Sequence[np.ndarray], position: int) -> np.ndarray:
    """Features of one triplet position: float32 (scans, features); NaN rows where no brain is."""
    return np.stack([rows[position] for rows in scans]).astype(np.float32)


def mean_over_triplets(scans: Sequence[np.ndarray], positions: np.ndarray) -> np.ndarray:
    """Mean over those of `positions` that show brain: float32 (scans, features); NaN where none does."""
    means = np.full((len(scans), scans[0].shape[1]), np.nan, dtype=np.float32)
    for mean, rows in zip(means, scans, strict=True):
        chosen = rows[positions].astype(np.float32)
        chosen = chosen[np.isfinite(chosen[:, 0])]
        if len(chosen):
            mean[:] = chosen.mean(axis=0)
    return means
