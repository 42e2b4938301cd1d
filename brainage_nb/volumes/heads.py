"""Where the head is in a scan: crown, centre, extent, and whether something is missing.

Rules on a 4 mm picture, quick and the same for every scan. It segments no brain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from brainage_nb.volumes.resampling import along_axes
from brainage_nb.volumes.scans import voxel_sizes

if TYPE_CHECKING:
    import nibabel as nib

COARSE_MM = 4.0
# The crown is the height with this much head above it: steadier than the highest voxel, in any orientation.
CROWN_ML = 5.0
CROWN_TO_CENTRE_MM = 80.0
# Left-right and front-back come from this much of the head, so that neck and jaw do not count.
TOP_MM = 120.0
SIDES = (("left", "right"), ("back", "front"), ("bottom", "top"))
CUT_CM2 = 15.0  # more head than this on a face of the image: cut off there (a nose alone stays below)
MIN_HEIGHT_MM = 130.0  # less than this below the crown: the lower brain is cut off
STRIPPED_MAX_L = 2.2  # brains hold less, whole heads of adults more
# Bone is a dark shell under the scalp, as a share of the brain's signal: 0.3-0.6 on whole heads. Without
# bone the outermost tissue is cortex with fluid, 0.54-0.74 (both on 61 scans at 2 mm).
RIM_RATIO = 0.5
MUCH_CUT_AWAY = 0.2  # share of voxels exactly 0 from which a preprocessed volume shows the brain only


@dataclass(frozen=True)
class Head:
    """What the 4 mm picture shows.

    Attributes
    ----------
    centre_mm : tuple
        Centre of the field of view in world coordinates (x to the right, y to the front, z upwards), mm.
    crown_mm : float
        Height of the crown, world z, mm.
    volume_l : float
        Head (with neck) inside the image, litres.
    extent_mm : tuple
        Left-right, back-front and bottom-top extent, mm.
    foreground_fraction : float
        Share of the image that is head.
    skull_stripped : bool
        Whether the outermost tissue looks like brain and not like scalp over bone.
    cut_off : tuple of str
        Faces of the image that cut the head, of left, right, back, front, bottom, top; a neck that leaves at
        the bottom does not count.
    """

    centre_mm: tuple[float, float, float]
    crown_mm: float
    volume_l: float
    extent_mm: tuple[float, float, float]
    foreground_fraction: float
    skull_stripped: bool
    cut_off: tuple[str, ...]


def head_in(volume: np.ndarray) -> np.ndarray:
    """Where a preprocessed volume (size, size, size) shows a head, bool: what is brighter than the mean.

    Where everything outside of the brain was set to 0 the mean says nothing: there it is all that is not 0.
    """
    within = volume != 0
    return within if within.mean() < 1 - MUCH_CUT_AWAY else volume > volume.mean(dtype=np.float64)


def find_head(image: nib.spatialimages.SpatialImage) -> Head:
    """Find the head in a scan, once: the grid, the cautions and the cleaning of one image all ask.

    Parameters
    ----------
    image : nibabel image
        3-D, as `load_scan` gives it; its voxels must not change afterwards, since the answer is kept in
        `image.extra`.

    Returns
    -------
    Head
        Of an image without a recognisable head, all that is not background.
    """
    if "head" not in image.extra:
        coarse, affine = coarse_picture(np.asanyarray(image.dataobj), image.affine)
        image.extra["head"] = _describe_head(coarse, affine)
    return image.extra["head"]


def _describe_head(coarse: np.ndarray, affine: np.ndarray) -> Head:
    """The facts of a 4 mm picture."""
    mask = head_mask(coarse)
    points = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    voxel_l = abs(np.linalg.det(affine[:3, :3])) / 1e6
    crown = _crown(points, affine)
    top = points[points[:, 2] >= crown - TOP_MM]
    x, y = top[:, :2].mean(axis=0)
    extent = np.ptp(points, axis=0) + np.abs(affine[:3, :3]).max(axis=1)
    return Head(
        centre_mm=(float(x), float(y), float(crown - CROWN_TO_CENTRE_MM)),
        crown_mm=float(crown),
        volume_l=float(len(points) * voxel_l),
        extent_mm=tuple(float(e) for e in extent),
        foreground_fraction=float(mask.mean()),
        skull_stripped=_is_skull_stripped(coarse, mask, affine, crown),
        cut_off=_cut_off(mask, points, affine, crown),
    )


def coarse_picture(
    array: np.ndarray, affine: np.ndarray, edge_mm: float = COARSE_MM
) -> tuple[np.ndarray, np.ndarray]:
    """Average blocks of voxels to edges of about 4 mm, axes turned and flipped to the nearest RAS.

    Parameters
    ----------
    array : (i, j, k) array
    affine : (4, 4) array
        Voxel to world, mm.

    Returns
    -------
    array : (x, y, z) float32
        Blocks start at the left, back, bottom end, so that the storage order does not matter.
    affine : (4, 4)
    """
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    orientation = io_orientation(affine)
    orientation[:, 0] = np.where(np.isnan(orientation[:, 0]), range(3), orientation[:, 0])
    steps = np.clip(np.round(edge_mm / voxel_sizes(affine)), 1, array.shape).astype(int)
    blocks = [
        _block_means(n, step, flipped)
        for n, step, flipped in zip(array.shape, steps, orientation[:, 1] < 0, strict=True)
    ]
    coarse = along_axes(np.asarray(array, dtype=np.float32), blocks)
    starts = [int(np.flatnonzero(block[0])[0]) for block in blocks]
    scale = np.diag([*steps.astype(float), 1.0])
    scale[:3, 3] = np.array(starts) + (steps - 1) / 2
    turned = apply_orientation(coarse, orientation)
    return turned, affine @ scale @ inv_ornt_aff(orientation, coarse.shape)


def head_mask(coarse: np.ndarray) -> np.ndarray:
    """Head against background: Otsu's threshold, the largest piece, holes filled.

    Parameters
    ----------
    coarse : (x, y, z) array
        About 4 mm, so that noise is averaged out.

    Returns
    -------
    (x, y, z) bool array
        Never empty.
    """
    from scipy import ndimage

    # Distance from the background's level (not always 0); the root tames bright fat.
    signal = np.abs(coarse - _corner_level(coarse))
    signal = np.sqrt(np.minimum(signal, np.percentile(signal, 99)))
    above = signal > _otsu(signal)
    if not above.any():
        return np.ones(coarse.shape, bool)
    pieces, n = ndimage.label(ndimage.binary_opening(above))  # opening cuts ghosts and noise off
    if n == 0:
        return above
    largest = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    return ndimage.binary_fill_holes(ndimage.binary_dilation(largest) & above)


def _block_means(n: int, step: int, from_the_end: bool) -> np.ndarray:
    """Matrix (n // step, n) that averages blocks; what is left over lies at the other end."""
    count = n // step
    matrix = np.kron(np.eye(count), np.full(step, 1.0 / step))
    rest = np.zeros((count, n - count * step))
    return np.hstack([rest, matrix] if from_the_end else [matrix, rest])


def _corner_level(coarse: np.ndarray) -> float:
    """Median of the eight corners: the level of air."""
    ends = [np.r_[0 : (w := max(1, n // 12)), n - w : n] for n in coarse.shape]
    return float(np.median(coarse[np.ix_(*ends)]))


def _otsu(values: np.ndarray, bins: int = 128) -> float:
    """Threshold that best separates two classes by their variance (Otsu 1979)."""
    counts, edges = np.histogram(values, bins)
    share = np.cumsum(counts) / counts.sum()
    mean = np.cumsum(counts * (edges[1:] + edges[:-1]) / 2) / counts.sum()
    between = (mean[-1] * share - mean) ** 2 / np.maximum(share * (1 - share), 1e-12)
    return float(edges[1:][between.argmax()])


def _crown(points: np.ndarray, affine: np.ndarray) -> float:
    """World height with `CROWN_ML` of head above it, between the slices too.

    Each voxel is spread over its own height, so that thick slices do not make the crown jump.
    """
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    height = np.abs(affine[2, :3]).sum()
    top = points[:, 2].max() + height / 2
    levels = top - np.arange(0, 40 + 2 * height, 0.25)
    near = points[points[:, 2] > levels[-1] - height, 2]
    above = np.array([np.clip((near + height / 2 - level) / height, 0, 1).sum() for level in levels])
    return float(np.interp(CROWN_ML, above * voxel_ml, levels))


def _cut_off(mask: np.ndarray, points: np.ndarray, affine: np.ndarray, crown: float) -> tuple[str, ...]:
    sizes = voxel_sizes(affine)
    cut = []
    for axis, sides in enumerate(SIDES):
        area = np.prod(np.delete(sizes, axis)) / 100
        cut += [
            side
            for index, side in zip((0, -1), sides, strict=True)
            if np.take(mask, index, axis=axis).sum() * area > (0 if side == "bottom" else CUT_CM2)
        ]
    is_low = crown - points[:, 2].min() >= MIN_HEIGHT_MM  # a neck that leaves the image is no cut
    return tuple(side for side in cut if side != "bottom" or not is_low)


def _is_skull_stripped(coarse: np.ndarray, mask: np.ndarray, affine: np.ndarray, crown: float) -> bool:
    """Small, and without the dark shell of bone 4 to 16 mm under the surface."""
    from scipy import ndimage

    sizes = voxel_sizes(affine)
    if mask.sum() * np.prod(sizes) / 1e6 > STRIPPED_MAX_L:
        return False
    depth = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=sizes)[1:-1, 1:-1, 1:-1]
    height = np.arange(mask.shape[2]) * affine[2, 2] + affine[2, 3]
    upper = mask & (height > crown - TOP_MM / 2)
    signal = np.abs(coarse - _corner_level(coarse))
    shells = [signal[upper & (depth > near) & (depth <= near + 4)] for near in (4, 8, 12)]
    inside = signal[upper & (depth > 24)]
    if not len(inside) or not all(len(shell) for shell in shells):
        return True
    return bool(min(np.median(shell) for shell in shells) > RIM_RATIO * np.median(inside))
