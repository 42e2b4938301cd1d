"""Several training processes, one a GPU, started from a notebook as a subprocess with its lines shown live.

A subprocess, since a notebook that has touched CUDA cannot fork workers (`notebook_launcher` breaks).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from brainage_nb.models.settings import TrainingSettings
from brainage_nb.workspace import write_csv, write_json

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
    command += ["--nproc_per_node", str(processes_wanted(settings)), "-m", "brainage_nb.models.training"]
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
