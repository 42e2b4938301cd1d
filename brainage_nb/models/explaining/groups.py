"""Heat maps of many scans together: in template space, averaged by age, summed by region, scored against a
known map.

One scan's map is made in `explain`. A mean map says what the model uses on average; it locates no disease.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from brainage_nb.models.explaining.heat_maps import grad_cam
from brainage_nb.volumes.mni import mni_grid

if TYPE_CHECKING:
    from brainage_nb.models.bundle import Bundle
    from brainage_nb.volumes.preprocessing import PreprocessingSettings
    from brainage_nb.volumes.store import VolumeStore

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
