"""Does the field of view hold the whole brain, whatever the head's pose, neck and place in the array?

Of each reference brain mask's voxels, the share inside the preprocessed cube; for the scans as they are and
with each disturbance done to the array of voxels, so that nothing in the header tells of it.

Run: `python benchmarks/field_of_view.py --data FOLDER [--quick]`; FOLDER holds `images/NAME.nii.gz` and
`dlmuse/NAME_DLMUSE.nii.gz`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.ndimage import affine_transform

from brainage_nb.volumes.preprocessing import grid_affine
from brainage_nb.volumes.scans import load_scan
from brainage_nb.volumes.settings import PreprocessingSettings

BARS = {"untouched": (99.8, 99.0)}
DISTURBED_BAR = (99.0, 97.0)
DIRECTIONS = {
    "left": (0, -1),
    "right": (0, 1),
    "back": (1, -1),
    "front": (1, 1),
    "down": (2, -1),
    "up": (2, 1),
}


def neck_added(image: np.ndarray, mask: np.ndarray, spacing: float, mm: float = 80.0):
    """Repeat the lowest slice that shows tissue downwards."""
    n = round(mm / spacing)
    lowest = int(np.argmax((image > 0).mean(axis=(0, 1)) > 0.02))
    neck = np.repeat(image[:, :, lowest : lowest + 1], n, axis=2)
    return (
        np.concatenate([neck, image[:, :, lowest:]], axis=2),
        np.concatenate([np.zeros(neck.shape, bool), mask[:, :, lowest:]], axis=2),
    )


def turned(image: np.ndarray, mask: np.ndarray, degrees: float, axis: int):
    """Turn the head inside an array padded so that nothing is cut off."""
    angle = np.deg2rad(degrees)
    a, b = (other for other in range(3) if other != axis)
    rotation = np.eye(3)
    rotation[[a, b], [a, b]] = np.cos(angle)
    rotation[a, b], rotation[b, a] = -np.sin(angle), np.sin(angle)
    pad = [(0, 0) if k == axis else (image.shape[k] // 5,) * 2 for k in range(3)]
    image, mask = np.pad(image, pad), np.pad(mask, pad)
    middle = (np.array(image.shape) - 1) / 2
    shift = middle - rotation @ middle
    return (
        affine_transform(image, rotation, shift, order=1),
        affine_transform(mask.astype(np.uint8), rotation, shift, order=0) > 0,
    )


def moved(image: np.ndarray, mask: np.ndarray, spacing: float, axis: int, sign: int, mm: float = 40.0):
    """Move the head in the array, by empty slices on one side."""
    n = round(mm / spacing)
    pad = [(0, 0) if k != axis else ((n, 0) if sign > 0 else (0, n)) for k in range(3)]
    return np.pad(image, pad), np.pad(mask, pad)


def disturbances(image: np.ndarray, mask: np.ndarray, spacing: float):
    """(name, image, mask) of every case."""
    yield "untouched", image, mask
    yield "80 mm more neck", *neck_added(image, mask, spacing)
    for degrees in (25, -25):
        yield f"pitched {degrees:+d} degrees", *turned(image, mask, degrees, axis=0)
    for name, (axis, sign) in DIRECTIONS.items():
        yield f"moved 40 mm {name}", *moved(image, mask, spacing, axis, sign)
    yield "rolled 25 degrees", *turned(image, mask, 25, axis=1)
    yield "turned 25 degrees", *turned(image, mask, 25, axis=2)
    yield "brain only", np.where(mask, image, 0), mask


def inside_percent(
    image: np.ndarray, mask: np.ndarray, spacing: float, settings: PreprocessingSettings
) -> float:
    """Share of the mask's voxels whose centre lies in the cube, per cent."""
    affine = np.diag([spacing, spacing, spacing, 1.0])
    grid = grid_affine(nib.Nifti1Image(image.astype(np.float32), affine), settings)
    to_grid = np.linalg.inv(grid) @ affine
    voxels = np.argwhere(mask) @ to_grid[:3, :3].T + to_grid[:3, 3]
    held = np.all((voxels >= -0.5) & (voxels <= settings.size - 0.5), axis=1)
    return 100.0 * float(held.mean())


def one_scan(path: Path, masks: Path, settings: PreprocessingSettings) -> list[dict]:
    """A row a disturbance."""
    scan = nib.as_closest_canonical(load_scan(path))
    stem = path.name.removesuffix(".nii.gz")
    mask = nib.as_closest_canonical(load_scan(masks / f"{stem}_DLMUSE.nii.gz"))
    spacing = float(scan.header.get_zooms()[0])
    arrays = np.asarray(scan.dataobj), np.asarray(mask.dataobj) > 0
    return [
        {"case": name, "scan": stem, "inside": inside_percent(image, brain, spacing, settings)}
        for name, image, brain in disturbances(*arrays, spacing)
    ]


def main() -> None:
    """Print the table and, as the last line, the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ixi_hh"))
    parser.add_argument("--quick", action="store_true", help="every tenth scan")
    options = parser.parse_args()
    paths = sorted((options.data / "images").glob("*.nii.gz"))[:: 10 if options.quick else 1]
    if not paths:
        print(json.dumps({"name": "field_of_view", "skipped": f"no scans under {options.data}"}))
        return
    began, settings = time.monotonic(), PreprocessingSettings()
    found = Parallel(n_jobs=2)(delayed(one_scan)(path, options.data / "dlmuse", settings) for path in paths)
    rows = pd.DataFrame([row for scan in found for row in scan])
    table = rows.groupby("case", sort=False)["inside"].agg(["mean", "min"])
    bars = [BARS.get(case, DISTURBED_BAR) for case in table.index]
    table["bar mean"], table["bar worst"] = zip(*bars, strict=True)
    table["holds"] = (table["mean"] >= table["bar mean"]) & (table["min"] >= table["bar worst"])
    print(
        f"Brain-mask voxels inside the {settings.size * settings.spacing_mm:g} mm cube, %, {len(paths)} scans"
    )
    print(table.round(3).to_string())
    verdict = {
        "name": "field_of_view",
        "value": float(table["mean"]["untouched"]),
        "bar": BARS["untouched"][0],
        "holds": bool(table["holds"].all()),
        "n": len(paths),
        "worst": float(table["min"].min()),
        "cases": {case: {"mean": row["mean"], "worst": row["min"]} for case, row in table.iterrows()},
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(verdict))


if __name__ == "__main__":
    main()
