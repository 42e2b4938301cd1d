"""A tiny workspace that notebooks 01 to 07 left, and what each of them does, without a kernel.

Fourteen heads of 4 mm, stored as 24^3 voxels, and one epoch of a network of some thousand weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from joblib import Parallel

from brainage_nb.bundle_format import find_bundles
from brainage_nb.cli import find_newest_bundle
from brainage_nb.cohort import inspection
from brainage_nb.cohort.cleaning import CleaningRules, clean
from brainage_nb.cohort.inspection import inspect_scans
from brainage_nb.cohort.splits import deal_splits
from brainage_nb.evaluation.evaluate import evaluate_runs
from brainage_nb.evaluation.report import write_report
from brainage_nb.evaluation.runs import read_splits
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.train import train
from brainage_nb.pipeline import find_notebooks, plan_run
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.predict.saving import current_bundle, update_bundle
from brainage_nb.sources.opening import open_source
from brainage_nb.volumes.store import VolumeStore, build_store, current_store
from brainage_nb.workspace import Workspace, open_workspace, write_csv
from tests.evaluation.fake_workspace import truth_of
from tests.models.tiny_bundle import SETTINGS, write_scan

RUN = "resnet18"
TRAINING = TrainingSettings(epochs=1, batch_size=4, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), device="cpu")


def write_scans(folder: Path, seed: int) -> None:
    """Heads and their table; another seed is another cohort under the same names."""
    folder.mkdir(parents=True)
    ages = np.random.default_rng(seed).permutation(np.linspace(20, 80, 14)).round(1)
    for n in range(len(ages)):
        write_scan(folder / f"sub-{n:02d}_T1w.nii.gz", 100 * seed + n)
    ids = [f"{n:02d}" for n in range(len(ages))]
    people = pd.DataFrame({"participant_id": ids, "age": ages, "sex": ["F", "M"] * 7})
    write_csv(people, folder / "ages.csv")


def open_scans(ws: Workspace) -> Any:
    """As 01 does with the demo cohort, whose truth it writes."""
    given = {
        "source": "folder",
        "data_dir": str(ws.path("scans")),
        "table": str(ws.path("scans", "ages.csv")),
    }
    found = open_source("folder", given, ws.root)
    found.cohort["source"] = "demo"
    planted = found.cohort.assign(gap_planted=found.cohort["age"] / 20)
    write_csv(truth_of(planted), ws.path("demo", "truth.csv"))
    without = pd.concat([found.unmatched_images, found.unmatched_rows]).fillna("")
    tables = {"cohort": found.cohort, "cohort_dropped": found.dropped, "cohort_unmatched": without}
    written = [write_csv(table, ws.path(f"{name}.csv")) for name, table in tables.items()]
    finish(ws, "01_data_access", written, found.tables)
    return found.cohort.to_csv()


def clean_scans(ws: Workspace) -> Any:
    """As 02."""
    cohort = ws.read("cohort.csv")
    facts = inspect_scans(cohort, ws.resolve, n_jobs=1)
    cleaning = clean(cohort, facts, CleaningRules())
    written = [write_csv(cleaning, ws.path("cleaning.csv"))]
    kept = cohort[cohort["scan_id"].isin(cleaning.loc[cleaning["kept"], "scan_id"])]
    existing = ws.read("splits.csv") if ws.path("splits.csv").exists() else None
    splits = deal_splits(kept, folds=0, seed=1, existing=existing)
    written.append(write_csv(splits, ws.path("splits.csv")))
    files = [ws.resolve(image) for image in cohort["image"]]
    read = {"cohort.csv": "", **dict(zip(files, facts["sha256"], strict=True))}
    finish(ws, "02_data_cleaning", written, read)
    return cleaning.to_csv(), splits.to_csv()


def store_volumes(ws: Workspace) -> Any:
    """As 03."""
    scans = ws.read("splits.csv")
    report = build_store(scans, ws.path("volumes"), SETTINGS, ws.resolve, n_jobs=1)
    print(report.note)
    failed = write_csv(report.failed, ws.path("scans_without_volume.csv"))
    written = [report.store.folder, ws.path("volumes", "current"), failed]
    finish(ws, "03_preprocessing_preview", written, ["splits.csv"])
    return report.store.read(scans["scan_id"]).tobytes(), report.failed.to_csv()


def train_network(ws: Workspace) -> Any:
    """As 04."""
    ws.need("volumes/current")
    store = current_store(ws.path("volumes"))
    splits, folder = read_splits(ws, store.scan_ids), ws.run(RUN)
    result = train(store, splits, folder, TRAINING)
    current_bundle(folder)
    finish(ws, "04_train_resnet18", sorted(folder.iterdir()), ["splits.csv", folder / "predictions.csv"])
    return result.predictions.to_csv(), result.history.drop(columns="seconds").to_csv()


def evaluate(ws: Workspace) -> Any:
    """As 06."""
    evaluation = evaluate_runs(ws, n_bootstrap=5)
    print(*evaluation.warnings)
    written = write_report(evaluation, [])
    for name, found in evaluation.runs.items():
        update_bundle(ws.run(name), found.calibration)
    read = ["cohort.csv", "splits.csv", *(f"runs/{name}/predictions.csv" for name in evaluation.runs)]
    finish(ws, "06_evaluate", written, read)
    runs = [found.run for found in evaluation.runs.values()]
    histories = [run.history.drop(columns="seconds", errors="ignore").to_csv() for run in runs]
    return [run.name for run in runs], histories, str(evaluation.results)


def predict_one(ws: Workspace) -> Any:
    """As 07."""
    model = load_bundle(current_bundle(ws.run(RUN)))
    splits = ws.read("splits.csv")
    if ws.path("scans_without_volume.csv").exists():
        splits = splits[~splits["scan_id"].isin(ws.read("scans_without_volume.csv")["scan_id"])]
    row = splits[splits["split"] == "test"].sort_values("scan_id").iloc[0]
    store = VolumeStore(ws.path("volumes", model.settings.fingerprint)).verify()
    prediction = model.predict(ws.resolve(row["image"]), row["age"])
    return rounded(prediction), store.read([row["scan_id"]]).tobytes()


def plan(ws: Workspace) -> Any:
    """What `brainage-nb run` would do."""
    steps = plan_run([n for n in find_notebooks() if n.number in STEPS], ws, {})
    return [notebook.number for notebook, _, done in steps if not done]


def show_in_app(ws: Workspace) -> Any:
    """The models that the app offers, and what it says of others."""
    found, damaged = find_bundles()
    print(*damaged)
    scan = ws.path("scans", "sub-00_T1w.nii.gz")
    return [rounded(load_bundle(place).predict(scan)) for place in found if place.is_relative_to(ws.root)]


def predict_newest(ws: Workspace) -> Any:
    """As `brainage-nb predict`."""
    return rounded(load_bundle(find_newest_bundle()).predict(ws.path("scans", "sub-00_T1w.nii.gz")))


def rounded(prediction: Any) -> tuple[float, ...]:
    """Age, interval and corrected age."""
    values = (prediction.predicted_age, prediction.low, prediction.high, prediction.corrected_age or 0.0)
    return tuple(round(float(value), 4) for value in values)


STEPS = {
    "01": open_scans,
    "02": clean_scans,
    "03": store_volumes,
    "04": train_network,
    "06": evaluate,
    "07": predict_one,
}
READERS = STEPS | {"plan": plan, "app": show_in_app, "predict": predict_newest}


def finish(ws: Workspace, notebook: str, written: list[Path], read: Any) -> None:
    """Leave the result that a notebook leaves."""
    defaults = next(one for one in find_notebooks() if one.name == notebook).cell_parameters()
    parameters = {name: item.default for name, item in defaults.items()} | {"workspace": str(ws.root)}
    ws.finish(notebook, parameters, written=written, read=read)


def make_workspace(root: Path, seed: int = 0) -> Workspace:
    """Run all steps in a new workspace."""
    write_scans(root / "scans", seed)
    ws = open_workspace(root)
    for step in STEPS.values():
        step(ws)
    return ws


def use_threads(patch: Any) -> None:
    """Let scans be inspected without processes, which take seconds to start."""
    patch.setattr(inspection, "process_pool", lambda n, **how: Parallel(n, backend="threading", **how))


def main(root: str) -> None:
    """Call each reader; the last line printed says what each gave, or the kind of its error and its words."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        use_threads(patch)
        patch.setenv("BRAINAGE_WORKSPACE", root)
        for name, read in READERS.items():
            try:
                found[name] = ("", repr(read(open_workspace(root))))
            except Exception as error:
                found[name] = (type(error).__name__, str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
