"""How fast and how large is the bootstrap? 10,000 subjects, 2,000 draws, all metrics, all groups, one paired
difference."""

import argparse
import json
import resource
import time

import numpy as np
import pandas as pd

from brainage_nb.evaluation.metrics import metrics_by_group, paired_difference, regression_metrics

BAR_SECONDS, BAR_GB = 20.0, 1.0


def cohort(n_subjects: int) -> pd.DataFrame:
    """Predictions of two models; a tenth of the subjects have two scans."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        {"subject_id": [f"{i:05d}" for i in range(n_subjects)], "age": rng.uniform(20, 86, n_subjects)}
    )
    rows = pd.concat([rows, rows.head(n_subjects // 10)], ignore_index=True)
    n = len(rows)
    rows["sex"] = rng.choice(["F", "M"], n)
    rows["site"] = rng.choice([f"site {i}" for i in range(20)], n)
    rows["diagnosis"] = rng.choice(["control", "AD", "MCI"], n, p=[0.8, 0.1, 0.1])
    rows["predicted_age"] = 8 + 0.85 * rows["age"] + rng.normal(0, 5, n)
    rows["other"] = 15 + 0.7 * rows["age"] + rng.normal(0, 6, n)
    return rows


def main() -> None:
    """Time every table an evaluation makes, print it, and print the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=2_000)
    parser.add_argument("--quick", action="store_true", help="accepted; the full form takes seconds")
    options = parser.parse_args()
    rows, draws = cohort(options.subjects), {"n_bootstrap": options.draws}
    age, predicted, subjects = rows["age"], rows["predicted_age"], rows["subject_id"].to_numpy()
    steps = {"all metrics": lambda: regression_metrics(age, predicted, subjects, reference_age=50.0, **draws)}
    for by in ("age_bin", "sex", "site", "diagnosis"):
        steps[f"by {by}"] = lambda by=by: metrics_by_group(rows, by, reference_age=50.0, **draws)
    steps["paired difference"] = lambda: paired_difference(age, predicted, rows["other"], subjects, **draws)
    seconds = {}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        seconds[name] = time.perf_counter() - start
    total = sum(seconds.values())
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{options.subjects} subjects ({len(rows)} scans), {options.draws} draws")
    for name, value in {**seconds, "total": total}.items():
        print(f"  {name:<20}{value:8.2f} s")
    print(f"  {'peak memory':<20}{peak_gb:8.2f} GB")
    verdict = {
        "name": "evaluation_bootstrap",
        "value": {"seconds": round(total, 2), "peak_gb": round(peak_gb, 3)},
        "bar": {"seconds": BAR_SECONDS, "peak_gb": BAR_GB},
        "holds": bool(total < BAR_SECONDS and peak_gb < BAR_GB),
        "n_subjects": options.subjects,
        "n_draws": options.draws,
    }
    print(json.dumps(verdict))


if __name__ == "__main__":
    main()
