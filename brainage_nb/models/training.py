"""Train the age models of one run: `train` in notebooks, `python -m brainage_nb.models.training` elsewhere.

Settings are in `settings`, the models of a run in `fitting.job`, the loop of one in `fitting.member_fit`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from brainage_nb.models.fitting.job import Job
from brainage_nb.models.fitting.launching import in_worker, launch, processes_wanted
from brainage_nb.models.fitting.member_fit import HISTORY
from brainage_nb.models.fitting.progress import EpochLines, ProgressBars
from brainage_nb.models.fitting.spreading import train_on_cluster
from brainage_nb.models.fitting.stopping import StopRequests
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.workspace import read_csv, read_json

if TYPE_CHECKING:
    from brainage_nb.volumes.store import VolumeStore

__all__ = ["RunResult", "TrainingSettings", "train"]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Parameters
    ----------
    complete : bool
        False where it stopped early with everything saved; call `train` again to go on.
    history : DataFrame
        A row an epoch of each model: losses and MAE in years, learning rate, gradient norm, seconds.
    predictions : DataFrame
        A row a scan, model and variant; empty until the run is complete.
    settings : dict
        As in `settings.json`; empty where no model was begun.
    notes : list of str
        What should be told: device, precision, where the volumes are, disk, time.
    """

    complete: bool
    history: pd.DataFrame
    predictions: pd.DataFrame
    settings: dict[str, Any]
    notes: list[str]


def train(
    store: VolumeStore,
    splits: pd.DataFrame,
    run_folder: str | Path,
    settings: TrainingSettings | None = None,
    *,
    fresh: bool = False,
    on_epoch=None,
) -> RunResult:
    """Train every model of a run, going on from where an earlier call stopped.

    Parameters
    ----------
    store : VolumeStore
        Preprocessed volumes.
    splits : DataFrame
        `scan_id, subject_id, session_id, age` (years), `split` and `fold`; scans absent from the store are
        left out.
    run_folder : path
        Receives `settings.json`, `history.csv`, `predictions.csv` and `checkpoints/`.
    settings : TrainingSettings, optional
    fresh : bool
        Delete what an earlier run left in the folder and start anew.
    on_epoch : callable, optional
        Called with the history so far (DataFrame) after each epoch, to draw a live curve.

    Returns
    -------
    RunResult

    Raises
    ------
    NotReady
        No usable GPU where one is required, or too little disk.
    SettingsDiffer
        The folder holds a run with other settings, and `fresh` is False.
    StartRefused
        `init_from` is absent, or has learned from scans this run is judged by.
    ClusterError, ModelsFailed
        A cluster was asked for and cannot be used, or some models failed on it.
    """
    settings = settings or TrainingSettings()
    run_folder = Path(run_folder)
    job = Job(store, splits, run_folder, settings)
    if not fresh and job.is_done():
        return _result(run_folder, ["This run is complete with these settings: nothing was trained again."])
    job.check_start(fresh=fresh)
    if settings.cluster and len(job.members) > 1:
        notes = train_on_cluster(job, store, splits, settings, fresh=fresh, on_epoch=on_epoch)
        return _result(run_folder, notes)
    if not in_worker() and processes_wanted(settings) > 1:
        launch(store, splits, run_folder, settings, fresh=fresh)
        return _result(run_folder, [])
    progress = EpochLines() if in_worker() else ProgressBars(on_epoch)
    with StopRequests(settings.max_minutes) as stop:
        job.run(stop, progress, fresh=fresh)
    stop.pass_on()
    return _result(run_folder, job.notes)


def _result(run_folder: Path, notes: list[str]) -> RunResult:
    predictions = run_folder / "predictions.csv"
    history, settings = run_folder / "history.csv", run_folder / "settings.json"
    return RunResult(
        complete=predictions.exists(),
        history=read_csv(history) if history.exists() else pd.DataFrame(columns=list(HISTORY)),
        predictions=read_csv(predictions) if predictions.exists() else pd.DataFrame(),
        settings=read_json(settings) if settings.exists() else {},
        notes=notes,
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry of one process; under `accelerate launch` there are several."""
    from brainage_nb.volumes.store import VolumeStore

    parser = argparse.ArgumentParser(prog="python -m brainage_nb.models.training", description=main.__doc__)
    parser.add_argument("--volumes", required=True, help="folder of the volume store")
    parser.add_argument("--splits", required=True, help="splits.csv")
    parser.add_argument("--run-folder", required=True, help="folder of the run, as WORKSPACE/runs/resnet18")
    parser.add_argument("--settings", help="JSON file of training settings; defaults where absent")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in that folder first")
    given = parser.parse_args(arguments)
    content = json.loads(Path(given.settings).read_text(encoding="utf-8")) if given.settings else {}
    os.environ.setdefault("BRAINAGE_TRAINING_WORKER", "1")
    result = train(
        VolumeStore.open(given.volumes),
        read_csv(given.splits),
        given.run_folder,
        TrainingSettings.from_json(content),
        fresh=given.fresh,
    )
    if os.environ.get("RANK", "0") == "0":
        print(*result.notes, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
