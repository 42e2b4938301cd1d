"""Maps from series: fractional anisotropy and mean diffusivity of diffusion, fALFF of resting BOLD.

Plain estimates from the series as it is: no correction of motion, eddy currents or distortion. Where a
pipeline has corrected a series, give that one.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from brainage_nb.volumes.scans import MAX_VOXELS, ScanError, placement, read_header

UNWEIGHTED = 50.0  # s/mm^2: below, a volume counts as one without diffusion weighting
FEWEST_DIRECTIONS = 6  # a tensor has so many numbers
BAND_HZ = (0.01, 0.08)  # of fALFF (Zou et al. 2008, doi:10.1016/j.jneumeth.2008.04.012), of all up to Nyquist
FEWEST_SECONDS = 120.0  # of BOLD: the band is to hold several frequencies
TR_S = (0.2, 6.0)  # longer ones do not see the band
SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}


def read_map(path: str | Path, modality: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a modality is made of: a map, and the mean picture of the series to register it by.

    Parameters
    ----------
    path : path
        A 4-D series; of diffusion with `.bval` and `.bvec` beside it (or, as in BIDS, above it).
    modality : {"dwi-FA", "dwi-MD", "bold-fALFF"}

    Returns
    -------
    map, picture : (i, j, k) float32 arrays
        The map is 0 outside of the head.
    affine : (4, 4) array
        Voxel to world, mm.

    Raises
    ------
    ScanError
        No series, no gradients, no repetition time, or dipy is not installed.
    """
    kind, measure = modality.split("-")
    path = Path(path)
    series, affine, tr = _load_series(path, modality)
    if kind == "dwi":
        return *_fit_tensor(series, *_read_gradients(path, series.shape[3]), measure.lower()), affine
    return *_measure_falff(series, tr, path.name), affine


def _load_series(path: Path, modality: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Voxels (i, j, k, n) float32, affine in mm and repetition time in seconds."""
    import nibabel as nib

    header, flags = read_header(path)
    shape = header.get_data_shape()
    if len(shape) != 4 or shape[3] < 2:
        raise ScanError(
            "not_series",
            f"{path.name}: {modality} is made from a series of volumes, and this has the shape {shape}. Give "
            "the series itself, not a map or a picture of it.",
        )
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        raise ScanError("too_large", f"{path.name}: its header claims {shape} voxels.")
    affine = placement(header, path, flags)
    series = np.nan_to_num(np.asarray(nib.load(path).dataobj, np.float32), posinf=0.0, neginf=0.0)
    unit = header.get_xyzt_units()[1] if hasattr(header, "get_xyzt_units") else "sec"
    return series, affine, float(header.get_zooms()[3]) * SECONDS.get(unit, 1.0)


# --- diffusion ------------------------------------------------------------------------------------------


def _read_gradients(path: Path, n: int) -> tuple[np.ndarray, np.ndarray]:
    """b-values (n,) in s/mm^2 and directions (n, 3) of a diffusion series."""
    stem = re.sub(r"\.nii(\.gz)?$", "", path.name)
    found = []
    for ending in ("bval", "bvec"):
        places = [path.with_name(f"{stem}.{ending}")]
        places += [folder / f"dwi.{ending}" for folder in path.parents[:4]]  # one for all, as BIDS allows
        if (place := next(filter(Path.is_file, places), None)) is None:
            raise ScanError("no_gradients", f"{path.name}: {stem}.{ending} is missing beside it.")
        try:
            found.append(np.atleast_2d(np.loadtxt(place)))
        except ValueError as error:
            raise ScanError("no_gradients", f"{place.name} is no table of numbers ({error}).") from error
    values, directions = found[0].ravel(), found[1] if found[1].shape[1] == 3 else found[1].T
    weighted = np.count_nonzero(values >= UNWEIGHTED)
    if not len(values) == len(directions) == n or directions.shape[1] != 3:
        raise ScanError(
            "no_gradients",
            f"{path.name} has {n} volumes, and {len(values)} b-values and {len(directions)} directions.",
        )
    if weighted < FEWEST_DIRECTIONS or weighted == n:
        raise ScanError(
            "no_gradients",
            f"{path.name}: {weighted} of {n} volumes are weighted by diffusion; expected "
            f"{FEWEST_DIRECTIONS} or more, and one without.",
        )
    return values, directions


def _fit_tensor(
    series: np.ndarray, values: np.ndarray, directions: np.ndarray, measure: str
) -> tuple[np.ndarray, np.ndarray]:
    """`fa` or `md` (1e-3 mm^2/s) inside of the head, and the mean picture without diffusion weighting."""
    try:
        from dipy.core.gradients import gradient_table
        from dipy.reconst.dti import TensorModel
    except ImportError as error:
        raise ScanError("no_dipy", "Diffusion needs dipy: pip install 'brainage-nb[dwi]'.") from error
    picture = series[..., values < UNWEIGHTED].mean(axis=-1)
    table = gradient_table(values, bvecs=directions, b0_threshold=UNWEIGHTED)
    fitted = TensorModel(table).fit(series, mask=_find_inside(picture))
    made = np.nan_to_num(getattr(fitted, measure)) * (1e3 if measure == "md" else 1.0)
    return made.astype(np.float32), picture


# --- BOLD -----------------------------------------------------------------------------------------------


def _measure_falff(series: np.ndarray, tr: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Share of the amplitude of fluctuation that lies in `BAND_HZ`, inside of the head; the mean picture."""
    from scipy.signal import detrend

    n = series.shape[3]
    if not TR_S[0] <= tr <= TR_S[1]:
        told = f"{name}: its header gives a repetition time of {tr:g} s"
        raise ScanError("no_tr", f"{told}; expected {TR_S[0]} to {TR_S[1]} s.")
    if n * tr < FEWEST_SECONDS:
        raise ScanError(
            "too_short", f"{name} lasts {n * tr:.0f} s; fALFF needs {FEWEST_SECONDS:.0f} or more."
        )
    picture = series.mean(axis=-1)
    inside = _find_inside(picture)
    amplitude = np.abs(np.fft.rfft(detrend(series[inside], axis=-1), axis=-1))[:, 1:]
    frequency = np.fft.rfftfreq(n, tr)[1:]
    slow = (frequency >= BAND_HZ[0]) & (frequency <= BAND_HZ[1])
    total = amplitude.sum(axis=-1)
    made = np.zeros(picture.shape, np.float32)
    made[inside] = amplitude[:, slow].sum(axis=-1) / np.where(total > 0, total, 1)
    return made, picture


def _find_inside(picture: np.ndarray) -> np.ndarray:
    """Where a mean picture is brighter than air: above a fifth of its brightest percentile."""
    return picture > 0.2 * np.percentile(picture, 99)
