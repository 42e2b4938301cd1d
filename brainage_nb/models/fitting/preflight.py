"""Whether training can run here, checked before it starts: device, precision, disk. Trains nothing."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import torch

from brainage_nb.models.checkpoints import space_needed
from brainage_nb.models.settings import TrainingSettings


class NotReady(RuntimeError):
    """Training cannot run here as set; the message says why and what to set."""


def choose_device(settings: TrainingSettings) -> torch.device:
    """The device to train on, proved by a real operation; on a CPU a loud warning, with `require_gpu` an
    error.

    Raises
    ------
    NotReady
        Where a GPU is required or asked for and none works, with the reason.
    """
    reason = "device='cpu' was asked for" if settings.device == "cpu" else why_no_gpu()
    if not reason:
        return torch.device("cuda", torch.cuda.current_device())
    if settings.require_gpu or settings.device == "cuda":
        raise NotReady(
            f"No usable GPU: {reason}. Choose a GPU runtime (Colab: Runtime > Change runtime type; Kaggle: "
            "Settings > Accelerator > GPU T4 x2), or set require_gpu=False and device='auto' for the CPU."
        )
    warnings.warn(
        f"TRAINING ON THE CPU ({reason}): some fifty times slower than a GPU. Meant for small volumes "
        "(spacing_mm=4, size=48).",
        stacklevel=2,
    )
    return torch.device("cpu")


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
            raise NotReady(f"precision={settings.precision!r} needs a GPU; on a CPU set 'auto' or 'fp32'.")
        return "fp32"
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"


def check_disk(folder: Path, n_parameters: int, members: int) -> str:
    """A sentence with the space a job needs and has.

    Raises
    ------
    NotReady
        Where it does not fit.
    """
    needed, free = space_needed(n_parameters, members), shutil.disk_usage(folder).free
    sentence = (
        f"{needed / 1e9:.2f} GB of disk needed at most in {folder} ({members} model(s) and checkpoints), "
        f"{free / 1e9:.1f} GB free"
    )
    if needed > free:
        raise NotReady(f"{sentence}. Free some space, train fewer members, or choose another workspace.")
    return sentence
