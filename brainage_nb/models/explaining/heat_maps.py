"""Where in a volume a network's age comes from: Grad-CAM and occlusion in 3-D, averaged over mirror images
and members.

Arrays in, arrays out; spaces, groups, regions and pictures are for `explain`. Written out here because
MONAI's import costs many times the map itself; the tests compare both with MONAI's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS = ("layer1", "layer2", "layer3", "layer4")


def grad_cam(
    networks: Sequence[nn.Module],
    volume: np.ndarray,
    layers: Sequence[str] = LAYERS[:3],
    *,
    elementwise: bool = True,
    flip_averaging: bool = True,
) -> np.ndarray:
    """Signed Grad-CAM of the predicted age, without the final ReLU, over several layers.

    The published form (Selvaraju et al. 2017) weights each channel by its mean gradient; the element-wise
    form (HiResCAM, Draelos & Carin 2020) keeps the gradient's place and so does not smear one place's
    importance over the head. Each layer's map is scaled to the same mean magnitude, then they are averaged:
    early layers say where exactly, later ones what matters. A regression beside the network counts as a
    layer: what each place adds to the age by not being as usual.

    Parameters
    ----------
    networks : sequence of AgeRegressor
        The members; maps are averaged.
    volume : array (size, size, size)
        RAS, as stored.
    layers : sequence of str
        Of `layer1` (fine) to `layer4` (coarse: 3 voxels a side at 96).
    elementwise : bool
        False for the published form.
    flip_averaging : bool
        Average with the map of the left-right mirror image, mirrored back.

    Returns
    -------
    float32 array (size, size, size)
        Positive where the age is pushed up, negative where it is pushed down. The unit is arbitrary; the
        largest magnitude is 1.
    """
    if unknown := set(layers) - set(LAYERS) or (set() if layers else {"none"}):
        raise ValueError(f"layers: {sorted(unknown)} unknown; expected some of {', '.join(LAYERS)}.")

    def one(batch: Tensor) -> Tensor:
        total = torch.zeros_like(batch)
        members = [_cams(network, batch, layers, elementwise=elementwise) for network in networks]
        for coarse in map(sum, zip(*members, strict=True)):
            fine = functional.interpolate(coarse, size=batch.shape[2:], mode="trilinear", align_corners=False)
            total += fine / fine.abs().mean().clamp_min(1e-12)
        return total

    heat = _mirrored(one, volume, flip_averaging)
    return heat / max(float(np.abs(heat).max()), 1e-12)


def occlusion(
    networks: Sequence[nn.Module],
    volume: np.ndarray,
    *,
    edge: int = 6,
    step: int = 3,
    fill: np.ndarray | None = None,
    flip_averaging: bool = True,
    batch_size: int = 8,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Years that each place adds to the age: the age less the age with a cube around that place covered.

    Parameters
    ----------
    edge, step : int
        Edge of the covered cube and distance between cubes, voxels.
    fill : array (size, size, size), optional
        What covers, voxel by voxel, such as the mean training volume; by default the mean of the cube itself.
    batch_size : int
        Covered copies computed at once.
    progress : callable, optional
        Receives the share done, 0 to 1.

    Returns
    -------
    float32 array (size, size, size)
        Years, mean over the cubes that cover a voxel; 0 where only background was covered.
    """
    corners = _corners(volume, edge, step)
    whole = torch.from_numpy(np.asarray(volume, dtype=np.float32))
    cover = None if fill is None else torch.from_numpy(np.asarray(fill, dtype=np.float32))
    total, times = np.zeros(volume.shape, dtype=np.float32), np.zeros(volume.shape, dtype=np.float32)
    base = _ages(networks, whole[None, None], flip_averaging)[0]
    for start in range(0, len(corners), batch_size):
        part = corners[start : start + batch_size]
        covered = whole.repeat(len(part), 1, 1, 1)
        for copy, corner in zip(covered, part, strict=True):
            cube = tuple(slice(first, first + edge) for first in corner)
            copy[cube] = copy[cube].mean() if cover is None else cover[cube]
        for corner, age in zip(part, _ages(networks, covered[:, None], flip_averaging), strict=True):
            cube = tuple(slice(first, first + edge) for first in corner)
            total[cube] += base - age
            times[cube] += 1
        if progress:
            progress(min(1.0, (start + len(part)) / len(corners)))
    return total / np.maximum(times, 1)


def edge_map(volume: np.ndarray) -> np.ndarray:
    """Magnitude of the intensity's gradient: where edges are. It knows no model; a heat map must beat it."""
    from scipy import ndimage

    return ndimage.gaussian_gradient_magnitude(np.asarray(volume, dtype=np.float32), sigma=1.0)


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with weights drawn anew: a heat map that stays the same shows the picture, not the model
    (Adebayo et al. 2018)."""
    import copy

    drawn = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drawn.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * max(spread, 1e-3))
        if drawn.linear is not None:
            weight = drawn.linear.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())
    return drawn.eval().requires_grad_(False)


# --- one forward pass and its bookkeeping ---------------------------------------------------------------


def _cams(network: nn.Module, batch: Tensor, layers: Sequence[str], *, elementwise: bool) -> list[Tensor]:
    """Coarse map (1, 1, d, h, w) of each layer, in one pass, and of the regression beside the network."""
    kept, me = [], threading.get_ident()

    def keep(_module, _inputs, output):
        if threading.get_ident() != me:  # the app predicts with the same network in other threads
            return None
        # What lies before the first layer needs no gradient; the later ones must stay joined to it.
        kept.append(output if kept else output.detach().requires_grad_())
        return kept[-1]

    handles = [getattr(network, layer).register_forward_hook(keep) for layer in sorted(layers)]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            gradients = torch.autograd.grad(network(batch.clone()).sum(), kept)
    finally:
        for handle in handles:
            handle.remove()
    maps = []
    for activation, gradient in zip(kept, gradients, strict=True):
        weights = gradient if elementwise else gradient.mean(dim=(2, 3, 4), keepdim=True)
        maps.append((weights * activation.detach()).sum(dim=1, keepdim=True))
    if network.linear is not None:
        maps.append(network.linear.parts(batch)[:, None])
    return maps


def _mirrored(one: Callable[[Tensor], Tensor], volume: np.ndarray, flip_averaging: bool) -> np.ndarray:
    batch = torch.from_numpy(np.asarray(volume, dtype=np.float32))[None, None]
    heat = one(batch)
    if flip_averaging:
        heat = (heat + one(batch.flip(2)).flip(2)) / 2
    return heat[0, 0].numpy()


def _ages(networks: Sequence[nn.Module], batch: Tensor, flip_averaging: bool) -> np.ndarray:
    with torch.inference_mode():
        ages = torch.stack([network(batch) for network in networks]).mean(dim=0)
        if flip_averaging:
            ages = (ages + torch.stack([network(batch.flip(2)) for network in networks]).mean(dim=0)) / 2
    return ages.numpy()


def _corners(volume: np.ndarray, edge: int, step: int) -> list[tuple[int, int, int]]:
    """First voxels of all cubes that cover some head; covering plain background says nothing and costs as
    much.
    """
    from scipy import ndimage

    head = ndimage.maximum_filter(np.asarray(volume, dtype=np.float32), size=3) > np.mean(volume, dtype=float)
    starts = [sorted({*range(0, side - edge + 1, step), side - edge}) for side in volume.shape]
    every = [(x, y, z) for x in starts[0] for y in starts[1] for z in starts[2]]
    return [(x, y, z) for x, y, z in every if head[x : x + edge, y : y + edge, z : z + edge].mean() > 0.05]
