"""Train the age models of one run: `train` in notebooks, `python -m brainage_nb.models.train` elsewhere.

Here, in one process per GPU, or spread over the workers of a Dask cluster; `forecast` says what it takes.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
import torch

from brainage_nb.cluster import end_with, in_order, open_cluster
from brainage_nb.models.compute import count_processes, space_needed
from brainage_nb.models.fit import HISTORY, PRECISE_SCANS, WARMUP_EPOCHS, VolumeDataset
from brainage_nb.models.resume import Progress, StopRequests
from brainage_nb.models.run import Job, make_accelerator
from brainage_nb.models.settings import (
    COLUMNS,
    Member,
    TrainingFailed,
    TrainingRefused,
    TrainingSettings,
    read_run_settings,
    read_run_table,
)
from brainage_nb.platforms import session_hours
from brainage_nb.volumes.store import VolumeStore
from brainage_nb.workspace import read_csv, read_json, write_csv, write_json, write_text


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Parameters
    ----------
    complete : bool
        False where it stopped early with everything saved; call `train` again to go on.
    history : DataFrame
        One row per epoch of each model: losses and MAE in years, learning rate at its end, gradient norm,
        seconds.
    predictions : DataFrame
        One row per scan, model and variant; empty until the run is complete.
    settings : dict
        As in `settings.json`; empty where no model was begun.
    notes : list of str
        What should be shown: device, precision, where the volumes are, disk, time.
    """

    complete: bool
    history: pd.DataFrame
    predictions: pd.DataFrame
    settings: dict[str, Any]
    notes: list[str]

    @classmethod
    def read(cls, run_folder: Path, notes: list[str]) -> RunResult:
        """What lies in a run folder."""
        predictions = read_run_table(run_folder / "predictions.csv", COLUMNS)
        history = read_run_table(run_folder / "history.csv", HISTORY)
        return cls(len(predictions) > 0, history, predictions, read_run_settings(run_folder), notes)


def train(
    store: VolumeStore | Sequence[VolumeStore],
    splits: pd.DataFrame,
    run_folder: str | Path,
    settings: TrainingSettings | None = None,
    *,
    fresh: bool = False,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
    network: torch.nn.Module | Callable[[], torch.nn.Module] | None = None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> RunResult:
    """Train every model of a run, going on from where an earlier call stopped.

    Parameters
    ----------
    store : VolumeStore, or several
        Preprocessed volumes; several, in the order of the settings' `channels`, for one network of them all.
    splits : DataFrame
        `scan_id, subject_id, session_id, age` (years), `split` and `fold`; scans absent from the store are
        left out.
    run_folder : path
        Receives `settings.json`, `history.csv`, `predictions.csv` and `checkpoints/`.
    settings : TrainingSettings, optional
    fresh : bool
        Delete what an earlier run left in the folder and start again.
    on_epoch : callable, optional
        Called with the history so far (DataFrame) after each epoch, to draw a live curve.
    network : module, or function that makes one, optional
        Instead of the ResNet-18: from volumes (batch, 1, D, H, W), axes RAS, to one number each, (batch,) or
        (batch, 1). The age is the training ages' mean plus that number times their spread. A function is
        called for each model, after its seed is set; of a module each model gets a copy. Recorded by name;
        such a run is evaluated as any other, but no bundle can be made of it.
    loss : callable, optional
        Instead of the settings' loss: from predicted and true ages (years, both (batch,)) to one number per
        scan, (batch,). Recorded by name.

    Returns
    -------
    RunResult

    Raises
    ------
    TrainingRefused
        The folder holds a run with other settings and `fresh` is False; no usable GPU where one is required;
        too little disk; `init_from` is absent, or has learned from scans this run is judged by.
    TrainingFailed
        The loss is no longer a number, a checkpoint cannot be written, or models on a cluster or a GPU
        process failed.
    ClusterError
        A cluster was asked for and cannot be used.
    StoreError
        Volumes are not what was written into the store.

    Examples
    --------
    >>> settings = TrainingSettings(epochs=1, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), device="cpu")
    >>> result = train(store, splits, "runs/tiny", settings)
    >>> result.complete, result.predictions["split"].value_counts().to_dict()
    (True, {'train': 20, 'val': 5, 'test': 5})
    """
    settings, run_folder = settings or TrainingSettings(), Path(run_folder)
    job = Job(store, splits, run_folder, settings, network, loss)
    if not fresh and job.is_done():
        note = "This run is complete with these settings: nothing was trained again."
        return RunResult.read(run_folder, [note])
    job.check_start(fresh=fresh)
    if not in_worker():  # whoever started a worker has verified
        for one in job.stores:
            one.verify()
    spread = bool(settings.cluster) and len(job.members) > 1 and bool(fresh or job.unfinished())
    processes = 1 if spread or in_worker() else count_processes(settings)
    if any(job.own.values()) and (spread or processes > 1):
        raise TrainingRefused(
            "A network or loss of your own trains in this process only: set processes=1 and cluster=''."
        )
    if spread:
        job.notes = train_on_cluster(job, splits, fresh=fresh, on_epoch=on_epoch)
    elif processes > 1:
        launch(job, splits, processes, fresh=fresh)
    else:
        with StopRequests(settings.max_minutes) as stop:
            job.run(stop, Progress(on_epoch, lines=in_worker()), fresh=fresh)
    return RunResult.read(run_folder, job.notes)


# --- several processes, one per GPU: a subprocess, since a notebook that has touched CUDA cannot fork ------

LAST_LINES = 100


def main(arguments: list[str] | None = None) -> None:
    """Entry of one process; under `torchrun` there are several."""
    parser = argparse.ArgumentParser(prog="python -m brainage_nb.models.train", description=main.__doc__)
    told = "folder of the volume store; several for channels"
    parser.add_argument("--volumes", required=True, nargs="+", help=told)
    parser.add_argument("--splits", required=True, help="splits.csv")
    parser.add_argument("--run-folder", required=True, help="folder of the run, as WORKSPACE/runs/resnet18")
    parser.add_argument("--settings", help="JSON file of training settings; defaults where absent")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in that folder first")
    parser.add_argument("--end-with", type=int, help="save and end when the process of this id has ended")
    given = parser.parse_args(arguments)
    if given.end_with:
        end_with(given.end_with)
    settings = TrainingSettings.from_json(read_json(given.settings) if given.settings else {})
    stores, splits = [VolumeStore(folder) for folder in given.volumes], read_csv(given.splits)
    result = train(stores, splits, given.run_folder, settings, fresh=given.fresh)
    if os.environ.get("RANK", "0") == "0":
        print(*result.notes, sep="\n", flush=True)


def in_worker() -> bool:
    """True inside a process that was started to train, by torchrun or accelerate."""
    return "WORLD_SIZE" in os.environ


class ForwardedStop(StopRequests):
    """Hands an interrupt or SIGTERM on to a subprocess, which saves and ends."""

    def __init__(self, process: subprocess.Popen):
        super().__init__()
        self.process = process

    def note(self, number: int, frame) -> None:
        """Take in a signal, here and there."""
        self.process.send_signal(number)
        super().note(number, frame)


def launch(job: Job, splits: pd.DataFrame, processes: int, *, fresh: bool) -> None:
    """Train in several processes by torchrun; blocks, printing their lines as they come.

    Raises
    ------
    TrainingFailed
        Where the subprocess ends with an error; the message holds its last lines.
    """
    settings_file = write_json(job.settings.to_json(), job.run_folder / "launch_settings.json")
    splits_file = write_csv(splits, job.run_folder / "launch_splits.csv")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "brainage_nb.models.train"]
    command += [
        "--volumes",
        *(store.folder for store in job.stores),
        "--splits",
        splits_file,
        "--run-folder",
        job.run_folder,
    ]
    command += ["--settings", settings_file, "--end-with", str(os.getpid()), *["--fresh"] * fresh]
    # Its own session: an interrupt of this process's group would reach the processes twice, which is at once.
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    lines: deque[str] = deque(maxlen=LAST_LINES)
    with process, ForwardedStop(process):
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        process.wait()
    if process.returncode:
        # The launcher's own report comes last and says little; the first process's error says what happened.
        shown = [line for line in lines if line.startswith("[rank0]")] or lines
        raise TrainingFailed(f"Training in {processes} processes failed:\n" + "\n".join(shown))
    settings_file.unlink()
    splits_file.unlink()


# --- the models of a run, spread over a Dask cluster that shares the run's folder ---------------------------

MARK = ".started"  # in the run folder: which start of the run is the current one
LOST_AGAIN = 10  # a preemptible machine may be taken away often; each time training goes on where it was
ONE_MODEL = Lock()  # a worker with several threads still trains one model at a time


class TaskStop(StopRequests):
    """Also ends a task whose run is no longer the current one: Dask cannot stop a running task.

    Parameters
    ----------
    mark : path
        File in the run folder that holds the current start's token.
    token : str
        Of the start that handed the task out.
    until : float
        When to save and end, seconds since the epoch.
    """

    def __init__(self, mark: Path, token: str, until: float):
        super().__init__((until - time.time()) / 60 if until < float("inf") else 0.0)
        self.mark, self.token = mark, token
        self.check()

    def asked(self, accelerator) -> bool:
        """Whether to stop and save now; `TrainingFailed` where nothing may be saved."""
        self.check()
        return super().asked(accelerator)

    def check(self) -> None:
        """Raise `TrainingFailed` where the run's mark is not this start's."""
        if not self.mark.is_file() or self.mark.read_text(encoding="utf-8") != self.token:
            name = self.mark.parent.name
            raise TrainingFailed(f"{name} was started again or given up; this task ends unsaved.")


def train_on_cluster(
    job: Job, splits: pd.DataFrame, *, fresh: bool, on_epoch: Callable[[pd.DataFrame], None] | None
) -> list[str]:
    """Train the unfinished models of a run on the workers of `settings.cluster`; gives notes to show.

    A model whose worker dies goes on from its newest checkpoint on another.

    Parameters
    ----------
    job : Job
        Of the run; its tables are written once all models are there.
    splits, fresh
        As in `train`.
    on_epoch : callable, optional
        Called with the history so far after each finished model.

    Raises
    ------
    ClusterError
        The cluster cannot be used.
    TrainingFailed
        After all others are done; names each failed model with its error.
    """
    from tqdm import tqdm

    if fresh:
        job.clear()
    settings, todo = job.settings, [member.name for member in job.unfinished()]
    until = time.time() + 60 * settings.max_minutes if settings.max_minutes else float("inf")
    alone, token = replace(settings, cluster="", processes=1), uuid.uuid4().hex
    folders = [store.folder.absolute() for store in job.stores]
    fixed = (folders, splits, job.run_folder.absolute(), alone, token, until)
    gpus = 0 if settings.device == "cpu" or not torch.cuda.is_available() else torch.cuda.device_count()
    mark = write_text(token, job.run_folder / MARK)
    notes, failed = [], []
    try:
        with open_cluster(settings.cluster, job.store.folder, gpus=gpus) as client:
            notes.append(f"{len(todo)} models on {len(client.nthreads())} workers of {settings.cluster}")
            results = in_order(client, train_member, [(*fixed, name) for name in todo], again=LOST_AGAIN)
            for name, result in zip(todo, tqdm(results, "models", len(todo), unit="model"), strict=True):
                if isinstance(result, Exception):
                    failed.append(f"{name}: {type(result).__name__}: {result}")
                    continue
                notes += [note for note in result if note not in notes]
                if on_epoch is not None and len(history := job.history()):
                    on_epoch(history)
    finally:
        mark.unlink(missing_ok=True)  # so that tasks still running somewhere end too
    if failed:
        raise TrainingFailed(
            f"{len(failed)} of {len(todo)} models could not be trained; the others are kept, and a run with "
            "the same settings trains only what is missing.\n" + "\n".join(failed)
        )
    if not job.unfinished():
        job.write_tables()
    return notes


def train_member(
    store_folders: Sequence[Path],
    splits: pd.DataFrame,
    run_folder: Path,
    settings: TrainingSettings,
    token: str,
    until: float,
    name: str,
) -> list[str]:
    """On a worker: train the model `name` of a run, going on from its checkpoint; gives notes to show.

    Parameters
    ----------
    store_folders : paths
        Of the volume stores, one for each channel.
    splits, run_folder, settings
        As `train` has them.
    token, until
        See `TaskStop`.
    name : str
        Of the member.
    """
    with ONE_MODEL:
        if time.time() >= until:
            return [f"{name} not begun: max_minutes is used up. Run again with the same settings to go on."]
        job = Job([VolumeStore(folder) for folder in store_folders], splits, run_folder, settings)
        with TaskStop(run_folder / MARK, token, until) as stop:
            job.run(stop, Progress(lines=True), only=name)
    return job.notes


# --- what a run will do and take, before it starts ----------------------------------------------------------

FORWARD_SHARE = 1 / 3  # of a training step's time, for a prediction


def forecast(
    store: VolumeStore | Sequence[VolumeStore],
    splits: pd.DataFrame,
    run_folder: str | Path,
    settings: TrainingSettings,
    *,
    fresh: bool = False,
    network: torch.nn.Module | Callable[[], torch.nn.Module] | None = None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> pd.DataFrame:
    """What a run will do, and the time and disk it will take, from a few real steps that nobody keeps.

    Parameters
    ----------
    store, splits, run_folder, settings, network, loss
        As in `train`.
    fresh : bool
        Whether finished models will be deleted and trained again.

    Returns
    -------
    DataFrame
        One row per fact, column `value`. The number of sessions follows from `settings.max_minutes` where it
        is set, else from the platform's longest session.
    """
    job = Job(store, splits, Path(run_folder), settings, network, loss)
    left = job.members if fresh else job.unfinished()
    facts = {"models to train": f"{len(left)} of {len(job.members)}"}
    facts |= describe_loop(job, left[0]) if left else {"time": "nothing is left to train"}
    facts |= _estimate_time(job, left) if left else {}
    return pd.DataFrame({"value": facts})


def describe_loop(job: Job, member: Member) -> dict[str, str]:
    """What the loop does with one model of a run, in words."""
    settings, steps = job.settings, -(-len(member.train) // job.settings.batch_size)
    rise = min(WARMUP_EPOCHS, settings.epochs / 5)
    averaged = f"the weights' average over {settings.ema_epochs:g} epoch(s)"
    return {
        "one epoch is": f"{steps} steps over {len(member.train)} scans, each varied at random",
        "loss": job.own["loss"] or "Huber: square within a year, linear beyond",
        "optimiser": f"AdamW, weight decay {settings.weight_decay:g}",
        "learning rate": f"up to {settings.learning_rate:g} in {rise:g} epochs, then a cosine to a hundredth",
        "judged by": f"{len(member.validation)} scans after each epoch, with {averaged}",
        "kept": "the last epoch" if settings.keep == "last" else "the epoch with the least validation MAE",
    }


def _estimate_time(job: Job, left: list[Member]) -> dict[str, str]:
    """Time and disk that the models `left` need."""
    settings, member = job.settings, left[0]
    step = _time_step(job, member) / count_processes(settings)
    predicted = len(member.validation) + min(len(member.train), PRECISE_SCANS)  # and BatchNorm's statistics
    epoch = (len(member.train) + FORWARD_SHARE * predicted) * step / settings.batch_size
    seconds = epoch * settings.epochs * len(left)
    session = settings.max_minutes / 60 or session_hours()
    sessions = math.ceil(seconds / 3600 / session)
    return {
        "one step": f"{step:.2g} s, measured",
        "one epoch": f"about {format_duration(epoch)}",
        "all": f"about {format_duration(seconds)} ({settings.epochs} epochs a model)",
        "sessions": f"{sessions} of {session:.3g} h" if math.isfinite(session) else "1, no limit",
        "disk": f"{space_needed(job.count_weights(), len(job.members)) / 1e9:.2g} GB at most",
    }


def _time_step(job: Job, member: Member) -> float:
    """Seconds per step, from steps of one process that nobody keeps; random numbers stay as they were."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        warnings.simplefilter("ignore")  # training says the same in a moment
        accelerator = make_accelerator(job.settings)
        volumes = VolumeDataset(job.stores, job.scans, accelerator.device)
        seconds = job.make_trainer(volumes, member, accelerator, Path(folder)).time_step()
    accelerator.free_memory()
    return seconds


def format_duration(seconds: float) -> str:
    """A length of time as a person says it: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 7200 else f"{seconds / 3600:.2g} h"


if __name__ == "__main__":
    main()
