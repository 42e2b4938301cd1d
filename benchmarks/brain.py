"""Brain extraction against reference masks: Dice, mirrored or upside-down brains, seconds a scan.

Every scan as it is, and turned by up to 25 degrees about each axis, moved by 30 mm and stored in a random
orientation; turns and moves are done to the array of voxels, so that nothing in the header tells of them.
The scans on which the method's numbers were chosen (every sixth) and the rest are shown apart.

Run: `python benchmarks/brain.py --data FOLDER [--quick]`; FOLDER holds `images/NAME.nii.gz` and
`dlmuse/NAME_DLMUSE.nii.gz` (above 0 is brain).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from disturbances import padded, stored_as, turned_and_moved
from joblib import Parallel, delayed
from scipy.spatial.transform import Rotation

from brainage_nb.volumes.brain import find_brain
from brainage_nb.volumes.scans import load_scan

CASES = ("untouched", "disturbed")
BARS = {"untouched": (0.95, 0.90), "disturbed": (0.94, 0.90)}  # mean and worst Dice
MOST_SECONDS = 10.0
RIGHT_FRONTAL, LEFT_FRONTAL, CEREBELLUM = 81, 82, (38, 39)  # white matter of the lobes; labels of DLMUSE
CHOSEN_ON = 6  # every sixth scan
PAD = 25  # voxels of room around the head before it is turned


def disturbed(image: nib.Nifti1Image, labels: np.ndarray, seed: int) -> tuple[nib.Nifti1Image, np.ndarray]:
    """Turn, move and store otherwise; the affine tells of the storage only."""
    random = np.random.default_rng(seed)
    turn = Rotation.from_euler("xyz", random.uniform(-25, 25, 3), degrees=True).as_matrix()
    move = random.standard_normal(3)
    move *= 30 / np.linalg.norm(move) / nib.affines.voxel_sizes(image.affine)
    picture, labels = (
        turned_and_moved(part, turn, move, PAD, order=order)
        for part, order in ((np.asarray(image.dataobj, dtype=np.float32), 1), (labels, 0))
    )
    pairs = [["LR", "PA", "IS"][k] for k in random.permutation(3)]
    codes = tuple(pair[random.integers(2)] for pair in pairs)
    affine = padded(image.affine, PAD)
    labels, _ = stored_as(labels, affine, codes)
    return nib.Nifti1Image(*stored_as(picture, affine, codes)), labels


def is_upright(labels: np.ndarray, affine: np.ndarray, to_scan: np.ndarray) -> bool:
    """Whether left, right and the cerebellum lie where they do in the template."""
    to_mni = np.linalg.inv(to_scan) @ affine
    right, left, cerebellum = (
        to_mni[:3, :3] @ np.argwhere(np.isin(labels, part)).mean(axis=0) + to_mni[:3, 3]
        for part in (RIGHT_FRONTAL, LEFT_FRONTAL, CEREBELLUM)
    )
    # One reference (IXI256) has nearly the whole brain labelled as the right half: it says nothing of sides.
    sizes = [np.count_nonzero(labels == side) for side in (RIGHT_FRONTAL, LEFT_FRONTAL)]
    sided = min(sizes) < max(sizes) / 2 or (right[0] > 10 and left[0] < -10)
    return bool(sided and cerebellum[2] < right[2] - 20 and cerebellum[1] < right[1] - 40)


def one_scan(path: Path, masks: Path, place: int) -> list[dict]:
    """A row a case."""
    stem = path.name.removesuffix(".nii.gz")
    labels = np.asarray(nib.load(masks / f"{stem}_DLMUSE.nii.gz").dataobj).astype(np.uint8)
    rows = []
    for case in CASES:
        image, regions = load_scan(path), labels
        if case == "disturbed":
            image, regions = disturbed(image, labels, place)
        began = time.monotonic()
        brain = find_brain(image)
        mask = brain.mask_on(image.affine, image.shape)
        seconds = time.monotonic() - began
        reference = regions > 0
        rows.append(
            {
                "case": case,
                "scans": "chosen on" if place % CHOSEN_ON == 0 else "the rest",
                "scan": stem,
                "dice": 2 * np.count_nonzero(mask & reference) / (mask.sum() + reference.sum()),
                "volume": mask.sum() / reference.sum(),
                "upright": is_upright(regions, image.affine, brain.to_scan),
                "flagged": bool(brain.problems),
                "correlation": brain.correlation,
                "agreement": brain.agreement,
                "seconds": seconds,
            }
        )
    return rows


def summary(rows: pd.DataFrame) -> pd.Series:
    """One line of the table."""
    return pd.Series(
        {
            "n": len(rows),
            "mean Dice": rows["dice"].mean(),
            "worst": rows["dice"].min(),
            "volume ratio": rows["volume"].mean(),
            "not upright": int((~rows["upright"]).sum()),
            "flagged": int(rows["flagged"].sum()),
            "lowest correlation": rows["correlation"].min(),
            "lowest agreement": rows["agreement"].min(),
            "median s": rows["seconds"].median(),
            "longest s": rows["seconds"].max(),
        }
    )


def main() -> None:
    """Print the table and, as the last line, the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ixi_hh"))
    parser.add_argument("--quick", action="store_true", help="every tenth scan")
    options = parser.parse_args()
    paths = list(enumerate(sorted((options.data / "images").glob("*.nii.gz"))))
    paths = paths[:: 10 if options.quick else 1]
    if not paths:
        print(json.dumps({"name": "brain", "skipped": f"no scans under {options.data}"}))
        return
    found = Parallel(n_jobs=2)(delayed(one_scan)(path, options.data / "dlmuse", k) for k, path in paths)
    rows = pd.DataFrame([row for scan in found for row in scan])
    everything = pd.concat([rows.assign(scans="all"), rows])
    table = pd.DataFrame(
        {key: summary(part) for key, part in everything.groupby(["case", "scans"], sort=False)}
    ).T
    print(f"Brain masks against the reference, {len(paths)} scans, two at a time on one processor each")
    print(table.round(4).to_string())
    shown = ["case", "scan", "dice", "correlation", "agreement"]
    for measure in shown[2:]:
        print(f"lowest {measure}:")
        print(rows.nsmallest(4, measure)[shown].round(3).to_string(index=False))
    overall = {case: table.loc[(case, "all")] for case in CASES}
    holds = all(
        line["mean Dice"] >= BARS[case][0]
        and line["worst"] >= BARS[case][1]
        and line["not upright"] == 0
        and line["flagged"] == 0
        and line["median s"] <= MOST_SECONDS
        for case, line in overall.items()
    )
    verdict = {
        "name": "brain",
        "value": round(float(overall["untouched"]["mean Dice"]), 4),
        "bar": BARS["untouched"][0],
        "holds": bool(holds),
        "n": len(paths),
        "cases": {
            f"{case}, {scans}": {name: round(float(value), 4) for name, value in line.items()}
            for (case, scans), line in table.iterrows()
        },
    }
    print(json.dumps(verdict))


if __name__ == "__main__":
    main()
