"""The model card: what a run is for, what it was made from, how good it is and where not to use it.

Made from the run and the workspace alone; nothing in it is typed by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from brainage_nb.evaluation import tables
from brainage_nb.evaluation.cautions import TEST_OBJECT
from brainage_nb.evaluation.evaluate import Evaluation
from brainage_nb.evaluation.metrics import with_interval
from brainage_nb.evaluation.one_run import RunEvaluation
from brainage_nb.volumes.recipes import PreprocessingSettings
from brainage_nb.workspace import version_of

FIGURES = {
    "mae": "MAE [years]",
    "mean_predictor_mae": "mean predictor's MAE [years]",
    "rmse": "RMSE [years]",
    "r": "r, predicted with true age",
    "r2": "R²",
    "slope": "slope of predicted on true age",
    "gap_age_r": "r, gap with true age",
}
# Of `benchmarks/accuracy.py` and `benchmarks/steadiness.py`; the README has the tables.
MEASURED = {
    "best": (
        "On 121 people (IXI), at 4 mm, half the width, 5-fold cross-validation: MAE 5.17 years [4.46, 5.96], "
        "r 0.92; at full width the same head tilted by up to 15 degrees moved an age by 0.3 years [0.3, 0.4] "
        "on average (40 other people than it learned from)."
    ),
    "reference": (
        "On 121 people (IXI), at 4 mm, half the width, 5-fold cross-validation: MAE 7.51 years [6.41, 8.63], "
        "r 0.82; at full width the same head tilted by up to 15 degrees moved an age by 4.2 years [3.1, 5.2] "
        "on average (40 other people than it learned from)."
    ),
}
NOT_SHOWN = (
    "One site, one scanner, 20 to 82 years: other scanners, ages and illnesses are not in these figures, and "
    "neither is the model of this card."
)


def model_card(evaluation: Evaluation, run: str = "") -> str:
    """The card as Markdown: of one run, or of every run under each other.

    Parameters
    ----------
    evaluation : Evaluation
    run : str
        One run's name; empty for all.
    """
    names = [run] if run else list(evaluation.runs)
    template = templates().get_template("model_card.md.j2")
    cards = [template.render(**_content(evaluation, name, evaluation.runs[name])) for name in names]
    return "\n\n---\n\n".join(card.strip() for card in cards) + "\n"


def templates(*, autoescape: bool = False) -> Any:
    """The jinja2 environment of this package's templates."""
    from jinja2 import Environment, PackageLoader

    return Environment(
        loader=PackageLoader("brainage_nb.evaluation", "."),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _content(evaluation: Evaluation, name: str, found: RunEvaluation) -> dict[str, Any]:
    ws, test, training = evaluation.workspace, found.metrics["test"], found.run.part("train")
    cohort = ws.read("cohort.csv")
    return {
        "name": name,
        "when": datetime.now(UTC).strftime("%Y-%m-%d"),
        "version": version_of("brainage-nb"),
        "settings": tables.flat_settings(found.run.settings),
        "fingerprint": found.run.settings.get("fingerprint", "not recorded"),
        "sources": sorted(cohort["source"].unique()) if "source" in cohort else [],
        "sites": sorted(site for site in cohort["site"].unique() if site) if "site" in cohort else [],
        "training": training,
        "age_low": training["age"].min(),
        "age_high": training["age"].max(),
        "test": test,
        "figures": [(title, with_interval(test[key])) for key, title in FIGURES.items()],
        "splits": markdown(tables.splits_table(ws)),
        "groups": markdown(tables.groups_table(found)),
        "corrector": found.calibration.corrector,
        "refused": found.calibration.refused,
        "interval": found.calibration.interval,
        "coverage": found.coverage.iloc[0],
        "diagnosed": "diagnosis" in found.run.predictions,
        "recipe_elsewhere": "" if evaluation.is_test_object else recipe_elsewhere(found.run.settings),
        "test_object": TEST_OBJECT if evaluation.is_test_object else "",
        "warnings": [text for text in evaluation.warnings if text.startswith(f"{name}:")],
    }


def recipe_elsewhere(settings: Mapping[str, Any]) -> str:
    """What was measured with the recipe that prepared and trained a run; empty where there is no one.

    What prepared it is judged by its steps: the same name may have meant others in an older release.
    """
    recipe = settings.get("recipe", "")
    try:
        prepared = PreprocessingSettings.from_json(settings["preprocessing"]).recipe
    except (KeyError, ValueError):
        return ""
    return f"{MEASURED[recipe]} {NOT_SHOWN}" if recipe == prepared and recipe in MEASURED else ""


def markdown(frame: pd.DataFrame) -> str:
    """A frame of text and numbers as a Markdown table."""
    lines = [list(frame.columns), ["---"] * frame.shape[1], *frame.astype(str).to_numpy().tolist()]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
