"""Scans of other modalities, laid onto the T1w scan of their session, whose map then leads to the template.

The move is rigid and found by normalised mutual information (Studholme et al. 1999,
doi:10.1016/S0031-3203(98)00091-0), which needs no word on which tissue is bright in which scan.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from brainage_nb.volumes.heads import find_head
from brainage_nb.volumes.maps import read_map
from brainage_nb.volumes.registration import mni_grid
from brainage_nb.volumes.resampling import LinearSampler, one_thread, resample_to
from brainage_nb.volumes.scans import ScanError, load_scan

if TYPE_CHECKING:
    import nibabel as nib

Voxels = tuple[np.ndarray, np.ndarray]  # an image's, and their affine
VERSION = 1  # raised whenever the same pair of scans gives another map than before; part of fingerprints
BALL_MM = 95.0  # compared is what lies so near the T1w head's centre: the head without neck and face
REACH_MM = 320.0  # edge of the cube around the other scan's head
BINS, DARKEST, BRIGHTEST = 32, 1, 99  # of intensity, along each side of the joint histogram; percentiles
SPACINGS = ((8.0, 0.5), (4.0, 0.05))  # grids of the search, and how near each comes: mm and degrees
LEAST_SEEN = 0.4  # share of those points that the other scan has to show
LEAST_TOLD = 0.02  # information beyond 1: noise has 0.004, two contrasts of one head 0.1 to 0.3
# What `register` finds: 0.54 and more where a second contrast was computed from eight real T1w heads (three
# also with 6 mm slices, noise, blur, a strong bias field, half the head); other people's 0.36 to 0.49 (11
# pairs), a wrong voxel size 0.33, turned or upside down 0.20.
LOWEST_FIT = 0.51
# A scan with left and right swapped fits, too. It is told by the information beyond 1 that its mirror image
# has, as a share of its own: 0.54 to 0.96 in 35 scans beside made and real T1w heads, of which 18 were then
# swapped: 1.06 to 1.84.
MOST_MIRRORED = 1.03
ENTITY = re.compile(r"(?:^|[/\\_])(sub|ses)-([0-9A-Za-z]+)")  # of BIDS


class Similarity:
    """How much a scan tells of a T1w scan where a rigid move lays it, as a function of that move.

    Parameters
    ----------
    spacing_mm : float
        Grid on which they are compared.
    t1w, scan : (array, affine)
        Voxels (i, j, k) float32, and voxel to world, mm.
    centre, scan_centre : (3,) arrays
        About the middle of each head, world.
    """

    def __init__(
        self, spacing_mm: float, t1w: Voxels, scan: Voxels, centre: np.ndarray, scan_centre: np.ndarray
    ) -> None:
        size = 2 * round(BALL_MM / spacing_mm) + 1
        away = (np.indices((size,) * 3).reshape(3, -1).T - size // 2) * spacing_mm
        near = ((away**2).sum(axis=1) < BALL_MM**2) & (away.sum(axis=1) / spacing_mm % 2 == 0)  # a chessboard
        self.points, self.centre = away[near], centre
        cube = resample_to(spacing_mm, *t1w, mni_grid(spacing_mm, size, centre), size)
        self.row = BINS * np.round(_to_bins(cube.ravel()[near])).astype(int)
        size = round(REACH_MM / spacing_mm)
        grid = mni_grid(spacing_mm, size, scan_centre)
        voxels = np.stack(
            [resample_to(spacing_mm, one, scan[1], grid, size) for one in (scan[0], np.ones_like(scan[0]))],
            -1,
        )
        shown = voxels[..., 1] > 0.5
        shown |= not shown.any()  # of a scan smaller than a voxel of this grid nothing is shown
        voxels[..., 0] = _to_bins(voxels[..., 0], shown)
        self.sample, self.to_voxel = LinearSampler(voxels), np.linalg.inv(grid)

    def __call__(self, move: np.ndarray, least_seen: float = LEAST_SEEN) -> float:
        """Normalised mutual information, 1 to 2, at a move (6,): mm, then degrees about x, y and z."""
        to_voxel = self.to_voxel @ rigid_map(move, self.centre)
        placed = (self.points + self.centre) @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        column, shown = self.sample(placed).T
        used = shown > 0.5
        if used.mean() < least_seen:
            return 1.0
        low = np.minimum(column[used].astype(int), BINS - 2)
        share, at = column[used] - low, self.row[used] + low
        joint = np.bincount(at, 1 - share, BINS**2) + np.bincount(at + 1, share, BINS**2)
        joint = joint.reshape(BINS, BINS) / joint.sum()
        return (_entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1))) / max(_entropy(joint), 1e-9)


def rigid_map(move: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Affine (4, 4) that turns about a centre (degrees, `move[3:]`), then shifts (mm, `move[:3]`)."""
    from scipy.spatial.transform import Rotation

    made = np.eye(4)
    made[:3, :3] = Rotation.from_euler("xyz", move[3:], degrees=True).as_matrix()
    made[:3, 3] = centre + move[:3] - made[:3, :3] @ centre
    return made


def register(
    t1w: nib.spatialimages.SpatialImage, scan: nib.spatialimages.SpatialImage
) -> tuple[np.ndarray, float, bool]:
    """Where a scan of a session's other modality lies on its T1w scan.

    Starts from the scanner's own coordinates and, where somebody has changed them, from head on head.

    Parameters
    ----------
    t1w, scan : nibabel images
        As `load_scan` gives them.

    Returns
    -------
    to_scan : (4, 4) array
        From the T1w scan's world to the other's, mm, rigid.
    fit : float
        Share of the mutual information that is lost 10 mm beside: sharp where the two are one head.
    mirrored : bool
        Whether the scan tells more of the T1w scan with left and right swapped.
    """
    from scipy.optimize import minimize

    voxels = [(np.asanyarray(one.dataobj, dtype=np.float32), one.affine) for one in (t1w, scan)]
    centres = [np.array(find_head(one).centre_mm) for one in (t1w, scan)]
    moves = [np.zeros(6), np.r_[centres[1] - centres[0], np.zeros(3)]]
    with one_thread():
        for spacing, near in SPACINGS:
            measure = Similarity(spacing, *voxels, *centres)
            how = {"method": "Powell", "options": {"xtol": near, "ftol": 1e-5, "maxiter": 30}}
            found = [minimize(lambda move: -measure(move), move, **how) for move in moves]  # noqa: B023
            moves = [min(found, key=lambda one: one.fun).x]
        swapped = Similarity(spacing, voxels[0], _mirror(voxels[1], centres[1]), *centres)
        apart = np.r_[centres[1] - centres[0], np.zeros(3)]
        start = apart + (moves[0] - apart) * (-1, 1, 1, 1, -1, -1)  # the move found, seen in the mirror
        told = -minimize(lambda move: -swapped(move), start, **how).fun - 1
    mirrored = told > MOST_MIRRORED * (measure(moves[0]) - 1)
    return rigid_map(moves[0], centres[0]), _sharpness(measure, moves[0]), mirrored


def _mirror(scan: Voxels, centre: np.ndarray) -> Voxels:
    """The scan with left and right swapped about the middle of its head."""
    swap = np.diag([-1.0, 1, 1, 1])
    swap[0, 3] = 2 * centre[0]
    return scan[0], swap @ scan[1]


def _sharpness(measure: Similarity, move: np.ndarray) -> float:
    """The `fit` of `register`; 0 where one tells nothing of the other."""
    best = measure(move) - 1
    if best < LEAST_TOLD:
        return 0.0
    beside = [
        measure(move + shift, LEAST_SEEN / 2) - 1 for shift in 10 * np.r_[np.eye(6)[:3], -np.eye(6)[:3]]
    ]
    return 1 - float(np.mean(beside)) / best


def lay_onto_t1w(
    scan: str | Path, t1w: str | Path | nib.spatialimages.SpatialImage, modality: str
) -> nib.spatialimages.SpatialImage:
    """Open a scan of another modality where the T1w scan of its session has it, as `preprocess` takes it.

    Voxels stay as they are; the affine leads to the T1w scan's world, so that they are sampled once only.

    Parameters
    ----------
    scan : path
    t1w : path or nibabel image
        As `load_scan` reads or gives it.
    modality : str
        One of `MODALITIES`, not T1w.

    Raises
    ------
    ScanError
        One of the two cannot be used, both are one picture (`same_scan`), their names say that they are of
        different people or sessions (`other_session`), or no rigid move lays one onto the other, or lays
        it better with left and right swapped (`not_registered`).

    Examples
    --------
    >>> image = lay_onto_t1w("sub-01_T2w.nii.gz", "sub-01_T1w.nii.gz", "T2w")  # doctest: +SKIP
    >>> preprocess(image, settings.for_modality("T2w"))  # doctest: +SKIP
    """
    t1w = load_scan(t1w) if isinstance(t1w, str | Path) else t1w
    image, picture = _open_scan(scan, modality)
    if picture.shape == t1w.shape and np.array_equal(picture.dataobj, t1w.dataobj):
        raise ScanError(
            "same_scan",
            f"{Path(scan).name} was given as the {modality} scan, and it is the T1w scan "
            f"{t1w.extra['path'].name} itself: every voxel is the same. Give the {modality} scan.",
        )
    said, expected = (_read_entities(path) for path in (scan, t1w.extra["path"]))
    if any(said[key] != expected[key] for key in said.keys() & expected.keys()):
        raise ScanError(
            "other_session",
            f"By their names {Path(scan).name} is of {' '.join(said.values())}, and the T1w scan "
            f"{t1w.extra['path'].name} of {' '.join(expected.values())}. Give the {modality} scan of the "
            "same person and session.",
        )
    to_scan, fit, mirrored = register(t1w, picture)
    names = f"{Path(scan).name} cannot be laid onto {t1w.extra['path'].name}"
    if fit < LOWEST_FIT:
        raise ScanError(
            "not_registered",
            f"{names}: where they agree best, their fit is {fit:.2f} (expected {LOWEST_FIT} or more). Look "
            "at both: are they of one person and session, and are size and direction of the voxels right?",
        )
    if mirrored:
        raise ScanError(
            "not_registered",
            f"{names}: it fits better with left and right swapped. One of the two has its sides wrong in the "
            "file. Find out which, and convert that one again from the scanner's own files.",
        )
    extra = image.extra | {"t1w": t1w, "modality": modality}
    return type(image)(image.dataobj, np.linalg.inv(to_scan) @ image.affine, extra=extra)


def _read_entities(path: str | Path) -> dict[str, str]:
    """Person and session that a BIDS name states, as {"sub": "sub-01", "ses": "ses-2"}, as far as it does."""
    return {key: f"{key}-{label}" for key, label in ENTITY.findall(str(path))}


def _open_scan(scan: str | Path, modality: str) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """What becomes of a scan, and the picture that it is registered by: itself, or the mean of its series."""
    if "-" not in modality:
        return (image := load_scan(scan)), image
    import nibabel as nib

    found, picture, affine = read_map(scan, modality)
    extra = {"flags": {}, "path": Path(scan)}
    return nib.Nifti1Image(found, affine, extra=extra), nib.Nifti1Image(picture, affine, extra=dict(extra))


def _to_bins(values: np.ndarray, counted: np.ndarray | slice = slice(None)) -> np.ndarray:
    low, high = np.percentile(values[counted], (DARKEST, BRIGHTEST))
    return np.clip((values - low) / max(high - low, 1e-9), 0, 1) * (BINS - 1)


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
