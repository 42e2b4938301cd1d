"""Where the brain is in a scan: a mask, the affine map to MNI152, and whether to trust them.

Works on whole heads, defaced and stripped scans. What the mask holds is the inside of the skull down to the
brain stem: brain, ventricles and the fluid around them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from brainage_nb.volumes.heads import MUCH_CUT_AWAY, find_head
from brainage_nb.volumes.registration import (
    Alignment,
    align,
    bend,
    carry,
    even_brightness,
    settle,
    signed_distance,
    template,
)
from brainage_nb.volumes.resampling import one_thread, resample_to
from brainage_nb.volumes.scans import ScanError, load_scan

if TYPE_CHECKING:
    import nibabel as nib

VERSION = 3  # raised whenever the same scan gives another brain than before; part of fingerprints
FINE_MM = 2.0  # grid on which the template is bent
AIR_PERCENTILE = 1.0  # of a scan's voxels: this is taken for the brightness of air
MARGIN_MM = 3.0  # the template's mask ends at the cortex; the skull begins about this much farther out
# What a brain found rightly looks like. Correlation: 242 looks at scans of adults gave 0.36 and more;
# a macaque, shuffled blocks, and heads whose header has them upside down or back to front gave 0.2 and less,
# a plain ball 0.29.
LOWEST_CORRELATION = 0.32
SCALES = (0.72, 1.20)  # stretch of the template along its main axes
VOLUME_L = (0.85, 3.0)  # MNI152 itself, larger than most, has 2.2
LOWEST_AGREEMENT = 0.80  # Dice of the bent mask with the affine one, or with one from elsewhere
# What other tools call a brain mask (BIDS, FSL, HD-BET, SynthStrip, ANTs); of a lesion, say, is none.
MASK_NAMES = (
    *("desc-brain_mask", "brain_mask", "brainmask", "brain-mask", "bet_mask", "hdbet_mask", "hd-bet_mask"),
    *("synthstrip_mask", "BrainExtractionMask"),
)
MASKED_BY_FREESURFER = ("T1", "nu", "orig", "rawavg")  # what lies in one space with its brainmask.mgz


@dataclass(frozen=True)
class Brain:
    """A brain found in a scan.

    Attributes
    ----------
    depth_mm : (n, n, n) float32 array
        Signed distance to the mask's surface on the template's grid, negative inside.
    alignment : Alignment
        The affine map from MNI152 to the scan that was found first; `depth_mm` and `core_depth_mm` lie on it.
    to_scan : (4, 4) array
        The affine map from MNI152 to the scan by the core of the brain alone: where volumes are taken from.
    core_depth_mm : (n, n, n) float32 array
        As `depth_mm`, of the template's mask bent by the core alone: less exact at the surface, but the same
        whether skull and scalp are there or not. Where another tool's mask was taken, it ends at most
        `MARGIN_MM` outside of that.
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
    to_scan: np.ndarray
    core_depth_mm: np.ndarray
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

    def depth_on(self, affine: np.ndarray, shape: tuple[int, ...], *, core: bool = False) -> np.ndarray:
        """`depth_mm`, or `core_depth_mm`, on a grid, as for `mask_on`."""
        from scipy.ndimage import affine_transform

        to_grid = np.linalg.inv(self.alignment.to_scan @ template(FINE_MM).affine) @ affine
        where = to_grid[:3, :3], to_grid[:3, 3]
        depth_mm = self.core_depth_mm if core else self.depth_mm
        return affine_transform(depth_mm, *where, tuple(shape), order=1, cval=50.0)


def find_brain(image: nib.spatialimages.SpatialImage, *, found_masks: bool = False) -> Brain:
    """Find the brain; the answer is kept in `image.extra`.

    Parameters
    ----------
    image : nibabel image
        As `load_scan` gives it.
    found_masks : bool
        Whether a mask that another tool left for the scan (`mask_beside`) replaces the one found here, if the
        two agree; if not, the flag `mask_not_taken` in `image.extra["flags"]` says why.

    Returns
    -------
    Brain
        Look at `problems` before using it; `brain_or_error` does.
    """
    key = ("brain", found_masks)
    if key not in image.extra:
        with one_thread():
            image.extra[key] = _find(image, found_masks)
    return image.extra[key]


def brain_or_error(image: nib.spatialimages.SpatialImage, *, found_masks: bool = False) -> Brain:
    """`find_brain`, and ScanError (`brain_not_found`) with the reasons where it cannot be trusted."""
    brain = find_brain(image, found_masks=found_masks)
    if brain.problems:
        raise ScanError(
            "brain_not_found",
            f"No brain was found that could be trusted: {'; '.join(brain.problems)}. Look at the scan.",
        )
    return brain


def mask_beside(scan: str | Path) -> Path | None:
    """A brain mask that another tool left for a scan: beside it, or in BIDS derivatives.

    `NAME_<one of MASK_NAMES>`, in derivatives `desc-brain_mask` in the scan's own space, and FreeSurfer's
    `brainmask.mgz` beside its `T1.mgz`.
    """
    scan = Path(scan)
    if scan.suffix == ".mgz":
        found = scan.with_name("brainmask.mgz")
        return found if found.is_file() and scan.stem in MASKED_BY_FREESURFER else None
    return _find_beside(scan, MASK_NAMES) or _find_in_derivatives(scan)


def _find(image: nib.spatialimages.SpatialImage, found_masks: bool) -> Brain:
    array = _without_offset(np.asanyarray(image.dataobj, dtype=np.float32))
    onto = template(FINE_MM)
    alignment = align(array, image.affine, np.array(find_head(image).centre_mm))
    grid = alignment.to_scan @ onto.affine
    scan = resample_to(FINE_MM, array, image.affine, grid, len(onto.brain)) / alignment.level
    scan = even_brightness(scan, onto.brain, onto.depth_mm)
    coefficients, correlation = bend(scan, onto)
    bent, depth = carry(onto, coefficients, onto.brain, onto.depth_mm)
    moved, settled = settle(even_brightness(scan, bent, depth), onto, coefficients)
    (core_depth,) = carry(onto, settled, onto.depth_mm)
    depth, core_depth = depth - MARGIN_MM, core_depth - MARGIN_MM
    agreement, source = _dice(depth < 0, onto.depth_mm < MARGIN_MM), "template"
    voxel_l = abs(np.linalg.det(grid)) / 1e6
    scan_file = image.extra.get("path") if found_masks else None
    if mask := scan_file and (mask_beside(scan_file) or _find_beside(scan_file, ("mask",))):
        try:
            depth, agreement = _read_mask_of(mask, grid, depth, voxel_l)
            core_depth, source = np.maximum(core_depth, depth - MARGIN_MM), str(mask)
        except ScanError as error:
            image.extra["flags"]["mask_not_taken"] = (
                f"{mask.name} was not taken as the brain mask, the brain was found without: {error.sentence}"
            )
    volume = float((depth < 0).sum() * voxel_l)
    problems = _find_problems(alignment, correlation, agreement, volume)
    to_scan = alignment.to_scan @ moved
    return Brain(depth, alignment, to_scan, core_depth, correlation, agreement, volume, source, problems)


def _without_offset(array: np.ndarray) -> np.ndarray:
    """The scan with air at about 0: some scanners add an offset.

    Around a stripped brain in z-scores lies 0, which is brighter than half of it; the darkest of what was
    kept stands for air there.
    """
    few = array[::4, ::4, ::4]
    air = np.percentile(few, AIR_PERCENTILE)
    if air < 0 and (few == 0).mean() > MUCH_CUT_AWAY:
        return np.where(array == 0, 0, array - np.percentile(few[few != 0], AIR_PERCENTILE))
    return array - air


def _find_problems(
    alignment: Alignment, correlation: float, agreement: float, volume: float
) -> tuple[str, ...]:
    """Sentences on what is not as in a brain found rightly; each with value and bounds."""
    largest, *_, smallest = alignment.scales
    checks = (
        ("it looks unlike a brain: its correlation with the template", correlation, LOWEST_CORRELATION, 1),
        ("its size, as a share of the template's along the shortest axis,", smallest, *SCALES),
        ("its size, as a share of the template's along the longest axis,", largest, *SCALES),
        ("what it holds, in litres,", volume, *VOLUME_L),
        ("its overlap with the template's affine mask", agreement, LOWEST_AGREEMENT, 1),
    )
    return tuple(
        f"{what} is {value:.2f} (expected {low} to {high})"
        for what, value, low, high in checks
        if not low <= value <= high
    )


def _read_mask_of(mask: Path, grid: np.ndarray, own: np.ndarray, voxel_l: float) -> tuple[np.ndarray, float]:
    """Signed distance of a mask file and its Dice with the brain found here (its signed distance is `own`).

    Raises
    ------
    ScanError
        Its name does not say that it is of the brain, it cannot be read, it has not the size of a brain, or
        the two overlap too little.
    """
    if not re.search(rf"({'|'.join(MASK_NAMES)})\.", mask.name):
        raise ScanError("mask_not_taken", "its name does not say that it is one (as …_brain_mask would).")
    depth = _read_depth(mask, grid, len(own))
    overlap, volume = _dice(depth < 0, own < 0), float((depth < 0).sum() * voxel_l)
    if overlap < LOWEST_AGREEMENT or not VOLUME_L[0] <= volume <= VOLUME_L[1]:
        low, high = VOLUME_L
        raise ScanError(
            "mask_not_taken",
            f"it holds {volume:.2f} litres (expected {low} to {high}) and overlaps the brain in the scan by "
            f"{overlap:.2f} (at least {LOWEST_AGREEMENT}).",
        )
    return depth, overlap


def _read_depth(mask: Path, grid: np.ndarray, size: int) -> np.ndarray:
    """Signed distance of a mask file (above 0 is brain) on the template's grid, laid onto the scan."""
    from scipy.ndimage import binary_closing

    image = load_scan(mask)
    brain = binary_closing(np.pad(np.asanyarray(image.dataobj) > 0, 3), iterations=2)[3:-3, 3:-3, 3:-3]
    inside = resample_to(FINE_MM, brain.astype(np.float32), image.affine, grid, size) > 0.5
    return signed_distance(inside, FINE_MM)


def _find_beside(scan: Path, parts: tuple[str, ...]) -> Path | None:
    """The first of `NAME_<part>.nii.gz` or `.nii` that lies beside a scan; NAME with or without `_T1w`."""
    stem = _stem(scan)
    every = product(parts, (stem, stem.removesuffix("_T1w")), (".nii.gz", ".nii"))
    files = (scan.with_name(f"{name}_{part}{ending}") for part, name, ending in every)
    return next(filter(Path.is_file, files), None)


def _find_in_derivatives(scan: Path) -> Path | None:
    """`derivatives/*/<the same folders>/<stem less _T1w>_desc-brain_mask` of the scan's data set."""
    name = _stem(scan).removesuffix("_T1w")
    for root in scan.parents[:5]:
        inner = scan.parent.relative_to(root)
        for space in ("", "_space-T1w"):  # the scan's own name: run-1 is not run-10, nor another acquisition
            if found := sorted(root.glob(f"derivatives/*/{inner}/{name}{space}_desc-brain_mask.nii*")):
                return found[0]
    return None


def _stem(scan: Path) -> str:
    return re.sub(r"\.(nii|hdr|img)(\.gz)?$", "", scan.name, flags=re.IGNORECASE)


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b)))
