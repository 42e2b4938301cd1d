"""Open every scan of a cohort and write down facts about it; one bad scan never ends the run.

Measures only. What the facts mean for a scan, kept or dropped, is for cleaning to say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cluster import process_pool
from brainage_nb.platforms import n_workers
from brainage_nb.volumes.heads import coarse_picture, find_head, head_mask
from brainage_nb.volumes.scans import (
    MAX_VOXELS,
    ScanError,
    errors_as_reason,
    load_scan,
    placement,
    read_header,
    voxel_file,
    voxel_sizes,
)
from brainage_nb.workspace import sha256_of

FACTS = (
    *("scan_id", "error", "error_detail", "file_flags", "shape", "voxel_mm", "field_of_view_mm"),
    *("orientation", "dtype", "oblique_degrees", "nonfinite_fraction", "intensity_p1", "intensity_p50"),
    *("intensity_p99", "n_values", "equal_neighbours", "at_maximum", "head_ml", "head_mm", "edge_fractions"),
    *("bottom_cut", "skull_stripped", "brightness", "sha256", "voxels_sha256"),
)
BRIGHT = 0.1
"""A voxel above this share of the range (1st to 99th percentile) stands out from the background."""
CRASHED = "reading it ended the process that read it (memory, or a fault in the reader); look at it by hand."


def inspect_scans(
    cohort: pd.DataFrame, resolve: Callable[[str], Path], *, n_jobs: int = 0, max_voxels: int = MAX_VOXELS
) -> pd.DataFrame:
    """Open every scan of the cohort, in parallel, and record facts.

    Parameters
    ----------
    cohort : DataFrame
        With `scan_id` and `image`.
    resolve : callable
        Turns an `image` cell into an absolute path (`workspace.resolve`).
    n_jobs : int
        Processes; 0 for as many as this session may use.
    max_voxels : int
        Most voxels a header may claim before it is no longer believed.

    Returns
    -------
    DataFrame
        One row per scan, in the order of `cohort`; unknown facts are None or NaN.

        scan_id : the scan
        error : code of what kept it from being measured, empty where nothing did
        error_detail : the same as a sentence
        file_flags : what was taken for granted while reading: code to sentence
        shape : voxels along each axis as stored
        voxel_mm : edge lengths of a voxel [mm], from the affine
        field_of_view_mm : shape x voxel_mm [mm]
        orientation : anatomical direction in which each stored axis grows, such as RAS
        dtype : number type on disk
        oblique_degrees : largest angle between a stored axis and the nearest anatomical axis [degrees]
        nonfinite_fraction : share of voxels that are NaN or infinite
        intensity_p1, intensity_p50, intensity_p99 : percentiles of intensity
        n_values : distinct intensities among at most 250 000 evenly spaced voxels
        equal_neighbours : share of bright voxels with a neighbour exactly as bright (label maps: most)
        at_maximum : share of bright voxels that have exactly the greatest intensity
        head_ml : volume of the head, or of what stands out from the background [ml]
        head_mm : geometric mean of its width and length [mm]
        edge_fractions : its section in the outermost slices over its largest: left, right, back, front, top
        bottom_cut : whether the image ends too close below the crown to hold the whole brain
        skull_stripped : whether the outermost tissue looks like brain, not like scalp over bone
        brightness : median over 99th percentile of intensity inside it, both above the background
        sha256 : SHA-256 of the file
        voxels_sha256 : SHA-256 of shape and intensities in the orientation nearest to RAS: equal for the same
            picture under another compression, number type or axis order

    Examples
    --------
    >>> facts = inspect_scans(cohort, ws.resolve)  # doctest: +SKIP
    >>> facts[["scan_id", "voxel_mm", "head_ml"]]  # doctest: +SKIP
    """
    tasks = [(resolve(image), max_voxels) for image in cohort["image"]]
    crashed = {"error": "unreadable", "error_detail": f"The file cannot be read: {CRASHED}"}
    found = dict(each_in_parallel(inspect_scan, tasks, n_jobs, title="scans inspected", lost=crashed))
    frame = pd.DataFrame([found[position] for position in range(len(tasks))], columns=FACTS)
    frame["scan_id"] = cohort["scan_id"].to_numpy()
    frame[["error", "error_detail"]] = frame[["error", "error_detail"]].fillna("")
    return frame


def each_in_parallel(
    work: Callable[..., Any], tasks: Sequence[tuple], n_jobs: int, *, title: str, lost: Any
) -> Iterator[tuple[int, Any]]:
    """Yield (position, work(*task)) as results come; a task whose process dies yields (position, lost).

    A dead worker takes all others with it, so whatever is then unfinished is done again one by one, which
    shows who did it.
    """
    from joblib import delayed
    from tqdm import tqdm

    # At least two: with one, joblib works in this very process, and a crash would end the session.
    parallel = process_pool(max(2, n_workers(n_jobs)), return_as="generator_unordered")
    waiting = set(range(len(tasks)))
    groups = [sorted(waiting)]
    with tqdm(total=len(tasks), desc=title, unit="scan") as bar:
        for group in groups:
            found = parallel(delayed(_numbered)(work, position, tasks[position]) for position in group)
            try:
                for position, result in found:
                    waiting.remove(position)
                    bar.update()
                    yield position, result
            except BrokenProcessPool:
                if len(group) > 1:
                    groups += [[position] for position in sorted(waiting)]
                else:
                    bar.update()
                    yield group[0], lost


def _numbered(work: Callable[..., Any], position: int, task: tuple) -> tuple[int, Any]:
    return position, work(*task)


def inspect_scan(path: str | Path, max_voxels: int = MAX_VOXELS) -> dict[str, Any]:
    """Facts of one scan by their names in `FACTS`; any exception becomes its `error`, none is raised."""
    path, facts = Path(path), {}
    try:
        with errors_as_reason(path, "measured"):
            facts |= _read_header(path)
            facts["sha256"] = sha256_of(voxel_file(path)) if path.is_file() else ""
            image = load_scan(path, max_voxels=max_voxels)
            facts |= _measure_geometry(image.shape, image.affine)
            facts |= _measure_content(image) | _measure_head(image)
    except ScanError as error:
        facts |= {"error": error.code, "error_detail": error.sentence}
    return facts


def _read_header(path: Path) -> dict[str, Any]:
    """What the header says, without touching the voxels, so that it is known of dropped scans too."""
    facts: dict[str, Any] = {}
    with suppress(Exception):  # load_scan says what is wrong with the file
        header, flags = read_header(path)
        shape = tuple(int(n) for n in header.get_data_shape())
        facts |= {"shape": shape, "dtype": str(header.get_data_dtype())}
        facts |= _measure_geometry(shape, placement(header, path, flags)) if len(shape) >= 3 else {}
    return facts


def _measure_geometry(shape: tuple[int, ...], affine: np.ndarray) -> dict[str, Any]:
    import nibabel as nib

    size = voxel_sizes(affine)
    cosines = affine[:3, :3] / size
    angle = np.degrees(np.arccos(np.clip(np.abs(cosines).max(axis=0), 0, 1)))
    return {
        "shape": tuple(int(n) for n in shape),
        "voxel_mm": tuple(size.round(3).tolist()),
        "field_of_view_mm": tuple((np.array(shape[:3]) * size).round(1).tolist()),
        "orientation": "".join(axis or "?" for axis in nib.aff2axcodes(affine)),
        "oblique_degrees": float(angle.max().round(1)),
    }


def _measure_content(image: Any) -> dict[str, Any]:
    array = np.asarray(image.dataobj)
    sample = array.reshape(-1)[:: max(1, array.size // 250_000)]
    low, middle, high = np.percentile(sample, [1, 50, 99])
    bright = sample > low + BRIGHT * (high - low)
    return {
        "file_flags": image.extra["flags"],
        "nonfinite_fraction": round(image.extra["nonfinite_fraction"], 4),
        "intensity_p1": float(low),
        "intensity_p50": float(middle),
        "intensity_p99": float(high),
        "n_values": len(np.unique(sample)),
        "equal_neighbours": _share_of_equal_neighbours(array, low, high),
        "at_maximum": float(np.mean(sample[bright] == array.max()).round(4)) if bright.any() else 0.0,
        "voxels_sha256": _hash_voxels(image),
    }


def _share_of_equal_neighbours(array: np.ndarray, low: float, high: float) -> float:
    """Share of bright voxels whose next neighbour along the first axis is exactly as bright."""
    lines = array[:, :: max(1, array.shape[1] // 40), :: max(1, array.shape[2] // 40)]
    # Above a tenth of the range: faint background noise, stored in few grey levels, repeats itself too.
    bright = lines[:-1] > low + BRIGHT * (high - low)
    return float((lines[:-1] == lines[1:])[bright].mean().round(3)) if bright.any() else 1.0


def _measure_head(image: Any) -> dict[str, Any]:
    """Size, brightness and completeness of the head."""
    head = find_head(image)
    coarse, _ = coarse_picture(np.asanyarray(image.dataobj), image.affine)
    mask = head_mask(coarse)
    level = np.percentile(coarse, 1)
    inside = coarse[mask]
    width, length, height = (mask.sum(axis=others) for others in ((1, 2), (0, 2), (0, 1)))
    spread = np.percentile(inside, 99) - level
    faces = ((width, 0), (width, -1), (length, 0), (length, -1), (height, -1))
    return {
        "head_ml": round(1000 * head.volume_l, 1),
        "head_mm": round(float(np.sqrt(head.extent_mm[0] * head.extent_mm[1])), 1),
        "edge_fractions": tuple(round(float(area[end] / area.max()), 3) for area, end in faces),
        "bottom_cut": "bottom" in head.cut_off,
        "skull_stripped": head.skull_stripped,
        "brightness": round(float((np.median(inside) - level) / spread), 3) if spread > 0 else float("nan"),
    }


def _hash_voxels(image: Any) -> str:
    import nibabel as nib

    array = np.asarray(nib.as_closest_canonical(image).dataobj, dtype="<f4")
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(np.ascontiguousarray(array + 0.0))  # -0.0 becomes 0.0
    return digest.hexdigest()
