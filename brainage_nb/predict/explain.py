"""Where in a volume a network's age comes from: Grad-CAM and occlusion in 3-D, averaged over mirror images
and members.

Arrays in, arrays out; spaces, groups, regions and pictures are for `explain`. Written out here because
MONAI's import costs many times the map itself; the tests compare both with MONAI's.

Can the heat maps be believed? Sanity checks, and a score against ageing planted in the known-answer
cohort.

Only the known-answer cohort can answer where the age *should* come from; on people nobody knows.

Heat maps of many scans together: in template space, averaged by age, summed by region, scored against a
known map.

One scan's map is made in `explain`. A mean map says what the model uses on average; it locates no disease.

Pictures of one prediction: slices with the heat map over them, and the age among the held-out ones.

Why a model says an age: a heat map of one scan, in its own space.

The maps themselves are in `explaining.heat_maps`; groups, template space and regions in `explaining.groups`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainage_nb.cohort.images import image_stem
from brainage_nb.demo.cohort import TRUTH
from brainage_nb.drawing import legend_under
from brainage_nb.predict.predictors import VGG
from brainage_nb.volumes.heads import head_in
from brainage_nb.volumes.pictures import PLANES, plane
from brainage_nb.volumes.registration import mni_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from brainage_nb.predict.bundle import Bundle
    from brainage_nb.predict.cautions import Prediction
    from brainage_nb.volumes.settings import PreprocessingSettings
    from brainage_nb.volumes.store import VolumeStore

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


HEAT, EDGES, RANDOM = "Grad-CAM of the model", "edges of the scan", "Grad-CAM, weights randomised"


def planted_places(
    cohort: Path | str,
    scans: pd.DataFrame,
    resolve: Callable[[str], Path],
    settings: PreprocessingSettings,
) -> dict[str, np.ndarray]:
    """Where each known-answer head lies: scan id -> affine (4, 4) from its cube's voxels to MNI152 mm.

    From the planted pose and size, so no registration error is mixed into the score.

    Parameters
    ----------
    cohort : path
        The known-answer cohort's folder.
    scans : DataFrame
        `scan_id, image`.
    resolve : callable
        From an `image` cell to a path.
    """
    from brainage_nb.demo.scans import place_scan
    from brainage_nb.volumes.preprocessing import grid_affine

    truth = pd.read_csv(
        Path(cohort) / TRUTH, dtype={"scan_id": str, "subject_id": str, "session_id": str}
    ).set_index("scan_id")
    places = {}
    for row in scans.itertuples():
        _, scanner, to_template = place_scan(truth.loc[row.scan_id].to_dict())
        cube = grid_affine(resolve(row.image), settings)
        places[row.scan_id] = to_template @ np.linalg.inv(scanner) @ cube
    return places


def planted_check(
    bundle: Bundle,
    store: VolumeStore,
    places: dict[str, np.ndarray],
    ageing_map: Path | str,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """How well heat falls where ageing was planted: the model's, that of edges, that of random weights.

    Parameters
    ----------
    places : mapping
        Scans to use and where they lie, from `planted_places`; give test scans.
    ageing_map : path
        The cohort's `ageing_map.nii.gz`.
    seed : int
        Of the random weights.

    Returns
    -------
    DataFrame
        `map, inside, n, auc_of_mean, auc_of_scans`: area under the ROC curve, 0.5 is chance, of the mean
        absolute map over scans and the mean over scans, inside the head and inside the brain alone. Inside
        the brain much of the planted ageing lies along sulci, where edges are, so edges are hard to beat
        there.
    """
    networks = bundle.model.networks
    drawn = [randomised(network, seed) for network in networks]
    makers = {
        HEAT: lambda volume: grad_cam(networks, volume),
        EDGES: edge_map,
        RANDOM: lambda volume: grad_cam(drawn, volume),
    }
    planted = on_template(ageing_map)
    volumes = {scan_id: np.asarray(store[scan_id], np.float32) for scan_id in places}
    head = np.mean([in_template(volume > 0, places[name]) for name, volume in volumes.items()], axis=0) > 0.3
    rows = []
    for name, make in makers.items():
        maps = [in_template(np.abs(make(volume)), places[scan]) for scan, volume in volumes.items()]
        for inside, mask in {"head": head, "brain": head & brain_mask()}.items():
            each = float(np.mean([localisation(heat, planted, mask) for heat in maps]))
            rows.append((name, inside, len(maps), localisation(np.mean(maps, axis=0), planted, mask), each))
    return pd.DataFrame(rows, columns=["map", "inside", "n", "auc_of_mean", "auc_of_scans"])


def on_template(image: Path | str) -> np.ndarray:
    """A NIfTI image in MNI152 space, on the template grid."""
    import nibabel as nib
    from scipy import ndimage

    loaded = nib.load(image)
    shape, affine = template_grid()
    matrix = np.linalg.inv(loaded.affine) @ affine
    return ndimage.affine_transform(loaded.get_fdata(dtype=np.float32), matrix, output_shape=shape, order=1)


def localisation(heat: np.ndarray, planted: np.ndarray, inside: np.ndarray, *, above: float = 0.2) -> float:
    """Area under the ROC curve of absolute heat against where ageing was planted; 0.5 is chance.

    Parameters
    ----------
    heat, planted : arrays of one shape
    inside : bool array
        Where it is asked, such as the head; background is easily right and says nothing.
    above : float
        Planted change that counts as ageing (1 is the largest).
    """
    from scipy.stats import rankdata

    strength, true = np.abs(heat[inside]), planted[inside] > above
    n_true = int(true.sum())
    if not 0 < n_true < len(true):
        raise ValueError(f"{n_true} of {len(true)} voxels have planted ageing; a curve needs both kinds.")
    ranks = rankdata(strength)
    return float((ranks[true].sum() - n_true * (n_true + 1) / 2) / (n_true * (len(true) - n_true)))


BANDS = ((0, 40), (40, 60), (60, 120))
# Where the middle of the preprocessed cube lies in MNI152 space, mm: the crown is its anchor (see
# `volumes.heads`).
CUBE_CENTRE_MNI = (0.0, -20.0, 0.0)
TEMPLATE_MM = 4.0
REGIONS = (
    "frontal",
    "parietal",
    "temporal",
    "occipital",
    "cerebellum and brain stem",
    "ventricles and around them",
    "outside the brain",
)


class GroupMap(NamedTuple):
    """Mean heat map of one age band on the template grid: youngest and oldest age in whole years, number of
    scans, map, mean volume.
    """

    low: float
    high: float
    n: int
    heat: np.ndarray
    volume: np.ndarray


def template_grid(spacing_mm: float = TEMPLATE_MM) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and voxel-to-mm affine of a grid around the MNI152 brain."""
    low, high = np.array([-92.0, -128.0, -76.0]), np.array([92.0, 92.0, 96.0])
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = low
    shape = np.ceil((high - low) / spacing_mm).astype(int) + 1
    return tuple(int(side) for side in shape), affine


def cube_to_template(settings: PreprocessingSettings) -> np.ndarray:
    """Affine (4, 4) from a voxel of a preprocessed cube to MNI152 mm.

    Exact where preprocessing registered the scan. Else by the cube's anchor alone: crown and middle agree,
    head size and tilt do not, so it is good to about a centimetre.
    """
    centre = {} if settings.to_mni else {"centre_mm": np.array(CUBE_CENTRE_MNI)}
    return mni_grid(settings.spacing_mm, settings.size, **centre)


def in_template(array: np.ndarray, to_template: np.ndarray, *, outside: float = 0.0) -> np.ndarray:
    """Resample a volume or heat map onto the template grid, linearly.

    Parameters
    ----------
    array : array (size, size, size)
    to_template : array (4, 4)
        Voxel of `array` to MNI152 mm: `cube_to_template`, or a registration's.
    outside : float
        Value where the cube does not reach.
    """
    from scipy import ndimage

    shape, affine = template_grid()
    matrix = np.linalg.inv(to_template) @ affine
    array = np.asarray(array, np.float32)
    return ndimage.affine_transform(array, matrix, output_shape=shape, order=1, cval=outside)


def age_group_maps(
    bundle: Bundle,
    store: VolumeStore,
    scans: pd.DataFrame,
    *,
    bands: Sequence[tuple[float, float]] = BANDS,
    per_band: int = 12,
    to_template: Mapping[str, np.ndarray] | None = None,
    make: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[GroupMap]:
    """Mean heat map of each age band, in template space.

    Parameters
    ----------
    bundle : Bundle
        A network's.
    store : VolumeStore
        Volumes of the bundle's own preprocessing.
    scans : DataFrame
        `scan_id, age` (years); give scans the model did not train on.
    bands : sequence of (low, high)
        Ages in years, low included; empty bands are left out.
    per_band : int
        Scans a band, evenly over its ages.
    to_template : mapping, optional
        Scan id -> affine (4, 4) from voxels to MNI152 mm; by default `cube_to_template`.
    make : callable, optional
        Volume -> heat map; by default Grad-CAM of the bundle.
    """
    if store.fingerprint != bundle.settings.fingerprint:
        raise ValueError(
            f"The volumes were made with {store.fingerprint}, the model expects "
            f"{bundle.settings.fingerprint}."
        )
    make = make or (lambda volume: grad_cam(bundle.model.networks, volume))
    usual = cube_to_template(store.settings)
    groups = []
    for low, high in bands:
        rows = scans[(scans["age"] >= low) & (scans["age"] < high)].sort_values("age")
        if rows.empty:
            continue
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(per_band, len(rows))).round().astype(int))
        ids = rows["scan_id"].iloc[chosen].tolist()
        places = [(to_template or {}).get(scan_id, usual) for scan_id in ids]
        volumes = [np.asarray(store[scan_id], np.float32) for scan_id in ids]
        heat = np.mean(
            [in_template(make(v), place) for v, place in zip(volumes, places, strict=True)], axis=0
        )
        shown = [
            in_template(v, place, outside=float(v.min())) for v, place in zip(volumes, places, strict=True)
        ]
        youngest, oldest = float(np.floor(rows["age"].iloc[0])), float(np.ceil(rows["age"].iloc[-1]))
        groups.append(GroupMap(youngest, oldest, len(ids), heat, np.mean(shown, axis=0)))
    return groups


def region_table(heat: np.ndarray, labels: np.ndarray, names: Sequence[str] = REGIONS) -> pd.DataFrame:
    """Heat by region.

    Parameters
    ----------
    heat : array
        On the grid of `labels`, such as `in_template` gives.
    labels : int array
        1 for the first of `names`, 2 for the second, ...; 0 is left out.

    Returns
    -------
    DataFrame
        `region, voxels, mean_heat, share` (of the sum of absolute heat) and `density` (share of heat over
        share of voxels: above 1 is more than its size explains), most dense first.
    """
    size = np.bincount(labels.ravel(), minlength=len(names) + 1)[1:]
    total = np.bincount(labels.ravel(), np.abs(heat).ravel(), len(names) + 1)[1:]
    signed = np.bincount(labels.ravel(), heat.ravel(), len(names) + 1)[1:]
    frame = pd.DataFrame({"region": list(names), "voxels": size, "mean_heat": signed / np.maximum(size, 1)})
    frame["share"] = total / max(total.sum(), 1e-12)
    frame["density"] = frame["share"] / np.maximum(size / size.sum(), 1e-12)
    return frame[frame["voxels"] > 0].sort_values("density", ascending=False, ignore_index=True)


def coarse_regions(spacing_mm: float = TEMPLATE_MM) -> np.ndarray:
    """Label map of `REGIONS` on the template grid.

    Lobes by planes in MNI152 coordinates (no atlas is downloaded), so borders are rough; the brain mask and
    the tissue maps behind the ventricles are those nilearn ships.
    """
    from scipy import ndimage

    shape, affine = template_grid(spacing_mm)
    brain, fluid = (_mni_mask(name, shape, affine) for name in ("brain", "fluid"))
    x, y, z = (
        axis * spacing_mm + start for axis, start in zip(np.indices(shape), affine[:3, 3], strict=True)
    )
    low = z < np.where(y < -35, -12 - 0.15 * (y + 35), -40)
    labels = np.select(
        [
            (y < -35) & low | (np.abs(x) < 16) & (z < -22),
            (z < -2 - 0.25 * (y + 20)) & (np.abs(x) > 22),
            y < -62,
            y < -12,
        ],
        [5, 3, 4, 2],
        default=1,
    )
    deep = ndimage.binary_dilation(fluid, iterations=max(1, round(4 / spacing_mm)))
    labels[deep & (np.abs(x) < 40) & (y > -65) & (y < 40) & (z > -12) & (z < 36)] = 6
    labels[~brain] = 7
    return labels


def brain_mask(spacing_mm: float = TEMPLATE_MM) -> np.ndarray:
    """The MNI152 brain on the template grid."""
    return _mni_mask("brain", *template_grid(spacing_mm))


def _mni_mask(name: str, shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """Brain, or deep fluid inside it (dark in the template, 12 mm from the surface), on our grid."""
    from nilearn import datasets
    from scipy import ndimage

    image = datasets.load_mni152_brain_mask(resolution=2)
    mask = image.get_fdata() > 0.5
    if name == "fluid":
        mask = ndimage.binary_erosion(mask, iterations=6)
        mask &= datasets.load_mni152_template(resolution=2).get_fdata() < 0.5
    matrix = np.linalg.inv(image.affine) @ affine
    return ndimage.affine_transform(mask.astype(np.float32), matrix, output_shape=shape, order=1) > 0.5


BLUE, VERMILION, GREY, BLACK = "#0072B2", "#D55E00", "#8C8C8C", "#222222"  # Okabe-Ito where coloured
# What lies at the left and right border of a slice.
ENDS = {"sagittal": "AP", "coronal": "RL", "axial": "RL"}


def overlay_planes(
    axes: Sequence[Axes],
    volume: np.ndarray,
    heat: np.ndarray | None = None,
    at: Sequence[int] | None = None,
    *,
    opacity: float = 0.6,
    spacing_mm: float = 1.0,
) -> Sequence[Axes]:
    """Sagittal, coronal and axial slice of a volume with a signed heat map over it.

    The head's left is on the picture's right, as on radiology workstations.

    Parameters
    ----------
    axes : three Axes
    volume, heat : array (x, y, z)
        RAS. Vermilion raises the age, blue lowers it.
    at : three ints, optional
        Voxel shown; by default where the heat is strongest inside the head, without heat the centre.
    opacity : float
        Of the strongest heat, 0 to 1.
    spacing_mm : float
        Voxel edge in mm, for the slices' positions in the titles.
    """
    at = strongest(volume, heat) if at is None else at
    low, high = np.percentile(volume, [1, 99.7])
    if heat is not None:
        shown = np.where(_near_head(volume), heat, 0.0)
        shown = shown / max(float(np.percentile(np.abs(shown), 99.8)), 1e-12)
    for axis, (ax, name) in enumerate(zip(axes, PLANES, strict=True)):
        position = at[axis] / max(volume.shape[axis] - 1, 1)
        picture, _ = plane(np.asarray(volume, np.float32), name, position)
        ax.imshow(picture, cmap="gray", vmin=low, vmax=high, interpolation="bilinear")
        if heat is not None:
            picture, _ = plane(shown, name, position)
            ax.imshow(signed_colours(picture, opacity), interpolation="bilinear")
        ax.set_title(f"{name}, {at[axis] * spacing_mm:.0f} mm", fontsize=9)
        for x, end in zip((0.03, 0.97), ENDS[name], strict=True):
            ax.text(x, 0.5, end, color="white", fontsize=9, ha="center", va="center", transform=ax.transAxes)
        ax.set_axis_off()
    return axes


def strongest(volume: np.ndarray, heat: np.ndarray | None) -> tuple[int, int, int]:
    """Where the three planes meet that hold the most heat inside the head; without heat its middle.

    Whole planes are compared, not voxels: a map of slabs has its strongest voxel anywhere, often at the skin.
    """
    head = head_in(volume)
    if heat is None or not np.abs(heat).max() > 0:
        places = np.argwhere(head)
        return (
            tuple(int(value) for value in np.median(places, axis=0))
            if len(places)
            else (len(volume) // 2,) * 3
        )
    inside = np.abs(heat) * head
    return tuple(int(inside.sum(axis=others).argmax()) for others in ((1, 2), (0, 2), (0, 1)))


def signed_colours(values: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """RGBA (..., 4) of values from -1 (blue) through 0 (clear) to 1 (vermilion)."""
    from matplotlib.colors import to_rgb

    values = np.clip(np.asarray(values, dtype=float), -1, 1)
    rgba = np.empty((*values.shape, 4))
    rgba[..., :3] = np.where(values[..., None] >= 0, to_rgb(VERMILION), to_rgb(BLUE))
    rgba[..., 3] = opacity * np.clip((np.abs(values) - 0.15) / 0.85, 0, 1)  # weak heat is left out
    return rgba


def age_among_held_out(ax: Axes, prediction: Prediction, position: Mapping[str, Any]) -> Axes:
    """Predicted against true age of people the model did not train on, and this scan among them.

    `position` is the bundle's entry of that name. Ages in years.
    """
    age, predicted = np.asarray(position["age"]), np.asarray(position["predicted_age"])
    ends = (min(age.min(), predicted.min()) - 3, max(age.max(), predicted.max()) + 3)
    ax.plot(ends, ends, color=GREY, lw=1, ls="--", label="predicted = true")
    ax.scatter(age, predicted, s=14, color=GREY, alpha=0.55, lw=0, label=f"held-out scans (n = {len(age)})")
    if np.isfinite(prediction.low) and np.isfinite(prediction.high):
        ax.axhspan(
            prediction.low,
            prediction.high,
            color=BLUE,
            alpha=0.12,
            lw=0,
            label=f"{prediction.level:.0%} interval",
        )
    ax.axhline(
        prediction.predicted_age, color=BLUE, lw=1.6, label=f"this scan: {prediction.predicted_age:.1f}"
    )
    if prediction.age is not None:
        ax.plot(
            prediction.age,
            prediction.predicted_age,
            "D",
            ms=9,
            color=VERMILION,
            mec="white",
            label="this scan at its true age",
        )
    ax.set(xlabel="True age [years]", ylabel="Predicted age [years]")
    ax.set_title("Where this scan lies among held-out scans", fontsize=10)
    legend_under(ax)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _near_head(volume: np.ndarray) -> np.ndarray:
    """Head and a voxel around it; heat in plain air only distracts."""
    from scipy import ndimage

    return ndimage.binary_dilation(ndimage.binary_fill_holes(head_in(volume)))


def group_panels(
    axes: Sequence[Axes], group: GroupMap, at_mm: Sequence[float] = (0, -20, 5)
) -> Sequence[Axes]:
    """Mean heat map of one age band over its mean brain, in template space; the head around it is not shown.

    `axes` are three; `at_mm` is the MNI152 position shown, mm.
    """
    from scipy import ndimage

    shape, affine = template_grid()
    at = np.round(np.linalg.solve(affine, [*at_mm, 1.0])[:3]).astype(int)
    at = [int(np.clip(index, 0, side - 1)) for index, side in zip(at, shape, strict=True)]
    brain = ndimage.binary_dilation(brain_mask())
    stripped = np.where(brain, group.volume, group.volume[brain].min())
    overlay_planes(axes, stripped, group.heat, at, spacing_mm=affine[0, 0])
    for ax, name, place in zip(axes, PLANES, at_mm, strict=True):
        ax.set_title(f"{name}, {'xyz'[PLANES.index(name)]} = {place:g} mm", fontsize=9)
    axes[0].text(
        -0.08,
        0.5,
        f"{group.low:g} to {group.high:g} years\nn = {group.n}",
        rotation=90,
        ha="center",
        va="center",
        fontsize=9,
        transform=axes[0].transAxes,
    )
    return axes


GRAD_CAM, OCCLUSION, TRIPLETS = "grad_cam", "occlusion", "triplets"
METHODS = {
    GRAD_CAM: "Grad-CAM, relative",
    OCCLUSION: "occlusion: years that each place adds to the age",
    TRIPLETS: "years that each triplet of axial slices adds to the age",
}
CUBE_MM = 24.0  # covered at once: about a gyrus with its neighbours


@dataclass(frozen=True)
class Explanation:
    """A heat map of one scan.

    Attributes
    ----------
    heat : float32 array (size, size, size)
        RAS, on the grid of `Prediction.volume`. Above 0 raises the age, below 0 lowers it.
    method : str
        A key of `METHODS`, whose text gives the unit.
    spacing_mm : float
        Voxel edge, mm.
    contributions : DataFrame or None
        For VGG16-SVR: `position, first_slice, last_slice, years`.
    """

    heat: np.ndarray = field(repr=False)
    method: str
    spacing_mm: float
    contributions: pd.DataFrame | None = field(default=None, repr=False)

    @property
    def title(self) -> str:
        """The method in words, with its unit."""
        return METHODS[self.method]

    def picture(
        self,
        prediction: Prediction,
        at: Sequence[int] | None = None,
        *,
        opacity: float = 0.6,
        figure: FigureBase | None = None,
    ) -> FigureBase:
        """Three planes through voxel `at` with the heat over them, on `figure` or one that stands alone."""
        from matplotlib.figure import Figure

        figure = figure or Figure(figsize=(9, 3.3), layout="constrained")
        axes, spacing = figure.subplots(1, 3), self.spacing_mm
        overlay_planes(axes, prediction.volume, self.heat, at, opacity=opacity, spacing_mm=spacing)
        said = f"{prediction.scan}: {prediction.predicted_age:.1f} years; {self.title}"
        figure.suptitle(f"{said}\n", fontsize=10, linespacing=0.6, parse_math=False)
        return figure

    def save(self, folder: Path | str, prediction: Prediction, *, n_folders: int = 0) -> list[Path]:
        """Write `<scan>_heat.nii.gz`, which lies on the scan in any viewer, and `<scan>_heat.png`.

        They go into `folder`, below the last `n_folders` folders of the scan's path; below more of them
        where the map of another scan lies there.
        """
        import nibabel as nib

        from brainage_nb.workspace import writing

        scan = Path(os.path.abspath(prediction.path or prediction.scan))
        owner = hashlib.sha256(os.fsencode(scan)).hexdigest().encode()
        deepest = len(scan.parts) - 2  # all folders but the root
        for depth in range(min(n_folders, deepest), deepest + 1):
            nifti = Path(folder, *scan.parts[-1 - depth : -1], f"{image_stem(scan.name)}_heat.nii.gz")
            if not nifti.exists() or _owner_of(nifti) == owner:
                break
        png = nifti.with_name(f"{image_stem(scan.name)}_heat.png")
        with writing(nifti) as temporary:
            image = nib.Nifti1Image(self.heat.astype(np.float32), prediction.affine)
            image.header["descrip"] = owner
            named = temporary.with_name(f"{temporary.name}.nii.gz")  # nibabel compresses by name
            nib.save(image, named)
            named.replace(temporary)
        with writing(png) as temporary:
            self.picture(prediction).savefig(temporary, format="png", dpi=150)
        return [nifti, png]


def explain(
    bundle: Bundle,
    prediction: Prediction,
    method: str = "",
    *,
    progress: Callable[[float], Any] | None = None,
) -> Explanation:
    """A heat map of one predicted scan.

    Parameters
    ----------
    bundle : Bundle
        The one that made the prediction.
    method : {"grad_cam", "occlusion", "triplets"}
        Networks: Grad-CAM (a second) by default, occlusion (a minute) on request. VGG16-SVR: triplets.
    progress : callable, optional
        Receives the share done, 0 to 1 (occlusion only).
    """
    known = (TRIPLETS,) if bundle.model.kind == VGG else (GRAD_CAM, OCCLUSION)
    method = method or known[0]
    if method not in known:
        raise ValueError(f"method = {method!r}: for this model expected one of {', '.join(known)}.")
    spacing = float(bundle.settings.spacing_mm)
    if method == TRIPLETS:
        contributions = bundle.model.model.contributions(prediction.volume, bundle.model.variant)
        return Explanation(_as_slabs(contributions, prediction.volume.shape), method, spacing, contributions)
    model = bundle.model
    if method == GRAD_CAM:
        heat = grad_cam(model.networks, prediction.volume, flip_averaging=model.averaging["flip_averaging"])
        return Explanation(heat, method, spacing)
    edge = max(2, round(CUBE_MM / spacing))
    heat = occlusion(
        model.networks,
        prediction.volume,
        edge=edge,
        step=max(1, edge // 2),
        flip_averaging=model.averaging["flip_averaging"],
        progress=progress,
    )
    return Explanation(heat, method, spacing)


def _owner_of(heat_map: Path) -> bytes:
    """Hash of the path of the scan that a map was made of; empty where the file does not say."""
    import nibabel as nib

    try:
        return nib.load(heat_map).header["descrip"].item()
    except (OSError, ValueError, KeyError, nib.filebasedimages.ImageFileError):
        return b""


def _as_slabs(contributions: pd.DataFrame, shape: tuple[int, ...]) -> np.ndarray:
    heat = np.zeros(shape, dtype=np.float32)
    for row in contributions.dropna(subset=["years"]).itertuples():
        heat[:, :, row.first_slice : row.last_slice + 1] = row.years
    return heat
