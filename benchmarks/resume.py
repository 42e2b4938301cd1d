"""Does a run that is killed with SIGKILL at random moments end bit for bit like one that was not?

Run: `python benchmarks/resume.py [--runs 20] [--quick]`. A checkpoint is written after every step. Even
runs are killed from outside at random moments; odd ones end themselves by SIGKILL within a write.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pandas as pd
import torch._dynamo  # noqa: F401  optimisers import it at their first step: once, before forking
from synthetic_store import synthetic_store

from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.train import train
from brainage_nb.workspace import read_csv

SETTINGS = TrainingSettings(
    epochs=3, batch_size=6, widths=(8, 16, 32, 64), blocks=(1, 1, 1, 1), device="cpu", checkpoint_minutes=0.0
)
CHECKPOINT_BYTES = 4_000_000


def start(work: Path, run: str, store, splits, bytes_until_kill: int = 0) -> int:
    """Fork a process that trains (or goes on training) a run; returns its id.

    With `bytes_until_kill` the process sends itself SIGKILL once its checkpoints have taken so many bytes.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        warnings.simplefilter("ignore")
        os.dup2(os.open(work / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if bytes_until_kill:
            kill_while_writing(bytes_until_kill)
        train(store, splits, work / run, SETTINGS)
        status = 0
    finally:
        os._exit(status)


def kill_while_writing(bytes_until_kill: int) -> None:
    """Make this process end itself within the write of a checkpoint."""
    write, written = Path.write_bytes, 0

    def cut(path, block):
        nonlocal written
        written += len(block)
        if written > bytes_until_kill:
            write(path, bytes(block)[: len(block) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, block)

    Path.write_bytes = cut


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 without any."""
    return max((int(path.name[5:14]) for path in folder.glob("checkpoints/*/step-*.pt")), default=0)


def kill_at(child: int, folder: Path, step: int, jitter: float) -> bool:
    """Kill some moments after a step was saved; False where the run ended first."""
    while newest_step(folder) < step:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(jitter)
    if os.waitpid(child, os.WNOHANG)[0]:
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def killed_run(work: Path, run: str, store, splits, number: int, kills_wanted: int) -> tuple[int, int]:
    """Train one run with up to `kills_wanted` kills; (kills, kills that cut a write)."""
    draw, kills, cut = random.Random(number), 0, 0
    for _ in range(kills_wanted):
        step = newest_step(work / run) + draw.randint(0, 4)
        if number % 2:
            child = start(work, run, store, splits, bytes_until_kill=draw.randint(1, 5 * CHECKPOINT_BYTES))
            killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        else:
            child = start(work, run, store, splits)
            killed = kill_at(child, work / run, step, draw.uniform(0, 0.05))
        kills += killed
        cut += any((work / run).glob("checkpoints/*/.step-*.tmp"))
    _, status = os.waitpid(start(work, run, store, splits), 0)
    if status:
        raise RuntimeError(f"The resumed run failed:\n{(work / 'log.txt').read_text()[-2000:]}")
    return kills, cut


def result(folder: Path) -> tuple:
    """What must be equal: weights, history without seconds, predictions."""
    history = read_csv(folder / "history.csv").drop(columns="seconds")
    weights = next(folder.glob("checkpoints/*/weights.safetensors")).read_bytes()
    return weights, history.to_csv(), (folder / "predictions.csv").read_bytes()


def main() -> None:
    """Train once undisturbed, then the killed runs; print a table, and as the last line the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3, help="at most so many a run")
    parser.add_argument("--quick", action="store_true", help="four runs")
    options = parser.parse_args()
    n_runs = 4 if options.quick else options.runs
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        store, splits = synthetic_store(work / "volumes", 30, 16, 8.0)
        started = time.monotonic()
        if os.waitpid(start(work, "whole", store, splits), 0)[1]:
            sys.exit((work / "log.txt").read_text())
        seconds, whole = time.monotonic() - started, result(work / "whole")
        rows = []
        for number in range(n_runs):
            kills, cut = killed_run(work, f"run{number}", store, splits, number, options.kills)
            same = result(work / f"run{number}") == whole
            rows.append({"run": number, "kills": kills, "in a write": cut, "identical": same})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    identical = int(table["identical"].sum())
    print(table.to_string(index=False))
    outcome = {
        "name": "resume",
        "value": identical,
        "bar": n_runs,
        "holds": identical == n_runs,
        "kills": int(table["kills"].sum()),
        "kills_in_a_write": int(table["in a write"].sum()),
        "seconds_undisturbed": round(seconds, 2),
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
