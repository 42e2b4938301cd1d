"""The figures of an evaluation, one a function: arrays or frames in, drawn on an Axes, the Axes back.

Computes no metric (they are given) and never shows or saves by itself; `save_figure` writes PNG and SVG.

Which figures an evaluation has, drawn from what was found. How each looks is in `plots`; a figure without
data is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.cleaning_plots import age_histogram
from brainage_nb.evaluation.evaluate import RECOVERED_KINDS, Evaluation
from brainage_nb.evaluation.external import ExternalEvaluation
from brainage_nb.evaluation.metrics import regression_metrics, text_of, with_interval
from brainage_nb.evaluation.runs import RunEvaluation
from brainage_nb.workspace import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008): told apart by people with any common form of colour blindness, and in grey print.
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
)
GREY = "#555555"
_TEXT, _SMALL = 9, 8  # points, at the printed size of the figure


def new_figure(
    columns: int = 1, rows: int = 1, *, width: float = 4.6, height: float = 3.9
) -> tuple[Figure, Any]:
    """A figure of `columns` x `rows` Axes, `width` x `height` inches each, outside pyplot's list of open
    figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_figure(figure: Figure, path: Path | str, *, dpi: int = 200) -> list[Path]:
    """Write `path` as PNG and SVG (its ending is replaced); returns both paths."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not again for each format
    written = []
    for ending in (".png", ".svg"):
        target = Path(path).with_suffix(ending)
        with writing(target) as temporary:
            figure.savefig(temporary, format=ending[1:], dpi=dpi)
        written.append(target)
    return written


def predicted_vs_true(
    age: np.ndarray,
    predicted: np.ndarray,
    metrics: dict[str, Any],
    *,
    name: str = "",
    reference_age: float | None = None,
    interval: tuple[np.ndarray, np.ndarray] | None = None,
    level: float = 0.9,
    ax: Axes | None = None,
) -> Axes:
    """Predicted against true age with the identity line and what the mean predictor says.

    Parameters
    ----------
    age, predicted : array (n,)
        Years.
    metrics : dict
        From `regression_metrics`; MAE and r with intervals go into the title.
    name : str
        What was predicted, such as `resnet18, test`.
    reference_age : float, optional
        Mean training age, years.
    interval : (low, high) of arrays (n,), optional
        Prediction intervals, drawn as thin lines where finite and few enough to be told apart.
    level : float
        Their level, for the legend.
    """
    ax = _axes(ax)
    age, predicted = np.asarray(age, dtype=float), np.asarray(predicted, dtype=float)
    ends = _limits(age, predicted)
    if interval is not None and np.isfinite(interval[0]).all() and len(age) <= 300:
        ends = _limits(np.ravel(interval), age)
        ax.vlines(age, *interval, color=SKY, lw=0.8, alpha=0.6, label=f"{level:.0%} interval", zorder=1)
    ax.scatter(age, predicted, color=BLUE, label="a scan", zorder=3, **_dots(len(age)))
    ax.plot(ends, ends, color="black", lw=1, label="predicted = true", zorder=2)
    if reference_age is not None:
        ax.axhline(reference_age, color=VERMILLION, ls="--", lw=1.2, label="mean predictor", zorder=2)
    ax.set(xlim=ends, ylim=ends)
    ax.set_aspect("equal")
    legend_under(ax)
    title = f"{name}: n = {metrics['n']} scans of {metrics['n_subjects']} subjects\n" + _mae_and_r(metrics)
    return _labelled(ax, title, "true age [years]", "predicted age [years]")


def gap_vs_age(
    age: np.ndarray,
    gap: np.ndarray,
    *,
    title: str,
    colour: str = BLUE,
    ylabel: str = "gap [years]",
    ax: Axes | None = None,
) -> Axes:
    """Brain-age gap against true age with its straight line: any slope is age bias, not biology."""
    ax = _axes(ax)
    age, gap = np.asarray(age, dtype=float), np.asarray(gap, dtype=float)
    ax.axhline(0, color="black", lw=1, zorder=1)
    ax.scatter(age, gap, color=colour, zorder=3, **_dots(len(age)))
    if len(age) > 2 and np.ptp(age) > 0:
        ends = np.array([age.min(), age.max()])
        slope, intercept = np.polyfit(age, gap, 1)
        label = f"{slope:+.2f} years a year of age"
        ax.plot(ends, intercept + slope * ends, color=VERMILLION, lw=1.5, label=label, zorder=4)
        legend_under(ax)
    reach = 1.15 * max(1.0, float(np.abs(gap).max()))
    ax.set_ylim(-reach, reach)
    return _labelled(ax, title, "true age [years]", ylabel)


def training_curve(
    history: pd.DataFrame, columns: Sequence[str], *, title: str, ylabel: str, ax: Axes | None = None
) -> Axes:
    """Columns of `history.csv` against epoch; seeds and folds are thin lines of one colour."""
    ax = _axes(ax)
    epoch = "epoch" if "epoch" in history else history.columns[0]
    members = [name for name in ("seed", "fold") if name in history and len(history[name].unique()) > 1]
    parts = [part for _, part in history.groupby(members)] if members else [history]
    for column in columns:
        colour = BLUE if column.startswith("val") else ORANGE
        for index, part in enumerate(parts):
            part = part.dropna(subset=[column])
            width = 1.6 if len(parts) == 1 else 0.9
            ax.plot(
                part[epoch],
                part[column],
                color=colour,
                lw=width,
                label=None if index else column.replace("_", " "),
            )
    values = history[list(columns)].to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 20 * np.median(values):
        ax.set_yscale("log")  # one early jump would flatten everything after it
    ax.legend(fontsize=_SMALL, frameon=False)
    ax.xaxis.get_major_locator().set_params(integer=True)
    return _labelled(ax, title, "epoch", ylabel)


def coverage_by_age(coverage: pd.DataFrame, level: float, *, ax: Axes | None = None) -> Axes:
    """Share of true ages inside their interval by age bin (from `intervals.coverage`), with 95 % Wilson
    intervals."""
    ax = _axes(ax)
    x = np.arange(len(coverage))
    low = coverage["coverage"] - coverage["coverage_low"]
    high = coverage["coverage_high"] - coverage["coverage"]
    colours = [VERMILLION if name == "all" else BLUE for name in coverage["group"]]
    ax.axhline(100 * level, color="black", ls="--", lw=1, label=f"promised: {level:.0%}")
    for i, colour in enumerate(colours):
        error = [[100 * max(0.0, low.iloc[i])], [100 * max(0.0, high.iloc[i])]]
        ax.errorbar(
            x[i], 100 * coverage["coverage"].iloc[i], yerr=error, fmt="o", color=colour, capsize=3, ms=5
        )
    labels = [f"{row.group}\nn={row.n}" for row in coverage.itertuples()]
    ax.set_xticks(x, labels)
    ax.set_ylim(0, 104)
    ax.legend(fontsize=_SMALL, frameon=False, loc="lower right")
    return _labelled(
        ax, f"Test scans inside their interval, n = {coverage['n'].max()}", "true age [years]", "inside [%]"
    )


def calibration(curve: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Promised against observed share inside, over many levels (columns `level, coverage, n`)."""
    ax = _axes(ax)
    ax.plot([0, 100], [0, 100], color="black", lw=1, label="as promised")
    ax.plot(
        100 * curve["level"],
        100 * curve["coverage"],
        "o-",
        color=BLUE,
        ms=4,
        lw=1.2,
        label="observed on test",
    )
    ax.set(xlim=(0, 102), ylim=(0, 102))
    ax.legend(fontsize=_SMALL, frameon=False, loc="upper left")
    return _labelled(
        ax,
        f"Calibration of the intervals, n = {curve['n'].iloc[0]} test scans",
        "promised inside [%]",
        "inside [%]",
    )


def estimates(
    table: pd.DataFrame,
    *,
    title: str,
    xlabel: str,
    zero: bool = False,
    reference: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Estimates with intervals under each other: groups, models, differences.

    Parameters
    ----------
    table : DataFrame
        Columns `label`, `value`, `low`, `high` and, optionally, a column named by `reference`, drawn as a
        cross on the same row (the mean predictor's MAE beside ours).
    zero : bool
        Draw a line at 0 (for differences).
    """
    ax = _axes(ax)
    y = np.arange(len(table))[::-1]
    value = table["value"].to_numpy(dtype=float)
    low, high = (table[end].to_numpy(dtype=float) for end in ("low", "high"))
    known = np.isfinite(low) & np.isfinite(high)
    ax.hlines(y[known], low[known], high[known], color=BLUE, lw=2)
    ax.plot(value, y, "o", color=BLUE, ms=5.5, label="estimate, 95 % interval")
    if reference:
        ax.plot(table[reference], y, "x", color=VERMILLION, ms=6, mew=1.8, label=reference)
        ax.set_xlim(left=0)
    if zero:
        ax.axvline(0, color="black", lw=1, zorder=0)
    if reference:
        _legend_below(ax)
    ax.set_yticks(y, table["label"])
    ax.set_ylim(-0.7, len(table) - 0.3)
    ax.grid(axis="x", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    return _labelled(ax, title, xlabel, "")


def planted_vs_recovered(
    planted: np.ndarray, recovered: np.ndarray, *, title: str, ylabel: str, ax: Axes | None = None
) -> Axes:
    """Gap planted in the known-answer cohort against the gap found, with the line of perfect recovery (black)
    and the straight line through the dots (red)."""
    ax = _axes(ax)
    ends = _limits(planted, recovered)
    ax.plot(ends, ends, color="black", lw=1)
    ax.scatter(planted, recovered, color=GREEN, zorder=3, **_dots(len(planted)))
    slope, intercept = np.polyfit(planted, recovered, 1)
    x = np.array([np.min(planted), np.max(planted)])
    ax.plot(x, intercept + slope * x, color=VERMILLION, lw=1.5)
    ax.set(xlim=ends, ylim=ends)
    ax.set_aspect("equal")
    return _labelled(ax, title, "planted gap [years]", ylabel)


def _mae_and_r(metrics: dict[str, Any]) -> str:
    text = f"MAE {with_interval(metrics['mae'], 1)} years, r {with_interval(metrics['r'])}"
    if np.isfinite(metrics["mean_predictor_mae"]["value"]):
        text += f"\nmean predictor's MAE {with_interval(metrics['mean_predictor_mae'], 1)} years"
    return text


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(4.6, 3.9), layout="constrained")[1]


def legend_under(ax: Axes, handles: Sequence[Any] | None = None, ncols: int = 3) -> None:
    """Put the legend of an Axes under it, where it covers no point."""
    handles = handles or ax.get_legend_handles_labels()[0]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
    ax.legend(handles=handles, fontsize=_SMALL, frameon=False, ncols=ncols, **place)


def _legend_below(ax: Axes) -> None:
    ax.figure.legend(
        *ax.get_legend_handles_labels(), fontsize=_SMALL, frameon=False, ncols=3, loc="outside lower center"
    )


def _limits(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    both = np.concatenate([np.asarray(x, dtype=float), np.asarray(y, dtype=float)])
    edge = max(1.0, 0.05 * float(np.ptp(both)))
    return float(both.min() - edge), float(both.max() + edge)


def _dots(n: int) -> dict[str, Any]:
    return {"s": 22 if n < 300 else 6, "alpha": 0.8 if n < 300 else 0.35, "linewidths": 0}


def _labelled(ax: Axes, title: str, xlabel: str, ylabel: str) -> Axes:
    ax.set_title(title, fontsize=_TEXT)
    ax.set_xlabel(xlabel, fontsize=_TEXT)
    ax.set_ylabel(ylabel, fontsize=_TEXT)
    ax.tick_params(labelsize=_SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


@dataclass
class ReportFigure:
    """A figure with the section it belongs to and what it shows, in words."""

    name: str
    section: str
    figure: Figure
    caption: str


def draw_figures(evaluation: Evaluation) -> list[ReportFigure]:
    """Every figure that has data, in the order of the report."""
    ws = evaluation.workspace
    figure, ax = new_figure(width=5.6, height=3.4)
    age_histogram(ax, ws.read("splits.csv"), by="split")
    drawn = [
        ReportFigure(
            "age_by_split",
            "splits",
            figure,
            "Ages of the subjects in each split, five-year bins; a subject counts once.",
        )
    ]
    for name, found in evaluation.runs.items():
        drawn += list(_of_run(name, found))
    figure, ax = new_figure(width=6.2, height=1.3 + 0.45 * len(evaluation.runs))
    estimates(
        models_table(evaluation),
        title="Error of each model on its test scans, raw",
        xlabel="MAE [years]",
        reference="mean predictor",
        ax=ax,
    )
    caption = (
        "MAE on test with 95 % subject bootstrap, and the mean predictor's on the same scans. Further left "
        "is better."
    )
    drawn.append(ReportFigure("models_compared", "models", figure, caption))
    return drawn + [draw_external(name, found) for name, found in evaluation.external.items()]


def models_table(evaluation: Evaluation) -> pd.DataFrame:
    """Columns `label, value, low, high` (test MAE of each run) and `mean predictor`."""
    return pd.DataFrame(
        [
            {
                "label": name,
                **found.metrics["test"]["mae"],
                "mean predictor": found.metrics["test"]["mean_predictor_mae"]["value"],
            }
            for name, found in evaluation.runs.items()
        ]
    )


def _of_run(name: str, found: RunEvaluation) -> Iterator[ReportFigure]:
    drawers = (_training, _predicted, _gaps, _intervals, _groups, _diagnosis, _planted)
    for draw in drawers:
        drawn = draw(name, found)
        if drawn is not None:
            drawn.figure.suptitle(name, fontsize=10, fontweight="bold")  # several runs have the same figures
            yield drawn


def _training(name: str, found: RunEvaluation) -> ReportFigure | None:
    history = found.run.history
    losses = [
        column
        for column in ("train_loss", "val_loss", "loss")
        if column in history and history[column].notna().any()
    ]
    errors = [
        column for column in ("train_mae", "val_mae") if column in history and history[column].notna().any()
    ]
    panels = [(columns, label) for columns, label in ((losses, "loss"), (errors, "MAE [years]")) if columns]
    if not panels or len(history) < 2:
        return None
    figure, axes = new_figure(len(panels), width=3.6, height=2.9)
    for ax, (columns, label) in zip(np.atleast_1d(axes), panels, strict=True):
        training_curve(history, columns, title=f"{label} by epoch", ylabel=label, ax=ax)
    return ReportFigure(
        f"training_{name}",
        "training",
        figure,
        f"{name}: how the run learned.",
    )


def _predicted(name: str, found: RunEvaluation) -> ReportFigure:
    rows = found.rows[found.rows["split"] == "test"]
    figure, ax = new_figure(width=5.0, height=5.2)
    predicted_vs_true(
        rows["age"].to_numpy(),
        rows["predicted_age"].to_numpy(),
        found.metrics["test"],
        name="test, raw",
        reference_age=found.run.reference_age,
        interval=(rows["low"].to_numpy(), rows["high"].to_numpy()),
        **({"level": found.calibration.interval.level} if found.calibration.interval else {}),
        ax=ax,
    )
    return ReportFigure(
        f"predicted_vs_true_{name}",
        "accuracy",
        figure,
        f"{name}: raw predicted age of test scans against true age. Dots on the black line are right; the "
        "dashed line is what predicting the mean training age for everyone gives.",
    )


def draw_external(name: str, found: ExternalEvaluation) -> ReportFigure:
    """The figure of another cohort, by its name."""
    figure, ax = new_figure(width=5.0, height=5.0)
    rows = found.predictions
    predicted_vs_true(
        rows["age"].to_numpy(), rows["predicted_age"].to_numpy(), found.metrics, name=f"{name}, raw", ax=ax
    )
    plain_name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
    caption = f"{name}: raw predicted age against true age in a cohort the model never saw."
    return ReportFigure(f"external_{plain_name}", "external", figure, caption)


def _gaps(name: str, found: RunEvaluation) -> ReportFigure:
    rows = found.rows[found.rows["split"] == "test"]
    panels = [("gap", "raw gap", BLUE)]
    if found.calibration.corrector:
        panels += [
            ("corrected_gap", "gap of age-free\ncorrected prediction", PURPLE),
            ("adjusted_gap", "gap adjusted\nby true age", GREEN),
        ]
    figure, axes = new_figure(len(panels), width=2.9 if len(panels) > 1 else 4.4, height=3.1)
    reach = 1.3 * float(np.abs(rows[[column for column, _, _ in panels]].to_numpy()).max())
    for ax, (column, title, colour) in zip(np.atleast_1d(axes), panels, strict=True):
        bias = regression_metrics(rows["age"], rows["age"] + rows[column], n_bootstrap=0)["gap_age_r"]
        gap_vs_age(
            rows["age"],
            rows[column],
            title=f"{title}\nr with age {with_interval(bias)}, n = {len(rows)}",
            colour=colour,
            ax=ax,
        )
        ax.set_ylim(-reach, reach)
    return ReportFigure(
        f"gap_vs_age_{name}",
        "bias",
        figure,
        f"{name}, test scans: predicted minus true age against true age. A sloping red line is age bias of "
        "the model."
        + (
            ""
            if found.calibration.corrector
            else " The correction was refused, so only the raw gap is shown."
        ),
    )


def _intervals(name: str, found: RunEvaluation) -> ReportFigure | None:
    interval = found.calibration.interval
    if interval is None or interval.support_:
        return None
    figure, axes = new_figure(2, width=3.8, height=3.1)
    coverage_by_age(found.coverage, interval.level, ax=axes[0])
    calibration(found.curve, ax=axes[1])
    return ReportFigure(
        f"intervals_{name}",
        "intervals",
        figure,
        f"{name}: left, the share of test scans whose true age lies in its {interval.level:.0%} interval, by "
        "age, with the uncertainty of that share; right, the same for other levels.",
    )


def _groups(name: str, found: RunEvaluation) -> ReportFigure:
    words = {"age_bin": "age", "sex": "sex", "site": "site", "diagnosis": "diagnosis"}
    table = pd.DataFrame(
        {
            "label": [f"{words[row.by]} {row.group}  (n = {row.n})" for row in found.groups.itertuples()],
            "value": found.groups["mae"],
            "low": found.groups["mae_low"],
            "high": found.groups["mae_high"],
            "mean predictor": found.groups["mean_predictor_mae"],
        }
    )
    figure, ax = new_figure(width=6.2, height=1.3 + 0.27 * len(table))
    estimates(
        table,
        title="Raw MAE on test by group",
        xlabel="MAE [years]",
        reference="mean predictor",
        ax=ax,
    )
    return ReportFigure(
        f"groups_{name}",
        "groups",
        figure,
        f"{name}: raw error within groups of test scans, 95 % subject bootstrap; n counts scans.",
    )


def _diagnosis(name: str, found: RunEvaluation) -> ReportFigure | None:
    table = found.diagnosis
    if not len(table):
        return None
    labels = [f"{row.diagnosis}  (n = {row.n_subjects})" for row in table.itertuples()]
    shown = pd.DataFrame(
        {
            "label": labels,
            "value": table["adjusted"],
            "low": table["adjusted_low"],
            "high": table["adjusted_high"],
        }
    )
    figure, ax = new_figure(width=6.2, height=1.4 + 0.35 * len(table))
    n_controls, adjusted_for = table["n_controls"].iloc[0], table["adjusted_for"].iloc[0]
    estimates(
        shown,
        title=f"Gap beyond that of {n_controls} controls, adjusted for {adjusted_for}",
        xlabel="difference in gap [years]",
        zero=True,
        ax=ax,
    )
    return ReportFigure(
        f"diagnosis_{name}",
        "groups",
        figure,
        f"{name}: mean gap of each diagnosis minus that of controls, test subjects, 95 % interval.",
    )


def _planted(name: str, found: RunEvaluation) -> ReportFigure | None:
    if not found.known:
        return None
    rows = found.planted
    recovered = pd.DataFrame(found.known["recovered"]).set_index("kind")
    figure, axes = new_figure(len(recovered), width=2.9, height=3.4)
    for ax, (kind, row) in zip(np.atleast_1d(axes), recovered.iterrows(), strict=True):
        r, slope = (text_of(row, name) for name in ("r", "slope"))
        title = f"{kind}\nr {r}, n = {row['n']:.0f}\nslope {slope}"
        title = title.replace("gap of the age-free corrected prediction", "age-free corrected gap")
        planted_vs_recovered(
            rows["planted_gap"].to_numpy(),
            rows[RECOVERED_KINDS[kind]].to_numpy(),
            title=title,
            ylabel="recovered gap [years]",
            ax=ax,
        )
    return ReportFigure(
        f"planted_gap_{name}",
        "known",
        figure,
        f"{name}: the gap that was planted in each test scan against the gap the model found. Black: found "
        "as planted; red: straight line through the dots.",
    )
