"""The figures of an evaluation: how each is drawn on its Axes, and which of them a report has, with captions.
Computes no metric (they are given) and shows nothing by itself; a figure without data is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from brainage_nb import drawing
from brainage_nb.cohort.cleaning_plots import age_histogram
from brainage_nb.drawing import BLUE, GREEN, PURPLE, SMALL, VERMILLION, label_axes
from brainage_nb.evaluation.evaluate import Evaluation
from brainage_nb.evaluation.external import ExternalEvaluation
from brainage_nb.evaluation.metrics import Metrics, flat, regression_metrics, with_interval
from brainage_nb.evaluation.rates import MIN_YEARS
from brainage_nb.evaluation.runs import RECOVERED_KINDS, RunEvaluation
from brainage_nb.workspace import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE_AGE = "true age [years]"


@dataclass
class ReportFigure:
    """A figure with the section it belongs to and what it shows, in words."""

    name: str
    section: str
    figure: Figure
    caption: str

    def save(self, folder: Path) -> Path:
        """Write it as PNG into a folder; returns the file."""
        path = folder / f"{self.name}.png"
        with writing(path) as temporary:
            self.figure.savefig(temporary, format="png", dpi=200, bbox_inches="tight")
        return path


# --- one Axes each: arrays in, the Axes back -------------------------------------------------------------


def draw_predicted_vs_true(
    age: np.ndarray,
    predicted: np.ndarray,
    metrics: Metrics,
    *,
    ax: Axes,
    name: str = "",
    reference_age: float | None = None,
    interval: tuple[np.ndarray, np.ndarray] | None = None,
    level: float = 0.9,
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
    shown = interval is not None and np.isfinite(interval[0]).all() and len(age) <= 300
    if shown:
        ax.vlines(
            age, *interval, color=drawing.SKY, lw=0.8, alpha=0.6, label=f"{level:.0%} interval", zorder=1
        )
    _draw_points(ax, age, predicted, BLUE)
    _draw_identity(ax, age, *(interval if shown else [predicted]))
    if reference_age is not None:
        ax.axhline(reference_age, color=VERMILLION, ls="--", lw=1.2, label="mean predictor", zorder=2)
    drawing.legend_under(ax)
    title = f"{name}: n = {metrics['n']} scans of {metrics['n_subjects']} subjects\n"
    title += f"MAE {with_interval(metrics['mae'], 1)} years, r {with_interval(metrics['r'])}"
    if np.isfinite(metrics["mean_predictor_mae"]["value"]):
        title += f"\nmean predictor's MAE {with_interval(metrics['mean_predictor_mae'], 1)} years"
    return label_axes(ax, title, TRUE_AGE, "predicted age [years]")


def draw_points_and_line(
    x: np.ndarray,
    y: np.ndarray,
    *,
    ax: Axes,
    labels: tuple[str, str, str],
    line: tuple[float, float] | None = None,
    words: str = "",
    colour: str = BLUE,
    zero: bool = False,
) -> Axes:
    """Points and a straight line (red) beside the one they would ideally lie on (black).

    Predicted against true age with the line of the correction, gaps against age (any slope is age bias, not
    biology), or recovered against planted gaps.

    Parameters
    ----------
    x, y : array (n,)
        Years.
    labels : (title, x label, y label)
    line : (intercept, slope), optional
        The red line; fitted to the points where not given and there are more than two.
    words : str
        What the legend says of it, such as `{slope:+.2f} years per year of age`; empty: no legend.
    zero : bool
        The ideal is y = 0 instead of y = x.
    """
    _draw_points(ax, x, y, colour)
    if zero:
        ax.axhline(0, color="black", lw=1, zorder=1)
    else:
        _draw_identity(ax, x, y)
    if line is None and len(x) > 2 and np.ptp(x) > 0:
        line = np.polyfit(x, y, 1)[::-1]
    if line is not None:
        (intercept, slope), ends = line, np.array([np.min(x), np.max(x)])
        label = words.format(intercept=intercept, slope=slope)
        ax.plot(ends, intercept + slope * ends, color=VERMILLION, lw=1.5, label=label, zorder=4)
    if words:
        drawing.legend_under(ax, ncols=2)
    return label_axes(ax, *labels)


def draw_training_curve(
    history: pd.DataFrame, columns: Sequence[str], *, ax: Axes, title: str, ylabel: str
) -> Axes:
    """Columns of `history.csv` against epoch, the first drawn as 1; seeds and folds are thin lines of one
    colour."""
    members = [name for name in ("seed", "fold") if len(set(history.get(name, ()))) > 1]
    parts = [part for _, part in history.groupby(members)] if members else [history]
    for column in columns:
        colour, label = (
            BLUE if column.startswith("val") else drawing.ORANGE,
            column.replace("_", " ").replace("mae", "MAE"),
        )
        for index, part in enumerate(parts):
            part = part.dropna(subset=[column])
            width = 1.6 if len(parts) == 1 else 0.9
            ax.plot(part["epoch"] + 1, part[column], color=colour, lw=width, label=None if index else label)
    values = history[list(columns)].to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 20 * np.median(values):
        ax.set_yscale("log")  # one early jump would flatten everything after it
    ax.legend(fontsize=SMALL, frameon=False)
    ax.xaxis.get_major_locator().set_params(integer=True)
    return label_axes(ax, title, "epoch", ylabel)


def draw_estimates(
    table: pd.DataFrame,
    value: str,
    names: Sequence[str],
    *,
    ax: Axes,
    labels: tuple[str, str],
    reference: str = "",
    mark: float | None = None,
) -> Axes:
    """Estimates with their intervals under each other: groups, models, differences, coverages.

    Parameters
    ----------
    table : DataFrame
        Columns `<value>`, `<value>_low`, `<value>_high`.
    names : sequence of str
        What each row is.
    labels : (title, x label)
    reference : str, optional
        A column drawn as a cross on the same row: the mean predictor's MAE beside ours.
    mark : float, optional
        Where a line stands that the estimates are read against: 0 for differences.
    """
    y = np.arange(len(table))[::-1]
    ax.hlines(y, table[f"{value}_low"], table[f"{value}_high"], color=BLUE, lw=2)
    ax.plot(table[value], y, "o", color=BLUE, ms=5.5, label="estimate, 95 % interval")
    if reference:
        ax.plot(table[reference], y, "x", color=VERMILLION, ms=6, mew=1.8, label="mean predictor")
        ax.set_xlim(left=0)
        ax.figure.legend(loc="outside lower center", fontsize=SMALL, frameon=False, ncols=2)
    if mark is not None:
        ax.axvline(mark, color="black", lw=1, zorder=0)
    ax.set_yticks(y, names)
    ax.set_ylim(-0.7, len(table) - 0.3)
    ax.grid(axis="x", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    return label_axes(ax, *labels, "")


def _draw_points(ax: Axes, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    size, alpha = (22, 0.8) if len(x) < 300 else (6, 0.35)
    ax.scatter(x, y, color=colour, label="a scan", s=size, alpha=alpha, linewidths=0, zorder=3)


def _draw_identity(ax: Axes, *values: np.ndarray) -> None:
    """The line y = x, on a square with room for all values."""
    low, high = np.min([np.min(part) for part in values]), np.max([np.max(part) for part in values])
    edge = max(1.0, 0.05 * (high - low))
    ends = (float(low - edge), float(high + edge))
    ax.plot(ends, ends, color="black", lw=1, label="predicted = true", zorder=2)
    ax.set(xlim=ends, ylim=ends, aspect="equal")


# --- the figures of a report -----------------------------------------------------------------------------


def draw_figures(evaluation: Evaluation) -> list[ReportFigure]:
    """Every figure that has data, in the order of the report.

    Examples
    --------
    >>> figures = draw_figures(evaluation)  # doctest: +SKIP
    >>> [drawn.name for drawn in figures if drawn.section == "bias"]  # doctest: +SKIP
    ['correction_resnet18', 'gap_vs_age_resnet18']
    """
    drawn = [ReportFigure("age_by_split", "splits", _draw_ages(evaluation), _caption(_draw_ages))]
    for name, found in evaluation.runs.items():
        for stem, (section, draw) in RUN_FIGURES.items():
            if (figure := draw(found)) is not None:
                figure.suptitle(name, fontsize=10, fontweight="bold")  # several runs have the same figures
                drawn.append(ReportFigure(f"{stem}_{name}", section, figure, f"{name}: {_caption(draw)}"))
    models = _draw_models(evaluation.runs)
    drawn.append(ReportFigure("models_compared", "models", models, _caption(_draw_models)))
    return drawn + [draw_external(name, found) for name, found in evaluation.external.items()]


def _caption(draw: Callable[..., Figure | None]) -> str:
    return " ".join((draw.__doc__ or "").split())


def _draw_ages(evaluation: Evaluation) -> Figure:
    """Ages of the subjects in each split, five-year bins; a subject counts once."""
    figure, ax = drawing.new_figure(width=5.6, height=3.4)
    age_histogram(ax, evaluation.workspace.read("splits.csv"), by="split")
    return figure


def draw_external(name: str, found: ExternalEvaluation) -> ReportFigure:
    """The figure of another cohort, by its name."""
    figure, ax = drawing.new_figure(width=5.0, height=5.0)
    rows = found.predictions
    draw_predicted_vs_true(rows["age"], rows["predicted_age"], found.metrics, name=f"{name}, raw", ax=ax)
    plain_name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
    caption = f"{name}: raw predicted age against true age in a cohort the model never saw."
    return ReportFigure(f"external_{plain_name}", "external", figure, caption)


def _draw_models(runs: dict[str, RunEvaluation]) -> Figure:
    """MAE on the scans that judge with 95 % subject bootstrap, and the mean predictor's on the same scans.
    Further left is better."""
    table = pd.DataFrame([flat(found.figures) for found in runs.values()])
    labels = ("Error of each model on the scans that judge it, raw", "MAE [years]")
    return _draw_table(table, "mae", pd.Series(list(runs)), labels=labels, reference="mean_predictor_mae")


def _draw_table(table: pd.DataFrame, value: str, names: pd.Series, **options: Any) -> Figure:
    """`draw_estimates` on a figure as high as the table is long, n beside each name."""
    n = table["n" if "n" in table else "n_subjects"].astype(str)
    figure, ax = drawing.new_figure(width=6.2, height=1.4 + 0.3 * len(table))
    draw_estimates(table, value, names + "  (n = " + n + ")", ax=ax, **options)
    return figure


def _draw_panels(panels: Sequence[dict[str, Any]], *, width: float, height: float) -> Figure:
    """`draw_points_and_line` side by side, one for each set of its arguments."""
    figure, axes = drawing.new_figure(len(panels), width=width, height=height)
    for ax, panel in zip(np.atleast_1d(axes), panels, strict=True):
        draw_points_and_line(**panel, ax=ax)
    return figure


def _draw_training(found: RunEvaluation) -> Figure | None:
    """How the run learned."""
    history = found.run.history.dropna(axis=1, how="all")
    wanted = {"loss": ["train_loss", "val_loss", "loss"], "MAE [years]": ["train_mae", "val_mae"]}
    panels = {label: [name for name in names if name in history] for label, names in wanted.items()}
    panels = {label: columns for label, columns in panels.items() if columns}
    if not panels or len(history) < 2:
        return None
    figure, axes = drawing.new_figure(len(panels), width=3.6, height=2.9)
    for ax, (label, columns) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        draw_training_curve(history, columns, title=f"{label} by epoch", ylabel=label, ax=ax)
    return figure


def _draw_predicted(found: RunEvaluation) -> Figure | None:
    """Raw predicted age against true age. Dots on the black line are right; the dashed line is
    what predicting the mean training age for everyone gives."""
    rows, interval = found.judged, found.calibration.interval
    figure, ax = drawing.new_figure(width=5.0, height=5.2)
    draw_predicted_vs_true(
        rows["age"],
        rows["predicted_age"],
        found.figures,
        name=f"{found.judged_words}, raw",
        reference_age=found.run.reference_age,
        interval=(rows["low"], rows["high"]),
        level=interval.level if interval else 0.0,
        ax=ax,
    )
    return figure


def _draw_correction(found: RunEvaluation) -> Figure | None:
    """Left, the line of the correction on the points that it was fitted on; right, the scans that judge,
    after the correction that needs no true age, with the line through them. The nearer red is to black, the
    less age bias there is."""
    corrector = found.calibration.corrector
    if corrector is None:
        return None
    rows, test = found.run.calibration_rows(), found.judged
    line = (corrector.intercept_, corrector.slope_)
    titles = (
        f"fitted on {found.run.calibrated_on} controls, n = {len(rows)} scans",
        f"{found.judged_words}, corrected without true age, n = {len(test)} scans",
    )
    axes = (TRUE_AGE, "predicted age [years]"), (TRUE_AGE, "corrected age [years]")
    panels = [
        {"x": rows["age"], "y": rows["predicted_age"], "line": line, "labels": (titles[0], *axes[0])},
        {"x": test["age"], "y": test["corrected_age"], "labels": (titles[1], *axes[1])},
    ]
    words = {"words": "{intercept:z.1f} + {slope:z.2f} × age"}
    return _draw_panels([panel | words for panel in panels], width=3.7, height=4.1)


def _draw_gaps(found: RunEvaluation) -> Figure | None:
    """Predicted minus true age against true age. A sloping red line is age bias of the model.
    Where the correction was refused, only the raw gap is shown."""
    age, corrected, panels = found.judged["age"], found.calibration.corrector is not None, []
    for column, title, colour in GAPS if corrected else GAPS[:1]:
        gap = found.judged[column]
        bias = with_interval(regression_metrics(age, age + gap, n_bootstrap=0)["gap_age_r"])
        labels = (f"{title}\nr with age {bias}, n = {len(gap)}", TRUE_AGE, "gap [years]")
        panels.append({"x": age, "y": gap, "labels": labels, "colour": colour, "zero": True})
    words = {"words": "{slope:+z.2f} years per year of age"}
    width, reach = 2.9 if corrected else 4.4, 1.3 * max(panel["y"].abs().max() for panel in panels)
    figure = _draw_panels([panel | words for panel in panels], width=width, height=3.1)
    for ax in figure.axes:
        ax.set_ylim(-reach, reach)
    return figure


def _draw_intervals(found: RunEvaluation) -> Figure | None:
    """The share of scans whose true age lies in its interval, by age, with the uncertainty of that
    share. The line is the share that was promised."""
    interval, table = found.calibration.interval, found.coverage
    if interval is None or interval.support_:
        return None
    scans = f"{found.judged_words.capitalize().replace(' ', '-')} scans"
    labels = (f"{scans} inside their {interval.level:.0%} interval, by true age", "share inside")
    figure = _draw_table(table, "coverage", table["group"], labels=labels, mark=interval.level)
    figure.axes[0].xaxis.set_major_formatter("{x:.0%}")
    return figure


def _draw_groups(found: RunEvaluation) -> Figure | None:
    """Raw error within groups, 95 % subject bootstrap; n counts scans."""
    names = found.groups["by"].replace("age_bin", "age") + " " + found.groups["group"]
    labels = ("Raw MAE by group", "MAE [years]")
    return _draw_table(found.groups, "mae", names, labels=labels, reference="mean_predictor_mae")


def _draw_diagnosis(found: RunEvaluation) -> Figure | None:
    """Mean gap of each diagnosis minus that of controls, 95 % interval."""
    table = found.diagnosis
    if table.empty:
        return None
    n_controls, adjusted_for = table[["n_controls", "adjusted_for"]].iloc[0]
    title = f"Gap beyond that of {n_controls} controls, adjusted for {adjusted_for}"
    labels = (title, "difference in gap [years]")
    return _draw_table(table, "adjusted", table["diagnosis"], labels=labels, mark=0)


def _draw_rates(found: RunEvaluation) -> Figure | None:
    """Raw predicted age at each visit, a line a person. Black: how predictions rise with age between
    people, which is a rate of 1. Dashed: the scanner changed, and what that adds is in the line."""
    rates, corrector = found.rates, found.calibration.corrector
    if rates.people.empty or corrector is None:
        return None
    ax = drawing.new_figure(width=5.6, height=4.4)[1]
    moved = set(rates.people.loc[rates.people["scanner"] != "", "subject_id"])
    for name, part in rates.visits.groupby("subject_id"):
        label = "another scanner" if name in moved else "a person"
        style = {"color": VERMILLION, "ls": "--"} if name in moved else {"color": BLUE}
        ax.plot(part["age"], part["predicted"], marker="o", ms=3, lw=1, alpha=0.7, label=label, **style)
    ends = np.array([rates.visits["age"].min(), rates.visits["age"].max()])
    line = corrector.intercept_ + corrector.slope_ * ends
    ax.plot(ends, line, color="black", lw=1.2, label="rate 1")
    handles = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    drawing.legend_under(ax, list(handles.values()))
    title = f"{len(rates.people)} people with visits {MIN_YEARS:g} year or more apart"
    if len(rates.groups):
        group = rates.groups.iloc[0]
        title += f"\nrate of the {group['n_subjects']} who kept their scanner "
        title += f"{with_interval(group, key='rate')} years a year"
    return label_axes(ax, title, TRUE_AGE, "predicted age [years]").figure


def _draw_planted(found: RunEvaluation) -> Figure | None:
    """The gap that was planted in each scan against the gap the model found. Black: found as planted;
    red: straight line through the dots."""
    panels, planted = [], found.planted
    for row in found.known.get("recovered", ()):
        kind = row["kind"].replace("gap of the age-free corrected prediction", "age-free corrected gap")
        r, slope = with_interval(row, key="r"), with_interval(row, key="slope")
        title = f"{kind}\nr {r}, n = {row['n']}\nslope {slope}"
        labels = (title, "planted gap [years]", "recovered gap [years]")
        gap = planted[RECOVERED_KINDS[row["kind"]]]
        panels.append({"x": planted["planted_gap"], "y": gap, "labels": labels, "colour": GREEN})
    return _draw_panels(panels, width=2.9, height=3.4) if panels else None


GAPS = (
    ("gap", "raw gap", BLUE),
    ("corrected_gap", "gap of age-free\ncorrected prediction", PURPLE),
    ("adjusted_gap", "gap adjusted\nby true age", GREEN),
)
RUN_FIGURES = {  # name -> section and drawing; the docstring is the caption
    "training": ("training", _draw_training),
    "predicted_vs_true": ("accuracy", _draw_predicted),
    "correction": ("bias", _draw_correction),
    "gap_vs_age": ("bias", _draw_gaps),
    "intervals": ("intervals", _draw_intervals),
    "groups": ("groups", _draw_groups),
    "diagnosis": ("groups", _draw_diagnosis),
    "rates": ("rates", _draw_rates),
    "planted_gap": ("known", _draw_planted),
}
