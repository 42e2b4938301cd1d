"""The models that `accuracy.py` compares: out-of-fold ages of every scan, each fold kept once computed.

A network is written as how its scans are prepared and what is added to it, joined by `+`, such as
`best+last+soft`; `linear` takes the mean with the regression beside it, as a run with `linear` and `last`
does, without training again; `x3` at the end averages three seeds. Every choice (penalty, scaling, best
epoch) is made inside the training folds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from brainage_nb.cohort.splits import deal_folds
from brainage_nb.models.network import fit_linear
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.train import train
from brainage_nb.volumes.settings import AugmentationSettings, PreprocessingSettings
from brainage_nb.volumes.store import VolumeStore, build_store
from brainage_nb.workspace import read_json, write_json

FOLDS = 5
SMOOTH_MM = 6.0
WIDE = AugmentationSettings(rotation_deg=15.0, shift_mm=10.0, scale=0.12, deformation_mm=5.0, deformation=0.6)
GENTLE = AugmentationSettings(rotation_deg=4.0, shift_mm=3.0, scale=0.03)
PREPARED: dict[str, dict] = {  # beside the named recipes
    "registered": {"brain_only": True, "to_mni": True},
}
INGREDIENTS: dict[str, dict] = {
    "last": {"keep": "last", "inner_fraction": 0.0},
    "soft": {"loss": "distribution"},
    "half": {"widths": (32, 64, 128, 256)},
    "quarter": {"widths": (16, 32, 64, 128)},
    "shallow": {"blocks": (1, 1, 1, 1)},
    "unaveraged": {"ema_epochs": 0.0},
    "ema3": {"ema_epochs": 3.0},
    "plain": {"augmentation": None},
    "gentle": {"augmentation": GENTLE},
    "wide": {"augmentation": WIDE},
    "noflip": {"flip_averaging": False},
    "brisk": {"learning_rate": 1e-3},
    "fours": {"batch_size": 4},
    "decay": {"weight_decay": 0.01},
    "started": {},  # from the bundle given by --start
}


def fold_of(cohort: pd.DataFrame, repeat: int) -> np.ndarray:
    """Fold (n,) of each scan: subjects sorted by age, each five in a row dealt to the folds at random."""
    ages = cohort.groupby("subject_id")["age"].mean()
    return cohort["subject_id"].map(deal_folds(ages, FOLDS, seed=repeat)).to_numpy()


# --- networks --------------------------------------------------------------------------------------------


class Networks:
    """Cross-validated ResNets, trained as notebook 04 does with folds.

    Parameters
    ----------
    cohort : DataFrame
        `scan_id, subject_id, session_id, image, age`.
    cache : path
        Receives volumes and runs; what is there already is not computed again.
    epochs : int
    start : str
        The bundle that `started` means.
    spacing_mm, size
        Of the volumes.
    """

    def __init__(
        self, cohort: pd.DataFrame, cache: Path, epochs: int, start: str, spacing_mm: float, size: int
    ):
        self.cohort, self.cache, self.epochs, self.start = cohort, cache, epochs, start
        self.spacing_mm, self.size = spacing_mm, size
        self.minutes: dict[str, float] = {}

    def predictions(self, variant: str, repeats: int) -> np.ndarray:
        """Out-of-fold ages (repeats, n) in years of a variant such as `best+last+softx3`."""
        name, _, seeds = variant.partition("x")
        seeds = int(seeds or 1)
        made, self.minutes[variant] = [], 0.0
        for repeat in range(repeats):
            rows = [self._one_run(name, repeat, seed, variant) for seed in range(seeds)]
            made.append(np.mean(rows, axis=0))
        return np.array(made)

    def _one_run(self, name: str, repeat: int, seed: int, variant: str) -> np.ndarray:
        prepared, *added = name.split("+")
        if "linear" in added:
            alone = "+".join(part for part in name.split("+") if part != "linear")
            return (self._one_run(alone, repeat, seed, variant) + self.linear(prepared, repeat)) / 2
        settings = self._settings(added, 100 * repeat + seed)
        splits = self.cohort.assign(split="train", fold=fold_of(self.cohort, repeat))
        grid = f"{self.spacing_mm:g}mm"
        folder = self.cache / "runs" / grid / f"{name}-{settings.epochs}-{repeat}-{seed}"
        result = train(self.store(prepared), splits, folder, settings)
        self.minutes[variant] += result.history["seconds"].sum() / 60
        rows = result.predictions[result.predictions["variant"] == "single"]
        return rows.set_index("scan_id")["predicted_age"].loc[self.cohort["scan_id"]].to_numpy()

    def _settings(self, added: list[str], seed: int) -> TrainingSettings:
        base = TrainingSettings(epochs=self.epochs, folds=FOLDS, seeds=(seed,), checkpoint_minutes=2.0)
        for name in added:
            base = replace(base, **({"init_from": self.start} if name == "started" else INGREDIENTS[name]))
        return base

    def linear(self, prepared: str, repeat: int) -> np.ndarray:
        """Out-of-fold ages (n,) of the regression that `linear` puts beside a network, alone."""
        store, folds = self.store(prepared), fold_of(self.cohort, repeat)
        volumes = torch.from_numpy(store.read(self.cohort["scan_id"]).astype(np.float32))[:, None]
        age, subjects = self.cohort["age"].to_numpy(float), self.cohort["subject_id"].to_numpy()
        made = np.full(len(age), np.nan)
        for fold in range(FOLDS):
            test = folds == fold
            batches = volumes[~test].split(16)
            fitted = fit_linear(batches, age[~test], subjects[~test], store.spacing_mm)
            made[test] = fitted(volumes[test]).numpy()
        return made

    def store(self, prepared: str) -> VolumeStore:
        """Volumes of a preprocessing recipe or of one of `PREPARED`."""
        recipe = "reference" if prepared in PREPARED else prepared
        switches = PREPARED.get(prepared, {})
        settings = PreprocessingSettings.of_recipe(
            recipe, spacing_mm=self.spacing_mm, size=self.size, **switches
        )
        report = build_store(self.cohort[["scan_id", "image"]], self.cache / "volumes", settings)
        if len(report.failed):
            raise SystemExit(f"{len(report.failed)} scans gave no volume:\n{report.failed.to_string()}")
        return report.store


# --- baselines -------------------------------------------------------------------------------------------


def region_volumes(cohort: pd.DataFrame, masks: Path) -> np.ndarray:
    """Voxels of each region, (n, n_regions)."""
    rows = []
    for name in cohort["image"].map(lambda image: Path(image).name.removesuffix(".nii.gz")):
        labels = np.asarray(nib.load(masks / f"{name}_DLMUSE.nii.gz").dataobj).astype(int)
        rows.append(np.bincount(labels.ravel(), minlength=208)[1:208])
    counts = np.array(rows, dtype=float)
    return counts[:, counts.any(axis=0)]


def smoothed_voxels(store: VolumeStore, cohort: pd.DataFrame) -> np.ndarray:
    """Brain-only registered volumes, smoothed, at every voxel inside of most brains, (n, n_voxels)."""
    volumes = store.read(cohort["scan_id"]).astype(np.float32)
    inside = (volumes != 0).mean(axis=0) > 0.5
    smooth = [gaussian_filter(volume, SMOOTH_MM / 2.355 / store.spacing_mm)[inside] for volume in volumes]
    return np.array(smooth)


def mean_predictor(features: np.ndarray, age: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The mean training age for everybody."""
    return np.full(len(test), age.mean())


def ridge(features: np.ndarray, age: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge on standardised features, penalty by leave-one-out error within the training folds."""
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(2, 7, 11)))
    return model.fit(features, age).predict(test)


def svr(features: np.ndarray, age: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Linear SVR on standardised features, C by cross-validation within the training folds."""
    model = make_pipeline(StandardScaler(), SVR(kernel="linear", epsilon=1.0))
    grid = {"svr__C": [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]}
    search = GridSearchCV(model, grid, scoring="neg_mean_absolute_error", cv=5)
    order = np.random.default_rng(0).permutation(len(age))
    return search.fit(features[order], age[order]).predict(test)


def cross_validated(
    name: str, fit: Callable, features: np.ndarray, cohort: pd.DataFrame, repeats: int, cache: Path
) -> np.ndarray:
    """Out-of-fold ages (repeats, n), each fold from the cache where it was computed before."""
    age = cohort["age"].to_numpy(dtype=float)
    content = hashlib.sha256(np.ascontiguousarray(features).tobytes() + age.tobytes()).hexdigest()[:12]
    made = np.full((repeats, len(age)), np.nan)
    for repeat in range(repeats):
        folds = fold_of(cohort, repeat)
        for fold in range(FOLDS):
            test = folds == fold
            file = cache / name.replace(" ", "_") / f"{content}-{repeat}-{fold}.json"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                predicted = fit(features[~test], age[~test], features[test])
                write_json({"predicted_age": predicted.tolist()}, file)
            made[repeat, test] = read_json(file)["predicted_age"]
    return made


def vgg_svr(store: VolumeStore, cohort: pd.DataFrame, weights: str, repeats: int, cache: Path) -> np.ndarray:
    """Out-of-fold ages (repeats, n) of VGG16 features and SVR, late fusion, as notebook 05 gives them."""
    from brainage_nb.models.svr import train_vgg_svr
    from brainage_nb.models.vgg16 import FeatureSettings, extract_features, vgg16_features

    network = vgg16_features(weights).place()
    settings = FeatureSettings.for_volumes(store.settings, image_size=64)
    features = extract_features(
        store, cache / "features", network, settings=settings, scan_ids=cohort["scan_id"]
    )
    made = []
    for repeat in range(repeats):
        splits = cohort.assign(split="train", fold=fold_of(cohort, repeat))
        run = train_vgg_svr(features, splits, cache / "runs" / f"vgg-{weights}-{repeat}", network)
        rows = run.predictions[run.predictions["variant"] == "late"].set_index("scan_id")
        made.append(rows["predicted_age"].loc[cohort["scan_id"]].to_numpy(float))
    return np.array(made)
