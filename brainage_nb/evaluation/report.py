"""What an evaluation found and what the workspace holds, as small tables of text for people. Computes no
figure.

The model card: what a run is for, what it was made from, how good it is and where not to use it.

Made from the run and the workspace alone; nothing in it is typed by hand.

The written evaluation: results.json, predictions.csv, figures, a one-file report.html and a model card.

Formats what `evaluate` found; computes no figure of its own.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation.cautions import TEST_OBJECT
from brainage_nb.evaluation.correction import WHY_GAP_ONLY
from brainage_nb.evaluation.evaluate import Evaluation, headline_table
from brainage_nb.evaluation.external import ExternalEvaluation
from brainage_nb.evaluation.metrics import text_of, with_interval
from brainage_nb.evaluation.plots import ReportFigure, draw_figures, save_figure
from brainage_nb.evaluation.runs import OUT_OF_FOLD, RunEvaluation
from brainage_nb.platforms import version_of
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.workspace import Workspace, write_csv, write_json, write_text

EXTERNAL_FIGURES = {
    "mae": "MAE [years]",
    "mean_predictor_mae": "mean predictor's MAE [years]",
    "r": "r",
    "mean_gap": "mean gap [years]",
}
SPLIT_WORDS = {
    "train": "training (the model has seen these)",
    "val": "validation (may have chosen the best epoch)",
    OUT_OF_FOLD: "out-of-fold (each by a model that did not see the subject)",
    "test": "test (never seen)",
}


def headline_sentences(evaluation: Evaluation) -> list[str]:
    """What each run reached on test, in one sentence, beside the mean predictor."""
    sentences = []
    for name, found in evaluation.runs.items():
        test = found.metrics["test"]
        sentences.append(
            f"{name}: on {test['n']} test scans of {test['n_subjects']} subjects that took no part in "
            f"training, predicted and true age differ by {with_interval(test['mae'], 1)} years on average "
            f"(MAE; r {with_interval(test['r'])}). Saying the mean training age, "
            f"{found.run.reference_age:.1f} years, for everyone differs by "
            f"{with_interval(test['mean_predictor_mae'], 1)} years."
        )
    return sentences


def other_splits(evaluation: Evaluation) -> pd.DataFrame:
    """Raw figures of the other splits, each row named for what it can be used for."""
    rows = []
    for name, found in evaluation.runs.items():
        for split, figures in found.metrics.items():
            # With folds, train and validation rows are out-of-fold too: one row says all of it.
            if split != "test" and (split == OUT_OF_FOLD or not found.run.folds):
                shown = {
                    "run": name,
                    "split": SPLIT_WORDS[split],
                    "scans": figures["n"],
                    "MAE [years]": with_interval(figures["mae"]),
                    "mean predictor's MAE [years]": with_interval(figures["mean_predictor_mae"]),
                    "r": with_interval(figures["r"]),
                    "gap-age r": with_interval(figures["gap_age_r"]),
                }
                rows.append(shown)
    return pd.DataFrame(rows)


def cohort_table(ws: Workspace) -> pd.DataFrame:
    """Who came in: scans, subjects, ages, sex by source and site."""
    cohort = ws.read("cohort.csv")
    keys = [name for name in ("source", "site") if name in cohort] or [lambda _: "all"]
    rows = []
    for names, part in cohort.groupby(keys, dropna=False):
        people = part.drop_duplicates("subject_id")
        sex = people["sex"].str.upper().str[:1] if "sex" in people else pd.Series("", index=people.index)
        rows.append(
            dict(zip(("source", "site"), names, strict=False))
            | {
                "scans": len(part),
                "subjects": len(people),
                "ages [years]": f"{part['age'].min():.1f} to {part['age'].max():.1f} (mean "
                f"{part['age'].mean():.1f})",
                "women / men / not known": f"{(sex == 'F').sum()} / {(sex == 'M').sum()} / "
                f"{(~sex.isin(['F', 'M'])).sum()}",
            }
        )
    return pd.DataFrame(rows)


def dropped_table(ws: Workspace) -> pd.DataFrame:
    """What cleaning dropped: scans a reason, with one example's detail."""
    if not ws.path("cleaning.csv").exists():
        return pd.DataFrame()
    cleaning = ws.read("cleaning.csv")
    lost = cleaning[~cleaning["kept"].astype(str).str.lower().isin(["true", "1"])]
    rows = [
        {
            "reason": reason,
            "scans": len(part),
            "for example": f"{part['scan_id'].iloc[0]}: {part['detail'].iloc[0]}",
        }
        for reason, part in lost.groupby("reason")
    ]
    return pd.DataFrame(rows).sort_values("scans", ascending=False) if rows else pd.DataFrame()


def splits_table(ws: Workspace) -> pd.DataFrame:
    """Subjects, scans and ages of each split."""
    rows = []
    dealt = ws.read("splits.csv")
    for split in ("train", "val", "test"):
        part = dealt[dealt["split"] == split]
        if len(part):
            people = part.groupby("subject_id")["age"].mean()
            rows.append(
                {
                    "split": split,
                    "subjects": len(people),
                    "scans": len(part),
                    "mean age (SD) [years]": f"{people.mean():.1f} ({people.std():.1f})".replace(
                        " (nan)", ""
                    ),
                    "ages [years]": f"{part['age'].min():.1f} to {part['age'].max():.1f}",
                }
            )
    return pd.DataFrame(rows)


def comparison_table(evaluation: Evaluation) -> pd.DataFrame:
    """Paired MAE differences as text."""
    return pd.DataFrame(
        [
            {
                "compared": f"{row['a']} minus {row['b']}",
                "MAE difference [years]": with_interval(row),
                "test scans": row["n"],
                "reads": _verdict(row),
            }
            for row in evaluation.comparisons.to_dict("records")
        ]
    )


def known_tables(evaluation: Evaluation) -> dict[str, dict[str, pd.DataFrame]]:
    """Known-answer checks a run: the errors side by side, and how much of the planted gap was recovered."""
    words = {
        "ours": "this model",
        "attainable": "attainable: best regression on the planted anatomy",
        "oracle": "oracle: knows the planted brain age",
    }
    tables = {}
    for name, found in evaluation.runs.items():
        if not found.known:
            continue
        cohort = found.known["mae_whole_cohort"]
        errors = found.known["mae"] | {"mean": found.metrics["test"]["mean_predictor_mae"]}
        words["mean"] = "mean predictor"
        recovered = pd.DataFrame(found.known["recovered"])
        tables[name] = {
            "errors": pd.DataFrame(
                [
                    {
                        "who predicts": words[key],
                        "MAE on test [years]": with_interval(errors[key]),
                        "MAE on the whole cohort, as in notebook 01 [years]": with_interval(cohort[key])
                        if key in cohort
                        else "–",
                    }
                    for key in ("mean", "ours", "attainable", "oracle")
                    if key in errors
                ]
            ),
            "recovered": pd.DataFrame(
                {
                    "kind of gap": recovered["kind"],
                    "n": recovered["n"],
                    "r with planted": [text_of(row, "r") for row in found.known["recovered"]],
                    "slope on planted": [text_of(row, "slope") for row in found.known["recovered"]],
                }
            ),
        }
    return tables


def external_tables(found: ExternalEvaluation) -> dict[str, pd.DataFrame]:
    """Another cohort as text: `raw` figures of all its scans, `offsets` of its sites and, where named
    controls calibrated, the `rest` of it before and after."""
    raw = {title: with_interval(found.metrics[key]) for key, title in EXTERNAL_FIGURES.items()}
    offsets = [
        {"site": row["site"], "controls' mean gap [years]": with_interval(row), "scans": row["n"]}
        for row in found.offsets.to_dict("records")
    ]
    rest = [
        {"form": row["form"], "scans": row["n"]}
        | {title: text_of(row, key) for key, title in EXTERNAL_FIGURES.items()}
        for row in found.rest.to_dict("records")
    ]
    return {
        "raw": pd.DataFrame([{"scans": found.metrics["n"], "subjects": found.metrics["n_subjects"]} | raw]),
        "offsets": pd.DataFrame(offsets),
        "rest": pd.DataFrame(rest),
    }


def settings_table(evaluation: Evaluation) -> pd.DataFrame:
    """Settings of each run, a row a setting, a column a run."""
    columns = {name: flat_settings(found.run.settings) for name, found in evaluation.runs.items()}
    return pd.DataFrame(columns).fillna("").rename_axis("setting").reset_index()


def flat_settings(settings: dict[str, Any], within: str = "") -> dict[str, str]:
    """Nested settings as `outer.inner` -> text; the prefix `settings.` is left out, and so is what is too
    long to read."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if name in ("identity", "inputs"):  # what a run compares itself by: repeats the settings
            continue
        label = f"{within}.{name}" if within and within != "settings" else name
        if isinstance(value, dict):
            flat |= flat_settings(value, label)
        elif len(str(value)) <= 80:
            flat[label] = str(value)
    return flat


def bias_table(found: RunEvaluation) -> pd.DataFrame:
    """Slope and gap-age r before and after, as text; empty where the correction was refused."""
    if not found.calibration.corrector:
        return pd.DataFrame()
    table = found.bias.rename(columns={"split": "scans", "kind": "form", "gap_age_r": "gap-age r"})
    return table.assign(
        slope=[
            "no prediction" if form.startswith("gap") else with_interval({"value": value})
            for form, value in zip(table["form"], table["slope"], strict=True)
        ],
        **{"gap-age r": [with_interval({"value": value}) for value in table["gap-age r"]]},
    )


def coverage_table(found: RunEvaluation) -> pd.DataFrame:
    """Coverage and width of the prediction interval by age bin, as text."""
    rows = list(found.coverage.itertuples())
    widths = [f"{row.mean_width:.1f}" if np.isfinite(row.mean_width) else "infinite" for row in rows]
    return pd.DataFrame(
        {
            "true age [years]": [row.group for row in rows],
            "scans": [row.n for row in rows],
            "inside [%]": [
                f"{100 * row.coverage:.0f} [{100 * row.coverage_low:.0f}, {100 * row.coverage_high:.0f}]"
                for row in rows
            ],
            "width [years]": widths,
        }
    )


def groups_table(found: RunEvaluation) -> pd.DataFrame:
    """Raw figures by group, as text."""
    names = {
        "mae": "MAE [years]",
        "mean_predictor_mae": "mean predictor's MAE [years]",
        "mean_gap": "mean gap [years]",
    }
    rows = found.groups.to_dict("records")
    first = {"by": [row["by"].replace("_", " ") for row in rows], "group": [row["group"] for row in rows]}
    counts = {"scans": [row["n"] for row in rows], "subjects": [row["n_subjects"] for row in rows]}
    return pd.DataFrame(
        first | counts | {title: [text_of(row, key) for row in rows] for key, title in names.items()}
    )


def diagnosis_table(found: RunEvaluation) -> pd.DataFrame:
    """Gap differences between diagnoses, as text."""
    rows = found.diagnosis.to_dict("records")
    return pd.DataFrame(
        {
            "diagnosis": [row["diagnosis"] for row in rows],
            "subjects": [row["n_subjects"] for row in rows],
            "controls": [row["n_controls"] for row in rows],
            "gap difference [years]": [text_of(row, "difference") for row in rows],
            "adjusted difference [years]": [text_of(row, "adjusted") for row in rows],
            "adjusted for": [row["adjusted_for"] for row in rows],
        }
    )


def _verdict(row: dict[str, Any]) -> str:
    if row["high"] < 0:
        return f"{row['a']} is nearer"
    if row["low"] > 0:
        return f"{row['b']} is nearer"
    return "no difference shown"


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
        "settings": flat_settings(found.run.settings),
        "fingerprint": found.run.settings.get("fingerprint", "not recorded"),
        "sources": sorted(cohort["source"].unique()) if "source" in cohort else [],
        "sites": sorted(site for site in cohort["site"].unique() if site) if "site" in cohort else [],
        "training": training,
        "age_low": training["age"].min(),
        "age_high": training["age"].max(),
        "test": test,
        "figures": [(title, with_interval(test[key])) for key, title in FIGURES.items()],
        "splits": markdown(splits_table(ws)),
        "groups": markdown(groups_table(found)),
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
        sentences=headline_sentences(evaluation),
        other_splits=other_splits(evaluation),
        cohort=cohort_table(ws),
        dropped=dropped_table(ws),
        splits=splits_table(ws),
        figures=[(drawn, images[drawn.name]) for drawn in figures],
        why_gap_only=WHY_GAP_ONLY,
        bias={name: bias_table(found) for name, found in evaluation.runs.items()},
        coverage={name: coverage_table(found) for name, found in evaluation.runs.items()},
        groups={name: groups_table(found) for name, found in evaluation.runs.items()},
        diagnosis={
            name: diagnosis_table(found) for name, found in evaluation.runs.items() if len(found.diagnosis)
        },
        comparisons=comparison_table(evaluation),
        known=known_tables(evaluation),
        reliability={name: found.reliability for name, found in evaluation.runs.items() if found.reliability},
        external={name: external_tables(found) for name, found in evaluation.external.items()},
        settings=settings_table(evaluation),
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
