"""Cross-validated error of age prediction on real scans: networks and baselines in the same folds.

Baselines: the mean predictor, ridge on registered smoothed voxels of the `best` recipe, and a linear SVR on
regional volumes. Networks: ResNet-18 at 4 mm by recipe (`--networks reference,best`), and from the weights of
a bundle (`--start`). Folds are dealt by subject over sorted ages, several times; every choice (penalty,
scaling, best epoch) is made inside the training folds. What is done is kept under `--cache`, so that a long
run can be cut and continued; networks take a quarter of an hour a repeat and recipe on two cores.

Run: `python benchmarks/accuracy.py --data FOLDER [--networks best] [--quick]`; FOLDER holds
`images/NAME.nii.gz`, `dlmuse/NAME_DLMUSE.nii.gz` and `IXI.xls`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from brainage_nb.cohort.sources import folder_cohort
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.training import train
from brainage_nb.volumes.preprocessing import PreprocessingSettings
from brainage_nb.volumes.store_building import build_store
from brainage_nb.workspace import read_json, write_json

FOLDS = 5
BASELINE = "SVR on DLMUSE volumes"
SETTINGS = PreprocessingSettings.of_recipe("best", spacing_mm=4, size=48)
SMOOTH_MM = 6.0
BOOTSTRAPS = 2000


def region_volumes(cohort: pd.DataFrame, masks: Path) -> np.ndarray:
    """Volume of each region as a share of the whole, (n, n_regions)."""
    rows = []
    for name in cohort["image"].map(lambda image: Path(image).name.removesuffix(".nii.gz")):
        labels = np.asarray(nib.load(masks / f"{name}_DLMUSE.nii.gz").dataobj).astype(int)
        rows.append(np.bincount(labels.ravel(), minlength=208)[1:208])
    counts = np.array(rows, dtype=float)
    return counts[:, counts.any(axis=0)]


def smoothed_voxels(cohort: pd.DataFrame, cache: Path) -> np.ndarray:
    """Brain-only registered volumes, smoothed, at every second voxel inside of most brains, (n, n_voxels)."""
    report = build_store(cohort[["scan_id", "image"]], cache / "volumes", SETTINGS)
    if len(report.failed):
        raise SystemExit(f"{len(report.failed)} scans gave no volume:\n{report.failed.to_string()}")
    volumes = report.store.read(cohort["scan_id"]).astype(np.float32)
    inside = (volumes != 0).mean(axis=0) > 0.5
    smooth = [gaussian_filter(volume, SMOOTH_MM / 2.355 / SETTINGS.spacing_mm)[inside] for volume in volumes]
    return np.array(smooth)


def mean_predictor(train: np.ndarray, age: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The mean training age for everybody."""
    return np.full(len(test), age.mean())


def ridge(train: np.ndarray, age: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge on standardised features, penalty by leave-one-out error within the training folds."""
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(2, 7, 11)))
    return model.fit(train, age).predict(test)


def svr(train: np.ndarray, age: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Linear SVR on standardised features, C by cross-validation within the training folds."""
    model = make_pipeline(StandardScaler(), SVR(kernel="linear", epsilon=1.0))
    grid = {"svr__C": [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]}
    search = GridSearchCV(model, grid, scoring="neg_mean_absolute_error", cv=5)
    order = np.random.default_rng(0).permutation(len(age))
    return search.fit(train[order], age[order]).predict(test)


def dealt_folds(cohort: pd.DataFrame, repeat: int) -> np.ndarray:
    """Fold (n,) of each scan: subjects sorted by age, each five in a row dealt to the folds at random."""
    random = np.random.default_rng((repeat, 1))
    ages = cohort.groupby("subject_id")["age"].mean().sort_values()
    folds = np.concatenate([random.permutation(FOLDS) for _ in range(-(-len(ages) // FOLDS))])[: len(ages)]
    return cohort["subject_id"].map(dict(zip(ages.index, folds, strict=True))).to_numpy()


def cross_validated(
    name: str, fit: Callable, features: np.ndarray, cohort: pd.DataFrame, repeats: int, cache: Path
) -> np.ndarray:
    """Out-of-fold predictions (repeats, n), each fold from the cache where it was computed before."""
    age = cohort["age"].to_numpy(dtype=float)
    content = hashlib.sha256(np.ascontiguousarray(features).tobytes() + age.tobytes()).hexdigest()[:12]
    made = np.full((repeats, len(age)), np.nan)
    for repeat in range(repeats):
        folds = dealt_folds(cohort, repeat)
        for fold in range(FOLDS):
            test = folds == fold
            file = cache / name.replace(" ", "_") / f"{content}-{repeat}-{fold}.json"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                predicted = fit(features[~test], age[~test], features[test])
                write_json({"predicted_age": predicted.tolist()}, file)
            made[repeat, test] = read_json(file)["predicted_age"]
    return made


def network(
    recipe: str, start: str, epochs: int, cohort: pd.DataFrame, repeats: int, cache: Path
) -> np.ndarray:
    """Out-of-fold predictions (repeats, n) of ResNet-18 at 4 mm, trained as notebook 04 does with folds."""
    settings = PreprocessingSettings.of_recipe(recipe, spacing_mm=4, size=48)
    store = build_store(cohort[["scan_id", "image"]], cache / "volumes", settings).store
    made = []
    for repeat in range(repeats):
        splits = cohort.assign(split="train", fold=dealt_folds(cohort, repeat))
        chosen = TrainingSettings(
            epochs=epochs, folds=FOLDS, seeds=(repeat,), init_from=start, checkpoint_minutes=1.0
        )
        folder = cache / f"resnet-{recipe}{'-started' if start else ''}-{epochs}-{repeat}"
        rows = train(store, splits, folder, chosen).predictions
        rows = rows[rows["variant"] == "single"].set_index("scan_id")["predicted_age"]
        made.append(rows.loc[cohort["scan_id"]].to_numpy())
    return np.array(made)


def interval(errors: np.ndarray) -> tuple[float, float, float]:
    """Mean over subjects of (n,) values, and its 95 % bootstrap interval."""
    random = np.random.default_rng(0)
    means = errors[random.integers(len(errors), size=(BOOTSTRAPS, len(errors)))].mean(axis=1)
    return float(errors.mean()), *(float(end) for end in np.percentile(means, [2.5, 97.5]))


def by_subject(values: np.ndarray, cohort: pd.DataFrame) -> np.ndarray:
    """Mean of (repeats, n) values over repeats and a subject's scans."""
    return pd.Series(values.mean(axis=0)).groupby(cohort["subject_id"].to_numpy()).mean().to_numpy()


def mean_correlation(predictions: np.ndarray, age: np.ndarray) -> float:
    """Pearson's r of predicted and true age, mean over repeats (repeats, n)."""
    return float(np.mean([np.corrcoef(one, age)[0, 1] for one in predictions]))


def table_of(predictions: dict[str, np.ndarray], cohort: pd.DataFrame) -> pd.DataFrame:
    """A row a variant: MAE, r, and the paired change of MAE against the baseline, with intervals."""
    age = cohort["age"].to_numpy(dtype=float)
    errors = {name: by_subject(np.abs(made - age), cohort) for name, made in predictions.items()}
    rows = {}
    for name, made in predictions.items():
        same_folds = np.abs(predictions[BASELINE][: len(made)] - age)
        change = interval(errors[name] - by_subject(same_folds, cohort))
        rows[name] = {
            "MAE": "{:.2f} [{:.2f}, {:.2f}]".format(*interval(errors[name])),
            "r": "" if name == "mean predictor" else f"{mean_correlation(made, age):.3f}",
            "repeats": len(made),
            "change of MAE": "{:+.2f} [{:+.2f}, {:+.2f}]".format(*change) if name != BASELINE else "",
        }
    return pd.DataFrame(rows).T


def main() -> None:
    """Print the table and, as the last line, the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ixi_hh"))
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "out" / "accuracy")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--networks", default="", help="recipes to train ResNet-18 with: reference,best")
    parser.add_argument("--network-repeats", type=int, default=1)
    parser.add_argument("--start", default="", help="bundle the networks start from, in rows of their own")
    parser.add_argument("--epochs", type=int, default=20, help="of the networks")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    options = parser.parse_args()
    if not (options.data / "IXI.xls").is_file():
        parser.exit(0, json.dumps({"name": "accuracy", "skipped": f"no scans under {options.data}"}) + "\n")
    cohort = folder_cohort(options.data / "images", options.data / "IXI.xls").cohort.reset_index(drop=True)
    repeats = 1 if options.quick else options.repeats
    regions = region_volumes(cohort, options.data / "dlmuse")
    variants = {
        "mean predictor": (mean_predictor, regions[:, :1]),
        BASELINE: (svr, regions),
        "ridge on registered voxels": (ridge, smoothed_voxels(cohort, options.cache)),
    }
    predictions = {
        name: cross_validated(name, fit, features, cohort, repeats, options.cache)
        for name, (fit, features) in variants.items()
    }
    for recipe in filter(None, options.networks.split(",")):
        title = f"ResNet-18, {recipe}, {options.epochs} epochs{', from a bundle' if options.start else ''}"
        predictions[title] = network(
            recipe, options.start, options.epochs, cohort, options.network_repeats, options.cache
        )
    table = table_of(predictions, cohort)
    n = cohort["subject_id"].nunique()
    print(
        f"{len(cohort)} scans of {n} subjects, {repeats} times {FOLDS} folds, years; 95 % subject bootstrap"
    )
    print(table.to_string())
    age = cohort["age"].to_numpy(dtype=float)
    mae = {name: float(by_subject(np.abs(made - age), cohort).mean()) for name, made in predictions.items()}
    # The bar is for what a scan alone gives: region volumes come from another tool.
    ours = min((name for name in mae if name not in (BASELINE, "mean predictor")), key=mae.get)
    verdict = {
        "name": "accuracy",
        "value": round(mae[ours], 3),
        "bar": round(mae[BASELINE], 3),
        "holds": mae[ours] < mae[BASELINE],
        "n": n,
        "unit": "years, MAE",
        "best": ours,
        "table": table.to_dict("index"),
    }
    print(json.dumps(verdict))


if __name__ == "__main__":
    main()
