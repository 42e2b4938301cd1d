"""Whether and where a model computes: device, precision and disk, proved before the work. Trains nothing."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import torch

from brainage_nb.models.settings import TrainingRefused, TrainingSettings


def choose_device(settings: TrainingSettings) -> torch.device:
    """The device to train on, proved by a real operation; on a CPU a loud warning.

    Raises
    ------
    TrainingRefused
        Where a GPU is asked for and none works, with the reason.
    """
    reason = "device='cpu' was asked for" if settings.device == "cpu" else why_no_gpu()
    if not reason:
        return torch.device("cuda", torch.cuda.current_device())
    if settings.device == "cuda":
        raise TrainingRefused(
            f"No usable GPU: {reason}. Choose a GPU runtime (Colab: Runtime > Change runtime type; Kaggle: "
            "Settings > Accelerator > GPU T4 x2), or set device='auto' for the CPU."
        )
    warnings.warn(
        f"TRAINING ON THE CPU ({reason}): some fifty times slower than a GPU. Meant for small volumes "
        "(spacing_mm=4, size=48).",
        stacklevel=2,
    )
    return torch.device("cpu")


def count_processes(settings: TrainingSettings) -> int:
    """Processes to train with: as set, else one for each GPU; `TrainingRefused` for several on a CPU."""
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and settings.processes > 1:
        raise TrainingRefused(
            f"processes = {settings.processes}: several processes train on GPUs only, one on each, and none "
            "is to be used here. Set processes=1; on CPUs, `cluster` trains several models side by side."
        )
    return 1 if on_cpu else settings.processes or torch.cuda.device_count()


def why_no_gpu() -> str:
    """Empty where a GPU convolves correctly, else the reason.

    `is_available()` alone does not do: it is True on cards that this PyTorch has no kernels for.
    """
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    try:
        ones = torch.ones(1, 1, 4, 4, 4, device="cuda")
        total = torch.nn.functional.conv3d(ones, ones[..., :2, :2, :2]).sum().item()
    except RuntimeError as error:
        name = torch.cuda.get_device_name()
        first = str(error).splitlines()[0]
        return f"{name} fails a convolution ({first}); this PyTorch may lack kernels for it"
    return "" if total == 216 else f"a convolution gives {total}, expected 216"


def choose_precision(settings: TrainingSettings, device: torch.device) -> str:
    """'fp32', 'fp16' or 'bf16'.

    By compute capability, not `is_bf16_supported()`: that is True on a T4, which only emulates bf16, slowly.
    """
    if device.type != "cuda":
        # bf16 gradients of 3-D convolutions overflowed on a CPU with native bf16 (PyTorch 2.15): never there.
        if settings.precision not in ("auto", "fp32"):
            raise TrainingRefused(
                f"precision={settings.precision!r} needs a GPU; on a CPU set 'auto' or 'fp32'."
            )
        return "fp32"
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"


def space_needed(n_parameters: int, members: int) -> int:
    """Bytes that a run needs at its worst moment.

    Two checkpoints and one being written of the model in training (weights, two Adam moments, weight
    average: 16 bytes a parameter; best weights in half precision: 2), and half-precision weights of every
    model.
    """
    return 3 * 18 * n_parameters + members * 2 * n_parameters


def check_disk(folder: Path, n_parameters: int, members: int) -> str:
    """A sentence with the space a run needs and has; `TrainingRefused` where it does not fit."""
    needed, free = space_needed(n_parameters, members), shutil.disk_usage(folder).free
    sentence = (
        f"{needed / 1e9:.2f} GB of disk needed at most in {folder} ({members} model(s) and checkpoints), "
        f"{free / 1e9:.1f} GB free"
    )
    if needed > free:
        raise TrainingRefused(
            f"{sentence}. Free some space, train fewer models, or choose another workspace."
        )
    return sentence


# A GPU takes some seconds to start: as long as the CPU takes for the networks of a few scans.
GPU_FROM_SCANS = 8

Model, Result = TypeVar("Model"), TypeVar("Result")


def chosen_device(asked: str, n_scans: int) -> tuple[str, str]:
    """The device to predict this many scans on, and why it is not a GPU where one was looked for.

    Parameters
    ----------
    asked : {"auto", "cpu", "cuda"}
        "auto" is a working GPU from `GPU_FROM_SCANS` scans on, else the CPU.
    """
    if asked != "auto":
        return asked, ""
    reason = why_no_gpu() if n_scans >= GPU_FROM_SCANS else ""
    return ("cpu", reason) if reason or n_scans < GPU_FROM_SCANS else ("cuda", "")


def working_device(name: str) -> torch.device:
    """The CPU, or the GPU if it works; ValueError with the reason where it does not, or for another name."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device = {name!r}: expected 'cpu' or 'cuda'.")
    if name == "cpu":
        return torch.device("cpu")
    if reason := why_no_gpu():
        raise ValueError(
            f"No usable GPU: {reason}. Choose the CPU (`--device cpu`, device='cpu'): it gives the same ages "
            "and takes a fraction of a second more for each scan and network."
        )
    return torch.device("cuda", torch.cuda.current_device())


def name_of(device: torch.device) -> str:
    """`the CPU` or `the GPU (Tesla T4)`."""
    return f"the GPU ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "the CPU"


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions on a GPU in full float32, not in TF32, whose three digits would show in an age.

    PyTorch keeps this for the whole process, so two threads must not be in here at once.
    """
    now = torch.backends.cudnn
    # Each is named: what is left out is not kept but switched off, cuDNN itself too.
    with now.flags(
        enabled=now.enabled, benchmark=now.benchmark, deterministic=now.deterministic, allow_tf32=False
    ):
        yield


class Placed(Generic[Model]):
    """A model on the CPU and, where a GPU is named, its copy there, used by one thread at a time.

    Parameters
    ----------
    model
        On the CPU, float32. It stays there, for what is not computed by `run`.
    device : torch.device or str
    copied : callable
        From (model, device) to a copy on the device; the default suits a list of modules.
    """

    _turn = threading.Lock()  # of all models: see `full_float32`

    def __init__(
        self,
        model: Model,
        device: torch.device | str = "cpu",
        copied: Callable[[Model, torch.device], Model] | None = None,
    ):
        self.model, self.device = model, torch.device(device)
        self._there = model if self.device.type == "cpu" else (copied or _copy_modules)(model, self.device)

    def run(self, compute: Callable[[Model], Result]) -> Result:
        """What `compute(model)` gives on the device; what is wrong there is PyTorch's own error."""
        if self.device.type == "cpu":
            return compute(self.model)
        with self._turn, full_float32():
            return compute(self._there)


def _copy_modules(modules: list[torch.nn.Module], device: torch.device) -> list[torch.nn.Module]:
    return [copy.deepcopy(module).to(device) for module in modules]
