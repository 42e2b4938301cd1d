"""A loss curve that redraws itself in its cell while training runs. Trains nothing."""

from __future__ import annotations

import time

import pandas as pd


class LiveCurve:
    """Give it as `on_epoch`: one figure in the running cell, redrawn as epochs end.

    Parameters
    ----------
    every_s : float
        Least time between two drawings, seconds; the figure would otherwise cost more than a small epoch.
    """

    def __init__(self, every_s: float = 3.0):
        self.every_s = every_s
        self.drawn = float("-inf")
        self.handle = None

    def __call__(self, history: pd.DataFrame) -> None:
        """Draw the history so far (a row an epoch; MAE in years)."""
        if time.monotonic() - self.drawn >= self.every_s:
            self.draw(history)

    def draw(self, history: pd.DataFrame) -> None:
        """Draw now, into the same place as before."""
        from IPython.display import display

        figure = history_figure(history)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        self.drawn = time.monotonic()


def history_figure(history: pd.DataFrame):
    """Loss and MAE (years) against epoch, side by side; returns the Figure.

    The training loss is what is minimised, the validation loss is always Huber's, in years.
    """
    from brainage_nb.evaluation.plots import new_figure, training_curve

    figure, axes = new_figure(2, width=4.2, height=3.0)
    losses = [name for name in ("train_loss", "val_loss") if name in history]
    training_curve(history, losses, title="Loss", ylabel="loss", ax=axes[0])
    errors = [name for name in ("train_mae", "val_mae") if name in history]
    training_curve(history, errors, title="Mean absolute error", ylabel="MAE [years]", ax=axes[1])
    return figure
