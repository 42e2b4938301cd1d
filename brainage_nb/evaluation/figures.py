"""Which figures an evaluation has, drawn from what was found. How each looks is in `plots`; a figure without
data is left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainage_nb.cohort.cleaning_plots import age_histogram
from brainage_nb.evaluation import plots
from brainage_nb.evaluation.evaluate import Evaluation
from brainage_nb.evaluation.external import ExternalEvaluation
from brainage_nb.evaluation.metrics import regression_metrics, with_interval
from brainage_nb.evaluation.one_run import RECOVERED_KINDS, RunEvaluation
from brainage_nb.evaluation.tables import text_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    figure, ax = plots.new_figure(width=5.6, height=3.4)
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
    figure, ax = plots.new_figure(width=6.2, height=1.3 + 0.45 * len(evaluation.runs))
    plots.estimates(
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
    figure, axes = plots.new_figure(len(panels), width=3.6, height=2.9)
    for ax, (columns, label) in zip(np.atleast_1d(axes), panels, strict=True):
        plots.training_curve(history, columns, title=f"{label} by epoch", ylabel=label, ax=ax)
    return ReportFigure(
        f"training_{name}",
        "training",
        figure,
        f"{name}: how the run learned.",
    )


def _predicted(name: str, found: RunEvaluation) -> ReportFigure:
    rows = found.rows[found.rows["split"] == "test"]
    figure, ax = plots.new_figure(width=5.0, height=5.2)
    plots.predicted_vs_true(
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
    figure, ax = plots.new_figure(width=5.0, height=5.0)
    rows = found.predictions
    plots.predicted_vs_true(
        rows["age"].to_numpy(), rows["predicted_age"].to_numpy(), found.metrics, name=f"{name}, raw", ax=ax
    )
    plain_name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
    caption = f"{name}: raw predicted age against true age in a cohort the model never saw."
    return ReportFigure(f"external_{plain_name}", "external", figure, caption)


def _gaps(name: str, found: RunEvaluation) -> ReportFigure:
    rows = found.rows[found.rows["split"] == "test"]
    panels = [("gap", "raw gap", plots.BLUE)]
    if found.calibration.corrector:
        panels += [
            ("corrected_gap", "gap of age-free\ncorrected prediction", plots.PURPLE),
            ("adjusted_gap", "gap adjusted\nby true age", plots.GREEN),
        ]
    figure, axes = plots.new_figure(len(panels), width=2.9 if len(panels) > 1 else 4.4, height=3.1)
    reach = 1.3 * float(np.abs(rows[[column for column, _, _ in panels]].to_numpy()).max())
    for ax, (column, title, colour) in zip(np.atleast_1d(axes), panels, strict=True):
        bias = regression_metrics(rows["age"], rows["age"] + rows[column], n_bootstrap=0)["gap_age_r"]
        plots.gap_vs_age(
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
    figure, axes = plots.new_figure(2, width=3.8, height=3.1)
    plots.coverage_by_age(found.coverage, interval.level, ax=axes[0])
    plots.calibration(found.curve, ax=axes[1])
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
    figure, ax = plots.new_figure(width=6.2, height=1.3 + 0.27 * len(table))
    plots.estimates(
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
    figure, ax = plots.new_figure(width=6.2, height=1.4 + 0.35 * len(table))
    n_controls, adjusted_for = table["n_controls"].iloc[0], table["adjusted_for"].iloc[0]
    plots.estimates(
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
    figure, axes = plots.new_figure(len(recovered), width=2.9, height=3.4)
    for ax, (kind, row) in zip(np.atleast_1d(axes), recovered.iterrows(), strict=True):
        r, slope = (text_of(row, name) for name in ("r", "slope"))
        title = f"{kind}\nr {r}, n = {row['n']:.0f}\nslope {slope}"
        title = title.replace("gap of the age-free corrected prediction", "age-free corrected gap")
        plots.planted_vs_recovered(
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
