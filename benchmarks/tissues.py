"""Grey and white matter against the regions of another tool (DLMUSE) on real scans.

Its cortex, cerebellar cortex, vermis and deep grey nuclei count as grey, its lobes' white matter, corpus
callosum, internal capsule, fornix and cerebellar white matter as white; thalamus, pallidum and brain stem,
which are both, as neither. Compared are the voxels of `tissues` in which one tissue has more than half, and,
over scans, the share of grey matter in both.

Run: `python benchmarks/tissues.py --data FOLDER [--quick]`; FOLDER holds `images/NAME.nii.gz` and
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
from scipy.ndimage import affine_transform

from brainage_nb.volumes import tissues
from brainage_nb.volumes.brain import brain_or_error
from brainage_nb.volumes.preprocessing import find_tissues
from brainage_nb.volumes.scans import load_scan

GREY = (*range(100, 208), 38, 39, 71, 72, 73, 23, 30, 31, 32, 36, 37, 47, 48, 57, 58)
WHITE = (*range(81, 96), 40, 41)
QUICK = 6  # scans
BARS = {"grey": 0.75, "white": 0.80}  # mean Dice; set after 0.79 and 0.85 had been seen, to notice a loss


def row_of(scan: Path, regions: Path) -> dict[str, float]:
    """Dice of both tissues and both tools' share of grey, of one scan."""
    image = load_scan(scan)
    brain = brain_or_error(image)
    started = time.perf_counter()
    found = find_tissues(image, found_masks=False)
    seconds = time.perf_counter() - started
    labelled = nib.load(regions)
    to_label = np.linalg.inv(labelled.affine) @ brain.to_scan @ tissues.grid()
    labels = affine_transform(
        np.asarray(labelled.dataobj).astype(np.int16),
        to_label[:3, :3],
        to_label[:3, 3],
        output_shape=found.grey.shape,
        order=0,
    )
    ours = {"grey": found.grey > 0.5, "white": found.white > 0.5}
    theirs = {"grey": np.isin(labels, GREY), "white": np.isin(labels, WHITE)}
    judged = theirs["grey"] | theirs["white"] | (labels == 0)  # what is both counts for neither
    row = {name: _dice(ours[name] & judged, theirs[name]) for name in ours}
    share = {name: maps["grey"].sum() / (maps["grey"] | maps["white"]).sum() for name, maps in
             {"share_here": ours, "share_there": theirs}.items()}  # fmt: skip
    return {"scan": scan.name.split("-")[0], **row, **share, "contrast": found.contrast, "seconds": seconds}


def main() -> None:
    """Print the table and, as the last line, figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ixi_hh"))
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} scans")
    options = parser.parse_args()
    scans = sorted((options.data / "images").glob("*.nii.gz"))
    if not scans:
        print(json.dumps({"name": "tissues", "skipped": f"no scans under {options.data}"}))
        return
    scans = scans[:: len(scans) // QUICK][:QUICK] if options.quick else scans
    rows = pd.DataFrame(
        row_of(scan, options.data / "dlmuse" / f"{scan.name.removesuffix('.nii.gz')}_DLMUSE.nii.gz")
        for scan in scans
    )
    print(rows.describe().loc[["mean", "min", "max"]].round(3).to_string())
    shares = float(np.corrcoef(rows["share_here"], rows["share_there"])[0, 1])
    print(f"share of grey matter, here and there, over {len(rows)} scans: r {shares:.3f}")
    dice = {name: round(float(rows[name].mean()), 3) for name in BARS}
    verdict = {
        "name": "tissues",
        "value": dice,
        "bar": BARS,
        "holds": all(dice[name] >= bar for name, bar in BARS.items()),
        "n": len(rows),
        "unit": "mean Dice",
        "share_r": round(shares, 3),
    }
    print(json.dumps(verdict))


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b)))


if __name__ == "__main__":
    main()
