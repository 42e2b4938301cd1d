"""Why a model says an age: a heat map of one scan, in its own space.

The maps themselves are in `explaining.heat_maps`; groups, template space and regions in `explaining.groups`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainage_nb.cohort.images import image_stem
from brainage_nb.models.bundles.members import VGG
from brainage_nb.models.explaining.heat_maps import grad_cam, occlusion

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import FigureBase

    from brainage_nb.models.bundle import Bundle
    from brainage_nb.models.bundles.prediction import Prediction

GRAD_CAM, OCCLUSION, TRIPLETS = "grad_cam", "occlusion", "triplets"
METHODS = {
    GRAD_CAM: "Grad-CAM, relative",
    OCCLUSION: "occlusion: years that each place adds to the age",
    TRIPLETS: "years that each triplet of axial slices adds to the age",
}
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

        from brainage_nb.models.explaining.plots import overlay_planes

        figure = figure or Figure(figsize=(9, 3.3), layout="constrained")
        axes, spacing = figure.subplots(1, 3), self.spacing_mm
        overlay_planes(axes, prediction.volume, self.heat, at, opacity=opacity, spacing_mm=spacing)
        said = f"{prediction.scan}: {prediction.predicted_age:.1f} years; {self.title}"
        figure.suptitle(f"{said}\n", fontsize=10, linespacing=0.6, parse_math=False)
        return figure

    def save(self, folder: Path | str, prediction: Prediction, *, n_folders: int = 0) -> list[Path]:
        """Write `<scan>_heat.nii.gz`, which lies on the scan in any viewer, and `<scan>_heat.png`.

        They go into `folder`, below the last `n_folders` folders of the scan's path; below more of them
        where the map of another scan lies there.
        """
        import nibabel as nib

        from brainage_nb.workspace import writing

        scan = Path(os.path.abspath(prediction.path or prediction.scan))
        owner = hashlib.sha256(os.fsencode(scan)).hexdigest().encode()
        deepest = len(scan.parts) - 2  # all folders but the root
        for depth in range(min(n_folders, deepest), deepest + 1):
            nifti = Path(folder, *scan.parts[-1 - depth : -1], f"{image_stem(scan.name)}_heat.nii.gz")
            if not nifti.exists() or _owner_of(nifti) == owner:
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


def explain(
    bundle: Bundle,
    prediction: Prediction,
    method: str = "",
    *,
    progress: Callable[[float], Any] | None = None,
) -> Explanation:
    """A heat map of one predicted scan.

    Parameters
    ----------
    bundle : Bundle
        The one that made the prediction.
    method : {"grad_cam", "occlusion", "triplets"}
        Networks: Grad-CAM (a second) by default, occlusion (a minute) on request. VGG16-SVR: triplets.
    progress : callable, optional
        Receives the share done, 0 to 1 (occlusion only).
    """
    known = (TRIPLETS,) if bundle.model.kind == VGG else (GRAD_CAM, OCCLUSION)
    method = method or known[0]
    if method not in known:
        raise ValueError(f"method = {method!r}: for this model expected one of {', '.join(known)}.")
    spacing = float(bundle.settings.spacing_mm)
    if method == TRIPLETS:
        contributions = bundle.model.model.contributions(prediction.volume, bundle.model.variant)
        return Explanation(_as_slabs(contributions, prediction.volume.shape), method, spacing, contributions)
    model = bundle.model
    if method == GRAD_CAM:
        heat = grad_cam(model.networks, prediction.volume, flip_averaging=model.averaging["flip_averaging"])
        return Explanation(heat, method, spacing)
    edge = max(2, round(CUBE_MM / spacing))
    heat = occlusion(
        model.networks,
        prediction.volume,
        edge=edge,
        step=max(1, edge // 2),
        flip_averaging=model.averaging["flip_averaging"],
        progress=progress,
    )
    return Explanation(heat, method, spacing)


def _owner_of(heat_map: Path) -> bytes:
    """Hash of the path of the scan that a map was made of; empty where the file does not say."""
    import nibabel as nib

    try:
        return nib.load(heat_map).header["descrip"].item()
    except (OSError, ValueError, KeyError, nib.filebasedimages.ImageFileError):
        return b""


def _as_slabs(contributions: pd.DataFrame, shape: tuple[int, ...]) -> np.ndarray:
    heat = np.zeros(shape, dtype=np.float32)
    for row in contributions.dropna(subset=["years"]).itertuples():
        heat[:, :, row.first_slice : row.last_slice + 1] = row.years
    return heat
