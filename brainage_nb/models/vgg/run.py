"""One run of the VGG16 + SVR baseline: who trains, who is predicted by what, and the files it leaves.

The only place here that sees splits and test rows. It fits through `fusion` and hands it training rows alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation.metrics import mean_training_age, regression_metrics
from brainage_nb.models.vgg.cache import FeatureCache
from brainage_nb.models.vgg.fusion import EARLY, LATE, EarlyFusion, LateFusion, fit_early, fit_late
from brainage_nb.models.vgg.linear_svr import GRID
from brainage_nb.models.vgg.network import IMAGENET, Vgg16Features
from brainage_nb.models.vgg_svr import VggSvr
from brainage_nb.workspace import read_csv, read_json, write_csv, write_json

COLUMNS = ("scan_id", "subject_id", "session_id", "split", "fold", "seed", "variant", "age", "predicted_age")
METHOD = "vgg16_svr"


@dataclass
class VggRun:
    """What a run left behind.

    Attributes
    ----------
    folder : Path
    predictions : DataFrame
        `predictions.csv`: with folds, train and validation rows are out-of-fold (`fold` >= 0).
    grid, by_position, rules : DataFrame
        Inner cross-validated MAE (years, training subjects) of hyper-parameters, positions, fusion rules.
    left_out : DataFrame
        `scan_id, split, reason`.
    settings : dict
        `settings.json`.
    reused : bool
        The run was there with equal settings, nothing was fitted.
    changed : list of str
        Where a run of that name with other settings was replaced: what differed.
    """

    folder: Path
    predictions: pd.DataFrame
    grid: pd.DataFrame
    by_position: pd.DataFrame
    rules: pd.DataFrame
    left_out: pd.DataFrame
    settings: dict[str, Any]
    reused: bool
    changed: list[str]

    def summary(self) -> pd.DataFrame:
        """What was chosen on training subjects, a column a fusion."""
        rows = {
            name: {**self.settings[name], "headline": name == self.settings["variant"]}
            for name in (EARLY, LATE)
        }
        return pd.DataFrame(rows).fillna("")

    @property
    def reference_age(self) -> float:
        """What the mean predictor says for everybody, years."""
        return mean_training_age(self.predictions)

    def accuracy(self, split: str = "test", *, n_bootstrap: int = 2000) -> dict[str, dict[str, Any]]:
        """`regression_metrics` of both fusions on one split; the mean predictor says the training mean."""
        rows = self.predictions[self.predictions["split"] == split]
        known = {"reference_age": self.reference_age, "n_bootstrap": n_bootstrap}
        return {
            variant: regression_metrics(part["age"], part["predicted_age"], part["subject_id"], **known)
            for variant, part in rows.groupby("variant")
        }


def train_vgg_svr(
    cache: FeatureCache,
    splits: pd.DataFrame,
    run_folder: Path | str,
    network: Vgg16Features,
    *,
    failed: pd.DataFrame | None = None,
) -> VggRun:
    """Fit both fusions on training subjects, predict every scan, write the run.

    Without folds: fitted on `train`, all rows with `fold` -1. With folds: a fit a fold over train and
    validation gives their out-of-fold rows, and a last fit on all of them gives the test rows. Test ages (and
    validation ages without folds) are copied into the table and used for nothing else.

    Parameters
    ----------
    cache : FeatureCache
        From `extract_features`.
    splits : DataFrame
        `splits.csv`.
    run_folder : path
        `ws.run("vgg16_svr")`; gets settings.json, predictions.csv, grid.csv, positions.csv, rules.csv,
        left_out.csv and model/.
    network : Vgg16Features
        The one the features were extracted with.
    failed : DataFrame, optional
        `scan_id, reason` of the extraction, to be repeated in `left_out`.
    """
    folder = Path(run_folder)
    inputs = _inputs(cache, splits, network)
    before = read_json(folder / "settings.json") if (folder / "settings.json").exists() else {}
    if before.get("inputs") == inputs:
        return _read(folder, before)
    if network.weights_sha256 != cache.facts["weights_sha256"]:
        raise ValueError(
            "The features come from other weights than this network's: extract them again with it."
        )
    known = np.array([cache.has(scan_id) for scan_id in splits["scan_id"]], dtype=bool)
    scans = splits[known].reset_index(drop=True)
    early, late, rows = _fit_and_predict(cache, scans, network.seed)
    lost = rows["predicted_age"].isna()
    left_out = _left_out(splits[~known], failed, rows[lost])
    variant = EARLY if early.inner_mae <= late.inner_mae else LATE
    settings = _settings(cache, network, variant, early, late, inputs)
    settings["n_scans"] = {name: int(n) for name, n in scans["split"].value_counts().items()}
    settings["n_left_out"] = int(left_out["scan_id"].nunique())
    model = VggSvr(early, late, network, cache.settings, cache.facts["spacing_mm"], variant, settings)
    grid = pd.concat([early.grid.assign(variant=EARLY), late.grid.assign(variant=LATE)])
    run = VggRun(folder, rows[~lost], grid, late.by_position, late.rules, left_out, settings, False, [])
    run.changed = _differences(before.get("inputs", {}), inputs)
    _write(run, model)
    return run


def _fit_and_predict(
    cache: FeatureCache, scans: pd.DataFrame, seed: int
) -> tuple[EarlyFusion, LateFusion, pd.DataFrame]:
    folds = sorted(fold for fold in scans["fold"].unique() if fold >= 0)
    learning = scans["split"].isin(["train", "val"]) if folds else scans["split"] == "train"
    early, late = _fit(cache, scans[learning])
    parts = []
    for fold in folds:
        held_out = scans["fold"] == fold
        parts.append(_predict(cache, scans[held_out], *_fit(cache, scans[learning & ~held_out])))
    rest = scans[~learning] if folds else scans
    parts.append(_predict(cache, rest.assign(fold=-1), early, late))
    return early, late, pd.concat(parts, ignore_index=True).assign(seed=seed)[list(COLUMNS)]


def _fit(cache: FeatureCache, training: pd.DataFrame) -> tuple[EarlyFusion, LateFusion]:
    rows = [cache.rows(scan_id) for scan_id in training["scan_id"]]
    age, subject_id = training["age"].to_numpy(dtype=np.float64), training["subject_id"].to_numpy()
    return fit_early(rows, age, subject_id), fit_late(rows, age, subject_id)


def _predict(cache: FeatureCache, scans: pd.DataFrame, early: EarlyFusion, late: LateFusion) -> pd.DataFrame:
    if scans.empty:
        return pd.DataFrame(columns=[*scans.columns, "variant", "predicted_age"])
    rows = [cache.rows(scan_id) for scan_id in scans["scan_id"]]
    return pd.concat(
        [
            scans.assign(variant=variant, predicted_age=model.predict(rows))
            for variant, model in ((EARLY, early), (LATE, late))
        ]
    )


def _left_out(absent: pd.DataFrame, failed: pd.DataFrame | None, lost: pd.DataFrame) -> pd.DataFrame:
    reasons = {} if failed is None else dict(zip(failed["scan_id"], failed["reason"], strict=True))
    reason = absent["scan_id"].map(reasons).fillna("no features: run the extraction for this scan")
    absent = absent.assign(reason=reason)
    lost = lost.assign(reason=lost["variant"] + ": none of the triplets the model uses shows brain")
    return pd.concat([absent, lost])[["scan_id", "split", "reason"]].reset_index(drop=True)


def _inputs(cache: FeatureCache, splits: pd.DataFrame, network: Vgg16Features) -> dict[str, Any]:
    """What decides a run's outcome; equal inputs need no second fit."""
    used = splits[["scan_id", "subject_id", "age", "split", "fold"]].sort_values("scan_id")
    known = [scan_id + cache.volume_sha256[scan_id] for scan_id in used["scan_id"] if cache.has(scan_id)]
    return {
        "features": cache.facts["fingerprint"],
        "volumes": hashlib.sha256("\n".join(known).encode()).hexdigest()[:12],
        "splits": hashlib.sha256(used.to_csv(index=False).encode()).hexdigest()[:12],
        "grid": [list(choice) for choice in GRID],
        "seed": network.seed,
    }


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {before[name]} -> {now[name]}"
        for name in now
        if name in before and before[name] != now[name]
    ]


def _settings(
    cache: FeatureCache,
    network: Vgg16Features,
    variant: str,
    early: EarlyFusion,
    late: LateFusion,
    inputs: dict[str, Any],
) -> dict[str, Any]:
    return {
        "method": METHOD,
        "title": network.title,
        "variant": variant,
        "variant_chosen_by": "inner cross-validation on training subjects",
        "fingerprint": cache.facts["volumes"],
        "weights": network.mode,
        "weights_sha256": network.weights_sha256,
        "features": cache.facts,
        EARLY: {
            **early.choice._asdict(),
            "inner_cv_mae_years": early.inner_mae,
            "n_triplets": len(early.positions),
        },
        LATE: {
            **late.choice._asdict(),
            "inner_cv_mae_years": late.inner_mae,
            "n_triplets": len(late.positions),
            "rule": late.fusion.rule,
            "slope": late.fusion.slope,
        },
        "inputs": inputs,
    }


def _write(run: VggRun, model: VggSvr) -> None:
    """Tables and model first, settings.json last: it is the sign that the rest is whole."""
    (run.folder / "settings.json").unlink(missing_ok=True)
    # A drawn network can be drawn again; ImageNet's weights go along, so that predicting needs no internet.
    model.save(run.folder / "model", with_network=model.network.mode == IMAGENET)
    for name in ("predictions", "grid", "positions", "rules", "left_out"):
        write_csv(_tables(run)[name], run.folder / f"{name}.csv")
    write_json(run.settings, run.folder / "settings.json")


def _tables(run: VggRun) -> dict[str, pd.DataFrame]:
    return {
        "predictions": run.predictions,
        "grid": run.grid,
        "positions": run.by_position,
        "rules": run.rules,
        "left_out": run.left_out,
    }


def _read(folder: Path, settings: dict[str, Any]) -> VggRun:
    names = ("predictions", "grid", "positions", "rules", "left_out")
    return VggRun(folder, *(read_csv(folder / f"{name}.csv") for name in names), settings, True, [])
