"""From a finished training run to a bundle: weights in the smallest exact-enough form, and what must be said
of them.

Reads the workspace the run lies in; opens no bundle (see `bundle`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from brainage_nb.evaluation.metrics import with_interval
from brainage_nb.models.bundles.facts import facts_of_run, training_rows
from brainage_nb.models.bundles.files import write_bundle
from brainage_nb.models.bundles.members import (
    HALF_PRECISION_YEARS,
    RESNET,
    VGG,
    NetworkEnsemble,
    SvrModel,
    arrays_of,
    network_from,
    precision_check,
)
from brainage_nb.models.bundles.prediction import NOT_A_DEVICE
from brainage_nb.models.bundles.reference import FILE as REFERENCE_FILE
from brainage_nb.models.bundles.reference import Reference
from brainage_nb.models.resnet import outputs_of
from brainage_nb.models.views import averaging_of
from brainage_nb.workspace import open_workspace, read_json, version_of

if TYPE_CHECKING:
    from brainage_nb.evaluation.runs import Run
    from brainage_nb.volumes.store import VolumeStore

REFERENCE_SCANS, FEATURE_SCANS, CHECK_SCANS = 200, 64, 8
PACKAGES = ("brainage-nb", "torch", "numpy", "nibabel", "scipy", "safetensors")


def save_bundle(
    run_folder: Path | str, target: Path | str | None = None, *, licence: str = "not stated by the makers"
) -> Path:
    """Write the bundle of a finished run.

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
    store = VolumeStore.open(ws.path("volumes", run.settings["fingerprint"]))
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
    bundle = Path(run_folder) / "bundle"
    made, predicted = bundle / "bundle.json", Path(run_folder) / "predictions.csv"
    if made.exists() and (not predicted.exists() or made.stat().st_mtime >= predicted.stat().st_mtime):
        return bundle
    return save_bundle(run_folder)


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
    from brainage_nb.models.vgg_svr import ARRAYS, FACTS, NETWORK, VggSvr

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
        licence=manifest["licence"],
        notice=NOT_A_DEVICE,
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

    from brainage_nb.models.bundle import load_bundle
    load_bundle("bundle").predict("scan.nii.gz", age=54.0)

or `brainage-nb predict --bundle bundle scan.nii.gz`. Opening a bundle runs nothing from it; it holds
`bundle.json` and safetensors arrays.

Licence of the weights: {licence}.

{notice}
"""
