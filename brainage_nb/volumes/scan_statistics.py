"""What a scan is like before any preprocessing: noise, sharpness, contrast, voxels, what was cut away.

A share of grey matter looks alike whether the scan was noisy, coarse, stripped or defaced; the scan does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from brainage_nb.volumes.heads import coarse_picture, find_head, head_mask
from brainage_nb.volumes.scans import voxel_sizes

SCAN_STATISTICS = (
    "the scan's noise", *["the scan's sharpness"] * 3, *["the scan's contrast"] * 2, "the scan's voxels",
    "the empty space around the head", "the head's size", "the size of the face",
)  # fmt: skip
"""What each number that `measure_scan` gives is about."""
FINE_MM = 2.0  # edge at which noise and sharpness are measured; finer voxels are no difference
MIDDLE_MM = 45.0  # radius around the head's middle: brain, whose brightness is the unit of all others
AROUND_MM = 110.0  # radius in which empty space counts; further out it is a matter of the field of view
EMPTY = 0.01  # of that unit above the lowest value: nothing was measured there, or it was cut away
TISSUE = 0.2  # of that unit; what is darker is air or fluid
LEAST = 1e-3  # of the unit, added before a logarithm is taken
NECK_MM = 70.0  # below the head's middle; what lies lower does not count, as it may be cut
FACE_MM = 60.0  # in front of and below the head's middle, along the diagonal
LEAST_L = 0.05  # litres, added before a logarithm is taken


def measure_scan(image: Any) -> np.ndarray:
    """Numbers (10,) about a scan as `load_scan` gives it, in logarithms where sizes are compared.

    Noise: median of second differences along the axis where it is least. Sharpness: mean of first ones along
    left-right, front-back and up-down. Contrast: how far dark, middle and bright parts of the brain are
    apart. Then the longest edge of a voxel, mm; the share around the head that is empty; litres of
    the head without neck, and of the face.
    """
    array, head = np.asanyarray(image.dataobj, dtype=np.float32), find_head(image)
    coarse, affine = coarse_picture(array, image.affine)
    places = np.stack(np.indices(coarse.shape), axis=-1) @ affine[:3, :3].T + affine[:3, 3] - head.centre_mm
    away_mm = np.sqrt((places**2).sum(axis=-1))
    middle = coarse[away_mm < MIDDLE_MM]
    dark, grey, bright = np.percentile(middle, [10, 50, 90]) if middle.size else np.zeros(3)
    air = np.percentile(coarse, 1)
    unit = max(float(bright - air), 1e-6)
    fine = (coarse_picture(array, image.affine, FINE_MM)[0] - air) / unit
    sharpness, noise = np.transpose([_measure_steps(np.moveaxis(fine, axis, 0)) for axis in range(3)])
    _, y, z = places[head_mask(coarse)].T
    is_face = (y - z > FACE_MM * np.sqrt(2)) & (z > -NECK_MM)
    litres = np.array([np.sum(z > -NECK_MM), is_face.sum()]) * abs(np.linalg.det(affine[:3, :3])) / 1e6
    steps = np.log(np.array([noise.min(), *sharpness]) + LEAST)
    edge = np.log(max(FINE_MM, voxel_sizes(image.affine).max()))
    contrast = np.array([bright - grey, grey - dark]) / unit
    empty = coarse[away_mm < AROUND_MM] <= coarse.min() + EMPTY * unit
    return np.array([*steps, *contrast, edge, np.mean(empty), *np.log(litres + LEAST_L)])


def _measure_steps(picture: np.ndarray) -> tuple[float, float]:
    """Mean first and median second difference along the first axis, inside of tissue."""
    inside = np.minimum(np.minimum(picture[:-2], picture[1:-1]), picture[2:]) > TISSUE
    if not inside.any():
        return 0.0, 0.0
    first, second = np.abs(picture[2:] - picture[:-2]), np.abs(np.diff(picture, n=2, axis=0))
    return float(first[inside].mean()), float(np.median(second[inside]))
