"""What a bundle says about the run behind it: who it was trained on, correction, interval, figures.

Nothing here names a person: ages are counted or rounded, ids are kept as salted hashes.

From a finished training run to a bundle: weights in the smallest exact-enough form, and what must be said
of them.

Reads the workspace the run lies in; opens no bundle (see `bundle`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from brainage_nb.bundle_format import CARD as CARD_FILE
from brainage_nb.bundle_format import MANIFEST, all_seen, hashed, write_bundle
from brainage_nb.evaluation.correction import ConformalInterval
from brainage_nb.evaluation.evaluate import calibrate
from brainage_nb.evaluation.metrics import regression_metrics, with_interval
from brainage_nb.evaluation.runs import OUT_OF_FOLD, Run, reported_level
from brainage_nb.models.network import outputs_of
from brainage_nb.models.settings import averaging_of
from brainage_nb.platforms import version_of
from brainage_nb.predict.cautions import FILE as REFERENCE_FILE
from brainage_nb.predict.cautions import NOT_A_DEVICE, Reference
from brainage_nb.predict.predictors import (
    HALF_PRECISION_YEARS,
    RESNET,
    VGG,
    NetworkEnsemble,
    SvrModel,
    arrays_of,
    network_from,
    precision_check,
)
from brainage_nb.workspace import Workspace, open_workspace, read_json, write_json, write_text

if TYPE_CHECKING:
    from brainage_nb.evaluation.correction import Calibration
    from brainage_nb.evaluation.runs import Run
    from brainage_nb.volumes.settings import PreprocessingSettings
    from brainage_nb.volumes.store import VolumeStore

LOOKED_AT = 7  # training scans opened again


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


REFERENCE_SCANS, FEATURE_SCANS, CHECK_SCANS = 200, 64, 8
PACKAGES = ("brainage-nb", "torch", "numpy", "nibabel", "scipy", "safetensors")


def save_bundle(
    run_folder: Path | str, target: Path | str | None = None, *, licence: str = "not stated by the makers"
) -> Path:
    """Write the bundle of a finished run, its interval at the level of the workspace's report (90 % before).

    Weights are rounded to half precision where no age of the checked training scans moves by 0.01 years or
    more; the manifest says which, and how far they moved.

    Parameters
    ----------
    run_folder : path
        `runs/<run>` of a workspace whose store, splits and cohort are in place.
    target : path, optional
        A folder, or a file name ending in `.zip`; by default `<run_folder>/bundle`.
    licence : str
        Terms for the weights, in words; they are the makers' to set.

    Returns
    -------
    Path
        The bundle.
    """
    from brainage_nb.evaluation.runs import read_run
    from brainage_nb.volumes.store import VolumeStore

    folder = Path(run_folder).absolute()
    ws = open_workspace(folder.parents[1])
    run = read_run(ws, folder.name)
    store = VolumeStore(ws.path("volumes", run.settings["fingerprint"]))
    learning = evenly(training_rows(run)["scan_id"].tolist(), REFERENCE_SCANS)
    checked = {scan_id: np.asarray(store[scan_id]) for scan_id in evenly(learning, CHECK_SCANS)}
    make = _svr_parts if (folder / "model").is_dir() else _resnet_parts
    model, parts, arrays = make(folder, run.settings, list(checked.values()))
    reference = reference_of(store, learning, model)
    manifest = {
        "run": run.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "licence": licence,
        "intended_use": NOT_A_DEVICE,
        "versions": {name: version_of(name) for name in PACKAGES},
        "variant": run.settings.get("variant", ""),
        "preprocessing": store.settings.to_json(),
        "volumes": store.fingerprint,
        "reference": reference.to_dict(),
        "reproduced_within_years": _largest_difference(model, checked, run),
        **parts,
        **facts_of_run(run, ws),
    }
    arrays[REFERENCE_FILE] = reference.arrays()
    return write_bundle(target or folder / "bundle", manifest, arrays, card_of(manifest))


def current_bundle(run_folder: Path | str) -> Path:
    """The bundle of a run: the one there, or saved now where there is none or the run was trained again."""
    return Path(run_folder) / "bundle" if _is_current(run_folder) else save_bundle(run_folder)


def update_bundle(run_folder: Path | str, calibration: Calibration) -> str:
    """Give a run's bundle the correction and interval of its evaluation, and say what it gives now.

    Copies of the bundle made before keep theirs; `bundle.json` and card say at which level.
    """
    place, evaluated = Path(run_folder) / "bundle", calibration.to_dict()
    gives = f"gives this {calibration.interval.title}" if calibration.interval else "gives no interval"
    if not _is_current(run_folder):
        return f"no bundle of this training yet; the next one {gives}"
    manifest = read_json(place / MANIFEST)
    if evaluated.items() <= manifest.items():
        return f"the bundle {gives}"
    before = manifest["interval"] or {"level": 0}
    manifest |= evaluated
    write_json(manifest, place / MANIFEST)
    write_text(card_of(manifest), place / CARD_FILE)
    return f"the bundle now {gives}; copies made before keep their own ({before['level']:.0%})"


def _is_current(run_folder: Path | str) -> bool:
    """Whether the run has a bundle, made after its predictions."""
    made, predicted = Path(run_folder) / "bundle" / MANIFEST, Path(run_folder) / "predictions.csv"
    return made.exists() and (not predicted.exists() or made.stat().st_mtime >= predicted.stat().st_mtime)


def evenly(items: Sequence[str], n: int) -> list[str]:
    """At most `n` of the items, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int))
    return [items[place] for place in chosen]


def reference_of(
    volumes: Mapping[str, np.ndarray] | VolumeStore,
    learning: Sequence[str],
    model: NetworkEnsemble | SvrModel,
) -> Reference:
    """What the training scans `learning` looked like, to the eye and, where it is one, to the network."""
    chosen = evenly(learning, FEATURE_SCANS) if isinstance(model, NetworkEnsemble) else []
    features = [model.features(volumes[scan_id]) for scan_id in chosen]
    return Reference.fit((volumes[scan_id] for scan_id in learning), features)


def _resnet_parts(
    folder: Path, settings: Mapping[str, Any], volumes: Sequence[np.ndarray]
) -> tuple[NetworkEnsemble, dict[str, Any], dict[str, Any]]:
    """The ensemble, its manifest entries and its array files."""
    training = settings["settings"]
    architecture = {name: training[name] for name in ("widths", "blocks", "norm", "shortcut")}
    architecture["outputs"] = outputs_of(training["loss"])
    averaging = averaging_of(training)
    places = sorted(folder.glob("checkpoints/*/weights.safetensors"))
    if not places:
        raise FileNotFoundError(
            f"{folder} has no finished model (checkpoints/*/weights.safetensors). Train it to the end first."
        )
    loaded = [load_file(path) for path in places]
    architecture["linear_edge"] = len(loaded[0].get("linear.weight", ()))
    stored = [network_from(architecture, weights) for weights in loaded]
    moved = max(precision_check(network, architecture, volumes, **averaging) for network in stored)
    half = moved < HALF_PRECISION_YEARS
    arrays = {
        f"member-{n:02d}.safetensors": arrays_of(network, half=half) for n, network in enumerate(stored)
    }
    kept = [network_from(architecture, named) for named in arrays.values()]
    entries = {
        "kind": RESNET,
        "trained_by_recipe": settings["recipe"],
        "architecture": architecture,
        **averaging,
        "members": [
            {"file": file, "name": path.parent.name} for file, path in zip(arrays, places, strict=True)
        ],
        "weights": "float16" if half else "float32",
        "half_precision_moves_years": moved,
    }
    return NetworkEnsemble(kept, **averaging), entries, arrays


def _svr_parts(
    folder: Path, settings: Mapping[str, Any], _volumes: Sequence[np.ndarray]
) -> tuple[SvrModel, dict[str, Any], dict[str, Any]]:
    """The fusion, its manifest entries and its array files, VGG16's convolutions among them."""
    from brainage_nb.models.svr import ARRAYS, FACTS, NETWORK, VggSvr

    model = VggSvr.load(folder / "model")
    with tempfile.TemporaryDirectory(prefix="brainage-") as scratch:
        model.save(scratch, with_network=True)
        arrays = {name: load_file(Path(scratch, name)) for name in (ARRAYS, NETWORK)}
        facts = read_json(Path(scratch, FACTS))
    entries = {"kind": VGG, "vgg_svr": facts, "members": [], "weights": "float32"}
    return SvrModel(model, settings["variant"]), entries, arrays


def _largest_difference(
    model: NetworkEnsemble | SvrModel, checked: Mapping[str, np.ndarray], run: Run
) -> float | None:
    """Largest difference in years from the run's own predictions of the checked scans; None with folds, where
    those came from the members that had not seen the scan, not from all."""
    if run.folds:
        return None
    known = run.predictions.set_index("scan_id")["predicted_age"]
    return max(
        abs(float(model.predict(volume).mean()) - known[scan_id]) for scan_id, volume in checked.items()
    )


def card_of(manifest: Mapping[str, Any]) -> str:
    """The bundle's README.md: what it is, from whom it learned, how good it is, what it is not for."""
    training = manifest["training"]
    rows = [
        f"| {split.replace('_', ' ')} | {figures['n']} | {with_interval(figures['mae'])} | "
        f"{with_interval(figures['r'])} | {with_interval(figures['mean_predictor_mae'])} |"
        for split, figures in manifest["figures"].items()
    ]
    return CARD.format(
        kind=manifest["kind"],
        run=manifest["run"],
        created=manifest["created"],
        n_subjects=training["n_subjects"],
        n_scans=training["n_scans"],
        low=training["age_low"],
        high=training["age_high"],
        demo=DEMO if set(training.get("source", {})) == {"demo"} else "",
        rows="\n".join(rows),
        interval=_interval_line(manifest),
        licence=manifest["licence"],
        notice=NOT_A_DEVICE,
    )


def _interval_line(manifest: Mapping[str, Any]) -> str:
    if not manifest["interval"]:
        return "It gives no prediction interval: nothing was held out to calibrate one."
    interval = ConformalInterval.from_dict(manifest["interval"])
    return f"It gives a {interval.title}. " + (
        interval.support_ or f"Half its width is {interval.quantile_:.1f} years."
    )


DEMO = """
**A test object.** It was trained on invented heads whose ages are known, to check the kit. Its ages mean
nothing for people.
"""
CARD = """\
# A brain-age model: {kind}, run {run}
{demo}
Made {created} with brainage-nb. Trained and chosen on {n_subjects} people ({n_scans} scans) of {low:.0f} to
{high:.0f} years.

Raw figures in years with 95 % subject bootstrap; the mean predictor always says the mean training age.
Validation scans may have chosen the epoch, so their figures may flatter; test scans chose nothing.

| part | n | MAE | r | MAE of the mean predictor |
|---|---|---|---|---|
{rows}

{interval}

    from brainage_nb.predict.bundle import load_bundle
    load_bundle("bundle").predict("scan.nii.gz", age=54.0)

or `brainage-nb predict --bundle bundle scan.nii.gz`. Opening a bundle runs nothing from it; it holds
`bundle.json` and safetensors arrays.

Licence of the weights: {licence}.

{notice}
"""
