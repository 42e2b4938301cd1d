"""How long the SVR's grid search takes, and how much memory: 400 made-up subjects with 25,088 features.

Run: `python benchmarks/svr_grid.py [--quick]`. The whole of `EarlyFusion.fit`: 15 choices of C and epsilon in
five folds with scaling learned in each, and the last fit. Then one triplet position of late fusion, by each
fold's shared kernel and by scikit-learn's `GridSearchCV`, which computes the kernel again for every choice.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import numpy as np
from sklearn.model_selection import GridSearchCV, GroupKFold

from brainage_nb.models.svr import GRID, EarlyFusion, make_svr, predict_out_of_fold

BAR_S, BAR_GB = 60.0, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=400)
    parser.add_argument("--features", type=int, default=25_088)
    parser.add_argument("--quick", action="store_true", help="accepted; the whole takes seconds")
    options = parser.parse_args()
    scans, age, subject_id = cohort(options.subjects, options.features)
    start = time.perf_counter()
    early = EarlyFusion().fit(scans, age, subject_id)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    features = np.stack([rows[0] for rows in scans]).astype(np.float32)
    predict_out_of_fold(features, age, subject_id)
    position_s = time.perf_counter() - start
    start = time.perf_counter()
    grid = {f"svr__{name}": values for name, values in GRID.items()}
    GridSearchCV(make_svr(), grid, cv=GroupKFold(5), refit=False).fit(features, age, groups=subject_id)
    search_s = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gigabytes = peak * (1 if sys.platform == "darwin" else 1024) / 1e9
    print(early.grid_.round(2).to_string(index=False))
    print(f"{options.subjects} subjects x {options.features} features, early fusion: {seconds:.1f} s")
    print(f"one position of late fusion: {position_s:.1f} s; peak memory of the process: {gigabytes:.2f} GB")
    result = {
        "name": "svr_grid",
        "value": round(seconds, 1),
        "bar": BAR_S,
        "holds": seconds <= BAR_S and gigabytes <= BAR_GB,
        "unit": "s",
        "peak_memory_gb": round(gigabytes, 2),
        "peak_memory_bar_gb": BAR_GB,
        "late_position_s": round(position_s, 1),
        "late_position_by_grid_search_s": round(search_s, 1),
        "inner_mae_years": round(early.inner_mae_, 2),
    }
    print(json.dumps(result))


def cohort(n_subjects: int, n_features: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Features behind a ReLU, as VGG16's are: many zeros, a weak shared age signal, much else."""
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 85, n_subjects)
    pattern = rng.normal(0, 0.15, n_features).astype(np.float32)
    shared = rng.normal(0, 1, (12, n_features)).astype(np.float32)
    scans = []
    for years in age:
        rows = (years - 50) / 18 * pattern + rng.normal(0, 1, 12).astype(np.float32) @ shared / 4
        rows = rows + rng.normal(0, 1, (2, n_features)).astype(np.float32)
        scans.append(np.maximum(rows, 0).astype(np.float16))
    return scans, age, np.arange(n_subjects).astype(str)


if __name__ == "__main__":
    main()
