"""Checkpoints that are whole, verified, or not there. They hold whatever state they are given.

A file's name carries its step and the SHA-256 of its bytes, so one rename makes a checkpoint valid and any
damage shows. With a mirror (a folder on Drive, say) each is copied there in the background under a temporary
name, read back, compared, renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
