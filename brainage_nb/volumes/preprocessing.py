"""One scan file to one network input, the same way in training, on the command line and in the app.

The steps are functions without torch, so that the processes that preprocess start fast; `volumes.transforms`
shows the same functions as a MONAI `Compose`. What sampling does in one pass per axis is MONAI's
GaussianSmooth and SpatialResample, of which most would be cropped away again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from brainage_nb.volumes import tissues
from brainage_nb.volumes.brain import brain_or_error
from brainage_nb.volumes.heads import find_head
from brainage_nb.volumes.registration import mni_grid
from brainage_nb.volumes.resampling import find_main_axes, resample, resample_to, smoothing_sd
from brainage_nb.volumes.scans import ScanError, load_scan, voxel_sizes
from brainage_nb.volumes.settings import PreprocessingSettings, parse_transforms, write_transforms

if TYPE_CHECKING:
    import nibabel as nib

# World axes and voxel lattice count as parallel when the farthest voxel is off by less than this.
PARALLEL_MM = 1e-3


class Stage(NamedTuple):
    """What the steps so far have made of a scan.

    Attributes
    ----------
    array : (i, j, k) float32 array
    affine : (4, 4) array
        From a voxel to the scan's world, mm.
    voxel_mm : (3,) array
        Edges of a voxel; in the template's mm where it lies on the template.
    scan : nibabel image
        The scan as it was opened; later steps find head and brain in it.
    """

    array: np.ndarray
    affine: np.ndarray
    voxel_mm: np.ndarray
    scan: Any


def preprocess(
    scan: str | Path | nib.spatialimages.SpatialImage, settings: PreprocessingSettings | None = None
) -> np.ndarray:
    """Turn one scan into a network's input.

    Without a step that looks for the brain, the cube's axes are the world's (x to the right, y to the front,
    z upwards), so the result does not depend on how the scanner stored the head; its centre lies
    `heads.CROWN_TO_CENTRE_MM` below the crown. The z-score runs over all voxels of the cube, as MONAI's
    NormalizeIntensity does: air is part of it, which the fixed field of view makes a steady part. With
    `to_mni` the cube lies in the template's space, with `brain_only` it is 0 outside of the brain and scaled
    inside, with `grey_matter` it holds shares from 0 to 1 and is not scaled.

    Parameters
    ----------
    scan : path or nibabel image
        A scan file, or what `load_scan` gave; for other modalities than T1w what `lay_onto_t1w` gave.
    settings : PreprocessingSettings, optional
        2 mm and 96 voxels where left out.

    Returns
    -------
    (size, size, size) float32 array
        Axes run to the right, the front and the top (RAS). What is trained on and predicted from is
        `as_stored` of it.

    Raises
    ------
    ScanError
        The scan cannot be used, its brain was not found (`brain_not_found`), its tissues cannot be told
        apart (`tissues_unclear`), or it was opened as another modality (`other_modality`).

    Examples
    --------
    >>> volume = preprocess("sub-01_T1w.nii.gz", PreprocessingSettings(spacing_mm=4, size=48))
    >>> volume.shape
    (48, 48, 48)
    """
    settings = settings or PreprocessingSettings()
    stage = start(scan, settings.modality)
    try:
        for step in list_steps(settings):
            stage = step(stage)
    except ScanError as error:  # what was odd about the file may say why
        flags = stage.scan.extra.get("flags", {})
        raise ScanError(error.code, " ".join([error.sentence, *flags.values()])) from error
    return _apply_extra(stage.array, settings.extra) if settings.extra else stage.array


def list_steps(settings: PreprocessingSettings) -> list[Callable[[Stage], Stage]]:
    """The steps after opening, in order, as functions from stage to stage."""
    masks = {"found_masks": settings.found_masks}
    numbers = {name: getattr(settings, name) for name in ("spacing_mm", "size", "smooth", "to_mni")}
    sampling = partial(smooth_and_sample, **numbers, **masks)
    if settings.grey_matter:
        return [partial(share_grey_matter, **masks), sampling]
    return [sampling, partial(scale_brain, **masks) if settings.brain_only else partial(scale_cube)]


def as_stored(volume: np.ndarray) -> np.ndarray:
    """Round as the volume store does (float16: by a two-thousandth of a value at most)."""
    return np.asarray(volume).astype(np.float16)


def grid_affine(
    scan: str | Path | nib.spatialimages.SpatialImage, settings: PreprocessingSettings | None = None
) -> np.ndarray:
    """Affine (4, 4) from a voxel of `preprocess`'s result to the scan's world coordinates, mm."""
    settings = settings or PreprocessingSettings()
    opened = start(scan, settings.modality).scan
    return _grid(opened, settings.spacing_mm, settings.size, settings.to_mni, settings.found_masks)


def start(scan: str | Path | nib.spatialimages.SpatialImage, modality: str = "T1w") -> Stage:
    """Open a scan: voxels and axes as in the file, lengths in mm; ScanError where it cannot be used.

    Head and brain of another modality than T1w are those of the T1w scan that it was laid onto.
    """
    image = load_scan(scan) if isinstance(scan, str | Path) else scan
    if (opened := image.extra.get("modality", "T1w")) != modality:
        told = f"This is to be a {modality} scan, and it was opened as {opened}"
        remedy = (
            ""
            if modality == "T1w"
            else f": give it with its T1w scan, as lay_onto_t1w(scan, t1w, {modality!r})"
        )
        raise ScanError("other_modality", f"{told}{remedy}.")
    return Stage(_voxels(image), image.affine, voxel_sizes(image.affine), image.extra.get("t1w", image))


def smooth_and_sample(
    stage: Stage,
    *,
    spacing_mm: float,
    size: int,
    smooth: bool = True,
    to_mni: bool = False,
    found_masks: bool = True,
) -> Stage:
    """Bring a scan to the target resolution on a cube below the crown or in template space, in one pass.

    Keywords are fields of `PreprocessingSettings`.
    """
    grid = _grid(stage.scan, spacing_mm, size, to_mni, found_masks)
    sd = smoothing_sd(stage.voxel_mm, spacing_mm) if smooth else np.zeros(3)
    cube = _not_empty(resample(stage.array, stage.affine, grid, size, sd))
    return Stage(cube, grid, np.full(3, spacing_mm), stage.scan)


def share_grey_matter(stage: Stage, *, found_masks: bool = True) -> Stage:
    """The share of grey matter in each voxel, 0 to 1, on the template's grid."""
    found = find_tissues(stage.scan, found_masks=found_masks)
    fine = brain_or_error(stage.scan, found_masks=found_masks).to_scan @ tissues.grid()
    return Stage(found.grey, fine, np.full(3, tissues.SPACING_MM), stage.scan)


def scale_cube(stage: Stage) -> Stage:
    """Mean 0 and standard deviation 1 over all voxels."""
    return stage._replace(array=_z_scored(stage.array))


def scale_brain(stage: Stage, *, found_masks: bool = True) -> Stage:
    """Mean 0 and standard deviation 1 over the brain, and 0 outside of it."""
    brain = brain_or_error(stage.scan, found_masks=found_masks)
    inside = _not_empty(brain.mask_on(stage.affine, stage.array.shape))
    scaled = np.zeros(stage.array.shape, np.float32)
    scaled[inside] = _z_scored(stage.array[inside])
    return stage._replace(array=scaled)


def find_tissues(image: nib.spatialimages.SpatialImage, *, found_masks: bool = True) -> tissues.Tissues:
    """Grey and white matter of a scan, on `tissues.grid()`.

    Raises
    ------
    ScanError
        As `preprocess`.
    """
    brain = brain_or_error(image, found_masks=found_masks)
    fine = brain.to_scan @ tissues.grid()
    voxels = _voxels(image)
    empty = (voxels == 0).astype(np.float32)
    bright, empty = (
        resample_to(tissues.RESOLUTION_MM, one, image.affine, fine, tissues.SIZE) for one in (voxels, empty)
    )
    found = tissues.tissues_of(bright, brain.depth_on(fine, bright.shape, core=True), empty)
    if found.problems:
        raise ScanError(
            "tissues_unclear", f"{'; '.join(found.problems)}. Look at the scan, or choose a recipe without."
        )
    return found


def build_transforms(text: str) -> list[Any]:
    """The transforms that `parse_transforms` reads; ValueError where MONAI does not take the arguments."""
    if not text:  # workers without further transforms need no MONAI
        return []
    import monai.transforms

    built = []
    for name, arguments in parse_transforms(text):
        try:
            built.append(getattr(monai.transforms, name)(**arguments))
        except Exception as error:  # MONAI raises many kinds
            raise ValueError(f"{write_transforms([(name, arguments)])}: {error}") from error
    return built


def _apply_extra(cube: np.ndarray, extra: str) -> np.ndarray:
    """What further transforms of MONAI make of a preprocessed cube."""
    import torch

    volume = torch.from_numpy(cube)[None]
    for transform in build_transforms(extra):
        volume = transform(volume)
    array = np.asarray(volume[0], np.float32)
    if not np.isfinite(array).all():
        raise ScanError("not_finite", f"{extra} leaves no usable volume; take it out of the chain.")
    return array


def _not_empty(array: np.ndarray) -> np.ndarray:
    """The array, in which something is not 0; ScanError where nothing is."""
    if not array.any():
        raise ScanError("brain_not_found", "The brain lies outside of the field of view; look at the scan.")
    return array


def _voxels(image: Any) -> np.ndarray:
    return np.asanyarray(image.dataobj, dtype=np.float32)


def _grid(image: Any, spacing_mm: float, size: int, to_mni: bool, found_masks: bool) -> np.ndarray:
    """The cube in MNI152 space, or under the crown, moved by under half a voxel of the scan onto its lattice.

    A scan that already has the target's spacing is so copied voxel by voxel: no interpolation blurs it.
    """
    if to_mni:
        return brain_or_error(image, found_masks=found_masks).to_scan @ mni_grid(spacing_mm, size)
    grid = np.diag([spacing_mm] * 3 + [1.0])
    first = np.array(find_head(image).centre_mm) - spacing_mm * (size - 1) / 2
    grid[:3, 3] = _on_lattice(first, image.affine, max(image.shape))
    return grid


def _on_lattice(point: np.ndarray, affine: np.ndarray, length: int) -> np.ndarray:
    """The voxel centre nearest to a world point if the voxel axes are the world's, else the point itself."""
    axes, strays = find_main_axes(affine)
    if sorted(axes) != [0, 1, 2] or strays.max() * length > PARALLEL_MM:
        return point
    voxel = np.round(np.linalg.solve(affine[:3, :3], point - affine[:3, 3]))
    return affine[:3, :3] @ voxel + affine[:3, 3]


def _z_scored(values: np.ndarray) -> np.ndarray:
    spread = float(values.std(dtype=np.float64))
    if spread == 0.0:
        raise ScanError("blank", "The field of view under the crown holds one value only; look at the scan.")
    return ((values - values.mean(dtype=np.float64)) / spread).astype(np.float32)
