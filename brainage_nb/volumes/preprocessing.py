"""One scan file to one network input, the same way in training, on the command line and in the app.

The steps are those of a MONAI chain - Orientation (RAS), GaussianSmooth, Spacing, a crop,
NormalizeIntensity - and the tests hold the result to it. They are computed in one pass an axis instead:
importing MONAI takes longer than ten scans, and most of what the chain smooths is cropped away again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainage_nb.volumes.heads import find_head
from brainage_nb.volumes.registration import mni_grid
from brainage_nb.volumes.resampling import gaussian_kernel, resample, smoothing_sd
from brainage_nb.volumes.scans import ScanError, load_scan, voxel_sizes
from brainage_nb.volumes.settings import PreprocessingSettings

if TYPE_CHECKING:
    import nibabel as nib

    from brainage_nb.volumes.tissues import Tissues

__all__ = [
    "PreprocessingSettings",
    "ScanError",
    "as_stored",
    "brain_inside",
    "grid_affine",
    "load_scan",
    "preprocess",
    "preprocessing_steps",
    "tissues_in",
]

# World axes and voxel lattice count as parallel when the farthest voxel is off by less than this.
PARALLEL_MM = 1e-3


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
        A scan file, or what `load_scan` gave.
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
        The scan cannot be used, its brain was not found (`brain_not_found`), or its tissues cannot be told
        apart (`tissues_unclear`).
    """
    settings = settings or PreprocessingSettings()
    image = _loaded(scan)
    try:
        grid = _grid(image, settings)
        if settings.grey_matter:
            return _grey_cube(image, grid, settings)
        return _scaled(_cube(image, grid, settings), image, grid, settings)
    except ScanError as error:  # what was odd about the file may say why
        flags = image.extra.get("flags", {})
        raise ScanError(error.code, " ".join([error.sentence, *flags.values()])) from error


def as_stored(volume: np.ndarray) -> np.ndarray:
    """Round as the volume store does (float16: by a two-thousandth of a value at most)."""
    return np.asarray(volume).astype(np.float16)


def grid_affine(
    scan: str | Path | nib.spatialimages.SpatialImage, settings: PreprocessingSettings | None = None
) -> np.ndarray:
    """Affine (4, 4) from a voxel of `preprocess`'s result to the scan's world coordinates, mm."""
    return _grid(_loaded(scan), settings or PreprocessingSettings())


def preprocessing_steps(
    scan: str | Path | nib.spatialimages.SpatialImage, settings: PreprocessingSettings | None = None
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """What `preprocess` does to a scan, one picture a step.

    Returns
    -------
    list of (title, array, voxel_size)
        Title of the step, a 3-D array and its voxel size (3,) in mm. The first keeps the file's axes; all
        others are RAS. The last is `preprocess`'s result.
    """
    import nibabel as nib

    settings = settings or PreprocessingSettings()
    image = _loaded(scan)
    stored = "".join(nib.aff2axcodes(image.affine))
    turned = nib.as_closest_canonical(image)
    sd = _smoothing(turned, settings)
    smoothed = _voxels(turned)
    for axis in range(3):
        if sd[axis]:
            from scipy.ndimage import correlate1d

            smoothed = correlate1d(smoothed, gaussian_kernel(sd[axis]), axis=axis, mode="constant")
    final = np.full(3, settings.spacing_mm)
    grid = _grid(image, settings)
    cube = _cube(image, grid, settings)
    place = "in MNI152 space" if settings.to_mni else "below the crown"
    if settings.grey_matter:
        last, result = "share of grey matter", _grey_cube(image, grid, settings)
    else:
        last = "brain only, z-scored" if settings.brain_only else "z-scored"
        result = _scaled(cube, image, grid, settings)
    steps = [
        (f"as stored ({stored})", _voxels(image), voxel_sizes(image.affine)),
        ("turned to RAS", _voxels(turned), voxel_sizes(turned.affine)),
        (f"smoothed to {settings.spacing_mm:g} mm", smoothed, voxel_sizes(turned.affine)),
        (f"{settings.spacing_mm:g} mm, {settings.size} voxels, {place}", cube, final),
        (last, result, final),
    ]
    return [step for step in steps if sd.any() or not step[0].startswith("smoothed")]


def brain_inside(
    scan: str | Path | nib.spatialimages.SpatialImage, settings: PreprocessingSettings
) -> np.ndarray:
    """The brain mask (size, size, size) bool on the grid of `preprocess`'s result."""
    image = _loaded(scan)
    return _brain(image, settings).mask_on(_grid(image, settings), (settings.size,) * 3)


def tissues_in(
    scan: str | Path | nib.spatialimages.SpatialImage, settings: PreprocessingSettings | None = None
) -> Tissues:
    """Grey and white matter of a scan, on `tissues.grid()`.

    Raises
    ------
    ScanError
        As `preprocess`.
    """
    from brainage_nb.volumes import tissues

    image, settings = _loaded(scan), settings or PreprocessingSettings()
    brain = _brain(image, settings)
    fine = brain.alignment.to_scan @ tissues.grid()
    sd = smoothing_sd(voxel_sizes(image.affine), tissues.RESOLUTION_MM)
    voxels = resample(_voxels(image), image.affine, fine, tissues.SIZE, sd)
    found = tissues.tissues_of(voxels, brain.mask_on(fine, voxels.shape))
    if found.problems:
        raise ScanError(
            "tissues_unclear", f"{'; '.join(found.problems)}. Look at the scan, or choose a recipe without."
        )
    return found


def _brain(image: Any, settings: PreprocessingSettings) -> Any:
    from brainage_nb.volumes.brain import brain_or_error

    return brain_or_error(image, found_masks=settings.found_masks)


def _cube(image: Any, grid: np.ndarray, settings: PreprocessingSettings) -> np.ndarray:
    """The scan on the grid, before any scaling."""
    voxels = _voxels(image)
    return resample(voxels, image.affine, grid, settings.size, _smoothing(image, settings))


def _grey_cube(image: Any, grid: np.ndarray, settings: PreprocessingSettings) -> np.ndarray:
    """Share of grey matter on the grid."""
    from brainage_nb.volumes import tissues

    found = tissues_in(image, settings)
    spacing = np.full(3, tissues.SPACING_MM)
    sd = smoothing_sd(spacing, settings.spacing_mm) if settings.smooth else np.zeros(3)
    fine = _brain(image, settings).alignment.to_scan @ tissues.grid()
    cube = resample(found.grey, fine, grid, settings.size, sd)
    return _with_brain(cube)


def _scaled(cube: np.ndarray, image: Any, grid: np.ndarray, settings: PreprocessingSettings) -> np.ndarray:
    if not settings.brain_only:
        return _z_scored(cube)
    inside = _with_brain(_brain(image, settings).mask_on(grid, cube.shape))
    scaled = np.zeros(cube.shape, np.float32)
    scaled[inside] = _z_scored(cube[inside])
    return scaled


def _with_brain(inside: np.ndarray) -> np.ndarray:
    """The array, in which something is not 0; ScanError where nothing is."""
    if not inside.any():
        raise ScanError("brain_not_found", "The brain lies outside of the field of view; look at the scan.")
    return inside


def _loaded(scan: Any) -> Any:
    return load_scan(scan) if isinstance(scan, str | Path) else scan


def _voxels(image: Any) -> np.ndarray:
    return np.asanyarray(image.dataobj, dtype=np.float32)


def _smoothing(image: Any, settings: PreprocessingSettings) -> np.ndarray:
    return smoothing_sd(voxel_sizes(image.affine), settings.spacing_mm) if settings.smooth else np.zeros(3)


def _grid(image: Any, settings: PreprocessingSettings) -> np.ndarray:
    """The cube in MNI152 space, or under the crown, moved by under half a voxel of the scan onto its lattice.

    A scan that already has the target's spacing is so copied voxel by voxel: no interpolation blurs it.
    """
    if settings.to_mni:
        to_scan = _brain(image, settings).alignment.to_scan
        return to_scan @ mni_grid(settings.spacing_mm, settings.size)
    first = np.array(find_head(image).centre_mm) - settings.spacing_mm * (settings.size - 1) / 2
    first = _on_lattice(first, image.affine, max(image.shape))
    grid = np.diag([settings.spacing_mm] * 3 + [1.0])
    grid[:3, 3] = first
    return grid


def _on_lattice(point: np.ndarray, affine: np.ndarray, length: int) -> np.ndarray:
    """The voxel centre nearest to a world point if the voxel axes are the world's, else the point itself."""
    axes = np.abs(affine[:3, :3]).argmax(axis=0)
    main = np.zeros((3, 3))
    main[axes, range(3)] = affine[axes, range(3)]
    if sorted(axes) != [0, 1, 2] or np.abs(affine[:3, :3] - main).max() * length > PARALLEL_MM:
        return point
    voxel = np.round(np.linalg.solve(affine[:3, :3], point - affine[:3, 3]))
    return affine[:3, :3] @ voxel + affine[:3, 3]


def _z_scored(cube: np.ndarray) -> np.ndarray:
    spread = float(cube.std(dtype=np.float64))
    if spread == 0.0:
        raise ScanError("blank", "The field of view under the crown holds one value only; look at the scan.")
    return ((cube - cube.mean(dtype=np.float64)) / spread).astype(np.float32)
