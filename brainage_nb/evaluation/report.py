"""The written evaluation: results.json, predictions.csv, figures, a one-file report.html and a model card.

Formats what `evaluate` found; computes no figure of its own.
"""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from brainage_nb.evaluation import tables
from brainage_nb.evaluation.bias import WHY_GAP_ONLY
from brainage_nb.evaluation.evaluate import Evaluation, evaluate_runs, headline_table
from brainage_nb.evaluation.figures import ReportFigure, draw_figures
from brainage_nb.evaluation.metrics import with_interval
from brainage_nb.evaluation.model_card import model_card, templates
from brainage_nb.evaluation.plots import save_figure
from brainage_nb.workspace import version_of, write_csv, write_json, write_text

__all__ = ["Evaluation", "evaluate_runs", "headline_table", "report_html", "write_report"]

PACKAGES = (
    "brainage-nb",
    "torch",
    "monai",
    "numpy",
    "pandas",
    "scikit-learn",
    "scipy",
    "statsmodels",
    "matplotlib",
)


def write_report(
    evaluation: Evaluation,
    figures: list[ReportFigure] | None = None,
    *,
    title: str = "Brain-age evaluation",
) -> list[Path]:
    """Write the workspace's `evaluation/` folder; figures that were drawn already are taken as they are.

    Returns
    -------
    list of Path
        `results.json`, `predictions.csv`, `report.html`, `model_card.md` and the figures as PNG and SVG.
    """
    folder = evaluation.workspace.path("evaluation")
    figures = draw_figures(evaluation) if figures is None else figures
    written = [
        write_json(evaluation.results, folder / "results.json"),
        write_csv(evaluation.predictions, folder / "predictions.csv"),
        write_text(model_card(evaluation), folder / "model_card.md"),
    ]
    images = {}
    for drawn in figures:
        png, svg = save_figure(drawn.figure, folder / "figures" / drawn.name)
        images[drawn.name] = base64.b64encode(png.read_bytes()).decode("ascii")
        written += [png, svg]
    page = report_html(evaluation, figures, images, title=title)
    return [write_text(page, folder / "report.html"), *written]


def report_html(
    evaluation: Evaluation,
    figures: list[ReportFigure],
    images: dict[str, str],
    *,
    title: str = "Brain-age evaluation",
) -> str:
    """The report as one HTML page that needs no other file and no network.

    Parameters
    ----------
    evaluation : Evaluation
    figures : list of ReportFigure
        What is shown, in order.
    images : dict
        Name of a figure -> its PNG, base64.
    title : str
    """
    environment = templates(autoescape=True)
    environment.filters["table"] = as_html_table
    ws = evaluation.workspace
    return environment.get_template("report.html.j2").render(
        title=title,
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        evaluation=evaluation,
        headline=headline_table(evaluation.results)
        .T.rename_axis(index="test, raw", columns=None)
        .reset_index(),
        sentences=tables.headline_sentences(evaluation),
        other_splits=tables.other_splits(evaluation),
        cohort=tables.cohort_table(ws),
        dropped=tables.dropped_table(ws),
        splits=tables.splits_table(ws),
        figures=[(drawn, images[drawn.name]) for drawn in figures],
        why_gap_only=WHY_GAP_ONLY,
        bias={name: tables.bias_table(found) for name, found in evaluation.runs.items()},
        coverage={name: tables.coverage_table(found) for name, found in evaluation.runs.items()},
        groups={name: tables.groups_table(found) for name, found in evaluation.runs.items()},
        diagnosis={
            name: tables.diagnosis_table(found)
            for name, found in evaluation.runs.items()
            if len(found.diagnosis)
        },
        comparisons=tables.comparison_table(evaluation),
        known=tables.known_tables(evaluation),
        reliability={name: found.reliability for name, found in evaluation.runs.items() if found.reliability},
        external={name: tables.external_tables(found) for name, found in evaluation.external.items()},
        settings=tables.settings_table(evaluation),
        versions=pd.DataFrame({"package": PACKAGES, "version": [version_of(name) for name in PACKAGES]}),
        with_interval=with_interval,
    )


def as_html_table(frame: pd.DataFrame) -> Any:
    """A DataFrame as an HTML table, text escaped."""
    from markupsafe import Markup

    text = frame.to_html(
        index=False, border=0, na_rep="–", float_format=lambda value: f"{value + 0.0:.2f}", justify="left"
    )
    keep_together = re.sub(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]", r"\1&nbsp;[\2,&nbsp;\3]", text)
    return Markup(keep_together.replace("-0.00", "0.00"))
