"""Several training processes, one a GPU, started from a notebook as a subprocess with its lines shown live.

A subprocess, since a notebook that has touched CUDA cannot fork workers (`notebook_launcher` breaks).

The models of one run (folds, seeds) trained side by side by the workers of a Dask cluster.

Each worker trains one model at a time as `job` would, in the run's folder, which all must see. A model whose
worker dies goes on from its newest checkpoint on another.

How long a training run will take here and what it will leave on disk, measured before it starts.

A few real steps on real volumes, thrown away afterwards; nothing is written and no random state is kept.

Train the age models of one run: `train` in notebooks, `python -m brainage_nb.models.train` elsewhere.

Settings are in `settings`, the models of a run in `fitting.job`, the loop of one in `fitting.member_fit`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from brainage_nb.cluster import in_order, open_cluster
from brainage_nb.models.fit import HISTORY, PRECISE_SCANS, MemberFit, open_volumes
from brainage_nb.models.resume import EpochLines, ProgressBars, StopRequests, space_needed
from brainage_nb.models.run import Job, accelerator_for
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.platforms import session_hours
from brainage_nb.workspace import read_csv, read_json, write_csv, write_json, write_text

if TYPE_CHECKING:
    from brainage_nb.volumes.store import VolumeStore

LAST_LINES = 100


class LaunchFailed(RuntimeError):
    """The training subprocess ended with an error; the message holds its last lines."""


def in_worker() -> bool:
    """True inside a process that was started to train."""
    return "BRAINAGE_TRAINING_WORKER" in os.environ or "WORLD_SIZE" in os.environ


def processes_wanted(settings: TrainingSettings) -> int:
    """Processes to train with: as set, or one a GPU, or one."""
    if settings.processes:
        return settings.processes
    if settings.device == "cpu" or not torch.cuda.is_available():
        return 1
    return torch.cuda.device_count()


def launch(
    store: VolumeStore, splits: pd.DataFrame, run_folder: Path, settings: TrainingSettings, *, fresh: bool
) -> None:
    """Train in several processes; blocks, printing their lines as they come.

    Raises
    ------
    LaunchFailed
        Where the subprocess ends with an error.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    settings_file = write_json(settings.to_json(), run_folder / "launch_settings.json")
    splits_file = write_csv(splits, run_folder / "launch_splits.csv")
    # torchrun, which `accelerate launch` calls too; unlike that, it also starts several processes on CPUs.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes_wanted(settings)), "-m", "brainage_nb.models.train"]
    command += ["--volumes", str(store.folder), "--splits", str(splits_file), "--run-folder", str(run_folder)]
    command += ["--settings", str(settings_file)] + (["--fresh"] if fresh else [])
    environment = os.environ | {"BRAINAGE_TRAINING_WORKER": "1", "PYTHONUNBUFFERED": "1"}
    lines, status = _followed(command, environment)
    if status:
        # The launcher's own report comes last and says little; the first process's error says what happened.
        told = [line for line in lines if line.startswith("[rank0]")] or lines
        raise LaunchFailed(f"Training in {processes_wanted(settings)} processes failed:\n" + "\n".join(told))
    settings_file.unlink()
    splits_file.unlink()


def _followed(command: list[str], environment: dict[str, str]) -> tuple[list[str], int]:
    """Run a command and print its lines as they come; interrupts reach it. Gives last lines and status."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: list[str] = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines = [*lines[1 - LAST_LINES :], line.rstrip()]
        return lines, process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise


MARK = ".started"  # in the run folder: which start of the sweep is the current one
LOST_AGAIN = 10  # a preemptible machine may be taken away often; each time training goes on where it was
STEPS_UNWATCHED = 20
ONE_MODEL = Lock()  # a worker with several threads still trains one model at a time


class Superseded(RuntimeError):
    """The run was started anew, or given up, since this task was handed out."""


class Watched(EpochLines):
    """Progress that ends a task whose run is no longer the current one: Dask cannot stop a running task."""

    def __init__(self, mark: Path, token: str):
        self.mark, self.token = mark, token

    def step(self, fit) -> None:
        if fit.step % STEPS_UNWATCHED == 0:
            self.check()
        super().step(fit)

    def epoch(self, fit) -> None:
        self.check()
        super().epoch(fit)

    def check(self) -> None:
        """Raise `Superseded` where the run's mark is not this start's."""
        if not self.mark.is_file() or self.mark.read_text(encoding="utf-8") != self.token:
            raise Superseded(f"{self.mark.parent.name} was started anew or given up; this task ends unsaved.")


class ModelsFailed(RuntimeError):
    """Some models of a run could not be trained; those that could are kept."""


def train_on_cluster(
    job: Job,
    store: VolumeStore,
    splits: pd.DataFrame,
    settings: TrainingSettings,
    *,
    fresh: bool,
    on_epoch: Callable[[pd.DataFrame], None] | None,
) -> list[str]:
    """Train the unfinished models of a run on the workers of `settings.cluster`.

    Parameters
    ----------
    job : Job
        Of the run; its tables are written once all models are there.
    store, splits, settings
        As `train` has them.
    fresh : bool
        Delete what an earlier run left.
    on_epoch : callable, optional
        Called with the history so far after each finished model.

    Returns
    -------
    list of str
        Notes to show.

    Raises
    ------
    ClusterError
        The cluster cannot be used.
    ModelsFailed
        After all others are done; names each failed model with its error.
    """
    from tqdm import tqdm

    if fresh:
        job.clear()
    todo = job.unfinished()
    until = time.time() + 60 * settings.max_minutes if settings.max_minutes else float("inf")
    alone = replace(settings, cluster="", processes=1)
    token, run_folder = uuid.uuid4().hex, job.run_folder.absolute()
    fixed = (store.folder.absolute(), splits, run_folder, alone.to_json(), token, until)
    tasks = [(*fixed, member.name) for member in todo]
    gpus = 0 if settings.device == "cpu" or not torch.cuda.is_available() else torch.cuda.device_count()
    job.run_folder.mkdir(parents=True, exist_ok=True)
    write_text(token, job.run_folder / MARK)
    notes, failed = [], []
    with (
        _given_up_afterwards(job.run_folder / MARK),
        open_cluster(settings.cluster, store.folder, gpus=gpus) as client,
    ):
        workers = len(client.nthreads())
        results = in_order(client, train_member, tasks, again=LOST_AGAIN)
        for member, result in zip(todo, tqdm(results, "models", len(todo), unit="model"), strict=True):
            if isinstance(result, Exception):
                failed.append(f"{member.name}: {type(result).__name__}: {result}")
                continue
            notes = [note for note in result if note not in notes] + notes
            if on_epoch is not None and len(history := job.history()):
                on_epoch(history)
    if failed:
        raise ModelsFailed(
            f"{len(failed)} of {len(todo)} models could not be trained; the others are kept, and a run with "
            "the same settings trains only what is missing.\n" + "\n".join(failed)
        )
    if not job.unfinished():
        job.write_tables()
    return [f"{len(todo)} models on {workers} workers of {settings.cluster}", *notes]


@contextmanager
def _given_up_afterwards(mark: Path) -> Iterator[None]:
    """Remove the mark of this start at the end, so that tasks still running somewhere end too."""
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def train_member(
    store_folder: Path,
    splits: pd.DataFrame,
    run_folder: Path,
    settings: dict,
    token: str,
    until: float,
    name: str,
) -> list[str]:
    """On a worker: train the model `name` of a run, going on from its checkpoint; gives notes to show.

    Parameters
    ----------
    store_folder : path
        Of the volume store.
    splits, run_folder
        As `train` has them.
    settings : dict
        `TrainingSettings.to_json`.
    token : str
        Of the start that handed this out; the run folder's mark must hold it, or the task ends.
    until : float
        When to save and end, seconds since the epoch; infinite for no limit.
    name : str
        Of the member.
    """
    from brainage_nb.volumes.store import VolumeStore

    with ONE_MODEL:
        left = (until - time.time()) / 60
        if left <= 0:
            return [f"{name} not begun: max_minutes is used up. Run again with the same settings to go on."]
        timed = TrainingSettings.from_json(settings | {"max_minutes": left if left < float("inf") else 0.0})
        job = Job(VolumeStore(store_folder), splits, run_folder, timed)
        with StopRequests(timed.max_minutes) as stop:
            watched = Watched(Path(run_folder) / MARK, token)
            watched.check()
            job.run(stop, watched, only=name)
    return job.notes


STEPS = 3  # the first is slower (kernels are chosen, memory is taken) and is not counted
FORWARD_SHARE = 1 / 3  # of a training step's time, for a prediction


def forecast(
    store: VolumeStore,
    splits: pd.DataFrame,
    run_folder: str | Path,
    settings: TrainingSettings,
    *,
    fresh: bool = False,
) -> pd.DataFrame:
    """Time and disk of a run, to be shown before it starts.

    Parameters
    ----------
    store, splits, run_folder, settings
        As in `training.train`.
    fresh : bool
        Whether finished models will be deleted and trained again.

    Returns
    -------
    DataFrame
        One row a fact, column `value`. The number of sessions follows from `settings.max_minutes` where it is
        set, else from the platform's longest session.
    """
    job = Job(store, splits, Path(run_folder), settings)
    left = job.members if fresh else job.unfinished()
    facts = {"models to train": f"{len(left)} of {len(job.members)}"}
    if not left:
        return pd.DataFrame({"value": facts | {"time": "nothing is left to train"}})
    step, n_parameters = _measured(job, left[0])
    step /= processes_wanted(settings)
    epoch = _epoch_seconds(left[0], settings, step)
    hours = epoch * settings.epochs * len(left) / 3600
    session = settings.max_minutes / 60 or session_hours()
    sessions = f"{math.ceil(hours / session)} of {session:.3g} h" if math.isfinite(session) else "1, no limit"
    facts |= {
        "one step": f"{step:.2g} s, measured",
        "one epoch": f"about {_told(epoch)}",
        "all": f"about {_told(3600 * hours)} ({settings.epochs} epochs a model)",
        "sessions": sessions,
        "disk": f"{space_needed(n_parameters, len(job.members)) / 1e9:.2g} GB at most",
    }
    return pd.DataFrame({"value": facts})


def _measured(job: Job, member) -> tuple[float, int]:
    """Seconds a step and number of parameters, from steps of one process that nobody keeps."""
    random = torch.get_rng_state()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # training says the same in a moment
        accelerator, _ = accelerator_for(job.settings)
        volumes = open_volumes(job.store, list(job.scans["scan_id"]), accelerator.device, share=0)
        fit = MemberFit(volumes, job.scans, member, job.settings, accelerator, Path(folder), {})
        fit.network.train()
        seconds = [_timed_step(fit, batch) for batch in (fit._batches_of_epoch() * STEPS)[:STEPS]]
        n_parameters = sum(weight.numel() for weight in fit.network.parameters())
        del fit, volumes
    accelerator.free_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch.set_rng_state(random)
    return min(seconds[1:]), n_parameters


def _timed_step(fit: MemberFit, batch: np.ndarray) -> float:
    began = time.monotonic()
    (volumes,) = fit.volumes.batches([batch])
    fit._step(batch, batch, volumes)
    if fit.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began


def _epoch_seconds(member, settings: TrainingSettings, step: float) -> float:
    """Training steps, and predictions of the validation scans and for BatchNorm's statistics."""
    sample = step / settings.batch_size
    predicted = len(member.validation) + min(len(member.train), PRECISE_SCANS)
    return len(member.train) * sample + FORWARD_SHARE * predicted * sample


def _told(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 7200 else f"{seconds / 3600:.2g} h"


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

    parser = argparse.ArgumentParser(prog="python -m brainage_nb.models.train", description=main.__doc__)
    parser.add_argument("--volumes", required=True, help="folder of the volume store")
    parser.add_argument("--splits", required=True, help="splits.csv")
    parser.add_argument("--run-folder", required=True, help="folder of the run, as WORKSPACE/runs/resnet18")
    parser.add_argument("--settings", help="JSON file of training settings; defaults where absent")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in that folder first")
    given = parser.parse_args(arguments)
    content = json.loads(Path(given.settings).read_text(encoding="utf-8")) if given.settings else {}
    os.environ.setdefault("BRAINAGE_TRAINING_WORKER", "1")
    result = train(
        VolumeStore(given.volumes),
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
