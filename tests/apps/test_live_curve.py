"""The loss curve that redraws itself: one figure, not one an epoch, and not more often than asked."""

import IPython.display
import pandas as pd

from brainage_nb.apps.live_curve import LiveCurve, history_figure


class Handle:
    updates = 0

    def update(self, figure):
        self.updates += 1


def a_history(epochs):
    rows = [
        {"fold": -1, "seed": 1, "epoch": n, "train_loss": 9 - n, "val_loss": 10 - n} for n in range(epochs)
    ]
    return pd.DataFrame(rows).assign(train_mae=5.0, val_mae=6.0)


def test_it_draws_once_and_then_updates_no_more_often_than_asked(monkeypatch):
    shown = []
    monkeypatch.setattr(
        IPython.display, "display", lambda figure, display_id: shown.append(Handle()) or shown[-1]
    )
    eager, slow = LiveCurve(every_s=0), LiveCurve(every_s=1000)
    for epochs in (1, 2, 3):
        eager(a_history(epochs))
        slow(a_history(epochs))
    assert [handle.updates for handle in shown] == [2, 0]


def test_the_figure_shows_loss_and_error_of_every_epoch():
    loss, error = history_figure(a_history(4)).axes
    assert list(loss.get_lines()[0].get_ydata()) == [9, 8, 7, 6]
    assert "years" in error.get_ylabel()
