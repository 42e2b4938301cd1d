"""Where a saved model computes: on the CPU, or on a GPU while the processors go on preparing scans.

Training chooses its device in `fitting.preflight`.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

# A GPU takes some seconds to start: as long as the CPU takes for the networks of a few scans.
GPU_FROM_SCANS = 8

Model, Result = TypeVar("Model"), TypeVar("Result")


def chosen_device(asked: str, n_scans: int) -> tuple[str, str]:
    """The device for this many scans, and why it is not a GPU where one was looked for.

    Parameters
    ----------
    asked : {"auto", "cpu", "cuda"}
        "auto" is a working GPU from `GPU_FROM_SCANS` scans on, else the CPU.
    """
    if asked != "auto":
        return asked, ""
    if n_scans < GPU_FROM_SCANS:
        return "cpu", ""
    from brainage_nb.models.fitting.preflight import why_no_gpu

    reason = why_no_gpu()
    return ("cpu", reason) if reason else ("cuda", "")


def working_device(name: str) -> torch.device:
    """The CPU, or the GPU if it works.

    Raises
    ------
    ValueError
        The name is neither `cpu` nor `cuda`, or the GPU does not work, with the reason.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise ValueError(f"device = {name!r}: expected 'cpu' or 'cuda'.")
    from brainage_nb.models.fitting.preflight import why_no_gpu

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

    The model on the CPU is the reference: whatever the GPU cannot do, for want of memory above all, is done
    there, with a warning.

    Parameters
    ----------
    model
        On the CPU, float32.
    device : torch.device or str
    copied : callable
        From (model, device) to a copy on the device; the default suits a module or a list of them.
    """

    _turn = threading.Lock()  # of all models: see `full_float32`

    def __init__(
        self,
        model: Model,
        device: torch.device | str = "cpu",
        copied: Callable[[Model, torch.device], Model] | None = None,
    ):
        self.model, self.device = model, torch.device(device)
        self._there: Model | None = None
        if self.device.type != "cpu":
            self._there = self._tried(lambda: (copied or _copied)(model, self.device))
        if self._there is None:
            self.device = torch.device("cpu")

    def run(self, compute: Callable[[Model], Result]) -> Result:
        """What `compute(model)` gives. It must return what lies on the CPU, never None."""
        if self._there is not None:
            with self._turn, full_float32():
                result = self._tried(lambda: compute(self._there))
            if result is not None:
                return result
        return compute(self.model)

    def _tried(self, work: Callable[[], Result]) -> Result | None:
        try:
            return work()
        except RuntimeError as error:  # what CUDA raises; an error of the model's own comes again on the CPU
            full = isinstance(error, torch.OutOfMemoryError)
            reason = "its memory is full" if full else (str(error).splitlines() or [type(error).__name__])[0]
        # Here, not above: a caught error still holds the tensors of its frames.
        warnings.warn(f"The GPU could not compute ({reason}); the CPU does it, more slowly.", stacklevel=4)
        if full:
            torch.cuda.empty_cache()
        return None


def _copied(model: Model, device: torch.device) -> Model:
    if isinstance(model, list):
        return [_copied(part, device) for part in model]
    return copy.deepcopy(model).to(device)
