"""Checkpoints that are whole, verified, or not there. They hold whatever state they are given.

A file's name carries its step and the SHA-256 of its bytes, so one rename makes a checkpoint valid and any
damage shows. With a mirror (a folder on Drive, say) each is copied there in the background under a temporary
name, read back, compared, renamed.

When to stop before the end: time used up, SIGTERM, or *interrupt*. The loop asks after each step.

What a person sees while training runs: a bar with the validation MAE, or plain lines from a subprocess.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from brainage_nb.workspace import copy_verified, sha256_of, writing

KEEP = 2
NAME = re.compile(r"step-(\d+)-([0-9a-f]{32})\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written; the message says what is safe."""


class Checkpoints:
    """The checkpoints of one model in training, the last two of them.

    Parameters
    ----------
    folder : path
        Made where it is missing.
    mirror : path, optional
        A second folder that receives a verified copy of each; slow or unsafe file systems belong here.
    """

    def __init__(self, folder: str | Path, mirror: str | Path | None = None):
        self.folder = Path(folder)
        self.mirror = Path(mirror) if mirror else None
        self._good: list[Path] = []
        self._copying: Future | None = None
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="mirror") if mirror else None
        for place in self._places():
            place.mkdir(parents=True, exist_ok=True)
            for leftover in place.glob(".step-*.tmp"):  # of a process that was killed while writing
                leftover.unlink(missing_ok=True)

    def _places(self) -> list[Path]:
        return [place for place in (self.folder, self.mirror) if place]

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write a state (tensors, numbers, text, lists and dicts of them) as the checkpoint of `step`.

        Raises
        ------
        CheckpointError
            Where it cannot be written, also after giving up the older checkpoint; the newest good one is
            untouched.
        """
        try:
            path = self._written(state, step)
        except (OSError, RuntimeError) as first:
            path = self._written_without_older(state, step, first)
        self._good = [good for good in self._good if good != path] + [path]
        self._prune(self.folder, self._good[-KEEP:])
        self._start_mirroring(path)
        return path

    def load(self, device: str | torch.device = "cpu") -> dict[str, Any] | None:
        """The newest state that is whole, or None. A damaged one is passed over with a warning."""
        for path in self._newest_first():
            if not _is_whole(path):
                warnings.warn(
                    f"Checkpoint {path} is damaged (content and hash disagree); using the one before.",
                    stacklevel=2,
                )
                continue
            self._good = [self.folder / path.name]
            return torch.load(path, map_location=device, weights_only=True)
        return None

    def delete(self) -> None:
        """Remove all checkpoints, the mirror's too."""
        self.wait()
        for place in self._places():
            self._prune(place, [])
        self._good = []

    def wait(self) -> None:
        """Wait until the mirror has what the folder has."""
        if self._copying is not None:
            self._copying.result()

    def _newest_first(self) -> list[Path]:
        found = [path for place in self._places() for path in place.iterdir() if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (path.name, path.parent == self.folder), reverse=True)

    def _written(self, state: dict[str, Any], step: int) -> Path:
        temporary = self.folder / f".step-{step:09d}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as stream:
                hashing = _HashingStream(stream)
                torch.save(state, hashing)
                stream.flush()
                os.fsync(stream.fileno())
            path = self.folder / f"step-{step:09d}-{hashing.sha256.hexdigest()[:32]}.pt"
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush_folder(self.folder)
        return path

    def _written_without_older(self, state: dict[str, Any], step: int, first: Exception) -> Path:
        """Try once more with the space of the older checkpoint; the newest good one always stays."""
        self._prune(self.folder, self._good[-1:])
        try:
            return self._written(state, step)
        except (OSError, RuntimeError) as error:
            safe = self._good[-1].name if self._good else "nothing yet"
            raise CheckpointError(
                f"The checkpoint of step {step} cannot be written to {self.folder}: {first}. Safe: {safe}. "
                "Free some disk space and run again: training goes on from what is safe."
            ) from error

    def _start_mirroring(self, path: Path) -> None:
        if self._copier is None:
            return
        self.wait()
        self._copying = self._copier.submit(self._mirror, path, [good.name for good in self._good[-KEEP:]])

    def _mirror(self, path: Path, keep: list[str]) -> None:
        """Copy, read back, rename; a mirror that fails is reported and training goes on."""
        try:
            if not _is_whole(path):
                raise OSError("it is not what was written")
            copy_verified(path, self.mirror / path.name)
            self._prune(self.mirror, [self.mirror / name for name in keep])
        except OSError as error:
            warnings.warn(f"{path.name} could not be copied to {self.mirror}: {error}", stacklevel=2)

    @staticmethod
    def _prune(folder: Path, keep: list[Path]) -> None:
        for path in folder.iterdir():
            if NAME.fullmatch(path.name) and path not in keep:
                path.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    try:
        return sha256_of(path)[:32] == NAME.fullmatch(path.name)[2]
    except OSError:
        return False


class _HashingStream:
    """Passes bytes on to a file and hashes what was meant to be written."""

    def __init__(self, stream):
        self.stream, self.sha256 = stream, hashlib.sha256()

    def write(self, block) -> int:
        self.sha256.update(block)
        return self.stream.write(block)

    def flush(self) -> None:
        self.stream.flush()


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def space_needed(n_parameters: int, members: int) -> int:
    """Bytes that a job needs at its worst moment.

    Two checkpoints and one being written of the member in training (weights, two Adam moments, weight
    average: 16 bytes a parameter; best weights in half precision: 2), and half-precision weights of every
    member.
    """
    return 3 * 18 * n_parameters + members * 2 * n_parameters


def halved(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights on the CPU: convolutions and the head in float16, norms, biases and statistics as they are."""
    return {
        name: (tensor.half() if tensor.ndim > 1 else tensor).detach().to("cpu", copy=True)
        for name, tensor in model.state_dict().items()
    }


def write_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write weights as safetensors, whole and read back before they count."""
    from safetensors.torch import save

    content = save({name: tensor.contiguous() for name, tensor in weights.items()})
    with writing(path) as temporary:
        temporary.write_bytes(content)
        if sha256_of(temporary) != hashlib.sha256(content).hexdigest():
            raise OSError(f"{path} reads back with another content; is the disk full or Drive disconnected?")


class StopRequests:
    """Watches for reasons to stop while the `with` block runs.

    Parameters
    ----------
    max_minutes : float
        From construction; 0 for no limit.

    Attributes
    ----------
    reason : str
        "", "time", "interrupt" or "terminate".
    """

    def __init__(self, max_minutes: float = 0.0):
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self.reason = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        if self.reason in ("interrupt", "terminate"):  # the second time: at once
            raise KeyboardInterrupt
        self.reason = "interrupt" if number == signal.SIGINT else "terminate"

    def asked(self, accelerator) -> bool:
        """Whether to stop now; several processes agree, so that all stop at the same step."""
        if not self.reason and time.monotonic() > self.deadline:
            self.reason = "time"
        if accelerator.num_processes == 1:
            return bool(self.reason)
        votes = accelerator.reduce(torch.tensor(float(bool(self.reason)), device=accelerator.device), "sum")
        if votes.item() and not self.reason:
            self.reason = "time"  # another process's reason; that one passes it on
        return bool(self.reason)

    def pass_on(self) -> None:
        """Give the interrupt or signal on, now that all is saved; call after the `with` block."""
        if self.reason == "interrupt":
            raise KeyboardInterrupt("Training was interrupted; all is saved. Run again to go on.")
        if self.reason == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)


FIRST_STEPS = 3


class ProgressBars:
    """One bar a model, counting steps, with the remaining time; for notebooks and terminals.

    Parameters
    ----------
    on_epoch : callable, optional
        Called with the history of the run so far (DataFrame) after each epoch.
    """

    def __init__(self, on_epoch: Callable[[pd.DataFrame], None] | None = None):
        self.on_epoch = on_epoch
        self.bar = None

    def begin(self, name: str, number: int, total: int, history: pd.DataFrame) -> None:
        self.title = name if total == 1 else f"{name} ({number + 1} of {total})"
        self.earlier, self.bar = history, None

    def _open(self, fit) -> None:
        """Open the bar where training goes on, which is known only once the checkpoint is read."""
        if self.bar is None:
            from tqdm import tqdm

            steps = fit.steps_per_epoch * fit.settings.epochs
            self.bar = tqdm(total=steps, initial=fit.step, desc=self.title, unit="step", mininterval=0.5)

    def step(self, fit) -> None:
        self._open(fit)
        self.bar.update(fit.step - self.bar.n)

    def epoch(self, fit) -> None:
        self._open(fit)
        last = fit.history[-1]
        self.bar.set_postfix_str(
            f"epoch {fit.epoch}/{fit.settings.epochs}, {last['seconds']:.3g} s an epoch, train MAE "
            f"{last['train_mae']:.2f}, val MAE {last['val_mae']:.2f} years (best {fit.best['val_mae']:.2f})"
        )
        if self.on_epoch is not None:
            now = pd.DataFrame(fit.history)
            self.on_epoch(pd.concat([self.earlier, now], ignore_index=True) if len(self.earlier) else now)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()


class EpochLines:
    """One line an epoch on standard output, from the first process; for subprocesses and batch systems."""

    def begin(self, name: str, number: int, total: int, _history: pd.DataFrame) -> None:
        self.title, self.steps = f"{name} ({number + 1} of {total})", 0
        self.started = time.monotonic()

    def step(self, fit) -> None:
        self.steps += 1
        if self.steps == FIRST_STEPS and fit.accelerator.is_main_process:
            epoch = (time.monotonic() - self.started) / FIRST_STEPS * fit.steps_per_epoch
            left = epoch * (fit.settings.epochs - fit.epoch) / 60
            print(f"{self.title}: about {epoch:.3g} s an epoch, {left:.3g} min for this model", flush=True)

    def epoch(self, fit) -> None:
        if fit.accelerator.is_main_process:
            last = fit.history[-1]
            print(
                f"{self.title}: epoch {fit.epoch}/{fit.settings.epochs}, train MAE {last['train_mae']:.2f}, "
                f"val MAE {last['val_mae']:.2f} years, {last['seconds']:.3g} s",
                flush=True,
            )

    def end(self) -> None:
        pass
