"""How many 1 mm scans a second are preprocessed, against a plain loop over the same steps in MONAI.

Both read the same gzipped 256 x 256 x 176 files and give the same values. The floor is what nobody can leave
out: decompression and one linear resampling. Rounds alternate, so that a busy machine slows all alike.

Run: `python benchmarks/preprocessing.py [--scans 8] [--rounds 3] [--quick]`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.ndimage import affine_transform

from brainage_nb.volumes.heads import find_head
from brainage_nb.volumes.preprocessing import grid_affine, preprocess
from brainage_nb.volumes.resampling import resample, smoothing_sd
from brainage_nb.volumes.scans import load_scan, voxel_sizes
from brainage_nb.volumes.settings import PreprocessingSettings

BAR_RATIO, BAR_DIFFERENCE = 1.8, 1e-3
SHAPE, WORKERS = (256, 256, 176), 2
SETTINGS = PreprocessingSettings()


def write_scan(path: Path, seed: int, tilt_degrees: float) -> Path:
    """A noisy 1 mm head, int16, axes as a sagittal scanner stores them (PSR), gzipped."""
    rng = np.random.default_rng(seed)
    axes = [np.arange(n) - n / 2 for n in SHAPE]
    p, s, r = np.meshgrid(*axes, indexing="ij", sparse=True)
    radius = np.sqrt((p / 92) ** 2 + ((s - 30) / 75) ** 2 + (r / 72) ** 2)
    neck = (np.hypot(p - 10, r) < 55) & (s < -20)
    head = np.where(radius < 1.0, 900 + 150 * np.sin(p / 9) * np.cos(s / 8) * np.cos(r / 7), 0)
    head = np.where((radius > 1.1) & (radius < 1.2), 1400, head) + np.where(neck & (radius > 1.2), 700, 0)
    noisy = np.hypot(head + rng.normal(0, 25, SHAPE), rng.normal(0, 25, SHAPE)).astype(np.int16)
    affine = np.array([[0, 0, 1.0, -88], [-1, 0, 0, 128], [0, 1, 0, -128], [0, 0, 0, 1]])
    c, t = np.cos(np.deg2rad(tilt_degrees)), np.sin(np.deg2rad(tilt_degrees))
    turn = np.array([[1, 0, 0, 0], [0, c, -t, 0], [0, t, c, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(noisy, turn @ affine), path)
    return path


def monai_chain() -> Callable[[Path, np.ndarray], np.ndarray]:
    """The plain chain: load, RAS, smooth, resample to the grid, z-score."""
    from monai.transforms import GaussianSmooth, LoadImage, NormalizeIntensity, Orientation, SpatialResample

    load = LoadImage(image_only=True, ensure_channel_first=True)
    turn, normalise = Orientation("RAS", labels=None), NormalizeIntensity()
    to_grid = SpatialResample(mode="bilinear", padding_mode="zeros", align_corners=False)

    def chain(path: Path, grid: np.ndarray) -> np.ndarray:
        volume = turn(load(path))
        sd = smoothing_sd(voxel_sizes(volume.affine.numpy()), SETTINGS.spacing_mm)
        volume = GaussianSmooth([max(float(x), 1e-6) for x in sd])(volume)
        volume = to_grid(volume, dst_affine=grid, spatial_size=(SETTINGS.size,) * 3)
        return normalise(volume)[0].numpy()

    return chain


def floor(path: Path, grid: np.ndarray) -> np.ndarray:
    """Decompress, and sample linearly at the grid's voxels without any smoothing."""
    image = nib.Nifti1Image.from_bytes(zlib.decompress(path.read_bytes(), wbits=31))
    to_scan = np.linalg.inv(image.affine) @ grid
    return affine_transform(
        np.asarray(image.dataobj), to_scan, output_shape=(SETTINGS.size,) * 3, order=1, output=np.float32
    )


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def where_the_time_goes(path: Path) -> dict[str, float]:
    """Seconds of each part of `preprocess` on one scan, best of three."""
    image, grid = load_scan(path), grid_affine(path, SETTINGS)
    sd = smoothing_sd(voxel_sizes(image.affine), SETTINGS.spacing_mm)
    cube = resample(np.asarray(image.dataobj), image.affine, grid, SETTINGS.size, sd)
    parts = {
        "decompress": lambda: zlib.decompress(path.read_bytes(), wbits=31),
        "load and check (with decompression)": lambda: load_scan(path),
        "find the head": lambda: (image.extra.pop("head", None), find_head(image)),  # kept once found
        "smooth and resample": lambda: resample(
            np.asarray(image.dataobj), image.affine, grid, SETTINGS.size, sd
        ),
        "z-score": lambda: (cube - cube.mean()) / cube.std(),
    }
    return {name: min(seconds(part) for _ in range(3)) for name, part in parts.items()}


def compare(paths: list[Path], rounds: int) -> tuple[dict[str, float], float]:
    """Scans a second of each way (median of rounds), and the largest difference from MONAI."""
    chain = monai_chain()
    grids = [grid_affine(path, SETTINGS) for path in paths]
    pool = Parallel(n_jobs=WORKERS)
    jobs = list(zip(paths, grids, strict=True))
    ways = {
        "MONAI chain, plain loop": lambda: [chain(*job) for job in jobs],
        "ours, one process": lambda: [preprocess(path, SETTINGS) for path in paths],
        f"ours, {WORKERS} processes": lambda: pool(delayed(preprocess)(path, SETTINGS) for path in paths),
        f"floor, {WORKERS} processes": lambda: pool(delayed(floor)(*job) for job in jobs),
    }
    theirs, ours = chain(*jobs[0]), preprocess(paths[0], SETTINGS)  # also warms both up
    for way in list(ways.values())[2:]:
        way()
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    rates = {name: len(paths) / statistics.median(spent) for name, spent in times.items()}
    return rates, float(np.abs(theirs - ours).max())


def main() -> None:
    """Print both tables and, as the last line, the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="4 scans, one round")
    options = parser.parse_args()
    n, rounds = (4, 1) if options.quick else (options.scans, options.rounds)
    verdict = {"name": "preprocessing", "bar": BAR_RATIO, "unit": "times MONAI's scans a second", "n": n}
    ratios, differences = {}, {}
    for kind, tilt in (("straight", 0.0), ("oblique", 7.0)):
        with tempfile.TemporaryDirectory() as folder:
            paths = [write_scan(Path(folder) / f"{seed}.nii.gz", seed, tilt) for seed in range(n)]
            rates, differences[kind] = compare(paths, rounds)
            parts = where_the_time_goes(paths[0])
        table = pd.DataFrame({"scans a second": rates})
        table["times MONAI"] = table["scans a second"] / rates["MONAI chain, plain loop"]
        ratios[kind] = float(table["times MONAI"][f"ours, {WORKERS} processes"])
        print(
            f"\n{kind} 1 mm scans, {n} of {SHAPE}, gzipped; load {os.getloadavg()[0]:.1f} on {os.cpu_count()}"
        )
        print(table.round(2).to_string())
        print(f"largest difference from MONAI: {differences[kind]:.1e} of a standard deviation")
        print(pd.DataFrame({"s a scan, one process": parts}).round(3).to_string())
        verdict[kind] = {"scans_per_second": rates, "seconds": parts, "difference": differences[kind]}
    verdict |= {"value": min(ratios.values()), "ratios": ratios}
    verdict["holds"] = min(ratios.values()) >= BAR_RATIO and max(differences.values()) <= BAR_DIFFERENCE
    print(json.dumps(verdict))


if __name__ == "__main__":
    main()
