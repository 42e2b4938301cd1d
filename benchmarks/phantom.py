"""Is the known-answer cohort as hard as it should be? A plain baseline, the attainable MAE and the oracle."""

import argparse
import json
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy import ndimage
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from tqdm import tqdm

from brainage_nb.demo.cohort import (
    TRUTH,
    attainable_mae,
    draw_truth,
    image_path,
    make_demo_cohort,
    mean_predictor_mae,
    oracle_mae,
)
from brainage_nb.platforms import n_workers
from brainage_nb.workspace import read_csv

BARS = {"ridge": (7.0, 9.0), "attainable": (3.2, 3.8), "oracle": (2.8, 3.2)}  # years
MANY = 2000  # subjects from whose truth (no images) the attainable MAE and the oracle are judged

BASELINE_FWHM_MM, BASELINE_SPACING_MM = 8.0, 6.0
BASELINE_BOX_MM = (120.0, 156.0, 114.0)  # left-right, back-front, up-down: the middle of the brain
BASELINE_BELOW_CROWN_MM = 18.0  # where that box begins: below scalp and skull


def baseline_ages(folder: Path | str, *, folds: int = 5, n_jobs: int = 0, seed: int = 0) -> pd.DataFrame:
    """`truth.csv` with `predicted_age`: ridge regression on smoothed, coarsely resampled voxels,
    cross-validated by subject.

    Parameters
    ----------
    folder : path
        A cohort that `make_demo_cohort` wrote.
    folds, seed : int
        The cross-validation; alpha is chosen inside each fold.
    n_jobs : int
        Processes that read scans; 0 for as many as there are processors.
    """
    truth = read_csv(Path(folder) / TRUTH)
    paths = [Path(folder) / image_path(row) for row in truth.to_dict("records")]
    reading = Parallel(n_jobs=n_workers(n_jobs), return_as="generator")(
        delayed(coarse_voxels)(p) for p in paths
    )
    voxels = np.stack(list(tqdm(reading, total=len(paths), desc="baseline", unit="scan")))
    voxels = (voxels - voxels.mean(axis=0)) / (voxels.std(axis=0) + 0.1)
    similarity = voxels @ voxels.T / voxels.shape[1]
    # Ridge in the basis of the scans themselves: as many columns as scans instead of as many as voxels.
    scale, basis = np.linalg.eigh(similarity.astype(float))
    scores = basis * np.sqrt(np.clip(scale, 0, None))
    cut = GroupKFold(folds, shuffle=True, random_state=seed)
    ridge = RidgeCV(np.logspace(-3, 3, 13))
    guess = cross_val_predict(ridge, scores, truth["age"], groups=truth["subject_id"], cv=cut)
    return truth.assign(predicted_age=guess)


def coarse_voxels(path: Path | str) -> np.ndarray:
    """One scan as a vector: turned to RAS, z-scored, smoothed, sampled on a box hung below the crown.

    Returns
    -------
    (20 * 26 * 19,) float32 array
    """
    image = nib.as_closest_canonical(nib.load(path))
    head = image.get_fdata(dtype=np.float32)
    voxel_size = np.array(image.header.get_zooms()[:3])
    smooth = ndimage.gaussian_filter(head, BASELINE_FWHM_MM / 2.355 / voxel_size)
    inside = smooth > 0.25 * np.percentile(smooth, 95)
    crown = np.flatnonzero(inside.mean(axis=(0, 1)) > 0.01)[-1]
    top = inside[:, :, max(0, crown - int(140 / voxel_size[2])) : crown + 1]
    middle = [(np.flatnonzero(top.any(axis=others))[[0, -1]]).mean() for others in ((1, 2), (0, 2))]
    start = [
        middle[0] - BASELINE_BOX_MM[0] / 2 / voxel_size[0],
        middle[1] - BASELINE_BOX_MM[1] / 2 / voxel_size[1],
        crown - (BASELINE_BELOW_CROWN_MM + BASELINE_BOX_MM[2]) / voxel_size[2],
    ]
    counts = [int(length / BASELINE_SPACING_MM) for length in BASELINE_BOX_MM]
    axes = [
        s + np.arange(n) * BASELINE_SPACING_MM / v for s, n, v in zip(start, counts, voxel_size, strict=True)
    ]
    coarse = ndimage.map_coordinates(smooth, np.stack(np.meshgrid(*axes, indexing="ij")), order=1)
    return ((coarse - coarse.mean()) / coarse.std()).ravel().astype(np.float32)


def main() -> None:
    """Write a cohort to a temporary folder, print its references, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="150 subjects instead of 200")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", default="", help="keep the cohort there instead of a temporary folder")
    options = parser.parse_args()
    n_subjects = 150 if options.quick else 200
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_demo_cohort(options.folder or temporary, n_subjects, options.seed, voxel_mm=2)
        truth = baseline_ages(folder)
    ridge = float((truth["predicted_age"] - truth["age"]).abs().mean())
    many = draw_truth(MANY, options.seed, voxel_mm=2)
    rows = [
        ("mean predictor", n_subjects, mean_predictor_mae(truth)),
        ("ridge", n_subjects, ridge),
        ("attainable", n_subjects, attainable_mae(truth)),
        ("attainable", MANY, attainable_mae(many)),
        ("oracle", n_subjects, oracle_mae(truth)),
        ("oracle", MANY, oracle_mae(many)),
    ]
    table = pd.DataFrame(rows, columns=["reference", "n subjects", "MAE [years]"])
    print(f"Known-answer cohort, 2 mm heads, seed {options.seed}")
    print(table.to_string(index=False, float_format="{:.2f}".format))
    reached = {"ridge": ridge, "attainable": rows[3][2], "oracle": rows[5][2]}
    holds = all(low <= reached[name] <= high for name, (low, high) in BARS.items())
    result = {"name": "phantom", "value": {name: round(value, 2) for name, value in reached.items()}}
    print(json.dumps(result | {"bar": BARS, "holds": holds, "n_subjects": n_subjects, "seed": options.seed}))


if __name__ == "__main__":
    main()
