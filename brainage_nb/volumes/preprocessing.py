"""One scan file to one network input, the same way in training, on the command line and in the app.

The steps are those of a MONAI chain - Orientation (RAS), GaussianSmooth, Spacing, a crop,
NormalizeIntensity - and the tests hold the result to it. They are computed in one pass an axis instead:
importing MONAI takes longer than ten scans, and most of what the chain smooths is cropped away again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .heads import find_head
from .resampling import gaussian_kernel, resample, smoothing_sd
from .scans import ScanError, load_scan, voxel_sizes

if TYPE_CHECKING:
    import nibabel as nib

__all__ = [
    "PreprocessingSettings",
    "ScanError",
    "as_stored",
    "grid_affine",
    "load_scan",
    "preprocess",
    "preprocessing_steps",
]

# Raised whenever the same settings give other numbers than before; part of every fingerprint.
VERSION = 1
# World axes and voxel lattice count as parallel when the farthest voxel is off by less than this.
PARALLEL_MM = 1e-3


@dataclass(frozen=True)
class PreprocessingSettings:
    """Every number that decides what a preprocessed volume looks like.

    Parameters
    ----------
    spacing_mm : float
        Edge of a voxel of the result, mm.
    size : int
        Edge of the result in voxels; 96 at 2 mm and 48 at 4 mm both show 192 mm.
    smooth : bool
        Whether finer scans are smoothed to the target resolution first. Without, scans of one person at
        1 mm and 3 mm differ in texture.
    """

    spacing_mm: float = 2.0
    size: int = 96
    smooth: bool = True

    def __post_init__(self) -> None:
        if not 0.5 <= self.spacing_mm <= 10:
            raise ValueError(f"spacing_mm = {self.spacing_mm}: expected 0.5 to 10 mm, usually 2 or 4.")
        if not 8 <= self.size <= 512:
            raise ValueError(f"size = {self.size}: expected 8 to 512 voxels, usually 96 or 48.")
        object.__setattr__(self, "spacing_mm", float(self.spacing_mm))
        object.__setattr__(self, "size", int(self.size))

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Every step with its numbers, in order, as `preprocessing.json` lists them."""
        from . import heads

        smoothing = {
            "step": "smooth",
            "fwhm_mm": self.spacing_mm,
            "kernel": "gaussian",
            "where": "finer than it",
        }
        return [
            {"step": "orientation", "axes": "RAS"},
            *([smoothing] if self.smooth else []),
            {
                "step": "resample",
                "spacing_mm": self.spacing_mm,
                "size": self.size,
                "interpolation": "linear",
                "axes": "world",
                "crown_ml": heads.CROWN_ML,
                "crown_to_centre_mm": heads.CROWN_TO_CENTRE_MM,
                "top_mm": heads.TOP_MM,
            },
            {"step": "z-score", "over": "all voxels"},
        ]

    @property
    def fingerprint(self) -> str:
        """Name of everything these settings give, as `2mm-96-1f0c…`; equal only where every number is."""
        content = json.dumps({"version": VERSION, "steps": self.steps}, sort_keys=True)
        return f"{self.spacing_mm:g}mm-{self.size}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    def to_json(self) -> dict[str, Any]:
        """Content of `preprocessing.json`."""
        return {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "settings": asdict(self),
            "steps": self.steps,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PreprocessingSettings:
        """Read `to_json` back; ValueError where this version of the package would give other numbers."""
        known = {field.name for field in fields(cls)}
        if extra := set(content["settings"]) - known:
            raise ValueError(f"Unknown preprocessing settings {sorted(extra)}; known are {sorted(known)}.")
        settings = cls(**content["settings"])
        if settings.fingerprint != content["fingerprint"]:
            raise ValueError(
                f"These volumes were made by other steps ({content['fingerprint']}) than this version of the "
                f"package takes with the same settings ({settings.fingerprint}). Use the version that made "
                "them, or preprocess again."
            )
        return settings


def preprocess(
    scan: str | Path | nib.spatialimages.SpatialImage, settings: PreprocessingSettings | None = None
) -> np.ndarray:
    """Turn one scan into a network's input.

    The cube's axes are the world's (x to the right, y to the front, z upwards), so the result does not
    depend on how the scanner stored the head; its centre lies `heads.CROWN_TO_CENTRE_MM` below the crown. The
    z-score runs over all voxels of the cube, as MONAI's NormalizeIntensity does: air is part of it, which
    the fixed field of view makes a steady part.

    Parameters
    ----------
    scan : path or nibabel image
        A scan file, or what `load_scan` gave.
    settings : PreprocessingSettings, optional
        2 mm and 96 voxels where left out.

    Returns
    -------
    (size, size, size) float32 array
        Axes run to the right, the front and the top (RAS); mean 0, standard deviation 1. What is trained on
        and predicted from is `as_stored` of it.

    Raises
    ------
    ScanError
        The scan cannot be used.
    """
    settings = settings or PreprocessingSettings()
    image = _loaded(scan)
    grid = _grid(image, settings)
    sd = _smoothing(image, settings)
    return _z_scored(resample(_voxels(image), image.affine, grid, settings.size, sd))


def as_stored(volume: np.ndarray) -> np.ndarray:
    """Round as the volume store does (float16: by 0.004 of a standard deviation at most)."""
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
    cube = resample(_voxels(image), image.affine, grid, settings.size, _smoothing(image, settings))
    steps = [
        (f"as stored ({stored})", _voxels(image), voxel_sizes(image.affine)),
        ("turned to RAS", _voxels(turned), voxel_sizes(turned.affine)),
        (f"smoothed to {settings.spacing_mm:g} mm", smoothed, voxel_sizes(turned.affine)),
        (f"{settings.spacing_mm:g} mm, {settings.size} voxels, below the crown", cube, final),
        ("z-scored", _z_scored(cube), final),
    ]
    return [step for step in steps if sd.any() or not step[0].startswith("smoothed")]


def _loaded(scan: Any) -> Any:
    return load_scan(scan) if isinstance(scan, str | Path) else scan


def _voxels(image: Any) -> np.ndarray:
    return np.asanyarray(image.dataobj, dtype=np.float32)


def _smoothing(image: Any, settings: PreprocessingSettings) -> np.ndarray:
    return smoothing_sd(voxel_sizes(image.affine), settings.spacing_mm) if settings.smooth else np.zeros(3)


def _grid(image: Any, settings: PreprocessingSettings) -> np.ndarray:
    """The cube under the crown, moved by under half a voxel of the scan onto its lattice.

    A scan that already has the target's spacing is so copied voxel by voxel: no interpolation blurs it.
    """
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
