"""What a bundle says about the run behind it: who it was trained on, correction, interval, figures.

Nothing here names a person: ages are counted or rounded, ids are kept as salted hashes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation.intervals import calibrate
from brainage_nb.evaluation.metrics import regression_metrics
from brainage_nb.evaluation.runs import OUT_OF_FOLD, Run, reported_level
from brainage_nb.workspace import Workspace

if TYPE_CHECKING:
    from brainage_nb.volumes.preprocessing import PreprocessingSettings

LOOKED_AT = 7  # training scans opened again
HASH_ROUNDS = (
    2000  # slows down guessing ids; it cannot stop it where ids are few and known (IXI001, IXI002, ...)
)


def check_manifest(manifest: Mapping[str, Any], settings: PreprocessingSettings) -> None:
    """Numbers that later steps rely on, checked once and early."""
    if not (8 <= settings.size <= 256 and 0.5 <= settings.spacing_mm <= 10):
        raise ValueError(
            f"volumes of {settings.size} voxels of {settings.spacing_mm} mm; expected 8 to 256 and 0.5 to 10"
        )
    training = manifest["training"]
    edges, counts = (np.asarray(training[name], dtype=float) for name in ("age_edges", "age_counts"))
    if len(edges) != len(counts) + 1 or not 0 <= training["age_low"] <= training["age_high"] <= 130:
        raise ValueError("the training ages are garbled")
    position = manifest["position"]
    if len({len(position[name]) for name in ("part", "age", "predicted_age")}) != 1:
        raise ValueError("the positions are garbled")
    for seen in all_seen(manifest):
        bytes.fromhex(seen["salt"])


def facts_of_run(run: Run, workspace: Workspace) -> dict[str, Any]:
    """Manifest entries `training, correction, interval, figures, position, seen, seen_before`, all from the
    run's own files.

    Correction and interval are those of the evaluation (`calibrate`), at the level of the workspace's report
    where there is one; test rows only give figures.
    """
    learning = training_rows(run)
    cleaning = _cleaning(workspace)
    return {
        "training": _training(learning, cleaning)
        | {"age_mean": run.reference_age, "skull_stripped": _skull_stripped(learning, workspace)},
        **calibrate(run, reported_level(workspace)).to_dict(),
        "figures": _figures(run),
        "position": _position(run),
        "seen": _seen(learning, cleaning),
        "seen_before": run.settings.get("seen_before", []),
    }


def training_rows(run: Run) -> pd.DataFrame:
    """Headline rows of all scans that any member learned or chose its epoch from: all but test."""
    return run.predictions[run.predictions["split"] != "test"]


def _training(rows: pd.DataFrame, cleaning: pd.DataFrame) -> dict[str, Any]:
    subjects = rows.groupby("subject_id").agg(age=("age", "mean"))
    age = subjects["age"].to_numpy()
    edges = np.arange(5 * np.floor(age.min() / 5), age.max() + 5.001, 5)
    facts = {
        "n_subjects": len(subjects),
        "n_scans": len(rows),
        "age_low": float(age.min()),
        "age_high": float(age.max()),
        "age_edges": edges,
        "age_counts": np.histogram(age, edges)[0],
        "voxel_mm": _voxel_range(rows, cleaning),
    }
    for name in ("sex", "site", "source"):
        if name in rows:
            values = rows.drop_duplicates("subject_id")[name].fillna("").astype(str)
            facts[name] = {value or "unknown": int(n) for value, n in values.value_counts().items()}
    return facts


def _voxel_range(rows: pd.DataFrame, cleaning: pd.DataFrame) -> list[float] | None:
    """Smallest and largest voxel edge among the training scans in mm, where cleaning measured them."""
    if "voxel_mm" not in cleaning:
        return None
    cells = cleaning.loc[cleaning["scan_id"].isin(rows["scan_id"]), "voxel_mm"].dropna()
    sizes = [float(edge) for cell in cells for edge in cell.split(" x ")]
    return [min(sizes), max(sizes)] if sizes else None


def _skull_stripped(rows: pd.DataFrame, workspace: Workspace) -> bool | None:
    """Whether most of a few training scans are skull-stripped; None where none can be opened."""
    from brainage_nb.volumes.heads import find_head
    from brainage_nb.volumes.scans import ScanError, load_scan

    images = workspace.read("cohort.csv").set_index("scan_id")["image"]
    chosen = rows["scan_id"].iloc[np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).astype(int)]
    seen = []
    for scan_id in chosen:
        try:
            seen.append(find_head(load_scan(workspace.resolve(images[scan_id]))).skull_stripped)
        except ScanError:  # scans need not lie where they lay in training
            continue
    return bool(np.mean(seen) > 0.5) if seen else None


def _figures(run: Run) -> dict[str, Any]:
    figures = {}
    for split in (name for name in run.splits() if name != "train"):
        rows = run.part(split)
        figures[split] = regression_metrics(
            rows["age"],
            rows["predicted_age"],
            rows["subject_id"].to_numpy(),
            reference_age=run.reference_age,
            n_bootstrap=1000,
        )
    return figures


def _position(run: Run) -> dict[str, Any]:
    """Held-out predictions against ages, to place a new one among: ages in whole years, no ids, shuffled."""
    parts = [name for name in run.splits() if name != "train" and not (run.folds and name == "val")]
    rows = pd.concat([run.part(name).assign(part=name) for name in parts])
    rows = rows.sample(frac=1, random_state=0)
    return {
        "part": rows["part"].replace(OUT_OF_FOLD, "out of fold").tolist(),
        "age": rows["age"].round().astype(int).tolist(),
        "predicted_age": rows["predicted_age"].round(1).tolist(),
    }


def _cleaning(workspace: Workspace) -> pd.DataFrame:
    if not workspace.path("cleaning.csv").exists():
        return pd.DataFrame({"scan_id": []})
    return workspace.read("cleaning.csv")


# --- who was in it --------------------------------------------------------------------------------------


def _seen(rows: pd.DataFrame, cleaning: pd.DataFrame) -> dict[str, Any]:
    salt = os.urandom(16).hex()
    images: Iterable[str] = ()
    if "sha256" in cleaning:
        chosen = cleaning[cleaning["scan_id"].isin(rows["scan_id"])]
        images = chosen["sha256"].dropna().astype(str)
    return {
        "salt": salt,
        "subjects": sorted({hashed(name, salt) for name in rows["subject_id"].unique()}),
        "images": sorted({hashed(digest, salt) for digest in images if digest}),
    }


def hashed(name: str, salt: str) -> str:
    """A salted hash of a subject id, or of a file's SHA-256, as kept in a bundle."""
    return hashlib.pbkdf2_hmac("sha256", name.encode(), bytes.fromhex(salt), HASH_ROUNDS).hex()[:24]


def all_seen(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Whom the bundle learned from: its own people, and those of the bundles its weights started from."""
    return [manifest["seen"], *manifest.get("seen_before", [])]


def among(names: Iterable[str], seen: Iterable[Mapping[str, Any]], kind: str) -> list[bool]:
    """Which of these subject ids (`kind` "subjects") or file hashes ("images") are in `all_seen`."""
    known = [(part["salt"], set(part[kind])) for part in seen]
    return [any(hashed(name, salt) in hashes for salt, hashes in known) for name in names]
