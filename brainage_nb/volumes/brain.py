"""Where the brain is in a scan: a mask, the affine map to MNI152, and whether to trust them.

Works on whole heads, defaced and stripped scans. What the mask holds is the inside of the skull down to the
brain stem: brain, ventricles and the fluid around them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .alignment import Alignment, align
from .heads import find_head
from .mni import Template, template
from .resampling import one_thread, resample, smoothing_sd
from .scans import ScanError, load_scan, voxel_sizes
from .warping import bend, even_brightness

if TYPE_CHECKING:
    import nibabel as nib

VERSION = 1  # raised whenever the same scan gives another brain than before; part of fingerprints
FINE_MM = 2.0  # grid on which the template is bent
MARGIN_MM = 3.0  # the template's mask ends at the cortex; the skull begins about this much farther out
# What a brain found rightly looks like. Correlation: 242 looks at scans of adults gave 0.36 and more;
# a macaque, shuffled blocks, and heads whose header has them upside down or back to front gave 0.2 and less,
# a plain ball 0.29.
LOWEST_CORRELATION = 0.32
SCALES = (0.72, 1.20)  # stretch of the template along its main axes
VOLUME_L = (0.85, 3.0)  # MNI152 itself, larger than most, has 2.2
LOWEST_AGREEMENT = 0.80  # Dice of the affine and the bent mask, or of a mask from elsewhere
N4_SHRINK_MM, N4_ROUNDS = 4.0, (40, 30, 20)


@dataclass(frozen=True)
class Brain:
    """A brain found in a scan.

    Attributes
    ----------
    depth_mm : (n, n, n) float32 array
        Signed distance to the mask's surface on the template's grid, negative inside.
    alignment : Alignment
        The affine map from MNI152 to the scan.
    correlation : float
        Between the bent template and the scan, inside the brain.
    agreement : float
        Dice of the affine mask and the final one.
    volume_l : float
        Of the mask, litres.
    source : str
        `template`, or the file a mask was taken from.
    problems : tuple of str
        Why it should not be used; empty where nothing speaks against it.
    """

    depth_mm: np.ndarray
    alignment: Alignment
    correlation: float
    agreement: float
    volume_l: float
    source: str
    problems: tuple[str, ...]

    @property
    def quality(self) -> float:
        """0 to 1: the lower of correlation and agreement, 0 where a size is not that of a brain."""
        sized = not any("litres" in problem or "size" in problem for problem in self.problems)
        return float(np.clip(min(self.correlation, self.agreement), 0, 1)) if sized else 0.0

    def mask_on(self, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The mask (bool) on a grid: its affine (voxel to the scan's world, mm) and shape."""
        return self.depth_on(affine, shape) < 0

    def depth_on(self, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Signed distance in the template's mm on a grid of the scan's world."""
        from scipy.ndimage import affine_transform

        grid = template(FINE_MM).affine
        to_grid = np.linalg.inv(self.alignment.to_scan @ grid) @ affine
        return affine_transform(
            self.depth_mm, to_grid[:3, :3], to_grid[:3, 3], output_shape=tuple(shape), order=1, cval=50.0
        )


def find_brain(image: nib.spatialimages.SpatialImage, mask: str | Path | None = None) -> Brain:
    """Find the brain; the answer is kept in `image.extra`.

    Parameters
    ----------
    image : nibabel image
        As `load_scan` gives it.
    mask : path, optional
        A brain mask or a stripped scan of the same head by another tool, on any grid of the same world; it
        replaces the mask found here, which then checks it.

    Returns
    -------
    Brain
        Look at `problems` before using it; `brain_or_error` does.
    """
    key = ("brain", str(mask or ""))
    if key not in image.extra:
        with one_thread():
            image.extra[key] = _find(image, mask)
    return image.extra[key]


def brain_or_error(image: nib.spatialimages.SpatialImage, mask: str | Path | None = None) -> Brain:
    """`find_brain`, and ScanError (`brain_not_found`) with the reasons where it cannot be trusted."""
    brain = find_brain(image, mask)
    if brain.problems:
        raise ScanError(
            "brain_not_found",
            f"No brain was found that could be trusted: {'; '.join(brain.problems)}. Look at the scan, or "
            "give a brain mask made by another tool.",
        )
    return brain


def mask_beside(scan: str | Path) -> Path | None:
    """A brain mask that another tool left for a scan: beside it, or in BIDS derivatives.

    `NAME_desc-brain_mask` (BIDS, fMRIPrep; in the scan's own space), `NAME_brain_mask`, `NAME_mask`,
    `NAME_bet_mask` (HD-BET), `NAME_synthstrip_mask`, and FreeSurfer's `brainmask.mgz` beside an `.mgz`.
    """
    scan = Path(scan)
    if scan.suffix == ".mgz":
        found = scan.with_name("brainmask.mgz")
        return found if found.is_file() and found != scan else None
    stem = scan.name.removesuffix(".gz").removesuffix(".nii")
    for part in ("desc-brain_mask", "brain_mask", "mask", "bet_mask", "synthstrip_mask"):
        for name in {stem, stem.removesuffix("_T1w")}:
            for ending in (".nii.gz", ".nii"):
                if (beside := scan.with_name(f"{name}_{part}{ending}")).is_file():
                    return beside
    return _in_derivatives(scan, stem)


def without_bias(image: nib.spatialimages.SpatialImage, brain: Brain) -> np.ndarray:
    """N4 bias field correction (SimpleITK) with the field fitted inside the brain; float32, image's shape."""
    import SimpleITK as sitk

    array = np.ascontiguousarray(image.dataobj, dtype=np.float32)
    sizes = voxel_sizes(image.affine)
    mask = brain.mask_on(image.affine, array.shape).astype(np.uint8)
    picture, inside = sitk.GetImageFromArray(array), sitk.GetImageFromArray(mask)
    for part in (picture, inside):  # SimpleITK reads the axes in reverse
        part.SetSpacing([float(size) for size in sizes[::-1]])
    shrink = [int(np.ceil(N4_SHRINK_MM / max(size, 0.1) - 0.01)) for size in sizes[::-1]]
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(N4_ROUNDS)
    n4.Execute(sitk.Shrink(picture, shrink), sitk.Shrink(inside, shrink))
    field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(picture))
    return (array / np.exp(field)).astype(np.float32)


def _find(image: nib.spatialimages.SpatialImage, mask: str | Path | None) -> Brain:
    array = np.asanyarray(image.dataobj, dtype=np.float32)
    onto = template(FINE_MM)
    alignment = align(array, image.affine, np.array(find_head(image).centre_mm))
    scan = _on_template(array, image.affine, alignment, onto) / alignment.level
    depth, correlation = bend(even_brightness(scan, onto), onto)
    depth = depth - MARGIN_MM
    agreement, source = _dice(depth < 0, onto.depth_mm < MARGIN_MM), "template"
    if mask is not None:
        own, source = depth, str(mask)
        depth = _depth_of(mask, alignment, onto)
        agreement = _dice(depth < 0, own < 0)
    voxel_l = abs(np.linalg.det((alignment.to_scan @ onto.affine)[:3, :3])) / 1e6
    volume = float((depth < 0).sum() * voxel_l)
    problems = _problems(alignment, correlation, agreement, volume, source)
    return Brain(depth, alignment, correlation, agreement, volume, source, problems)


def _on_template(array: np.ndarray, affine: np.ndarray, alignment: Alignment, onto: Template) -> np.ndarray:
    grid = alignment.to_scan @ onto.affine
    return resample(array, affine, grid, len(onto.brain), smoothing_sd(voxel_sizes(affine), FINE_MM))


def _problems(
    alignment: Alignment, correlation: float, agreement: float, volume: float, source: str
) -> tuple[str, ...]:
    """Sentences on what is not as in a brain found rightly; each with value and bound."""
    found = []
    if not correlation >= LOWEST_CORRELATION:
        found.append(
            f"it looks unlike a brain (correlation {correlation:.2f}, at least {LOWEST_CORRELATION})"
        )
    low, high = alignment.scales[-1], alignment.scales[0]
    if not SCALES[0] <= low <= high <= SCALES[1]:
        found.append(f"its size is {low:.2f} to {high:.2f} of the template's ({SCALES[0]} to {SCALES[1]})")
    if not VOLUME_L[0] <= volume <= VOLUME_L[1]:
        found.append(f"it holds {volume:.2f} litres ({VOLUME_L[0]} to {VOLUME_L[1]})")
    if not agreement >= LOWEST_AGREEMENT:
        other = "template's affine mask" if source == "template" else f"mask {Path(source).name}"
        found.append(f"it and the {other} overlap by {agreement:.2f} only (at least {LOWEST_AGREEMENT})")
    return tuple(found)


def _depth_of(mask: str | Path, alignment: Alignment, onto: Template) -> np.ndarray:
    """Signed distance of a mask file (above 0 is brain) on the template's grid."""
    from scipy import ndimage

    image = load_scan(mask)
    brain = np.asanyarray(image.dataobj) > 0
    brain = ndimage.binary_closing(np.pad(brain, 3), iterations=2)[3:-3, 3:-3, 3:-3]
    inside = _on_template(brain.astype(np.float32), image.affine, alignment, onto) > 0.5
    outer, inner = ndimage.distance_transform_edt(~inside), ndimage.distance_transform_edt(inside)
    return (np.where(inside, 0.5 - inner, outer - 0.5) * onto.spacing_mm).astype(np.float32)


def _in_derivatives(scan: Path, stem: str) -> Path | None:
    """`derivatives/*/<the same folders>/<stem less _T1w>_desc-brain_mask` of the scan's data set."""
    for root in scan.parents[:5]:
        if not (root / "derivatives").is_dir():
            continue
        inner = scan.parent.relative_to(root)
        name = stem.removesuffix("_T1w")
        for space in ("", "_space-T1w"):  # the scan's own name: run-1 is not run-10, nor another acquisition
            if found := sorted((root / "derivatives").glob(f"*/{inner}/{name}{space}_desc-brain*_mask.nii*")):
                return found[0]
    return None


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b)))
