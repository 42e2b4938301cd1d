"""What moves in a notebook: the loss curve of a training that runs (04), and the prediction widget (07).

Every view of the widget is also a plain figure (`result_figure`), so that headless runs and exported pages
show it. Works with ipywidgets 7.7 and 8, whose upload fields differ.
"""

from __future__ import annotations

import html
import io
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from brainage_nb.apps.uploads import StoredScan, predict_stored, stored
from brainage_nb.predict.cautions import Failure, Prediction
from brainage_nb.predict.explain import Explanation, age_among_held_out, explain, strongest

if TYPE_CHECKING:
    import pandas as pd

    from brainage_nb.predict.bundle import Bundle


class LiveCurve:
    """Give it as `on_epoch`: one figure in the running cell, redrawn as epochs end.

    Parameters
    ----------
    every_s : float
        Least time between two drawings, seconds; the figure would otherwise cost more than a small epoch.
    """

    def __init__(self, every_s: float = 3.0):
        self.every_s = every_s
        self.drawn, self.handle = float("-inf"), None

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


def history_figure(history: pd.DataFrame) -> Figure:
    """Loss and MAE (years) against epoch, side by side; returns the Figure.

    The training loss is what is minimised, the validation loss is always Huber's, in years.
    """
    from brainage_nb.drawing import new_figure
    from brainage_nb.evaluation.plots import draw_training_curve

    figure, axes = new_figure(2, width=4.2, height=3.0)
    losses = [name for name in ("train_loss", "val_loss") if name in history]
    draw_training_curve(history, losses, title="Loss", ylabel="loss", ax=axes[0])
    errors = [name for name in ("train_mae", "val_mae") if name in history]
    draw_training_curve(history, errors, title="Mean absolute error", ylabel="MAE [years]", ax=axes[1])
    return figure


# --- the prediction widget ---------------------------------------------------------------------------


def result_figure(
    bundle: Bundle,
    prediction: Prediction,
    explanation: Explanation,
    at: Sequence[int] | None = None,
    *,
    opacity: float = 0.6,
) -> Figure:
    """Three planes with the heat map, and the age among held-out scans: one static picture."""
    figure = Figure(figsize=(12, 7.8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.2))
    explanation.picture(prediction, at, opacity=opacity, figure=upper)
    left, right = lower.subplots(1, 2, width_ratios=(1.3, 1))
    age_among_held_out(left, prediction, bundle.manifest["position"])
    _write_result(right, prediction)
    return figure


def _write_result(ax: Any, prediction: Prediction) -> None:
    lines = [f"{name}: {value}" for name, value in prediction.frame()["value"].items()]
    others = [caution.sentence for caution in prediction.warnings if not caution.forbids_use]
    lines += ["", *(f"! {sentence}" for sentence in others)]
    wrapped = [part for line in lines for part in (textwrap.wrap(line, 58) or [""])]
    ax.text(0, 1, "\n".join(wrapped), va="top", fontsize=9, transform=ax.transAxes, parse_math=False)
    ax.set_axis_off()


class PredictionWidget:
    """Choose or upload a scan, and the other scans of its session that the model takes; predict, look around.

    Parameters
    ----------
    bundle : Bundle
    scans : mapping
        Name to show -> (path, true age in years or None); the workspace's list.
    """

    def __init__(self, bundle: Bundle, scans: Mapping[str, tuple[Path, float | None]]):
        import ipywidgets as w

        self.bundle, self.scans = bundle, dict(scans)
        self.prediction: Prediction | None = None
        self.explanation: Explanation | None = None
        self.choice = w.Dropdown(options=list(self.scans), description="Scan")
        self.upload = w.FileUpload(multiple=False, description="or upload one")
        self.others = {
            name: w.FileUpload(multiple=False, description=f"its {name} scan") for name in bundle.others
        }
        self.age = w.Text(placeholder="years, if known", description="True age")
        self.button = w.Button(description="Predict", button_style="primary")
        last = bundle.settings.size - 1
        names = ("left to right", "back to front", "bottom to top")
        self.sliders = [
            w.IntSlider(value=last // 2, min=0, max=last, description=name, continuous_update=False)
            for name in names
        ]
        self.opacity = w.FloatSlider(value=0.6, min=0, max=1, step=0.1, description="heat map")
        self.said, self.picture = w.HTML(), w.Image(format="png", layout=w.Layout(max_width="100%"))
        self.button.on_click(self._when_asked)
        for field in (self.choice, self.upload):
            field.observe(self._forget_session, names="value")
        for slider in (*self.sliders, self.opacity):
            slider.observe(self._redraw, names="value")
        fields = [self.choice, self.upload, *self.others.values(), self.age, self.button]
        top = w.HBox(fields, layout=w.Layout(flex_flow="row wrap"))
        looks = w.HBox([*self.sliders, self.opacity], layout=w.Layout(flex_flow="row wrap"))
        self.view = w.VBox([top, self.said, looks, self.picture])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.view)

    def predict(self) -> Prediction | Failure:
        """Predict the chosen or uploaded scan and show it; uploads are removed afterwards."""
        result, *unused = self._results()
        if not isinstance(result, Failure):
            self.prediction, self.explanation = result, explain(self.bundle, result)
            strong = strongest(result.volume, self.explanation.heat)
            for slider, index in zip(self.sliders, strong, strict=True):
                slider.value = index
            self._redraw()
        self._say(" ".join(one.sentence for one in (result, *unused) if isinstance(one, Failure)))
        return result

    def _results(self) -> list[Prediction | Failure]:
        uploads = uploaded(self.upload.value)[:1]
        name = uploads[0].name if uploads else self.choice.value
        try:
            age = float(self.age.value) if self.age.value.strip() else None
        except ValueError:
            return [Failure(name, "age", f"True age {self.age.value!r}: expected years, as 54.5.")]
        others = {name: file for name, field in self.others.items() for file in uploaded(field.value)}
        if uploads:
            with stored(uploads, [age]) as found:
                return predict_stored(self.bundle, found[:1], others)
        path, known = self.scans[name]
        scan = StoredScan(Path(path), name, str(path), known if age is None else age)
        return predict_stored(self.bundle, [scan], others)

    def _forget_session(self, _change: Any) -> None:
        self.age.value = ""  # it was another scan's, as were further scans
        for field in self.others.values():
            field.set_trait("value", type(field.value)())

    def _when_asked(self, _button: Any) -> None:
        self._say("Predicting ...")
        self.predict()

    def _redraw(self, _change: Any = None) -> None:
        if self.prediction is None:
            return
        at = [slider.value for slider in self.sliders]
        figure = result_figure(self.bundle, self.prediction, self.explanation, at, opacity=self.opacity.value)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=90)
        self.picture.value = stream.getvalue()

    def _say(self, text: str) -> None:
        self.said.value = html.escape(text)


def uploaded(value: Any) -> list[io.BytesIO]:
    """Files of a FileUpload's value: a tuple of mappings (ipywidgets 8) or name -> mapping (ipywidgets 7)."""
    named = value.items() if isinstance(value, Mapping) else [(item["name"], item) for item in value]
    files = []
    for name, item in named:
        files.append(io.BytesIO(bytes(item["content"])))
        files[-1].name = name
    return files


def workspace_scans(
    splits: Any, resolve: Callable[[str], Path], split: str = "test"
) -> dict[str, tuple[Path, float | None]]:
    """The scans of one split for the widget's list: `scan_id` -> (path, age), those whose file is there."""
    rows = splits[splits["split"] == split].sort_values("scan_id")
    found = {row.scan_id: (resolve(row.image), float(row.age)) for row in rows.itertuples()}
    return {name: (path, age) for name, (path, age) in found.items() if path.exists()}
