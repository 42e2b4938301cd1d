"""The same head scanned, stored or treated otherwise: tilted, resampled, cut, stripped. No benchmark itself.

Turns and moves are done to the array of voxels and the header does not tell of them, as if the person lay
otherwise; of storage order, voxel size and field of view the header tells, as a scanner's does. Cubic
splines are used, so that the resampling itself blurs little. Stripping and defacing follow the reference mask
that comes with a scan, if one does, and not the brain that the package finds (`reference_brain`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.interpolate import CubicSpline
from scipy.ndimage import affine_transform, binary_dilation, gaussian_filter
from scipy.spatial.transform import Rotation

from brainage_nb.demo.scans import smooth_random
from brainage_nb.volumes.brain import find_brain
from brainage_nb.volumes.heads import find_head
from brainage_nb.volumes.resampling import FWHM_PER_SD, along_axes
from brainage_nb.volumes.scans import voxel_sizes

VERSION = 2  # raised whenever the same scan gives another disturbed one than before
DEGREES, SHIFT_MM = 15.0, 20.0
PAD_MM = 50.0  # room around the array, so that no turn or move cuts anything off
# What stays below the crown where the neck is cut: the lowest brain of 121 IXI-HH scans (reference masks)
# ends 162 mm below it, their images 187 to 229 mm.
NECK_CUT_MM = 165.0
GAIN, OFFSET = 2.7, 0.1  # of the intensity; offset as a share of the brightest voxel
BIAS_LOG_SD, BIAS_KNOTS_MM = 0.1, 70.0  # a field of about 20 % up and down
NOISE = 0.03  # of the head's median intensity
BLUR_MM = 2.0  # full width at half maximum
# A face is cut as defacing tools do: all before and below an oblique plane, so far off the brain.
FACE_NORMAL, FACE_MARGIN_MM = np.array([0.0, 1.0, -1.0]) / np.sqrt(2), 5.0

Image = nib.Nifti1Image


def turned_and_moved(
    array: np.ndarray, turn: np.ndarray, move: np.ndarray, pad: int | np.ndarray, order: int
) -> np.ndarray:
    """Turn an array about its middle and move it, with room around it.

    Parameters
    ----------
    array : (i, j, k) array
    turn : (3, 3) array
        In voxels.
    move : (3,) array
        In voxels.
    pad : int or (3,) array of int
        Empty voxels added at both ends of each axis; `padded` gives the affine.
    order : int
        Of the spline; 0 for labels.
    """
    array = np.pad(array, [(n, n) for n in np.broadcast_to(pad, 3)])
    middle = (np.array(array.shape) - 1) / 2
    return affine_transform(array, turn, middle - turn @ (middle + move), order=order)


def padded(affine: np.ndarray, pad: int | np.ndarray) -> np.ndarray:
    """Affine (4, 4) of an array that got `pad` voxels at both ends of each axis."""
    affine = affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.broadcast_to(pad, 3)
    return affine


def stored_as(array: np.ndarray, affine: np.ndarray, codes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The same picture of the same world with its axes stored in another order, and its affine.

    `codes` name where each new axis points, as ("R", "A", "S").
    """
    change = ornt_transform(nib.io_orientation(affine), axcodes2ornt(tuple(codes)))
    turned = np.ascontiguousarray(nib.apply_orientation(array, change))
    return turned, affine @ inv_ornt_aff(change, array.shape)


def tilted(image: Image, random: np.random.Generator) -> Image:
    """Turned by up to `DEGREES` about each axis."""
    angles = random.uniform(-DEGREES, DEGREES, 3)
    return _posed(image, Rotation.from_euler("xyz", angles, degrees=True).as_matrix(), np.zeros(3))


def shifted(image: Image, random: np.random.Generator) -> Image:
    """Moved by `SHIFT_MM` in a random direction."""
    move = random.standard_normal(3)
    return _posed(image, np.eye(3), SHIFT_MM * move / np.linalg.norm(move))


def mirrored(image: Image, random: np.random.Generator | None = None) -> Image:
    """All three axes stored from the other end; the affine follows, so the anatomy stays."""
    opposite = dict(zip("LRPAIS", "RLAPSI", strict=True))
    codes = [opposite[code] for code in nib.aff2axcodes(image.affine)]
    return Image(*stored_as(_voxels(image), image.affine, codes))


def resampled(image: Image, edges_mm: Sequence[float]) -> Image:
    """The same field of view in other voxels; an axis that gets coarser is blurred to its new resolution.

    `edges_mm` are for the axes nearest to left-right, front-back and up-down.
    """
    sizes = voxel_sizes(image.affine)
    edges = np.asarray(edges_mm, dtype=float)[_world_axes(image)]
    steps = edges / sizes
    counts = np.maximum(1, np.round(np.array(image.shape) / steps)).astype(int)
    array = _voxels(image)
    sd = np.sqrt(np.maximum(0.0, edges**2 - sizes**2)) / FWHM_PER_SD / sizes
    blurred = gaussian_filter(array, sd, mode="nearest") if sd.any() else array
    matrices = [_spline(n, count, step) for n, count, step in zip(array.shape, counts, steps, strict=True)]
    made = np.clip(along_axes(blurred, matrices), array.min(), array.max())
    to_old = np.diag([*steps, 1.0])
    to_old[:3, 3] = (steps - 1) / 2  # the first voxel begins where the old first one does
    return Image(np.ascontiguousarray(made, dtype=np.float32), image.affine @ to_old)


def neck_cut(image: Image, random: np.random.Generator | None = None) -> Image:
    """Without the slices that lie more than `NECK_CUT_MM` below the crown."""
    head = find_head(image)
    axis = _world_axes(image).index(2)
    middle = np.linalg.solve(image.affine[:3, :3], np.array(head.centre_mm) - image.affine[:3, 3])
    places = np.tile(middle, (image.shape[axis], 1))
    places[:, axis] = np.arange(image.shape[axis])
    heights = (places @ image.affine[:3, :3].T + image.affine[:3, 3])[:, 2]
    kept = np.flatnonzero(heights >= head.crown_mm - NECK_CUT_MM)
    box = [slice(None)] * 3
    box[axis] = slice(kept[0], kept[-1] + 1)
    return image.slicer[tuple(box)]


def brighter(image: Image, offset: float = 0.0) -> Image:
    """Intensities times `GAIN`, plus an offset, to be stored as int16 with slope and intercept."""
    array = _voxels(image)
    made = Image(GAIN * (array + offset * array.max()), image.affine)
    made.set_data_dtype(np.int16)
    return made


def biased(image: Image, random: np.random.Generator) -> Image:
    """Slowly brighter here and darker there."""
    field = smooth_random(random, image.shape, BIAS_KNOTS_MM / voxel_sizes(image.affine))
    return Image(_voxels(image) * np.exp(BIAS_LOG_SD * field), image.affine)


def noisy(image: Image, random: np.random.Generator) -> Image:
    """With Rician noise."""
    array = _voxels(image)
    sd = NOISE * np.median(array[array > array.mean()])
    noise = sd * random.standard_normal((2, *array.shape), dtype=np.float32)
    return Image(np.hypot(array + noise[0], noise[1]).astype(np.float32), image.affine)


def blurred(image: Image, random: np.random.Generator | None = None) -> Image:
    """As by a scanner of lower resolution, on the same voxels."""
    sd = BLUR_MM / FWHM_PER_SD / voxel_sizes(image.affine)
    return Image(gaussian_filter(_voxels(image), sd, mode="nearest"), image.affine)


def contrasted(image: Image, curve: Callable[[np.ndarray], np.ndarray]) -> Image:
    """Intensities along a rising curve, where 0 stays 0 and the 99th percentile of the head stays 1."""
    array = _voxels(image)
    level = np.percentile(array[array > array.mean()], 99)
    return Image((level * curve(np.maximum(array, 0) / level)).astype(np.float32), image.affine)


def s_curve(shares: np.ndarray) -> np.ndarray:
    """Halfway from a straight line to a smooth step: steep in the middle, flat at 0, and from 1 on."""
    within = np.minimum(shares, 1)
    return (shares + within**2 * (3 - 2 * within)) / 2


def reference_brain(image: Image) -> np.ndarray:
    """Mask (bool) of the brain: where `dlmuse/NAME_DLMUSE.nii.gz` beside the scans' folder has a region.

    Of a scan without one, the brain that the package finds.
    """
    path = image.extra.get("path")
    if path and (labels := Path(path).parent.parent / "dlmuse" / dlmuse_name(path)).is_file():
        return np.asanyarray(nib.load(labels).dataobj) > 0
    return find_brain(image).mask_on(image.affine, image.shape)


def dlmuse_name(path: str | Path) -> str:
    """File name of the region labels of a scan."""
    return f"{Path(path).name.split('.')[0]}_DLMUSE.nii.gz"


def stripped(image: Image, wider: int) -> Image:
    """Without skull and scalp: 0 outside of the brain, whose mask is made wider by some voxels."""
    brain = reference_brain(image)
    brain = binary_dilation(brain, iterations=wider) if wider else brain
    return Image(np.where(brain, _voxels(image), np.float32(0)), image.affine)


def defaced(image: Image, random: np.random.Generator | None = None) -> Image:
    """0 before and below a plane that leaves the whole brain."""
    ahead = FACE_NORMAL @ image.affine[:3, :3]  # mm towards the face that a voxel of each axis goes
    distance = sum(np.ix_(*(a * np.arange(n) for a, n in zip(ahead, image.shape, strict=True))))
    kept = distance <= distance[reference_brain(image)].max() + FACE_MARGIN_MM
    return Image(np.where(kept, _voxels(image), np.float32(0)), image.affine)


GEOMETRIC: dict[str, Callable[[Image, np.random.Generator], Image]] = {
    f"tilted up to {DEGREES:g} degrees": tilted,
    f"shifted {SHIFT_MM:g} mm": shifted,
    "mirrored storage": mirrored,
    "resampled to 1 mm": lambda image, random: resampled(image, (1, 1, 1)),
    "resampled to 1 x 1 x 3 mm": lambda image, random: resampled(image, (1, 1, 3)),
    "neck cut": neck_cut,
}
CASES = GEOMETRIC | {
    "intensity scaled": lambda image, random: brighter(image),
    "intensity scaled, offset": lambda image, random: brighter(image, OFFSET),
    "bias field": biased,
    "noise": noisy,
    f"blurred by {BLUR_MM:g} mm": blurred,
    "contrast, gamma 0.7": lambda image, random: contrasted(image, lambda x: x**0.7),
    "contrast, gamma 1.4": lambda image, random: contrasted(image, lambda x: x**1.4),
    "contrast, S curve": lambda image, random: contrasted(image, s_curve),
    "stripped": lambda image, random: stripped(image, 0),
    "stripped, one voxel wider": lambda image, random: stripped(image, 1),
    "defaced": defaced,
}


def disturb(image: Image, case: str, scan_id: str) -> Image:
    """One of `CASES`, always the same for a scan_id; `image` is a scan as `load_scan` gives it."""
    return CASES[case](image, np.random.default_rng([*f"{case} {scan_id}".encode()]))


def _posed(image: Image, turn: np.ndarray, move_mm: np.ndarray) -> Image:
    """Turn (3, 3) and move (mm, along the stored axes) that the header does not tell of."""
    sizes = voxel_sizes(image.affine)
    pad = np.ceil(PAD_MM / sizes).astype(int)
    array = _voxels(image)
    in_voxels = turn * sizes / sizes[:, None]
    made = turned_and_moved(array, in_voxels, move_mm / sizes, pad, order=3)
    return Image(np.clip(made, min(0, array.min()), array.max()), padded(image.affine, pad))


def _voxels(image: Image) -> np.ndarray:
    return np.asanyarray(image.dataobj, dtype=np.float32)


def _world_axes(image: Image) -> list[int]:
    """For each stored axis the nearest world axis: 0 left-right, 1 front-back, 2 up-down."""
    return nib.io_orientation(image.affine)[:, 0].astype(int).tolist()


def _spline(n: int, count: int, step: float) -> np.ndarray:
    """Weights (count, n) of cubic interpolation at voxels `step` old ones wide; the end voxels go on."""
    places = np.clip((np.arange(count) + 0.5) * step - 0.5, 0, n - 1)
    return CubicSpline(np.arange(n), np.eye(n))(places)
