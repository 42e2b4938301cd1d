"""Is the known-answer cohort as hard as it should be? A plain baseline, the attainable MAE and the oracle."""

import argparse
import json
import tempfile

import pandas as pd

from brainage_nb.demo.cohort import (
    TRUTH,
    attainable_mae,
    baseline_mae,
    draw_truth,
    make_cohort,
    mean_predictor_mae,
    oracle_mae,
)
from brainage_nb.workspace import read_csv

BARS = {"ridge": (7.0, 9.0), "attainable": (3.2, 3.8), "oracle": (2.8, 3.2)}  # years
MANY = 2000  # subjects from whose truth (no images) the attainable MAE and the oracle are judged


def main() -> None:
    """Write a cohort to a temporary folder, print its references, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="150 subjects instead of 200")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", default="", help="keep the cohort there instead of a temporary folder")
    options = parser.parse_args()
    n_subjects = 150 if options.quick else 200
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_cohort(options.folder or temporary, n_subjects, options.seed, voxel_mm=2)
        truth, ridge = read_csv(folder / TRUTH), baseline_mae(folder)
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
