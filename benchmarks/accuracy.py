"""Cross-validated error of age prediction on real scans: networks, ingredient by ingredient, and baselines.

Baselines: the mean predictor, ridge on registered smoothed voxels (their brightness; the grey matter of
`best`, as it stands beside that network), a linear SVR on regional volumes of another tool, VGG16 features
of `best` with SVR (`--vgg random_projection` or `imagenet`).
Networks: `--networks reference,best,best+last,best+last+softx3` (see `accuracy_models`). All in the same
folds, dealt by subject over sorted ages. What is done is kept under `--cache`, so that a run of hours can be
cut and continued; a GPU is used if there is one. On two cores a full ResNet-18 takes about ten minutes a row
at 4 mm and 20 epochs, one of half the width three.

Run: `python benchmarks/accuracy.py --data FOLDER [--networks best] [--quick]`; FOLDER holds
`images/NAME.nii.gz`, `dlmuse/NAME_DLMUSE.nii.gz` and `IXI.xls`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from accuracy_models import (
    FOLDS,
    Networks,
    cross_validated,
    mean_predictor,
    region_volumes,
    ridge,
    smoothed_voxels,
    svr,
    vgg_svr,
)

from brainage_nb.evaluation.metrics import age_bins, mean_with_interval, with_interval
from brainage_nb.sources.folder import match_scans

MEAN, REGIONS = "mean predictor", "SVR on DLMUSE volumes"
RIDGE, LINEAR = "ridge on registered voxels", "ridge on grey matter"


def baselines(
    cohort: pd.DataFrame, data: Path, networks: Networks, repeats: int, vgg: str
) -> dict[str, np.ndarray]:
    """Out-of-fold ages (repeats, n) of every baseline."""
    regions = region_volumes(cohort, data / "dlmuse")
    variants = {
        MEAN: (mean_predictor, regions[:, :1]),
        REGIONS: (svr, regions),
        RIDGE: (ridge, smoothed_voxels(networks.store("registered"), cohort)),
    }
    made = {
        name: cross_validated(name, fit, features, cohort, repeats, networks.cache)
        for name, (fit, features) in variants.items()
    }
    made[LINEAR] = np.array([networks.linear("best", repeat) for repeat in range(repeats)])
    if vgg:
        title = f"VGG16 ({vgg.replace('_', ' ')}) + SVR, best"
        made[title] = vgg_svr(networks.store("best"), cohort, vgg, 1, networks.cache)
    return made


def errors_of(made: np.ndarray, cohort: pd.DataFrame) -> np.ndarray:
    """Mean absolute error of each scan (n,) over repeats, years."""
    return np.abs(made - cohort["age"].to_numpy(dtype=float)).mean(axis=0)


def change(made: np.ndarray, against: np.ndarray, cohort: pd.DataFrame) -> str:
    """Paired change of the MAE in the folds that both have, with its 95 % subject bootstrap interval."""
    shared = min(len(made), len(against))
    paired = errors_of(made[:shared], cohort) - errors_of(against[:shared], cohort)
    return with_interval(mean_with_interval(paired, cohort["subject_id"].to_numpy()))


def table_of(
    predictions: dict[str, np.ndarray], first: str, cohort: pd.DataFrame, minutes: dict[str, float]
) -> pd.DataFrame:
    """A row a variant: MAE and r, the paired changes against the regions' SVR and the first network, cost."""
    subjects, age = cohort["subject_id"].to_numpy(), cohort["age"].to_numpy(dtype=float)
    rows = {}
    for name, made in predictions.items():
        correlation = np.mean([np.corrcoef(one, age)[0, 1] for one in made])
        rows[name] = {
            "MAE": with_interval(mean_with_interval(errors_of(made, cohort), subjects)),
            "r": "" if name == MEAN else f"{correlation:.3f}",
            "repeats": len(made),
            "against regions": "" if name == REGIONS else change(made, predictions[REGIONS], cohort),
            f"against {first}": change(made, predictions[first], cohort) if first not in ("", name) else "",
            "minutes": f"{minutes[name]:.0f}" if name in minutes else "",
        }
    return pd.DataFrame(rows).T


def by_age(predictions: dict[str, np.ndarray], cohort: pd.DataFrame) -> pd.DataFrame:
    """MAE and mean signed error, years, in each decade."""
    age = cohort["age"].to_numpy(dtype=float)
    decade = age_bins(age).to_numpy()
    columns = {"n": pd.Series(1, index=decade).groupby(level=0).sum()}
    for name, made in predictions.items():
        columns[f"{name}: MAE"] = pd.Series(errors_of(made, cohort)).groupby(decade).mean()
        columns[f"{name}: mean gap"] = pd.Series(made.mean(axis=0) - age).groupby(decade).mean()
    return pd.DataFrame(columns).round(2)


def main() -> None:
    """Print the tables and, as the last line, the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ixi_hh"))
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "out" / "accuracy")
    parser.add_argument("--repeats", type=int, default=5, help="of the baselines")
    parser.add_argument("--networks", default="", help="such as reference,best,best+last+softx3")
    parser.add_argument("--network-repeats", type=int, default=1)
    parser.add_argument("--start", default="", help="the bundle that +started begins from")
    parser.add_argument("--epochs", type=int, default=20, help="of the networks")
    parser.add_argument("--spacing-mm", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--vgg", default="", help="weights of a VGG16 row: random_projection or imagenet")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    options = parser.parse_args()
    if not (options.data / "IXI.xls").is_file():
        print(json.dumps({"name": "accuracy", "skipped": f"no scans under {options.data}"}))
        return
    cohort = match_scans(options.data / "images", options.data / "IXI.xls").cohort.reset_index(drop=True)
    networks = Networks(
        cohort, options.cache, options.epochs, options.start, options.spacing_mm, options.size
    )
    predictions = baselines(
        cohort, options.data, networks, 1 if options.quick else options.repeats, options.vgg
    )
    wanted = [name for name in options.networks.split(",") if name]
    for name in wanted:
        predictions[name] = networks.predictions(name, options.network_repeats)
        mae = errors_of(predictions[name], cohort).mean()
        print(f"{name}: MAE {mae:.2f}", flush=True)
    print(
        f"{len(cohort)} scans of {cohort['subject_id'].nunique()} subjects, {FOLDS} folds, years; "
        "95 % subject bootstrap"
    )
    table = table_of(predictions, wanted[0] if wanted else "", cohort, networks.minutes)
    print(table.to_string())
    verdict = judged(predictions, cohort)
    print(by_age({name: predictions[name] for name in (REGIONS, verdict["best"])}, cohort).to_string())
    print(json.dumps(verdict | {"table": table.to_dict("index")}))


def judged(predictions: dict[str, np.ndarray], cohort: pd.DataFrame) -> dict:
    """The bar is for what a scan alone gives: region volumes come from another tool."""
    mae = {name: float(errors_of(made, cohort).mean()) for name, made in predictions.items()}
    ours = min((name for name in mae if name not in (REGIONS, MEAN)), key=mae.get)
    return {
        "name": "accuracy",
        "value": round(mae[ours], 3),
        "bar": round(mae[REGIONS], 3),
        "holds": mae[ours] < mae[REGIONS],
        "n": int(cohort["subject_id"].nunique()),
        "unit": "years, MAE",
        "best": ours,
    }


if __name__ == "__main__":
    main()
