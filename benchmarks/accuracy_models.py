"""What `accuracy.py` compares: models that learn from some scans and predict others.

A model is one of `NETWORKS`, `RIDGES` or the baselines; a recipe is a model or the mean of two. Each choice
within a model (penalty, C, best epoch) is made among the scans that it learns from. A prediction is kept in
one small file once it is made, so that a run of hours can be cut and goes on; scans prepared otherwise, or
other settings of a model, are another file.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from brainage_nb.cohort.splits import deal_folds
from brainage_nb.models.network import fit_linear
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.train import train
from brainage_nb.models.vgg16 import FeatureSettings
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.volumes.store import VolumeStore, build_store
from brainage_nb.workspace import read_json, write_json

LAST = {"keep": "last", "inner_fraction": 0.0}
BRIGHTNESS, GREY = "registered", "best"  # what a network is shown
NETWORKS: dict[str, tuple[str, dict]] = {  # how its scans are prepared, how it learns
    "network on brightness": (BRIGHTNESS, LAST),
    "network on grey matter": (GREY, LAST),
    "reference": ("reference", {}),
}
RIDGES = {"ridge on brightness": BRIGHTNESS, "ridge on grey matter": GREY}
MEAN, REGIONS, VGG = "mean predictor", "SVR on DLMUSE volumes", "VGG16 + SVR on grey matter"
IMAGE_SIZE = 64  # pixels, of the slices that VGG16 sees
VALIDATION = 0.15  # of the scans to learn from, where the best epoch is kept


@dataclass(frozen=True)
class Task:
    """One model to fit: on whom, for whom, with which seed. Scans are rows of the cohort."""

    model: str
    learn: tuple[int, ...]
    judged: tuple[int, ...]
    seed: int = 0


class Models:
    """Fits and remembers.

    Parameters
    ----------
    cohort : DataFrame
        `scan_id, subject_id, session_id, image, age`.
    data : path
        Folder with `dlmuse/NAME_DLMUSE.nii.gz`.
    cache : path
        Receives volumes and predictions.
    epochs : int
        Of the networks.
    widths : ints
        Channels of their four stages.
    vgg_weights : str
        `random_projection` or `imagenet`.
    spacing_mm, size
        Of the volumes.
    """

    def __init__(
        self,
        cohort: pd.DataFrame,
        data: Path,
        cache: Path,
        *,
        epochs: int = 60,
        widths: tuple[int, ...] = (32, 64, 128, 256),
        vgg_weights: str = "random_projection",
        spacing_mm: float = 4.0,
        size: int = 48,
    ):
        self.cohort, self.data, self.cache = cohort, data, cache
        self.epochs, self.widths, self.vgg_weights = epochs, widths, vgg_weights
        self.spacing_mm, self.size = spacing_mm, size
        self.age = cohort["age"].to_numpy(dtype=float)
        self.subjects = cohort["subject_id"].to_numpy()

    def run(self, tasks: Sequence[Task], jobs: int = 1) -> None:
        """Fit what is not kept yet, `jobs` models side by side."""
        wanted = list(dict.fromkeys(tasks))
        missing = [task for task in wanted if not self._file(task).is_file()]
        found = len(wanted) - len(missing)
        print(f"Predictions: {found} found in {self.cache}, {len(missing)} to make", flush=True)
        for prepared in {self._prepared(task.model) for task in missing} - {""}:
            self.store(prepared)  # once, before several processes ask for it
        Parallel(n_jobs=jobs)(delayed(self.predict)(task) for task in missing)

    def predict(self, task: Task) -> np.ndarray:
        """Ages (n,) in years of the scans `task.judged`."""
        file = self._file(task)
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            ages = self._fit(task)
            write_json(dict(zip(self._names(task.judged), map(float, ages), strict=True)), file)
        kept = read_json(file)
        return np.array([kept[name] for name in self._names(task.judged)])

    def _names(self, rows: Sequence[int]) -> list[str]:
        return list(self.cohort["scan_id"].iloc[list(rows)])

    def _file(self, task: Task) -> Path:
        content = repr((self._names(task.learn), self._names(task.judged), self._describe(task)))
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return self.cache / "predictions" / task.model.replace(" ", "_") / f"{digest}.json"

    def _describe(self, task: Task) -> list[object]:
        """How the volumes are made, and how the model learns."""
        if not (prepared := self._prepared(task.model)):
            return []
        settings = self._preprocessing(prepared)
        volumes = [settings.fingerprint]
        if task.model == VGG:
            return [*volumes, self.vgg_weights, FeatureSettings.for_volumes(settings, image_size=IMAGE_SIZE)]
        return [*volumes, self._training(task).identity()] if task.model in NETWORKS else volumes

    def _prepared(self, model: str) -> str:
        return NETWORKS[model][0] if model in NETWORKS else RIDGES.get(model, GREY if model == VGG else "")

    def _fit(self, task: Task) -> np.ndarray:
        learn, judged = list(task.learn), list(task.judged)
        if task.model == MEAN:
            return np.full(len(judged), self.age[learn].mean())
        if task.model == REGIONS:
            return fit_svr(self.regions[learn], self.age[learn]).predict(self.regions[judged])
        if task.model in RIDGES:
            return self._fit_ridge(RIDGES[task.model], learn, judged)
        with tempfile.TemporaryDirectory() as folder:
            splits = self._splits(task)
            run = (self._fit_vgg if task.model == VGG else self._fit_network)(task, splits, Path(folder))
        return run.set_index("scan_id")["predicted_age"].loc[self._names(judged)].to_numpy(float)

    def _splits(self, task: Task) -> pd.DataFrame:
        """Splits in which the judged scans are the test part."""
        scans = self.cohort.assign(split="", fold=-1)
        split = scans.columns.get_loc("split")
        scans.iloc[list(task.learn), split], scans.iloc[list(task.judged), split] = "train", "test"
        scans = scans[scans["split"] != ""]
        ages = scans[scans["split"] == "train"].groupby("subject_id")["age"].mean()
        folds = deal_folds(ages, round(1 / VALIDATION), seed=task.seed)
        if "keep" not in NETWORKS.get(task.model, ("", {}))[1]:  # the best epoch is chosen by these
            scans.loc[scans["subject_id"].isin(folds.index[folds == 0]), "split"] = "val"
        else:  # only watched, and nobody who learns may be spared
            scans.loc[scans["split"] == "test", "split"] = "val"
        return scans

    def _fit_network(self, task: Task, splits: pd.DataFrame, folder: Path) -> pd.DataFrame:
        store = self.store(self._prepared(task.model))
        return train(store, splits, folder / "run", self._training(task)).predictions

    def _training(self, task: Task) -> TrainingSettings:
        numbers = {"epochs": self.epochs, "widths": self.widths, "seeds": (task.seed,)}
        return TrainingSettings(**numbers, checkpoint_minutes=60.0, **NETWORKS[task.model][1])

    def _fit_vgg(self, task: Task, splits: pd.DataFrame, folder: Path) -> pd.DataFrame:
        """VGG16 features and SVR, late fusion, as notebook 05 fits them."""
        from brainage_nb.models.svr import train_vgg_svr
        from brainage_nb.models.vgg16 import extract_features, vgg16_features

        store, network = self.store(GREY), vgg16_features(self.vgg_weights).place()
        settings = FeatureSettings.for_volumes(store.settings, image_size=IMAGE_SIZE)
        features = extract_features(
            store, self.cache / "features", network, settings=settings, scan_ids=self.cohort["scan_id"]
        )
        splits = splits.assign(split=splits["split"].where(splits["split"] == "test", "train"))
        rows = train_vgg_svr(features, splits, folder / "run", network).predictions
        return rows[rows["variant"] == "late"]

    def _fit_ridge(self, prepared: str, learn: list[int], judged: list[int]) -> np.ndarray:
        """The regression that `best` puts beside its network, alone."""
        store = self.store(prepared)
        volumes = torch.from_numpy(store.read(self.cohort["scan_id"]).astype(np.float32))[:, None]
        batches = volumes[learn].split(16)
        model = fit_linear(batches, self.age[learn], self.subjects[learn], store.spacing_mm)
        return model(volumes[judged]).numpy()

    def _preprocessing(self, prepared: str) -> PreprocessingSettings:
        """Of a recipe, or of `registered`: `reference` with the brain on the template."""
        switches = {"brain_only": True, "to_mni": True} if prepared == BRIGHTNESS else {}
        recipe = "reference" if prepared == BRIGHTNESS else prepared
        return PreprocessingSettings.of_recipe(recipe, spacing_mm=self.spacing_mm, size=self.size, **switches)

    def store(self, prepared: str) -> VolumeStore:
        """The volumes of `prepared`, made where they are not there."""
        scans, settings = self.cohort[["scan_id", "image"]], self._preprocessing(prepared)
        report = build_store(scans, self.cache / "volumes", settings)
        if len(report.failed):
            raise SystemExit(f"{len(report.failed)} scans gave no volume:\n{report.failed.to_string()}")
        return report.store

    @cached_property
    def regions(self) -> np.ndarray:
        """Voxels of each DLMUSE region, (n, n_regions)."""
        rows = []
        for name in self.cohort["image"].map(lambda image: Path(image).name.removesuffix(".nii.gz")):
            labels = np.asarray(nib.load(self.data / "dlmuse" / f"{name}_DLMUSE.nii.gz").dataobj).astype(int)
            rows.append(np.bincount(labels.ravel(), minlength=208)[1:208])
        counts = np.array(rows, dtype=float)
        return counts[:, counts.any(axis=0)]


def fit_svr(features: np.ndarray, age: np.ndarray) -> GridSearchCV:
    """Linear SVR on standardised features (n, n_features), C by cross-validation."""
    model = make_pipeline(StandardScaler(), SVR(kernel="linear", epsilon=1.0))
    grid = {"svr__C": [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]}
    search = GridSearchCV(model, grid, scoring="neg_mean_absolute_error", cv=5)
    order = np.random.default_rng(0).permutation(len(age))
    return search.fit(features[order], age[order])


def fold_of(cohort: pd.DataFrame, rows: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold (n,) of each of `rows`: subjects sorted by age, so many in a row dealt to the folds at random."""
    scans = cohort.iloc[rows]
    dealt = deal_folds(scans.groupby("subject_id")["age"].mean(), folds, seed=seed)
    return scans["subject_id"].map(dealt).to_numpy()
