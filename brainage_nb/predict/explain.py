"""Why a model says an age: heat maps of one scan and of groups, their checks against known answers, pictures.

A map shows what a model uses and locates no disease; where an age should come from is known in the demo only.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainage_nb.bundle_format import VGG
from brainage_nb.cohort.images import image_stem
from brainage_nb.demo.cohort import TRUTH
from brainage_nb.drawing import legend_under
from brainage_nb.volumes.heads import head_in
from brainage_nb.volumes.pictures import PLANES, plane
from brainage_nb.volumes.registration import mni_grid
from brainage_nb.workspace import read_csv, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from brainage_nb.predict.bundle import Bundle
    from brainage_nb.predict.cautions import Prediction
    from brainage_nb.volumes.settings import PreprocessingSettings
    from brainage_nb.volumes.store import VolumeStore

GRAD_CAM, OCCLUSION, TRIPLETS = "grad_cam", "occlusion", "triplets"
METHODS = {
    GRAD_CAM: "Grad-CAM, relative",
    OCCLUSION: "occlusion: years that each place adds to the age",
    TRIPLETS: "years that each triplet of axial slices adds to the age",
}
LAYERS = ("layer1", "layer2", "layer3", "layer4")
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
        title = f"{prediction.scan}: {prediction.predicted_age:.1f} years; {self.title}"
        figure.suptitle(f"{title}\n", fontsize=10, linespacing=0.6, parse_math=False)
        return figure

    def save(self, folder: Path | str, prediction: Prediction, *, n_folders: int = 0) -> list[Path]:
        """Write `<scan>_heat.nii.gz`, which lies on the scan in any viewer, and `<scan>_heat.png`.

        They go into `folder`, below the last `n_folders` folders of the scan's path; below more of them
        where the map of another scan lies there.
        """
        import nibabel as nib

        scan = Path(os.path.abspath(prediction.path or prediction.scan))
        owner = hashlib.sha256(os.fsencode(scan)).hexdigest().encode()
        deepest = len(scan.parts) - 2  # all folders but the root
        for depth in range(min(n_folders, deepest), deepest + 1):
            nifti = Path(folder, *scan.parts[-1 - depth : -1], f"{image_stem(scan.name)}_heat.nii.gz")
            if not nifti.exists() or _read_owner(nifti) == owner:
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


def explain(bundle: Bundle, prediction: Prediction, method: str = "") -> Explanation:
    """A heat map of one predicted scan.

    Parameters
    ----------
    bundle : Bundle
        The one that made the prediction.
    method : {"grad_cam", "occlusion", "triplets"}
        Networks: Grad-CAM (a second) by default, occlusion (a minute) on request. VGG16-SVR: triplets.

    Examples
    --------
    >>> explain(bundle, prediction).picture(prediction)  # doctest: +SKIP
    """
    model, spacing = bundle.model, float(bundle.settings.spacing_mm)
    known = (TRIPLETS,) if model.kind == VGG else (GRAD_CAM, OCCLUSION)
    method = method or known[0]
    if method not in known:
        raise ValueError(f"method = {method!r}: for this model expected one of {', '.join(known)}.")
    contributions = None
    if method == TRIPLETS:
        contributions = model.model.contributions(prediction.volume, model.variant)
        heat = np.zeros(prediction.volume.shape, dtype=np.float32)
        for row in contributions.dropna(subset=["years"]).itertuples():
            heat[:, :, row.first_slice : row.last_slice + 1] = row.years
    elif method == GRAD_CAM:
        heat = grad_cam(model.networks, prediction.volume, flip_averaging=model.flip_averaging)
    else:
        edge = max(2, round(CUBE_MM / spacing))
        heat = occlusion(model.networks, prediction.volume, edge=edge, flip_averaging=model.flip_averaging)
    return Explanation(heat, method, spacing, contributions)


def _read_owner(heat_map: Path) -> bytes:
    """Hash of the path of the scan that a map was made of; empty where the file does not say."""
    import nibabel as nib

    try:
        return nib.load(heat_map).header["descrip"].item()
    except (OSError, ValueError, KeyError, nib.filebasedimages.ImageFileError):
        return b""


# --- the maps -------------------------------------------------------------------------------------------


def grad_cam(
    networks: Sequence[nn.Module],
    volume: np.ndarray,
    layers: Sequence[str] = LAYERS[:3],
    *,
    elementwise: bool = True,
    flip_averaging: bool = True,
) -> np.ndarray:
    """Signed Grad-CAM of the predicted age over several layers.

    Not MONAI's `GradCAM`: that ends in a ReLU and so drops the sign, which for an age is the message.

    The published form (Selvaraju et al. 2017) weights each channel by its mean gradient; the element-wise
    form (HiResCAM, Draelos & Carin 2020) keeps the gradient's place and so does not smear one place's
    importance over the head. Each layer's map is scaled to the same mean magnitude, then they are averaged:
    early layers say where exactly, later ones what matters. A regression beside the network counts as a
    layer: what each place adds to the age by not being as usual.

    Parameters
    ----------
    networks : sequence of AgeRegressor
        The ensemble; maps are averaged.
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

    def map_one(batch: Tensor) -> Tensor:
        total = torch.zeros_like(batch)
        maps = [_cams(network, batch, layers, elementwise=elementwise) for network in networks]
        for coarse in map(sum, zip(*maps, strict=True)):
            fine = functional.interpolate(coarse, size=batch.shape[2:], mode="trilinear", align_corners=False)
            total += fine / fine.abs().mean().clamp_min(1e-12)
        return total

    batch = torch.from_numpy(np.asarray(volume, dtype=np.float32))[None, None]
    heat = map_one(batch)
    if flip_averaging:
        heat = (heat + map_one(batch.flip(2)).flip(2)) / 2
    return (heat / heat.abs().max().clamp_min(1e-12))[0, 0].numpy()


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


def occlusion(
    networks: Sequence[nn.Module], volume: np.ndarray, *, edge: int = 6, flip_averaging: bool = True
) -> np.ndarray:
    """Years that each place adds to the age: the age less the age with a cube around that place covered.

    Cubes of `edge` voxels, covered by their own mean, overlap by half; those without any head are left out.
    Not MONAI's `OcclusionSensitivity`: in 1.6 its `mean_patch` multiplies a cube by its mean.

    Returns
    -------
    float32 array (size, size, size)
        Years, mean over the cubes that cover a voxel; 0 where only background was covered.
    """
    head, step, batch_size = _near_head(volume), max(1, edge // 2), 8
    starts = [sorted({*range(0, side - edge + 1, step), side - edge}) for side in volume.shape]
    cubes = [tuple(slice(start, start + edge) for start in corner) for corner in product(*starts)]
    cubes = [cube for cube in cubes if head[cube].mean() > 0.05]
    whole = torch.from_numpy(np.asarray(volume, dtype=np.float32))
    total, times = np.zeros(volume.shape, dtype=np.float32), np.zeros(volume.shape, dtype=np.float32)

    def predict(batch: Tensor) -> np.ndarray:
        views = [batch, batch.flip(2)] if flip_averaging else [batch]
        return torch.stack([net(view) for net in networks for view in views]).mean(dim=0).numpy()

    with torch.inference_mode():
        age = predict(whole[None, None])
        for first in range(0, len(cubes), batch_size):
            part = cubes[first : first + batch_size]
            covered = whole.repeat(len(part), 1, 1, 1)
            for copy, cube in zip(covered, part, strict=True):
                copy[cube] = copy[cube].mean()
            for cube, years in zip(part, age - predict(covered[:, None]), strict=True):
                total[cube] += years
                times[cube] += 1
    return total / np.maximum(times, 1)


# --- groups, in template space --------------------------------------------------------------------------

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
    matrix, array = np.linalg.inv(to_template) @ affine, np.asarray(array, np.float32)
    return ndimage.affine_transform(array, matrix, output_shape=shape, order=1, cval=outside)


def age_group_maps(
    bundle: Bundle,
    store: VolumeStore,
    scans: pd.DataFrame,
    *,
    bands: Sequence[tuple[float, float]] = BANDS,
    per_band: int = 12,
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
        Scans per band, evenly over its ages.
    make : callable, optional
        Volume -> heat map; by default Grad-CAM of the bundle.
    """
    if store.fingerprint != bundle.settings.fingerprint:
        raise ValueError(
            f"The volumes were made with {store.fingerprint}, the model expects "
            f"{bundle.settings.fingerprint}."
        )
    make = make or partial(grad_cam, bundle.model.networks)
    place = cube_to_template(store.settings)
    groups = []
    for low, high in bands:
        rows = scans[(scans["age"] >= low) & (scans["age"] < high)].sort_values("age")
        if rows.empty:
            continue
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(per_band, len(rows))).round().astype(int))
        volumes = [np.asarray(store[scan_id], np.float32) for scan_id in rows["scan_id"].iloc[chosen]]
        heat = np.mean([in_template(make(volume), place) for volume in volumes], axis=0)
        shown = np.mean([in_template(v, place, outside=float(v.min())) for v in volumes], axis=0)
        youngest, oldest = float(np.floor(rows["age"].iloc[0])), float(np.ceil(rows["age"].iloc[-1]))
        groups.append(GroupMap(youngest, oldest, len(volumes), heat, shown))
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
    voxels = pd.DataFrame({"label": labels.ravel(), "heat": heat.ravel(), "share": np.abs(heat).ravel()})
    by_label = voxels[voxels["label"] > 0].groupby("label")
    frame = by_label.agg(voxels=("heat", "size"), mean_heat=("heat", "mean"), share=("share", "sum"))
    frame["share"] /= max(frame["share"].sum(), 1e-12)
    frame["density"] = frame["share"] / (frame["voxels"] / frame["voxels"].sum())
    frame.insert(0, "region", [names[label - 1] for label in frame.index])
    return frame.sort_values("density", ascending=False, ignore_index=True)


def coarse_regions() -> np.ndarray:
    """Label map of `REGIONS` on the template grid.

    Lobes by planes in MNI152 coordinates (no atlas is downloaded), so borders are rough; the brain mask and
    the template behind the ventricles are those nilearn ships.
    """
    from scipy import ndimage

    shape, affine = template_grid()
    brain, fluid = (_mni_mask(name) for name in ("brain", "fluid"))
    x, y, z = (
        axis * TEMPLATE_MM + start for axis, start in zip(np.indices(shape), affine[:3, 3], strict=True)
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
    deep = ndimage.binary_dilation(fluid)
    labels[deep & (np.abs(x) < 40) & (y > -65) & (y < 40) & (z > -12) & (z < 36)] = 6
    labels[~brain] = 7
    return labels


def _mni_mask(name: str) -> np.ndarray:
    """The MNI152 `brain`, or deep `fluid` inside it (dark in the template, 12 mm from the surface)."""
    from nilearn import datasets
    from scipy import ndimage

    mask = datasets.load_mni152_brain_mask(resolution=2)
    inside = mask.get_fdata() > 0.5
    if name == "fluid":
        inside = ndimage.binary_erosion(inside, iterations=6)
        inside &= datasets.load_mni152_template(resolution=2).get_fdata() < 0.5
    return in_template(inside, mask.affine) > 0.5


# --- can the maps be believed? --------------------------------------------------------------------------

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

    truth = read_csv(Path(cohort) / TRUTH).set_index("scan_id")
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
    import nibabel as nib

    networks = bundle.model.networks
    makers = {
        HEAT: partial(grad_cam, networks),
        EDGES: edge_map,
        RANDOM: partial(grad_cam, [randomised(network, seed) for network in networks]),
    }
    image = nib.load(ageing_map)
    planted = in_template(image.get_fdata(), image.affine)
    volumes = {scan_id: np.asarray(store[scan_id], np.float32) for scan_id in places}
    head = np.mean([in_template(volume > 0, places[name]) for name, volume in volumes.items()], axis=0) > 0.3
    rows = []
    for name, make in makers.items():
        maps = [in_template(np.abs(make(volume)), places[scan]) for scan, volume in volumes.items()]
        for inside, mask in {"head": head, "brain": head & _mni_mask("brain")}.items():
            each = float(np.mean([localisation(heat, planted, mask) for heat in maps]))
            rows.append((name, inside, len(maps), localisation(np.mean(maps, axis=0), planted, mask), each))
    return pd.DataFrame(rows, columns=["map", "inside", "n", "auc_of_mean", "auc_of_scans"])


def edge_map(volume: np.ndarray) -> np.ndarray:
    """Magnitude of the intensity's gradient: where edges are. It knows no model; a heat map must beat it."""
    from scipy import ndimage

    return ndimage.gaussian_gradient_magnitude(np.asarray(volume, dtype=np.float32), sigma=1.0)


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with weights drawn at random: a heat map that stays the same shows the picture, not the model
    (Adebayo et al. 2018)."""
    import copy

    drawn = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    weights = [*drawn.parameters(), *([] if drawn.linear is None else [drawn.linear.weight])]
    with torch.no_grad():
        for weight in weights:
            spread = float(weight.std()) if weight.numel() > 1 else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * max(spread, 1e-3))
    return drawn.eval().requires_grad_(False)


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
    from sklearn.metrics import roc_auc_score

    true = planted[inside] > above
    if not 0 < true.sum() < len(true):
        raise ValueError(f"{true.sum()} of {len(true)} voxels have planted ageing; a curve needs both kinds.")
    return float(roc_auc_score(true, np.abs(heat[inside])))


# --- pictures -------------------------------------------------------------------------------------------

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#8C8C8C"  # Okabe-Ito where coloured
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
            ax.imshow(_signed_colours(picture, opacity), interpolation="bilinear")
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
    if heat is not None and np.abs(heat).max() > 0:
        inside = np.abs(heat) * head
        return tuple(int(inside.sum(axis=others).argmax()) for others in ((1, 2), (0, 2), (0, 1)))
    places = np.argwhere(head) if head.any() else np.array([volume.shape]) // 2
    return tuple(int(value) for value in np.median(places, axis=0))


def _signed_colours(values: np.ndarray, opacity: float) -> np.ndarray:
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
    here, low, high = prediction.predicted_age, prediction.low, prediction.high
    ends = (min(age.min(), predicted.min()) - 3, max(age.max(), predicted.max()) + 3)
    ax.plot(ends, ends, color=GREY, lw=1, ls="--", label="predicted = true")
    ax.scatter(age, predicted, s=14, color=GREY, alpha=0.55, lw=0, label=f"held-out scans (n = {len(age)})")
    if np.isfinite(low) and np.isfinite(high):
        ax.axhspan(low, high, color=BLUE, alpha=0.12, lw=0, label=f"{prediction.level:.0%} interval")
    ax.axhline(here, color=BLUE, lw=1.6, label=f"this scan: {here:.1f}")
    if prediction.age is not None:
        mark = {"ms": 9, "color": VERMILION, "mec": "white", "label": "this scan at its true age"}
        ax.plot(prediction.age, here, "D", **mark)
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
    at = np.round(np.linalg.solve(affine, [*at_mm, 1.0])[:3]).astype(int).clip(0, np.array(shape) - 1)
    brain = ndimage.binary_dilation(_mni_mask("brain"))
    stripped = np.where(brain, group.volume, group.volume[brain].min())
    overlay_planes(axes, stripped, group.heat, at, spacing_mm=affine[0, 0])
    for ax, name, letter, place in zip(axes, PLANES, "xyz", at_mm, strict=True):
        ax.set_title(f"{name}, {letter} = {place:g} mm", fontsize=9)
    label = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 9}
    years = f"{group.low:g} to {group.high:g} years\nn = {group.n}"
    axes[0].text(-0.08, 0.5, years, transform=axes[0].transAxes, **label)
    return axes
