"""What a person sees while training runs: a bar with the validation MAE, or plain lines from a subprocess."""

from __future__ import annotations

import time
from collections.abc import Callable

import pandas as pd

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
