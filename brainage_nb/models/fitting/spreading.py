"""The models of one run (folds, seeds) trained side by side by the workers of a Dask cluster.

Each worker trains one model at a time as `job` would, in the run's folder, which all must see. A model whose
worker dies goes on from its newest checkpoint on another.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import pandas as pd
import torch

from brainage_nb.cluster import in_order, open_cluster
from brainage_nb.models.fitting.job import Job
from brainage_nb.models.fitting.progress import EpochLines
from brainage_nb.models.fitting.stopping import StopRequests
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.workspace import write_text

if TYPE_CHECKING:
    from brainage_nb.volumes.store import VolumeStore

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
        job = Job(VolumeStore.open(store_folder), splits, run_folder, timed)
        with StopRequests(timed.max_minutes) as stop:
            watched = Watched(Path(run_folder) / MARK, token)
            watched.check()
            job.run(stop, watched, only=name)
    return job.notes
