"""The head every phantom scan starts from: MNI152 brain tissue with an invented skull, scalp, face and neck.

Not for real scans, and no source of anatomy beyond the brain: what lies outside it only has the right order
of bright and dark in a T1-weighted scan, so that whatever finds or strips a head has something to find.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

# T1-like intensities, white matter near 0.9. Order: air < bone < CSF < muscle < grey < white < fat.
GREY, WHITE, CSF = 0.65, 0.875, 0.27
BONE, MARROW, MUSCLE, SKIN, FAT, AIR = 0.07, 0.38, 0.48, 0.42, 1.0, 0.02

NECK_MM = 96  # how far the head reaches below the template's lower edge
FACE_MM = 24  # how far it reaches in front of the template's front edge
SKULL_MM, SCALP_MM = 7.0, 14.0  # outer surfaces of skull and skin, measured from the inside of the skull
FIELD_STEP_MM = 4.0  # spacing of the grid on which displacements are kept


@dataclass(frozen=True)
class Anatomy:
    """The template head, axes x (to the right), y (to the front), z (up), all maps float32 in 0..1.

    Attributes
    ----------
    affine : (4, 4) array
        Voxel index -> MNI152 position in mm; isotropic, no rotation.
    brain : tuple of three slices
        The box that holds the inside of the skull; the tissue maps below have its shape, `head` the full one.
    grey, white, inside : arrays
        Tissue fractions and the inside of the skull; what is inside and neither grey nor white is CSF.
    texture : array
        What the template shows beyond its tissue means (deep nuclei, myelin), in units of intensity.
    sulci : array
        Share of the grey matter that gives way to CSF when sulci open fully.
    periventricular : array
        1 in white matter at the ventricles' wall, falling with distance from it.
    head, fat : arrays
        Intensity of everything outside the skull's inside, without fat, and the amount of fat.
    widening : (3, nx, ny, nz) array
        Outward displacement at each point of the `field_affine` grid when ventricles widen; largest length 1.
    """

    affine: np.ndarray
    brain: tuple[slice, slice, slice]
    grey: np.ndarray
    white: np.ndarray
    inside: np.ndarray
    texture: np.ndarray
    sulci: np.ndarray
    periventricular: np.ndarray
    head: np.ndarray
    fat: np.ndarray
    widening: np.ndarray
    field_affine: np.ndarray

    @property
    def voxel_mm(self) -> float:
        """Edge of the template's voxels in mm."""
        return float(self.affine[0, 0])


@lru_cache(maxsize=1)
def template_anatomy(voxel_mm: int) -> Anatomy:
    """Build the template head, once per process.

    Parameters
    ----------
    voxel_mm : int
        Edge of its voxels, 1 or 2 mm.
    """
    t1, grey, white, mask, affine = _templates(voxel_mm)
    x, y, z = _positions(t1.shape, affine)
    inside = _inside_of_skull(mask, voxel_mm)
    lateral = _ventricles(mask, grey + white, (x, y, z), voxel_mm)
    head, fat = _around_the_brain(inside, white, (x, y, z), voxel_mm)
    brain = ndimage.find_objects((inside > 0.01).astype(np.uint8))[0]
    residual = t1 - (GREY * grey + WHITE * white + 0.39 * np.clip(1 - grey - white, 0, 1))
    texture = np.clip(np.where(mask, residual, 0), -0.2, 0.2)
    from_wall = ndimage.distance_transform_edt(~lateral, sampling=voxel_mm)
    periventricular = np.exp(-((from_wall / 9.0) ** 1.5)) * np.clip(white * 1.2, 0, 1) * ~lateral
    widening, field_affine = _widening(lateral, affine, voxel_mm)
    sulci = _sulci(inside, grey, white, from_wall, voxel_mm)
    boxed = [
        np.ascontiguousarray(image[brain], np.float32)
        for image in (grey, white, inside, texture, sulci, periventricular)
    ]
    return Anatomy(affine, brain, *boxed, head, fat, widening, field_affine)


def _templates(voxel_mm: int) -> tuple[np.ndarray, ...]:
    """nilearn's T1, grey, white and mask, given room for a face and a neck; and the affine of that grid."""
    from nilearn import datasets

    room = ((0, 0), (0, FACE_MM // voxel_mm), (NECK_MM // voxel_mm, 0))
    names = ("template", "gm_template", "wm_template", "brain_mask")
    images = [getattr(datasets, f"load_mni152_{name}")(resolution=voxel_mm) for name in names]
    t1, grey, white, mask = (np.pad(image.get_fdata(dtype=np.float32), room) for image in images)
    affine = images[0].affine.copy()
    affine[2, 3] -= room[2][0] * voxel_mm
    mask = mask > 0.5
    return t1, np.clip(grey, 0, 1) * mask, np.clip(white, 0, 1) * mask, mask, affine


def _positions(shape: tuple[int, ...], affine: np.ndarray) -> tuple[np.ndarray, ...]:
    """Open grids of x, y, z in mm; they broadcast to `shape`."""
    axes = [np.arange(n, dtype=np.float32) * affine[i, i] + affine[i, 3] for i, n in enumerate(shape)]
    return tuple(grid.astype(np.float32) for grid in np.meshgrid(*axes, indexing="ij", sparse=True))


def _inside_of_skull(mask: np.ndarray, voxel_mm: float) -> np.ndarray:
    """Brain plus the CSF around it: the mask, closed over fissures, grown by about 2 mm, with a soft edge."""
    grown = ndimage.distance_transform_edt(~mask, sampling=voxel_mm) < 2.5
    closed = ndimage.gaussian_filter(grown.astype(np.float32), 4.0 / voxel_mm) > 0.5
    return ndimage.gaussian_filter((closed | mask).astype(np.float32), 0.8 / voxel_mm)


def _ventricles(mask: np.ndarray, tissue: np.ndarray, at: tuple, voxel_mm: float) -> np.ndarray:
    """The lateral ventricles with the third: deep CSF, the largest parts near the template's middle."""
    x, y, z = at
    deep = ndimage.distance_transform_edt(mask, sampling=voxel_mm) > 12
    near = (abs(x) < 40) & (y > -65) & (y < 40) & (z > -12) & (z < 36)
    parts, _ = ndimage.label(mask & deep & near & (tissue < 0.5))
    sizes = np.bincount(parts.ravel()) * voxel_mm**3
    sizes[0] = 0
    return np.isin(parts, np.flatnonzero(sizes > 600))


def _sulci(
    inside: np.ndarray, grey: np.ndarray, white: np.ndarray, from_ventricle: np.ndarray, voxel_mm: float
) -> np.ndarray:
    """Where cortex borders CSF, in fissures and at the surface, away from the ventricles."""
    fluid = np.clip(inside - grey - white, 0, 1) * (from_ventricle > 15)
    near_fluid = ndimage.gaussian_filter(fluid, 2.0 / voxel_mm)
    return np.clip(4.5 * near_fluid, 0, 1) * (grey > 0.02)


def _widening(lateral: np.ndarray, affine: np.ndarray, voxel_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Smooth field that points away from the ventricles, strongest at their wall, on a coarser grid."""
    step = round(FIELD_STEP_MM / voxel_mm)
    smooth = ndimage.gaussian_filter(lateral.astype(np.float32), 6.5 / voxel_mm)[::step, ::step, ::step]
    away = -np.stack(np.gradient(smooth))
    field_affine = affine.copy()
    field_affine[:3, :3] *= step
    return (away / np.linalg.norm(away, axis=0).max()).astype(np.float32), field_affine


# --- what is invented -----------------------------------------------------------------------------------


def _around_the_brain(
    inside: np.ndarray, white: np.ndarray, at: tuple, voxel_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Intensity of the head outside the skull's inside (fat left out), and the amount of fat."""
    outside = ndimage.distance_transform_edt(inside < 0.5, sampling=voxel_mm).astype(np.float32)
    outside = ndimage.gaussian_filter(outside, 1.5 / voxel_mm)
    surface = _head_surface(outside, at)
    paint = _Paint(voxel_mm, surface.shape)
    paint.over(surface, SKIN)
    paint.over(surface + 2.0, 0, fat=1)
    neck = np.clip(-(at[2] + 60) / 40, 0, 1)
    paint.over(surface + 6.5 + 4 * neck, MUSCLE)
    paint.over(outside - SKULL_MM, BONE)
    paint.over(np.abs(outside - 0.55 * SKULL_MM) - 1.0, MARROW)  # between the skull's two tables
    _face(paint, at)
    _neck(paint, at, _cord(white, at))
    grain = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(surface.shape), 2.5 / voxel_mm)
    free = (1 - inside) * (1 + 0.12 * grain / grain.std())
    return (paint.image * free).astype(np.float32), (paint.fat * free).astype(np.float32)


def _head_surface(outside: np.ndarray, at: tuple) -> np.ndarray:
    """Signed distance (mm, negative inside) to the skin: cranium, face, nose, chin and neck, blended."""
    x, y, z = at
    surface = outside - SCALP_MM
    below = np.maximum(_ellipsoid(at, (0, -36, -110), (60, 63, 1e4)), z + 45)
    for part, blend in (
        (below, 25.0),
        (_ellipsoid(at, (0, 28, -58), (66, 66, 72)), 20.0),
        (_ellipsoid(at, (0, 62, -112), (27, 25, 20)), 18.0),
        (_ellipsoid(at, (0, 92, -54), (12, 20, 17)), 10.0),
        (_ellipsoid((abs(x), y, z), (80, -22, -40), (9, 16, 26)), 8.0),
    ):
        surface = _blend(surface, part, blend)
    return surface


def _face(paint: _Paint, at: tuple) -> None:
    """Fat of the orbits, air-filled cavities."""
    x, y, z = at
    sides = (abs(x), y, z)
    paint.over(_ellipsoid(sides, (32, 58, -40), (19, 24, 17)), 0, fat=1)
    for place, centre, axes in (
        (at, (0, 62, -52), (11, 26, 17)),
        (at, (0, 22, -46), (13, 13, 9)),
        (at, (0, 6, -100), (11, 8, 48)),
        (sides, (29, 52, -64), (12, 15, 14)),
    ):
        paint.over(_ellipsoid(place, centre, axes), AIR)


def _cord(white: np.ndarray, at: tuple) -> float:
    """Front-back position (mm) of the brain stem at the template's lower edge."""
    lowest = np.flatnonzero(white.any(axis=(0, 1)))[0]
    weight = white[:, :, lowest : lowest + 3].sum(axis=(0, 2))
    return float((weight * at[1].ravel()).sum() / weight.sum())


def _neck(paint: _Paint, at: tuple, cord_y: float) -> None:
    """Vertebrae, the spinal canal, and the cord that goes on from the brain stem."""
    x, y, z = at
    bodies, canal = (np.hypot(x, y - cord_y - front) + 0 * z for front in (23, 0))
    for distance, top, intensity in (
        (bodies - 13, 62, BONE),
        (bodies - 11, 62, MARROW * 1.5),
        (canal - 13, 62, BONE),
        (canal - 10, 62, CSF),
        (canal - 6, 68, GREY * 1.1),
    ):
        paint.over(np.maximum(distance, z + top), intensity)


def _ellipsoid(at: tuple, centre: tuple, axes: tuple) -> np.ndarray:
    """About the signed distance (mm, negative inside) to an ellipsoid."""
    radius = sum(((p - c) / a) ** 2 for p, c, a in zip(at, centre, axes, strict=True))
    return (np.sqrt(radius) - 1) * min(axes)


def _blend(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Smooth minimum of two signed distances: the union of two bodies with a rounded joint."""
    near = np.clip(width - np.abs(a - b), 0, None) / width
    return np.minimum(a, b) - near**2 * width / 4


class _Paint:
    """An intensity image painted body over body, each given by a signed distance in mm with a soft edge."""

    def __init__(self, voxel_mm: float, shape: tuple[int, ...]) -> None:
        self.edge = max(voxel_mm, 1.5)
        self.image = np.zeros(shape, np.float32)
        self.fat = np.zeros(shape, np.float32)

    def over(self, distance: np.ndarray, intensity: float, fat: float = 0.0) -> None:
        """Paint a body of this intensity, or of fat, over what is there."""
        cover = np.clip(0.5 - distance / self.edge, 0, 1)
        self.image += cover * (intensity - self.image)
        self.fat += cover * (fat - self.fat)
