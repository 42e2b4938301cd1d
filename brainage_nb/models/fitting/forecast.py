"""How long a training run will take here and what it will leave on disk, measured before it starts.

A few real steps on real volumes, thrown away afterwards; nothing is written and no random state is kept.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from brainage_nb.models.checkpoints import space_needed
from brainage_nb.models.fitting.batches import open_volumes
from brainage_nb.models.fitting.job import Job, accelerator_for
from brainage_nb.models.fitting.launching import processes_wanted
from brainage_nb.models.fitting.member_fit import PRECISE_SCANS, MemberFit
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.platforms import session_hours

if TYPE_CHECKING:
    from brainage_nb.volumes.store import VolumeStore

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
