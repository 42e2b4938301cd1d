"""Stopping and going on: checkpoints that are whole or not there, requests to stop, a bar to look at.

Checkpoints hold whatever state they are given. A file's name carries its step and the SHA-256 of its bytes,
so one rename makes a checkpoint valid and any damage shows.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from brainage_nb.models.settings import TrainingFailed
from brainage_nb.workspace import sha256_of, writing

KEEP = 2
NAME = re.compile(r"step-(\d+)-([0-9a-f]{32})\.pt")


class Checkpoints:
    """The checkpoints of one model in training, the last two of them.

    Parameters
    ----------
    folder : path
        Made where it is missing.
    """

    def __init__(self, folder: str | Path):
        self.folder, self._good = Path(folder), []
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step-*.tmp"):  # of a process that was killed while writing
            leftover.unlink(missing_ok=True)

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write a state (tensors, numbers, text, lists and dicts of them) as the checkpoint of `step`.

        Raises
        ------
        TrainingFailed
            Where it cannot be written, also after giving up the older checkpoint; the newest good one is
            untouched.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / f"step-{step:09d}-{digest[:32]}.pt"
        try:
            _write_whole(content, digest, path)
        except OSError:
            self._keep(self._good[-1:])  # once more, with the space of the older checkpoint
            try:
                _write_whole(content, digest, path)
            except OSError as error:
                safe = self._good[-1].name if self._good else "nothing yet"
                raise TrainingFailed(
                    f"The checkpoint of step {step} cannot be written to {self.folder}: {error}. Safe: "
                    f"{safe}. Free some disk space and run again: training goes on from what is safe."
                ) from error
        self._keep([*(good for good in self._good if good != path), path][-KEEP:])
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest whole state, on the CPU, or None; a damaged one is passed over with a warning."""
        for path in sorted(self._list(), reverse=True):
            if _is_whole(path):
                self._good = [path]
                return torch.load(path, map_location="cpu", weights_only=True)
            warnings.warn(
                f"Checkpoint {path} is damaged (content and hash disagree); using the one before.",
                stacklevel=2,
            )
        return None

    def delete(self) -> None:
        """Remove all checkpoints."""
        self._keep([])

    def _list(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if NAME.fullmatch(path.name)]

    def _keep(self, good: list[Path]) -> None:
        self._good = good
        for path in set(self._list()) - set(good):
            path.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    try:
        return sha256_of(path)[:32] == NAME.fullmatch(path.name)[2]
    except OSError:
        return False


def _write_whole(content: bytes | memoryview, digest: str, path: Path) -> None:
    """Write a file that counts only once it was read back as it should be."""
    with writing(path) as temporary:
        temporary.write_bytes(content)
        if sha256_of(temporary) != digest:
            raise OSError(f"{path} reads back with another content; is the disk full or Drive disconnected?")


def halve_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights on the CPU: convolutions and the head in float16, norms, biases and statistics as they are."""
    return {
        name: (tensor.half() if tensor.ndim > 1 else tensor).detach().to("cpu", copy=True)
        for name, tensor in model.state_dict().items()
    }


def write_weights(weights: dict[str, torch.Tensor], path: Path, identity: dict[str, Any]) -> None:
    """Write weights as safetensors, together with what decided them, see `read_identity`."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    content = save(tensors, metadata={"identity": json.dumps(identity)})
    _write_whole(content, hashlib.sha256(content).hexdigest(), path)


def read_identity(path: Path) -> dict[str, Any] | None:
    """What decided a model's weights, None where the file does not say; ValueError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("identity", "null"))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} holds no weights: {error}") from error


class StopRequests:
    """Watches for reasons to stop while the `with` block runs: time used up, SIGTERM, or *interrupt*.

    An interrupt or signal is passed on at the end of the block, when all is saved.

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
                self._before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, error: type | None, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.reason == "interrupt" and error is None:
            raise KeyboardInterrupt("Training was interrupted; all is saved. Run again to go on.")
        if self.reason == "terminate" and error is None:
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, number: int, _frame) -> None:
        """Take in a signal; the second one ends the block at once."""
        if self.reason in ("interrupt", "terminate"):
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


class Progress:
    """What a person sees while training runs: for each model a bar that counts steps, with the time left.

    Parameters
    ----------
    on_epoch : callable, optional
        Called with the history of the run so far (DataFrame) after each epoch.
    lines : bool
        One line per epoch instead, from the first process; for subprocesses and batch systems.
    """

    def __init__(self, on_epoch: Callable[[pd.DataFrame], None] | None = None, *, lines: bool = False):
        self.on_epoch, self.lines = on_epoch, lines

    def begin(self, trainer, number: int, total: int, history: pd.DataFrame) -> None:
        """Start with the model `trainer.member`, number `number` of `total`; `history` is of those before."""
        from tqdm import tqdm

        name, steps = trainer.member.name, trainer.steps_per_epoch * trainer.settings.epochs
        self.title = name if total == 1 else f"{name} ({number + 1} of {total})"
        self.earlier = history
        self.bar = tqdm(
            desc=self.title,
            total=steps,
            initial=trainer.step,
            unit="step",
            mininterval=0.5,
            disable=self.lines,
        )

    def step(self, trainer) -> None:
        """Take in a step."""
        self.bar.update(trainer.step - self.bar.n)

    def epoch(self, trainer) -> None:
        """Take in an epoch."""
        last = trainer.history[-1]
        text = (
            f"epoch {trainer.epoch}/{trainer.settings.epochs}, {last['seconds']:.3g} s, train MAE "
            f"{last['train_mae']:.2f}, val MAE {last['val_mae']:.2f} years (kept: epoch "
            f"{trainer.best['epoch'] + 1}, {trainer.best['val_mae']:.2f})"
        )
        self.bar.set_postfix_str(text)
        if self.lines and trainer.accelerator.is_main_process:
            print(f"{self.title}: {text}", flush=True)
        if self.on_epoch is not None:
            now = pd.DataFrame(trainer.history)
            self.on_epoch(pd.concat([self.earlier, now], ignore_index=True) if len(self.earlier) else now)

    def end(self) -> None:
        """Close the bar."""
        self.bar.close()
