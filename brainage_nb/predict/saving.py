"""From a finished training run to a bundle: its weights, and what must be known of them.

Nothing in a bundle names a person: ages are counted or rounded, ids are kept as salted hashes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from brainage_nb.bundle_format import (
    CARD,
    FUSED,
    MANIFEST,
    RESNET,
    VGG,
    BundleError,
    hashed,
    open_bundle,
    write_bundle,
)
from brainage_nb.evaluation.correction import ConformalInterval
from brainage_nb.evaluation.metrics import regression_metrics, with_interval
from brainage_nb.evaluation.rates import measure_rates
from brainage_nb.evaluation.report import load_templates
from brainage_nb.evaluation.runs import OUT_OF_FOLD, add_gaps, calibrate, read_run, reported_level
from brainage_nb.platforms import version_of
from brainage_nb.predict.cautions import NOT_A_DEVICE, REFERENCE_FILE, Reference, name_reference
from brainage_nb.predict.predictors import NetworkEnsemble, SvrModel, load_network, round_weights
from brainage_nb.workspace import MissingInput, Workspace, open_workspace, read_json, write_json, write_text

if TYPE_CHECKING:
    from brainage_nb.evaluation.correction import Calibration
    from brainage_nb.evaluation.fusion import FusedPart, Fusion
    from brainage_nb.evaluation.runs import Run
    from brainage_nb.volumes.store import VolumeStore

Parts = tuple[NetworkEnsemble | SvrModel, dict[str, Any], dict[str, Any]]  # model, manifest entries, arrays
OPENED_AGAIN, REFERENCE_SCANS, CHECK_SCANS = 7, 200, 8
PACKAGES = ("brainage-nb", "torch", "numpy", "nibabel", "scipy", "safetensors")


def save_bundle(
    run_folder: Path | str, target: Path | str | None = None, *, licence: str = "not stated by the makers"
) -> Path:
    """Write the bundle of a finished run, its interval at the level of the workspace's report (90 % before).

    Large weights are rounded to half precision; `reproduced_within_years` in the manifest says how far that
    moves the ages of some training scans (null with folds, whose predictions come from single networks).

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

    Examples
    --------
    >>> save_bundle("workspace/runs/resnet18", "model.zip", licence="CC BY 4.0")  # doctest: +SKIP
    PosixPath('model.zip')
    """
    folder = Path(run_folder).absolute()
    ws = open_workspace(folder.parents[1])
    run = read_run(ws, folder.name)
    channels = _open_stores(run, ws)
    store, *others = channels.values()
    people = learning_rows(run).drop_duplicates("subject_id")  # two scans of one would look too alike
    learning = _choose_evenly(people["scan_id"].tolist(), REFERENCE_SCANS)
    statistics = read_statistics(ws.read("cleaning.csv"), learning)
    reference, *references = (
        Reference.fit((one[scan_id] for scan_id in learning), statistics) for one in channels.values()
    )
    collect = _collect_svr if (folder / "model").is_dir() else _collect_networks
    model, entries, arrays = collect(folder, run.settings)
    known = run.predictions.set_index("scan_id")["predicted_age"]
    apart = []
    for scan_id in _choose_evenly(learning, 0 if run.folds else CHECK_SCANS):
        volume = np.stack([one[scan_id] for one in channels.values()]) if others else store[scan_id]
        apart.append(abs(model.predict(volume).mean() - known[scan_id]))
    manifest = {
        **_describe_making(run, licence),
        "variant": run.settings.get("variant", ""),
        "preprocessing": store.settings.to_json(),
        "volumes": store.fingerprint,
        "reference": reference.to_dict(),
        "reproduced_within_years": max(apart, default=None),
        **entries,
        **facts_of_run(run, ws),
    }
    arrays[REFERENCE_FILE] = reference.arrays()
    if others:
        beside = dict(zip([*channels][1:], references, strict=True))
        manifest |= {
            "channels": [*channels],
            "references": {name: one.to_dict() for name, one in beside.items()},
            "channel_dropout": run.settings["settings"]["channel_dropout"],
        }
        arrays |= {name_reference(name): one.arrays() for name, one in beside.items()}
    return write_bundle(target or folder / "bundle", manifest, arrays, write_card(manifest))


def _open_stores(run: Run, workspace: Workspace) -> dict[str, VolumeStore]:
    """The checked volumes of each scan that a run reads, by its name; the first one's settings decide all."""
    from brainage_nb.volumes.store import VolumeStore

    first, *others = run.modality.split(" + ")
    store = VolumeStore(workspace.path("volumes", run.settings["fingerprint"])).verify()
    stores, trained = {first: store}, run.settings.get("identity", {})
    for n, name in enumerate(others, start=2):
        expected, found = store.settings.for_modality(name).fingerprint, trained[f"channel_{n}"].split()[0]
        if first != "T1w" or found != expected:
            raise ValueError(
                f"{run.name} reads {', '.join([first, *others])} together: a bundle needs the T1w scan first "
                f"and {name} volumes made with its settings ({expected}; these are {found}). Run notebook "
                "03, then train again with channels = T1w,..."
            )
        stores[name] = VolumeStore(workspace.path("volumes", found)).verify()
    return stores


def save_fused_bundle(
    fusion: Fusion, workspace: Workspace, *, licence: str = "not stated by the makers"
) -> Path:
    """Write `runs/fused/bundle`: the bundles of the fused runs, and how their ages are fused.

    It can fuse from the T1w scan alone, and from it with any of the others, each with an interval of its own.

    Raises
    ------
    ValueError
        No run reads the T1w scan, its ages do not follow true age, or a run can have no bundle.
    """
    run, modalities = fusion.run, fusion.modalities
    if several := [name for name in fusion.names if "+" in modalities[name]]:
        raise ValueError(
            f"No fused bundle: {several[0]} reads {modalities[several[0]]} together, and only runs of one "
            "scan each are fused in a bundle. This run has a bundle of its own."
        )
    names = sorted(fusion.names, key=lambda name: modalities[name] != "T1w")  # the T1w scan first
    read = {name: modalities[name] for name in names}
    others = sorted({*read.values()} - {"T1w"})
    sets = [("T1w", *some) for n in range(len(others), -1, -1) for some in combinations(others, n)]
    found = {some: fusion.find_part(some) for some in sets}
    if found["T1w",] is None:
        raise ValueError(
            f"No fused bundle: the runs {', '.join(names)} read {', '.join(read.values())}, and none of "
            "them gives ages that follow true age from the T1w scan, with which a bundle begins."
        )
    folders = {f"model-{place}": name for place, name in enumerate(names)}
    inner = {folder: current_bundle(workspace.run(name)) for folder, name in folders.items()}
    manifest = {
        **_describe_making(run, licence),
        "kind": FUSED,
        "members": [
            {"folder": folder, "run": name, "modality": modalities[name]} for folder, name in folders.items()
        ],
        "parts": [_describe_part(some, part, names) for some, part in found.items() if part],
        **_describe_calibration(fusion.whole.run, fusion.whole.calibration),
        "figures": {name: _measure(run, name) for name in run.splits() if name != "train"},
        "position": _list_positions(run),
    }
    learned = {"training": read_json(inner["model-0"] / MANIFEST)["training"]}
    card = write_card(manifest | learned)
    return write_bundle(workspace.run(FUSED) / "bundle", manifest, {}, card, inner)


def offer_fused_bundle(fusion: Fusion, workspace: Workspace) -> str:
    """Save the fused bundle and say where; or say why there is none."""
    try:
        return f"saved {save_fused_bundle(fusion, workspace)}"
    except (ValueError, OSError) as error:
        return f"no bundle. {error}"


def _describe_part(modalities: Sequence[str], part: FusedPart, names: Sequence[str]) -> dict[str, Any]:
    """How ages from these scans are fused, weights in the order of `names`, and their own calibration."""
    weights = dict(zip(part.combination.runs, part.combination.weights, strict=True))
    return {
        "modalities": list(modalities),
        "intercept": part.combination.intercept,
        "weights": [weights[name] for name in names if name in weights],
        "words": part.combination.words,
        **_describe_calibration(part.run, part.calibration),
    }


def _describe_making(run: Run, licence: str) -> dict[str, Any]:
    """Manifest entries that every bundle has."""
    return {
        "run": run.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "licence": licence,
        "intended_use": NOT_A_DEVICE,
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def current_bundle(run_folder: Path | str) -> Path:
    """The bundle of a run: the one there, or saved now where none opens or the run was trained again.

    MissingInput for the fused one where notebook 06 has to make it (again).
    """
    if _is_current(run_folder):
        return Path(run_folder) / "bundle"
    if Path(run_folder).name == FUSED and not (Path(run_folder) / "predictions.csv").exists():
        raise MissingInput(
            f"{run_folder} has no fused bundle of the runs as they are now. Run notebook 06 with "
            'more = "fuse=..." to make it.'
        )
    return save_bundle(run_folder)


def update_bundle(run_folder: Path | str, calibration: Calibration) -> str:
    """Give a run's bundle the correction and interval of its evaluation, and say what it gives now.

    Copies of the bundle made before keep theirs; `bundle.json` and card say at which level.
    """
    place = Path(run_folder).absolute() / "bundle"
    gives = f"gives this {calibration.interval.title}" if calibration.interval else "gives no interval"
    if not _is_current(run_folder):
        return f"no bundle of this training yet; the next one {gives}"
    run, manifest = read_run(open_workspace(place.parents[2]), place.parent.name), read_json(place / MANIFEST)
    evaluated = _describe_calibration(run, calibration)
    if evaluated.items() <= manifest.items():
        return f"the bundle {gives}"
    before = manifest["interval"] or {"level": 0}
    manifest |= evaluated
    write_json(manifest, place / MANIFEST)
    write_text(write_card(manifest), place / CARD)
    return f"the bundle now {gives}; copies made before keep their own ({before['level']:.0%})"


def _is_current(run_folder: Path | str) -> bool:
    """Whether the run has a bundle that is whole, made after its predictions."""
    folder = Path(run_folder)
    made, runs = folder / "bundle" / MANIFEST, [folder]
    try:
        whole = open_bundle(made.parent)
        for files in whole.members.values() or [whole]:
            for file in files.manifest["files"]:
                files.arrays(file)  # of other content than was saved, each prediction would refuse it
    except BundleError:
        return False
    if whole.members:
        runs = [folder.with_name(member["run"]) for member in whole.manifest["members"]]
    predicted = [path for run in runs if (path := run / "predictions.csv").exists()]
    return all(made.stat().st_mtime >= path.stat().st_mtime for path in predicted)


def _choose_evenly(items: Sequence[str], n: int) -> list[str]:
    chosen = np.unique(np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int))
    return [items[place] for place in chosen]


def read_statistics(cleaning: pd.DataFrame, scan_ids: Sequence[str]) -> np.ndarray | None:
    """Statistics (n, 10) of scans before preprocessing; None where an older notebook 02 measured none."""
    if "scan_statistics" not in cleaning:
        return None
    cells = cleaning.set_index("scan_id")["scan_statistics"].reindex(scan_ids).fillna("")
    return np.array([cell.split(" x ") for cell in cells], dtype=float) if cells.ne("").all() else None


# --- the model ------------------------------------------------------------------------------------------


def _collect_networks(folder: Path, settings: Mapping[str, Any]) -> Parts:
    """The ensemble as it is saved, its manifest entries and its array files."""
    if own := settings.get("own", {}).get("network"):
        raise ValueError(
            f"{folder} was trained with a network of your own ({own}): a bundle runs nothing, so it can only "
            "hold the ResNet-18 of this package. Keep checkpoints/*/weights.safetensors and the code."
        )
    training, places = settings["settings"], sorted(folder.glob("checkpoints/*/weights.safetensors"))
    if not places:
        raise FileNotFoundError(
            f"{folder} has no finished model (checkpoints/*/weights.safetensors). Train it to the end first."
        )
    trained = [_keep_spreads_above_0(load_file(path)) for path in places]
    channels = trained[0]["conv1.weight"].shape[1]
    architecture = {name: training[name] for name in ("widths", "blocks", "shortcut")} | {
        "linear_edge": len(trained[0].get("linear.weight", ())) // channels,
    }
    architecture |= {"channels": channels} if channels > 1 else {}
    rounded = [round_weights(load_network(architecture, weights)) for weights in trained]
    files = [f"member-{n:02d}.safetensors" for n in range(len(places))]
    named = zip(files, places, strict=True)
    entries = {
        "kind": RESNET,
        "trained_by_recipe": settings["recipe"],
        "architecture": architecture,
        "flip_averaging": bool(training["flip_averaging"]),
        "members": [{"file": file, "name": path.parent.name} for file, path in named],
        "weights": "float16",
    }
    networks = [load_network(architecture, weights) for weights in rounded]
    ensemble = NetworkEnsemble(networks, flip_averaging=entries["flip_averaging"])
    return ensemble, entries, dict(zip(files, rounded, strict=True))


def _keep_spreads_above_0(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A channel that never fires has a spread of 0, which a bundle may not; the least number moves no age."""
    least = np.finfo(np.float32).tiny
    return {n: np.maximum(a, least) if n.endswith("running_var") else a for n, a in weights.items()}


def _collect_svr(folder: Path, settings: Mapping[str, Any]) -> Parts:
    """The fusion, its manifest entries and its array files, VGG16's convolutions among them."""
    from brainage_nb.models.svr import ARRAYS, FACTS, NETWORK, VggSvr

    model, facts = VggSvr.load(folder / "model"), read_json(folder / "model" / FACTS)
    network = {name: tensor.numpy() for name, tensor in model.network.layers.state_dict().items()}
    arrays = {ARRAYS: load_file(folder / "model" / ARRAYS), NETWORK: network}
    entries = {"kind": VGG, "vgg_svr": facts, "members": [], "weights": "float32"}
    return SvrModel(model, settings["variant"]), entries, arrays


# --- the run behind it ----------------------------------------------------------------------------------


def facts_of_run(run: Run, workspace: Workspace) -> dict[str, Any]:
    """Manifest entries `training, correction, interval, rates, figures, position, seen, seen_before`, all
    from the run's own files.

    Correction and interval are those of the evaluation (`calibrate`), at the level of the workspace's report
    where there is one; test rows only give figures.
    """
    learning, cleaning = learning_rows(run), workspace.read("cleaning.csv")
    cleaning = cleaning[cleaning["scan_id"].isin(learning["scan_id"])]
    return {
        "training": _describe_training(learning, cleaning)
        | {"age_mean": run.reference_age, "skull_stripped": _find_skull_stripped(learning, workspace)},
        **_describe_calibration(run, calibrate(run, reported_level(workspace))),
        "figures": {name: _measure(run, name) for name in run.splits() if name != "train"},
        "position": _list_positions(run),
        "seen": _hash_people(learning, cleaning),
        "seen_before": run.settings.get("seen_before", []),
    }


def _describe_calibration(run: Run, calibration: Calibration) -> dict[str, Any]:
    """`Calibration.to_dict`, its correction with `mae`: of corrected ages on the scans that judge the run.

    Beside it `rates`, by which two scans of one person give a rate of ageing.
    """
    facts, judged = calibration.to_dict(), run.part(run.judged_on)
    scale = measure_rates(run.unseen, calibration).scale
    facts["rates"] = asdict(scale) if scale else None
    if facts["correction"] and len(judged):
        errors = add_gaps(run, calibration).loc[judged.index, "corrected_gap"].abs()
        if errors.notna().all():
            facts["correction"]["mae"] = float(errors.mean())
    return facts


def learning_rows(run: Run) -> pd.DataFrame:
    """Headline rows of all scans that any member learned or chose its epoch from: all but test."""
    return run.predictions[run.predictions["split"] != "test"]


def _describe_training(rows: pd.DataFrame, cleaning: pd.DataFrame) -> dict[str, Any]:
    age = rows.groupby("subject_id")["age"].mean().to_numpy()
    edges = np.arange(5 * np.floor(age.min() / 5), age.max() + 5.001, 5)
    cells = cleaning["voxel_mm"].dropna() if "voxel_mm" in cleaning else ()
    voxels = [float(edge) for cell in cells for edge in cell.split(" x ")]
    facts = {
        "n_subjects": len(age),
        "n_scans": len(rows),
        "age_low": float(age.min()),
        "age_high": float(age.max()),
        "age_edges": edges,
        "age_counts": np.histogram(age, edges)[0],
        "voxel_mm": [min(voxels), max(voxels)] if voxels else None,
    }
    people = rows.drop_duplicates("subject_id")
    for name in (name for name in ("sex", "site", "source") if name in rows):
        counts = people[name].fillna("").astype(str).value_counts()
        facts[name] = {value or "unknown": int(n) for value, n in counts.items()}
    return facts


def _find_skull_stripped(rows: pd.DataFrame, workspace: Workspace) -> bool | None:
    """Whether most of a few training scans are skull-stripped; None where none can be opened."""
    from brainage_nb.volumes.heads import find_head
    from brainage_nb.volumes.scans import ScanError, load_scan

    images = workspace.read("cohort.csv").set_index("scan_id")["image"]
    found = []
    for scan_id in _choose_evenly(rows["scan_id"].tolist(), OPENED_AGAIN):
        try:
            found.append(find_head(load_scan(workspace.resolve(images[scan_id]))).skull_stripped)
        except ScanError:  # scans need not lie where they lay in training
            continue
    return bool(np.mean(found) > 0.5) if found else None


def _measure(run: Run, split: str) -> dict[str, Any]:
    rows = run.part(split)
    subjects, mean = rows["subject_id"].to_numpy(), run.reference_age
    return regression_metrics(
        rows["age"], rows["predicted_age"], subjects, reference_age=mean, n_bootstrap=1000
    )


def _list_positions(run: Run) -> dict[str, Any]:
    """Held-out predictions against ages, to place a new one among: ages in whole years, no ids, shuffled."""
    parts = [name for name in run.splits() if name != "train" and not (run.folds and name == "val")]
    rows = pd.concat([run.part(name).assign(part=name) for name in parts])
    rows = rows.sample(frac=1, random_state=0)
    return {
        "part": rows["part"].replace(OUT_OF_FOLD, "out of fold").tolist(),
        "age": rows["age"].round().astype(int).tolist(),
        "predicted_age": rows["predicted_age"].round(1).tolist(),
    }


def _hash_people(rows: pd.DataFrame, cleaning: pd.DataFrame) -> dict[str, Any]:
    salt = os.urandom(16).hex()
    images = cleaning["sha256"].dropna().astype(str) if "sha256" in cleaning else ()
    return {
        "salt": salt,
        "subjects": sorted({hashed(name, salt) for name in rows["subject_id"].unique()}),
        "images": sorted({hashed(digest, salt) for digest in images if digest}),
    }


def write_card(manifest: Mapping[str, Any]) -> str:
    """The bundle's README.md: what it is, from whom it learned, how good it is, what it is not for."""
    interval = manifest["interval"] and ConformalInterval.from_dict(manifest["interval"])
    is_test_object = set(manifest["training"].get("source", {})) == {"demo"}
    content = {"interval": interval, "is_test_object": is_test_object, "with_interval": with_interval}
    card = load_templates().get_template("bundle_card.md.j2").render(manifest | content, notice=NOT_A_DEVICE)
    return f"{card.strip()}\n"
