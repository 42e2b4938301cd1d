"""A small workspace as notebooks 01 to 05 would leave it, with simulated predictions: no image, no
training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from brainage_nb.workspace import Workspace, open_workspace, write_csv, write_json

SPELLINGS = [
    "Control", "CTL", "TD", "HV", "Healthy_Control", "Cognitively normal", "healthy", "non-demented",
    "HC (young)", "Gesunde Kontrolle", "NL", "témoin",
]  # fmt: skip
SPLITS = np.array(["train"] * 14 + ["val"] * 3 + ["test"] * 3)
PREDICTION_COLUMNS = [
    "scan_id", "subject_id", "session_id", "split", "fold", "seed", "variant", "age", "predicted_age",
]  # fmt: skip


def cohort_frame(
    n_subjects: int = 200, *, twice: int = 0, diagnosis: bool = False, seed: int = 0
) -> pd.DataFrame:
    """cohort.csv and splits.csv in one, a row a scan; the first `twice` test subjects have two sessions."""
    rng = np.random.default_rng(seed)
    people = pd.DataFrame({"age": np.sort(rng.uniform(20, 86, n_subjects))})
    people["subject_id"] = [f"{i:04d}" for i in rng.permutation(n_subjects)]
    people["sex"] = rng.choice(["F", "M"], n_subjects)
    people["site"] = rng.choice(["A", "B"], n_subjects)
    people["split"] = np.resize(SPLITS[rng.permutation(len(SPLITS))], n_subjects)
    people["gap_planted"] = rng.normal(0, 3.5, n_subjects)
    if diagnosis:
        people["diagnosis"] = rng.choice(["control", "AD"], n_subjects, p=[0.8, 0.2])
        people.loc[people["diagnosis"] == "AD", "gap_planted"] += 6
    again = people[people["split"] == "test"].head(twice)
    scans = pd.concat([people.assign(session_id="1"), again.assign(session_id="2")], ignore_index=True)
    scans["scan_id"] = scans["subject_id"] + "_ses-" + scans["session_id"]
    scans["image"] = "demo/" + scans["scan_id"] + ".nii.gz"
    return scans.assign(source="folder", fold=-1)


def simulated(
    scans: pd.DataFrame, *, slope: float = 0.8, offset: float = 10.0, noise: float = 4.0, seed: int = 1
):
    """Predicted ages: offset + slope * age + planted gap + noise of the scan."""
    rng = np.random.default_rng(seed)
    return offset + slope * scans["age"] + scans["gap_planted"] + rng.normal(0, noise, len(scans))


def write_workspace(root: Path, scans: pd.DataFrame, *, demo: bool = False) -> Workspace:
    """Write cohort.csv, cleaning.csv, splits.csv and, for a demo cohort, demo/truth.csv."""
    ws = open_workspace(root)
    known = [name for name in ("diagnosis",) if name in scans]
    if demo:
        scans = scans.assign(source="demo")
    people = ["scan_id", "subject_id", "session_id", "image", "age", "sex", "site"]
    write_csv(scans[[*people, "source", *known]], ws.path("cohort.csv"))
    write_csv(scans[[*people, "split", "fold"]], ws.path("splits.csv"))
    cleaning = scans[["scan_id", "subject_id", "session_id", "image"]].assign(
        kept=True, reason="", flags="", detail="", sha256=[f"{i:064x}" for i in range(len(scans))]
    )
    dropped = cleaning.head(2).assign(
        scan_id=["odd1", "odd2"], kept=False, reason="unreadable", detail="The file ends early.", sha256=""
    )
    write_csv(pd.concat([cleaning, dropped]), ws.path("cleaning.csv"))
    if demo:
        write_csv(truth_of(scans), ws.path("demo", "truth.csv"))
    return ws


def truth_of(scans: pd.DataFrame, seed: int = 3) -> pd.DataFrame:
    """Planted truth: brain age drives two anatomy parameters, each with individual noise."""
    rng = np.random.default_rng(seed)
    brain_age = scans["age"] + scans["gap_planted"]
    truth = scans[["scan_id", "subject_id", "session_id", "age"]].assign(
        brain_age=brain_age,
        gap=scans["gap_planted"],
        ventricle_mm=0.01 * brain_age + rng.normal(0, 0.03, len(scans)),
        sulcal_opening=0.02 * brain_age + rng.normal(0, 0.08, len(scans)),
    )
    return truth


def write_run(ws: Workspace, name: str, scans: pd.DataFrame, predicted, *, variant: str = "single") -> Path:
    """Write runs/<name> with settings.json, history.csv and predictions.csv."""
    rows = scans.assign(predicted_age=np.asarray(predicted), fold=-1, seed=0, variant=variant)
    write_csv(rows[PREDICTION_COLUMNS], ws.run(name) / "predictions.csv")
    return write_settings(ws, name, variant)


def write_settings(ws: Workspace, name: str, variant: str) -> Path:
    """settings.json and a short history.csv."""
    epochs = np.arange(1, 21)
    history = pd.DataFrame(
        {
            "epoch": epochs,
            "train_loss": 10 / epochs,
            "val_loss": 11 / epochs + 0.5,
            "val_mae": 12 / epochs + 6,
        }
    )
    write_csv(history, ws.run(name) / "history.csv")
    settings = {"run": name, "variant": variant, "fingerprint": "abc", "seeds": [0], "folds": 0, "epochs": 20}
    write_json(settings, ws.run(name) / "settings.json")
    return ws.run(name)


def write_folded_run(
    ws: Workspace, name: str, scans: pd.DataFrame, *, n_folds: int, mean_rows: bool, seed: int = 0
) -> Path:
    """A run with folds: one out-of-fold row a train or validation scan, one row a fold model for each test
    scan."""
    rng = np.random.default_rng(seed)
    subjects = scans["subject_id"].unique()
    fold_of = dict(zip(subjects, rng.integers(0, n_folds, len(subjects)), strict=True))
    pool = scans[scans["split"] != "test"]
    parts = [pool.assign(fold=pool["subject_id"].map(fold_of), predicted_age=simulated(pool, seed=seed))]
    test = scans[scans["split"] == "test"]
    members = [test.assign(fold=k, predicted_age=simulated(test, seed=100 + k)) for k in range(n_folds)]
    rows = pd.concat([*parts, *members]).assign(seed=0, variant="single")
    if mean_rows:
        mean = np.mean([part["predicted_age"] for part in members], axis=0)
        rows = pd.concat([rows, test.assign(fold=-1, predicted_age=mean, seed=-1, variant="mean")])
    write_csv(rows[PREDICTION_COLUMNS], ws.run(name) / "predictions.csv")
    return write_settings(ws, name, "mean")
