"""Why a model says an age: heat maps of one scan and of groups, their checks against known answers, pictures.

A map shows what a model uses and locates no disease; where an age should come from is known in the demo only.
"""

from __future__ import annotations

import copy
import hashlib
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from brainage_nb.bundle_format import VGG
from brainage_nb.cohort.images import image_stem
from brainage_nb.demo.anatomy import template_anatomy
from brainage_nb.demo.cohort import TRUTH
from brainage_nb.demo.scans import OLDEST, YOUNGEST, mean_head, place_scan
from brainage_nb.drawing import legend_under
from brainage_nb.predict.predictors import NetworkEnsemble, as_batch
from brainage_nb.volumes.heads import head_in
from brainage_nb.volumes.pictures import PLANES, plane
from brainage_nb.volumes.preprocessing import grid_affine, preprocess
from brainage_nb.volumes.registration import mni_grid
from brainage_nb.volumes.resampling import resample
from brainage_nb.workspace import read_csv, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure, FigureBase

    from brainage_nb.predict.bundle import Bundle
    from brainage_nb.predict.cautions import Prediction
    from brainage_nb.volumes.settings import PreprocessingSettings
    from brainage_nb.volumes.store import VolumeStore

INTEGRATED, GRAD_CAM, OCCLUSION, TRIPLETS = "integrated_gradients", "grad_cam", "occlusion", "triplets"
METHODS = {  # in words, and the unit of the colours
    INTEGRATED: (
        "integrated gradients: years that each place adds to the mean training brain's age",
        "years per cm³",
    ),
    GRAD_CAM: ("Grad-CAM, relative", "of the largest"),
    OCCLUSION: ("occlusion: years that each place adds to the age", "years"),
    TRIPLETS: ("years that each triplet of axial slices adds to the age", "years"),
}
COLOURS = "Orange raises the age, blue lowers it"
NO_MEAN = (
    "This bundle was saved without the mean training volume, from which a map in years starts. So this is "
    "Grad-CAM, which has no unit. Save the bundle again from its run for a map in years."
)
NO_PLACES = "This kind of model maps no single places: the years are what each three axial slices add."
CUBE_MM = 24.0  # covered at once: about a gyrus with its neighbours


@dataclass(frozen=True)
class Explanation:
    """A heat map of one scan.

    Attributes
    ----------
    heat : float32 array (size, size, size)
        RAS, on the grid of `Prediction.volume`. Above 0 raises the age, below 0 lowers it.
    method : str
        A key of `METHODS`.
    spacing_mm : float
        Voxel edge, mm.
    words : str
        What the map adds up to, or why it is not in years.
    contributions : DataFrame or None
        For VGG16-SVR: `position, first_slice, last_slice, years`.
    """

    heat: np.ndarray = field(repr=False)
    method: str
    spacing_mm: float
    words: str = ""
    contributions: pd.DataFrame | None = field(default=None, repr=False)

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

        figure = figure or Figure(figsize=(9, 3.6), layout="constrained")
        axes, spacing = figure.subplots(1, 3), self.spacing_mm
        overlay_planes(axes, prediction.volume, self.heat, at, opacity=opacity, spacing_mm=spacing)
        title, unit = METHODS[self.method]
        per_unit = (10 / spacing) ** 3 if self.method == INTEGRATED else 1
        full = full_heat(prediction.volume, self.heat) * per_unit
        age = f"{prediction.scan}: {prediction.predicted_age:.1f} years"
        if prediction.do_not_use_because:
            age = f"{age}, NOT TO BE USED"
        colours = f"{COLOURS}; full colour: {full:.2g} {unit}"
        lines = [age, title, colours, *textwrap.wrap(self.words, 110)]
        figure.suptitle("\n".join(lines), fontsize=9, parse_math=False)
        return figure

    def planes(self, prediction: Prediction, at: Sequence[int], opacity: float) -> list[Figure]:
        """The three planes of `picture`, each alone: a narrow page puts them below each other."""
        from matplotlib.figure import Figure

        figures = [Figure(figsize=(3.6, 3.8), layout="constrained") for _ in PLANES]
        axes = [figure.subplots() for figure in figures]
        overlay_planes(axes, prediction.volume, self.heat, at, opacity=opacity, spacing_mm=self.spacing_mm)
        return figures

    def save(self, folder: Path | str, prediction: Prediction, *, n_folders: int = 0) -> list[Path]:
        """Write `<scan>_heat.nii.gz`, which lies on the scan in any viewer, and `<scan>_heat.png`.

        They go into `folder`, below the last `n_folders` folders of the scan's path; below more of them
        where the map of another scan lies there.
        """
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
    method : {"integrated_gradients", "grad_cam", "occlusion", "triplets"}
        Networks: by default integrated gradients, in years; Grad-CAM is the fastest, occlusion the slowest.
        Bundles saved without the mean training volume give Grad-CAM in their place, with a word. VGG16-SVR:
        triplets. Networks that read several scans together: integrated gradients, summed over scans.

    Examples
    --------
    >>> explanation = explain(bundle, prediction)  # doctest: +SKIP
    >>> explanation.words  # doctest: +SKIP
    "What moved this age away from the mean training brain's, by one method: the sum of the map is ...
    >>> explanation.picture(prediction)  # doctest: +SKIP
    """
    model, spacing = bundle.model, float(bundle.settings.spacing_mm)
    known = (INTEGRATED,) if bundle.channels else (INTEGRATED, GRAD_CAM, OCCLUSION)
    known = (TRIPLETS,) if model.kind == VGG else known
    if method and method not in known:
        raise ValueError(f"method = {method!r}: for this model expected one of {', '.join(known)}.")
    if model.kind == VGG:
        contributions = model.model.contributions(prediction.volume, model.variant)
        heat = np.zeros(prediction.volume.shape, dtype=np.float32)
        for row in contributions.dropna(subset=["years"]).itertuples():
            heat[:, :, row.first_slice : row.last_slice + 1] = row.years
        return Explanation(heat, TRIPLETS, spacing, NO_PLACES, contributions)
    mean, volume = bundle.reference.mean_volume, prediction.volume
    if method == OCCLUSION:
        heat = occlusion(model, volume, mean, edge=max(2, round(CUBE_MM / spacing)))
        return Explanation(heat, OCCLUSION, spacing)
    if method == GRAD_CAM or mean is None:
        return Explanation(grad_cam(model, volume), GRAD_CAM, spacing, "" if method == GRAD_CAM else NO_MEAN)
    if bundle.channels:
        volume = prediction.stacked
        means = [mean, *(one.mean_volume for one in bundle.channels.values())]
        mean = np.stack([each * one.any() for each, one in zip(means, volume, strict=True)])
    heat = integrated_gradients(model, volume, mean)
    own = prediction.predicted_age if prediction.alone is None else prediction.alone
    words = _add_up(heat, own, float(model.predict(mean).mean()))
    if prediction.alone is not None:
        words = f"Of the T1w scan's age alone, before it was fused. {words}"
    return Explanation(heat, INTEGRATED, spacing, words)


def _add_up(heat: np.ndarray, predicted_age: float, mean_age: float) -> str:
    """What a map in years adds up to, and how much of the difference it leaves out, in words."""
    total = float(heat.sum(dtype=np.float64))
    missing, shown = predicted_age - mean_age - total, round(total, 1) + 0.0  # -0.0 becomes 0.0
    words = (
        "What moved this age away from the mean training brain's, by one method: the sum of the map is "
        f"{shown:+.1f} years (predicted {predicted_age:.1f}, the mean training brain {mean_age:.1f})."
    )
    return words if abs(missing) < 0.1 else f"{words} {missing:+.1f} years could not be placed."


def usual_method(bundle: Bundle) -> str:
    """Integrated gradients, or Grad-CAM where a network's bundle lacks the mean volume they start from."""
    return GRAD_CAM if bundle.reference.mean_volume is None else INTEGRATED


def _map_for_mean(bundle: Bundle, volume: np.ndarray) -> np.ndarray:
    """A network's usual map of one stored volume, of the fewest steps: it is one of many in a mean."""
    if bundle.channels:
        raise ValueError(f"{bundle.title}: mean maps are made of a model that reads one scan of a session.")
    mean = bundle.reference.mean_volume
    if mean is None:
        return grad_cam(bundle.model, volume)
    return integrated_gradients(bundle.model, volume, mean, within_years=np.inf)


def _read_owner(heat_map: Path) -> bytes:
    """Hash of the path of the scan that a map was made of; empty where the file does not say."""
    try:
        return nib.load(heat_map).header["descrip"].item()
    except (OSError, ValueError, KeyError, nib.filebasedimages.ImageFileError):
        return b""


# --- the maps -------------------------------------------------------------------------------------------

STEPS = (9, 27, 81, 243)  # along the path; every third place of one is a place of the one before


def integrated_gradients(
    model: NetworkEnsemble, volume: np.ndarray, mean: np.ndarray, *, within_years: float = 0.09
) -> np.ndarray:
    """Years that each voxel moves the age away from that of the mean training brain.

    The gradient of the age is averaged along the straight way from the mean volume to this one and
    multiplied by what differs (Sundararajan et al. 2017). The sum is the predicted age less that of the mean
    volume; steps are added until it is. Exact for a linear model.

    Parameters
    ----------
    model : NetworkEnsemble
        As it predicts: all its networks, of the mirror image too where it averages over it; computed where
        it computes.
    volume, mean : array (size, size, size), or (channels, size, size, size)
        RAS, as stored: this scan's and the mean of the training scans'. Years of all channels are added up.
    within_years : float
        How near the sum must come; 9 steps are the fewest (taken alone where this is infinite), 243 the most.

    Returns
    -------
    float32 array (size, size, size)
        Years.

    Examples
    --------
    >>> heat = integrated_gradients(bundle.model, prediction.volume, mean)  # doctest: +SKIP
    >>> heat.sum()  # doctest: +SKIP
    3.2
    """
    owed = float(model.predict(volume).mean() - model.predict(mean).mean())
    start, end = (as_batch(array).to(model.device) for array in (mean, volume))
    mirrored = (False, True) if model.flip_averaging else (False,)

    def integrate(networks: Sequence[nn.Module]) -> Tensor:
        total, heat = torch.zeros_like(end), torch.zeros_like(end)
        for steps in STEPS:
            for step in (k for k in range(steps) if steps == STEPS[0] or k % 3 != 1):
                place = (start + (step + 0.5) / steps * (end - start)).requires_grad_()
                for network, flip in product(networks, mirrored):
                    total += torch.autograd.grad(network(place.flip(2) if flip else place).sum(), place)[0]
            heat = (end - start) * total / (steps * len(networks) * len(mirrored))
            if abs(float(heat.sum(dtype=torch.float64)) - owed) < within_years:
                break
        return heat

    with torch.inference_mode(False), torch.enable_grad():
        return model.placed.run(integrate)[0].sum(dim=0).cpu().numpy()


def grad_cam(model: NetworkEnsemble, volume: np.ndarray) -> np.ndarray:
    """Signed Grad-CAM of the predicted age over the first three layers: quick, without a unit.

    Not MONAI's `GradCAM`: that ends in a ReLU and so drops the sign, which for an age is the message. The
    element-wise form (HiResCAM, Draelos & Carin 2020) keeps each gradient's place and so does not smear one
    place's importance over the head. Each layer's map is scaled to the same mean magnitude, then they are
    averaged: early layers say where exactly, later ones what matters. A regression beside the network counts
    as a layer: what each place adds to the age by not being as usual.

    Parameters
    ----------
    model : NetworkEnsemble
        Maps are averaged over its networks, and with those of the mirror image where the model's ages are.
    volume : array (size, size, size)
        RAS, as stored.

    Returns
    -------
    float32 array (size, size, size)
        Positive where the age is pushed up, negative where it is pushed down. The unit is arbitrary; the
        largest magnitude is 1.
    """
    batch = as_batch(volume)
    heat = _layers_heat(model.networks, batch)
    if model.flip_averaging:
        heat = (heat + _layers_heat(model.networks, batch.flip(2)).flip(2)) / 2
    return (heat / heat.abs().max().clamp_min(1e-12))[0, 0].numpy()


def _layers_heat(networks: Sequence[nn.Module], batch: Tensor) -> Tensor:
    """Sum of the layers' maps at the batch's resolution, each scaled to the same mean magnitude."""
    total = torch.zeros_like(batch)
    for coarse in map(sum, zip(*(_layer_maps(network, batch) for network in networks), strict=True)):
        fine = functional.interpolate(coarse, size=batch.shape[2:], mode="trilinear", align_corners=False)
        total += fine / fine.abs().mean().clamp_min(1e-12)
    return total


def _layer_maps(network: nn.Module, batch: Tensor) -> list[Tensor]:
    """Coarse map (1, 1, d, h, w) of layers 1 to 3, and of the regression beside the network."""
    with torch.inference_mode(False), torch.enable_grad():
        stem = network.maxpool(network.act(network.bn1(network.conv1(batch))))
        first = network.layer1(stem).detach().requires_grad_()
        kept = [first, second := network.layer2(first), network.layer3(second)]
        score = network.fc(network.avgpool(network.layer4(kept[-1])).flatten(1))
        gradients = torch.autograd.grad((network.age_sd * score).sum(), kept)
    pairs = zip(kept, gradients, strict=True)
    maps = [(layer.detach() * gradient).sum(dim=1, keepdim=True) for layer, gradient in pairs]
    return maps if network.linear is None else [*maps, network.linear.parts(batch)[:, None]]


def occlusion(
    model: NetworkEnsemble, volume: np.ndarray, mean: np.ndarray | None = None, *, edge: int = 6
) -> np.ndarray:
    """Years that each place adds to the age: the age less the age with a cube around that place covered.

    Cubes of `edge` voxels, covered by the mean training volume or, without one, by their own mean, overlap by
    half; those without any head are left out. Not MONAI's `OcclusionSensitivity`: in 1.6 its `mean_patch`
    multiplies a cube by its mean.

    Returns
    -------
    float32 array (size, size, size)
        Years, mean over the cubes that cover a voxel; 0 where only background was covered.
    """
    head, step = _near_head(volume), max(1, edge // 2)
    starts = [sorted({*range(0, side - edge + 1, step), side - edge}) for side in volume.shape]
    cubes = [tuple(slice(start, start + edge) for start in corner) for corner in product(*starts)]
    whole, age = np.asarray(volume, dtype=np.float32), model.predict(volume).mean()
    total, times = np.zeros_like(whole), np.zeros_like(whole)
    for cube in cubes:
        if head[cube].mean() > 0.05:
            covered = whole.copy()
            covered[cube] = whole[cube].mean() if mean is None else mean[cube]
            total[cube] += age - model.predict(covered).mean()
            times[cube] += 1
    return total / np.maximum(times, 1)


# --- groups, in template space --------------------------------------------------------------------------

BANDS = ((0, 40), (40, 60), (60, 120))
# Where the middle of the preprocessed cube lies in MNI152 space, mm: the crown is its anchor (see
# `volumes.heads`).
CUBE_CENTRE_MNI = (0.0, -20.0, 0.0)
REGIONS = (
    "frontal", "parietal", "temporal", "occipital", "cerebellum and brain stem", "ventricles and around them",
    "outside the brain",
)  # fmt: skip


class GroupMap(NamedTuple):
    """Mean heat map of one age band in the preprocessed cube: youngest and oldest age in whole years, number
    of scans, map, mean volume.
    """

    low: float
    high: float
    n: int
    heat: np.ndarray
    volume: np.ndarray


def cube_to_template(settings: PreprocessingSettings) -> np.ndarray:
    """Affine (4, 4) from a voxel of a preprocessed cube to MNI152 mm.

    Exact where preprocessing registered the scan. Else by the cube's anchor alone: crown and middle agree,
    head size and tilt do not, so it is good to about a centimetre.
    """
    centre = {} if settings.to_mni else {"centre_mm": np.array(CUBE_CENTRE_MNI)}
    return mni_grid(settings.spacing_mm, settings.size, **centre)


def age_group_maps(
    bundle: Bundle,
    store: VolumeStore,
    scans: pd.DataFrame,
    *,
    per_band: int = 12,
) -> list[GroupMap]:
    """Mean heat map of each age band of `BANDS` (years, low included) that has scans, by the usual method.

    Parameters
    ----------
    bundle : Bundle
        A network's.
    store : VolumeStore
        Volumes of the bundle's own preprocessing.
    scans : DataFrame
        `scan_id, age` (years); give scans the model did not train on.
    per_band : int
        Scans per band, evenly over its ages.
    """
    if store.fingerprint != bundle.settings.fingerprint:
        raise ValueError(
            f"The volumes are {store.fingerprint}, the model expects {bundle.settings.fingerprint}."
        )
    groups = []
    for low, high in BANDS:
        rows = scans[(scans["age"] >= low) & (scans["age"] < high)]
        if rows.empty:
            continue
        volumes = [store[scan_id].astype(np.float32) for scan_id in _choose_evenly(rows, per_band)["scan_id"]]
        heat = np.mean([_map_for_mean(bundle, volume) for volume in volumes], axis=0)
        youngest, oldest = float(np.floor(rows["age"].min())), float(np.ceil(rows["age"].max()))
        groups.append(GroupMap(youngest, oldest, len(volumes), heat, np.mean(volumes, axis=0)))
    return groups


def _choose_evenly(scans: pd.DataFrame, n: int) -> pd.DataFrame:
    """At most `n` scans, evenly over their ages."""
    places = np.linspace(0, len(scans) - 1, min(n, len(scans))).round().astype(int)
    return scans.sort_values("age").iloc[places]


def region_table(heat: np.ndarray, labels: np.ndarray, names: Sequence[str] = REGIONS) -> pd.DataFrame:
    """What a heat map adds up to in each region.

    Parameters
    ----------
    heat : array (size, size, size)
        In the preprocessed cube.
    labels : int array
        1 for the first of `names`, 2 for the second, ..., such as `coarse_regions` gives; 0 is left out.

    Returns
    -------
    DataFrame
        `region, sum` (years for a map by integrated gradients), `share` (of the sum of absolute heat) and
        `density` (share of heat over share of voxels: above 1 is more than its size explains), most dense
        first.
    """
    voxels = pd.DataFrame({"label": labels.ravel(), "heat": heat.ravel(), "share": np.abs(heat).ravel()})
    by_label = voxels[voxels["label"] > 0].groupby("label")
    frame = by_label.agg(sum=("heat", "sum"), share=("share", "sum"))
    frame["share"] /= max(frame["share"].sum(), 1e-12)
    frame["density"] = frame["share"] / (by_label.size() / by_label.size().sum())
    frame.insert(0, "region", [names[label - 1] for label in frame.index])
    return frame.sort_values("density", ascending=False, ignore_index=True)


def coarse_regions(settings: PreprocessingSettings) -> np.ndarray:
    """Label map of `REGIONS` in the preprocessed cube; every voxel has one.

    Lobes by planes in MNI152 coordinates (no atlas is downloaded), so borders are rough; the brain mask and
    the template behind the ventricles are those nilearn ships.
    """
    brain, deep = (_mni_mask(name, settings) for name in ("brain", "deep"))
    origin = cube_to_template(settings)[:3, 3]
    x, y, z = np.indices(brain.shape) * settings.spacing_mm + origin[:, None, None, None]
    low = z < np.where(y < -35, -12 - 0.15 * (y + 35), -40)
    hind = (y < -35) & low | (np.abs(x) < 16) & (z < -22)
    temporal = (z < -2 - 0.25 * (y + 20)) & (np.abs(x) > 22)
    labels = np.select([hind, temporal, y < -62, y < -12], [5, 3, 4, 2], default=1)
    labels[deep & (np.abs(x) < 40) & (y > -65) & (y < 40) & (z > -12) & (z < 36)] = 6
    labels[~brain] = 7
    return labels


def _mni_mask(name: str, settings: PreprocessingSettings) -> np.ndarray:
    """In the preprocessed cube the MNI152 `brain`, or `deep`: fluid inside of it (dark in the template, 12 mm
    from the surface) and 4 mm around it.
    """
    from nilearn import datasets

    mask = datasets.load_mni152_brain_mask(resolution=2)
    inside = mask.get_fdata() > 0.5
    if name == "deep":
        fluid = datasets.load_mni152_template(resolution=2).get_fdata() < 0.5
        inside = ndimage.binary_dilation(ndimage.binary_erosion(inside, iterations=6) & fluid, iterations=2)
    return _to_cube(inside, mask.affine, settings) > 0.5


def _to_cube(array: np.ndarray, to_template: np.ndarray, settings: PreprocessingSettings) -> np.ndarray:
    """A volume that `to_template` puts into MNI152 space (mm), where the preprocessed cube lies there."""
    return resample(np.asarray(array, np.float32), to_template, cube_to_template(settings), settings.size)


# --- can the maps be believed? --------------------------------------------------------------------------

PLANTED = (0.3, 0.5)  # planted change that counts as ageing; 1 is the largest
SIGNED, ABSOLUTE, EITHER = "signed", "absolute", "either sign"  # how maps of many scans are read


def planted_check(
    bundle: Bundle,
    store: VolumeStore,
    cohort: Path | str,
    splits: pd.DataFrame,
    resolve: Callable[[str], Path],
    *,
    per_map: int = 24,
    seed: int = 0,
    draws: int = 1,
) -> pd.DataFrame:
    """Whether a network's heat falls where ageing changes its input, beside what knows nothing and a ceiling.

    Each head is brought to template space by its planted pose, so no registration error is mixed into the
    scores. Asked is inside the brain, where the input is not empty: elsewhere it is easily right.

    Parameters
    ----------
    bundle : Bundle
        A network's, trained on the known-answer cohort.
    store : VolumeStore
        Its volumes.
    cohort : path
        The cohort's folder.
    splits : DataFrame
        `scan_id, age, split, image` of the scans in the store.
    resolve : callable
        From an `image` cell to a path.
    per_map : int
        Test scans whose maps are read together, evenly over their ages; three times as many training scans.
    seed : int
        Of the random weights.
    draws : int
        Networks with random weights.

    Returns
    -------
    DataFrame
        `map, read` (see `read_maps`), `above` (a change by `planted_change`, of `PLANTED`), `n` scans, the
        scores of `localisation`, and their standard errors `auc_se, ap_se` (jackknife over scans; maps of
        scans drawn with replacement are noisier, so their scores lie below). Maps of test scans: the
        model's; those of random weights (a map that stays the same shows the picture, not the model: Adebayo
        et al. 2018); edges, near which much of the ageing lies; and the difference from the mean brain, by
        which a map in years is multiplied and which knows no model. The *ceiling* is what the volumes
        themselves show, of training scans.
    """
    truth, settings = read_csv(Path(cohort) / TRUTH).set_index("scan_id"), bundle.settings
    test = _choose_evenly(splits[splits["split"] == "test"], per_map)
    training = _choose_evenly(splits[splits["split"] == "train"], 3 * per_map)
    places = {
        row.scan_id: _planted_place(truth.loc[row.scan_id], resolve(row.image), settings)
        for row in pd.concat([test, training]).itertuples()
    }

    def make_all(make: Callable[[np.ndarray], np.ndarray], scans: pd.DataFrame) -> np.ndarray:
        """Maps (n, size, size, size) of these scans in template space."""
        made = [(name, make(store[name].astype(np.float32))) for name in scans["scan_id"]]
        return np.stack([_to_cube(heat, places[name], settings) for name, heat in made])

    brain = _mni_mask("brain", settings) & (make_all(lambda volume: volume > 0, test).mean(axis=0) > 0.3)
    planted, rows = planted_change(settings)[brain], []
    for name, readings, make in _map_makers(bundle, seed, draws):
        scans = training if EITHER in readings else test
        maps, ages = make_all(make, scans)[:, brain], truth.loc[scans["scan_id"], "brain_age"].to_numpy()
        rows += [
            {"map": name, "read": read, "above": above, "n": len(scans)}
            | _score(maps, ages, read, planted, above)
            for read, above in product(readings, PLANTED)
        ]
    return pd.DataFrame(rows)


def _score(
    maps: np.ndarray, ages: np.ndarray, read: str, planted: np.ndarray, above: float
) -> dict[str, float]:
    """`localisation` of maps (n, voxels) read together, with standard errors by leaving out each in turn."""
    scores = localisation(read_maps(maps, ages, read), planted, above)
    others = [np.arange(len(ages)) != k for k in range(len(ages))]
    again = [localisation(read_maps(maps[some], ages[some], read), planted, above) for some in others]
    errors = pd.DataFrame(again)[["auc", "ap"]].std(ddof=0) * np.sqrt(len(ages) - 1)
    return scores | errors.add_suffix("_se").to_dict()


def planted_change(settings: PreprocessingSettings) -> np.ndarray:
    """How much ageing changes a network's own input: the known-answer cohort's mean head, young and old.

    Both heads are without noise, pose or scanner, and are preprocessed as any scan is. All that ages changes
    together: what cannot be seen in the input, a map cannot be asked to show.

    Returns
    -------
    array (size, size, size)
        In the preprocessed cube: the absolute difference over its 99.9th percentile in the brain, at most 1.
    """
    anatomy, volumes = template_anatomy(2), []
    for brain_age in (YOUNGEST, OLDEST):
        t1w, scan = (
            nib.Nifti1Image(mean_head(anatomy, brain_age, modality), anatomy.affine)
            for modality in ("T1w", settings.modality)
        )
        scan.extra |= {"modality": settings.modality, "t1w": t1w}
        volumes.append(_to_cube(preprocess(scan, settings), grid_affine(scan, settings), settings))
    change = np.abs(volumes[1] - volumes[0])
    return np.clip(change / np.percentile(change[_mni_mask("brain", settings)], 99.9), 0, 1)


def _planted_place(truth: pd.Series, t1w: Path, settings: PreprocessingSettings) -> np.ndarray:
    """Affine (4, 4) from the cube of a known-answer head to MNI152 mm."""
    _, scanner, to_template = place_scan(truth.to_dict())
    return to_template @ np.linalg.inv(scanner) @ grid_affine(t1w, settings.for_modality("T1w"))


def _map_makers(
    bundle: Bundle, seed: int, draws: int
) -> list[tuple[str, tuple[str, ...], Callable[[np.ndarray], np.ndarray]]]:
    """Name, how it is read, and from a volume to its map: of the model, of random weights, of no model."""
    usual, model, mean = usual_method(bundle), bundle.model, bundle.reference.mean_volume
    makers = {usual: partial(_map_for_mean, bundle), GRAD_CAM: partial(grad_cam, model)}
    for draw in range(draws):
        first = seed + draw * len(model.networks)
        drawn = [randomised(network, first + n) for n, network in enumerate(model.networks)]
        random = replace(bundle, model=NetworkEnsemble(drawn, flip_averaging=model.flip_averaging))
        makers[f"{usual}, random weights {draw + 1}"] = partial(_map_for_mean, random)
    unsigned = {"edges of the scan": edge_map}
    if usual == INTEGRATED:
        unsigned["difference from the mean brain"] = lambda volume: volume - mean
    return [
        *((name, (SIGNED, ABSOLUTE), make) for name, make in makers.items()),
        *((name, (ABSOLUTE,), make) for name, make in unsigned.items()),
        ("ceiling", (EITHER,), np.asarray),
    ]


def read_maps(maps: np.ndarray, ages: np.ndarray, read: str) -> np.ndarray:
    """One map of many scans', in which a place that ages should be high.

    Parameters
    ----------
    maps : array (n, ...)
    ages : array (n,)
        Planted brain ages, years.
    read : str
        `signed`: the slope of each voxel on the brain age, years per year for maps in years. A place that
        ages must raise the age more, the older the brain is; with the wrong sign it ranks last.
        `absolute`: the mean size, for maps without a sign. `either sign`: the size of the slope, for volumes,
        in which ageing brightens some places and darkens others.
    """
    if read == ABSOLUTE:
        return np.abs(maps).mean(axis=0)
    aged = ages - ages.mean()
    slope = np.tensordot(aged / (aged**2).sum(), maps, 1)
    return np.abs(slope) if read == EITHER else slope


def edge_map(volume: np.ndarray) -> np.ndarray:
    """Magnitude of the intensity's gradient: where edges are. It knows no model; a heat map must beat it."""
    return ndimage.gaussian_gradient_magnitude(np.asarray(volume, dtype=np.float32), sigma=1.0)


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with weights drawn at random: a heat map that stays the same shows the picture, not the model
    (Adebayo et al. 2018)."""
    drawn, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    for weight in [*drawn.parameters(), *([] if drawn.linear is None else [drawn.linear.weight])]:
        nn.init.normal_(weight, std=max(float(weight.std(correction=0)), 1e-3), generator=generator)
    return drawn.eval().requires_grad_(False)


def localisation(heat: np.ndarray, planted: np.ndarray, above: float) -> dict[str, float]:
    """How well high heat finds planted ageing: `planted` share, `auc`, `ap`; see `planted_check`.

    Parameters
    ----------
    heat, planted : arrays (n,)
        Of the voxels where it is asked; background is easily right and says nothing.
    above : float
        Planted change that counts as ageing (1 is the largest).
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    true = planted > above
    if not 0 < true.sum() < len(true):
        raise ValueError(f"{true.sum()} of {len(true)} voxels have planted ageing; a curve needs both kinds.")
    scores = {"auc": roc_auc_score(true, heat), "ap": average_precision_score(true, heat)}
    return {"planted": float(true.mean())} | {name: float(score) for name, score in scores.items()}


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
    full: float | None = None,
    spacing_mm: float = 1.0,
) -> Sequence[Axes]:
    """Sagittal, coronal and axial slice of a volume with a signed heat map over it.

    The head's left is on the picture's right, as on radiology workstations.

    Parameters
    ----------
    axes : three Axes
    volume, heat : array (x, y, z)
        RAS. Orange raises the age, blue lowers it.
    at : three ints, optional
        Voxel shown; by default where the heat is strongest inside the head, without heat the centre.
    opacity : float
        Of heat in full colour, 0 to 1.
    full : float, optional
        Heat shown in full colour; by default `full_heat`.
    spacing_mm : float
        Voxel edge in mm, for the slices' positions in the titles.
    """
    at = strongest(volume, heat) if at is None else at
    low, high = np.percentile(volume, [1, 99.7])
    if heat is not None:
        shown = np.where(_near_head(volume), heat, 0.0) / (full or full_heat(volume, heat))
    for axis, (ax, name) in enumerate(zip(axes, PLANES, strict=True)):
        position = at[axis] / max(volume.shape[axis] - 1, 1)
        picture, _ = plane(np.asarray(volume, np.float32), name, position)
        ax.imshow(picture, cmap="gray", vmin=low, vmax=high, interpolation="bilinear")
        if heat is not None:
            picture, _ = plane(shown, name, position)
            ax.imshow(picture, _heat_colours(), vmin=-1, vmax=1, alpha=opacity, interpolation="bilinear")
        ax.set_title(f"{name}, {at[axis] * spacing_mm:.0f} mm", fontsize=9)
        for x, end in zip((0.03, 0.97), ENDS[name], strict=True):
            ax.text(x, 0.5, end, color="white", fontsize=9, ha="center", va="center", transform=ax.transAxes)
        ax.set_axis_off()
    return axes


def full_heat(volume: np.ndarray, heat: np.ndarray) -> float:
    """The heat that a picture shows in full colour: of a thousand voxels, two near the head exceed it."""
    return max(float(np.percentile(np.abs(heat) * _near_head(volume), 99.8)), 1e-12)


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


def _heat_colours() -> Colormap:
    """From blue through clear (weak heat is left out) to orange."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    ends = [(0, BLUE, 1), (0.425, BLUE, 0), (0.575, VERMILION, 0), (1, VERMILION, 1)]
    return LinearSegmentedColormap.from_list("heat", [(at, to_rgba(*colour)) for at, *colour in ends])


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
    return ndimage.binary_dilation(ndimage.binary_fill_holes(head_in(volume)))


def group_figure(bundle: Bundle, groups: Sequence[GroupMap], at_mm: Sequence[float] = (0, -20, 5)) -> Figure:
    """Mean heat map of each age band over its mean brain; the head around it is not shown.

    `at_mm` is the MNI152 position shown, mm; one scale of colours for all bands.
    """
    from matplotlib.figure import Figure

    affine = cube_to_template(bundle.settings)
    at = np.round(np.linalg.solve(affine, [*at_mm, 1.0])[:3]).astype(int).clip(0, bundle.settings.size - 1)
    brain = ndimage.binary_dilation(_mni_mask("brain", bundle.settings))
    figure = Figure(figsize=(9, 3.2 * len(groups)), layout="constrained")
    brains = [np.where(brain, group.volume, group.volume[brain].min()) for group in groups]
    full = max(full_heat(volume, group.heat) for volume, group in zip(brains, groups, strict=True))
    panels = figure.subplots(len(groups), 3, squeeze=False)
    for axes, group, volume in zip(panels, groups, brains, strict=True):
        overlay_planes(axes, volume, group.heat, at, full=full)
        for ax, name, letter, place in zip(axes, PLANES, "xyz", at_mm, strict=True):
            ax.set_title(f"{name}, {letter} = {place:g} mm", fontsize=9)
        years = f"{group.low:g} to {group.high:g} years\nn = {group.n}"
        label = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 9}
        axes[0].text(-0.08, 0.5, years, transform=axes[0].transAxes, **label)
    title = f"Mean maps by true age; orange raises it, blue lowers it\n{METHODS[usual_method(bundle)][0]}"
    figure.suptitle(title, fontsize=10)
    return figure
