"""When to stop before the end: time used up, SIGTERM, or *interrupt*. The loop asks after each step."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch


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
