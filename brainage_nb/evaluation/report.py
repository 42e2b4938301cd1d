"""What an evaluation found as small tables of text, and the evaluation as written: results.json,
predictions.csv, figures, a one-file report.html and a model card. Computes no figure of its own."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation.evaluate import (
    FEWEST_COMPARED,
    HEADLINE,
    TEST_OBJECT,
    Evaluation,
    headline_table,
)
from brainage_nb.evaluation.external import ExternalEvaluation
from brainage_nb.evaluation.metrics import flat, text_table, with_interval
from brainage_nb.evaluation.plots import ReportFigure, draw_figures
from brainage_nb.evaluation.rates import Rates
from brainage_nb.evaluation.runs import OUT_OF_FOLD, RunEvaluation
from brainage_nb.platforms import version_of
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.workspace import Workspace, write_csv, write_json, write_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.nodes import EvalContext

SPLIT_WORDS = {
    "train": "training (the model has seen these)",
    "val": "validation (may have chosen the best epoch)",
    OUT_OF_FOLD: "out-of-fold (each by a model that did not see the subject)",
    "test": "test (never seen)",
}
KNOWN_WORDS = {
    "mean": "mean predictor",
    "ours": "this model",
    "attainable": "attainable: best regression on the planted anatomy",
    "oracle": "oracle: knows the planted brain age",
}
KNOWN_COLUMNS = (
    "who predicts", "MAE on the judging scans [years]", "MAE on the whole cohort, as in notebook 01 [years]",
)  # fmt: skip
PACKAGES = (
    "brainage-nb", "torch", "monai", "numpy", "pandas", "scikit-learn", "scipy", "statsmodels", "matplotlib",
)  # fmt: skip
# --- tables of text: of the workspace --------------------------------------------------------------------


def people_table(scans: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Who is in each group of scans: scans, subjects, ages and sex; a subject counts once in a group."""
    rows = []
    for names, part in scans.groupby(by, sort=False, dropna=False):
        people, age = part.drop_duplicates("subject_id"), part.groupby("subject_id")["age"].mean()
        initial = people.get("sex", pd.Series(dtype=str)).str.upper().str[:1]
        women, men = (initial == "F").sum(), (initial == "M").sum()
        counts = {
            "scans": len(part),
            "subjects": len(people),
            "ages [years]": f"{part['age'].min():.1f} to {part['age'].max():.1f} (mean {age.mean():.1f}, SD "
            f"{age.std():.1f})".replace(", SD nan", ""),
            "women / men / not known": f"{women} / {men} / {len(people) - women - men}",
        }
        rows.append(dict(zip(by, names, strict=True)) | counts)
    return pd.DataFrame(rows)


def cohort_table(ws: Workspace) -> pd.DataFrame:
    """Who came in, by source and site."""
    cohort = ws.read("cohort.csv")
    by = ["source", "site"] if "site" in cohort else ["source"]
    return people_table(cohort.assign(source=cohort.get("source", "not known")).sort_values(by), by)


def splits_table(ws: Workspace) -> pd.DataFrame:
    """Who is in each split."""
    dealt, order = ws.read("splits.csv"), {"train": 0, "val": 1, "test": 2}
    return people_table(dealt.sort_values("split", key=lambda names: names.map(order)), ["split"])


def dropped_table(ws: Workspace) -> pd.DataFrame:
    """What cleaning dropped: scans per reason, with one example's detail."""
    cleaning = ws.read("cleaning.csv")
    lost = cleaning[~cleaning["kept"]]
    table = lost.assign(example=lost["scan_id"] + ": " + lost["detail"]).groupby("reason", as_index=False)
    table = table.agg(**{"scans": ("scan_id", "size"), "for example": ("example", "first")})
    return table.sort_values("scans", ascending=False)


# --- of all runs -----------------------------------------------------------------------------------------


def other_splits(evaluation: Evaluation) -> pd.DataFrame:
    """Raw figures of the other splits, each row named for what it can be used for."""
    rows = [
        {"run": name, "split": SPLIT_WORDS[split]} | flat(figures)
        for name, found in evaluation.runs.items()
        for split, figures in found.metrics.items()
        # With folds, train and validation rows are out-of-fold too: one row says all of it.
        if split != found.run.judged_on and (split == OUT_OF_FOLD or not found.run.folds)
    ]
    return text_table(rows, ("run", "split", "n", "mae", "mean_predictor_mae", "r", "gap_age_r"))


def comparison_table(evaluation: Evaluation) -> pd.DataFrame:
    """Paired MAE differences as text."""
    rows = evaluation.comparisons
    few = rows["n_subjects"] < FEWEST_COMPARED
    words = ["too few people to tell", rows["a"] + " is nearer", rows["b"] + " is nearer"]
    reads = np.select([few, rows["high"] < 0, rows["low"] > 0], words, "no difference shown")
    rows = rows.assign(compared=rows["a"] + " minus " + rows["b"], reads=reads).to_dict("records")
    table = text_table(rows, ("compared", "value", "n", "reads"))
    return table.rename(columns={"value": "MAE difference [years]", "scans": "shared scans"})


def known_tables(evaluation: Evaluation) -> dict[str, dict[str, pd.DataFrame]]:
    """Known-answer checks of each run: the `errors` side by side, and how much of the planted gap was
    `recovered`."""
    tables = {}
    for name, found in evaluation.runs.items():
        if known := found.known:
            errors = known["mae"] | {"mean": found.figures["mean_predictor_mae"]}
            shown = [who for who in KNOWN_WORDS if who in errors]
            parts = [errors, known["mae_whole_cohort"]]
            cells = [[with_interval(part[who]) if who in part else "–" for part in parts] for who in shown]
            rows = [(KNOWN_WORDS[who], *row) for who, row in zip(shown, cells, strict=True)]
            recovered = text_table(known["recovered"], ("kind", "n", "r", "slope"))
            recovered = recovered.rename(columns={"r": "r with planted", "slope": "slope on planted"})
            tables[name] = {"errors": pd.DataFrame(rows, columns=KNOWN_COLUMNS), "recovered": recovered}
    return tables


def fusion_tables(evaluation: Evaluation) -> dict[str, pd.DataFrame]:
    """What was fused as text: `people` by the runs they have ages from, and what each set of runs gives the
    `same` people, who have all; empty without fusion."""
    if evaluation.fusion is None:
        return {}
    found = evaluation.fusion.to_dict(**evaluation.bootstrap)
    names = ("fused_from", "n", "n_subjects", "mae", "mean_predictor_mae", "half_width", "inside")
    people = text_table([flat(row) for row in found["people"]], names)
    people["inside"] = [f"{share:.0%}" for share in people["inside"]]
    people["half_width"] = [f"{width:.1f}".replace("inf", "infinite") for width in people["half_width"]]
    same = [
        flat(row) | {"weights": evaluation.fusion.parts[row["from"]].combination.words}
        for row in found["parts"]
    ]
    same = text_table(same, ("from", "n", "mae", "gain", "weights") if same else ())
    return {
        "people": people.rename(columns={"fused_from": "fused from", "half_width": "interval: ± years"}),
        "same": same.rename(columns={"gain": "all together are nearer by [years]"}),
    }


def settings_table(evaluation: Evaluation) -> pd.DataFrame:
    """Settings of each run, one row per setting, one column per run."""
    columns = {name: flat_settings(found.run.settings) for name, found in evaluation.runs.items()}
    return pd.DataFrame(columns).fillna("").rename_axis("setting").reset_index()


def flat_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Nested settings as `outer.inner` -> text, without the prefix `settings.`, what a run compares itself by
    (it repeats the settings) and what is too long to read."""
    (nested,) = pd.json_normalize(dict(settings)).to_dict("records")
    asked_first = sorted(nested.items(), key=lambda item: not item[0].startswith("settings."))
    rounded = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in asked_first
    }
    return {
        name.removeprefix("settings."): str(value)  # what became of "auto" stands outside, and counts
        for name, value in rounded.items()
        if not {"identity", "inputs"} & set(name.split(".")) and len(str(value)) <= 80
    }


# --- of one run, and of another cohort -------------------------------------------------------------------


def bias_table(found: RunEvaluation) -> pd.DataFrame:
    """Slope and gap-age r before and after, as text; empty where the correction was refused."""
    rows = found.bias.to_dict("records")
    for row in rows:
        row |= {name: with_interval({"value": row[name]}) for name in ("slope", "gap_age_r")}
        row["slope"] = "no prediction" if row["kind"].startswith("gap") else row["slope"]
    return text_table(rows, ("split", "kind", "slope", "gap_age_r"))


def coverage_table(found: RunEvaluation) -> pd.DataFrame:
    """Coverage and width of the prediction interval by age bin, as text."""
    table = found.coverage.copy()
    table[["coverage", "coverage_low", "coverage_high"]] *= 100
    table["mean_width"] = [f"{width:.1f}".replace("inf", "infinite") for width in table["mean_width"]]
    text = text_table(table.to_dict("records"), ("group", "n", "coverage", "mean_width"), digits=0)
    return text.rename(columns={"group": "true age [years]"})


def groups_table(found: RunEvaluation) -> pd.DataFrame:
    """Raw figures by group, as text."""
    rows = found.groups.replace({"by": {"age_bin": "age"}}).to_dict("records")
    return text_table(rows, ("by", "group", "n", "n_subjects", "mae", "mean_predictor_mae", "mean_gap"))


def diagnosis_table(found: RunEvaluation) -> pd.DataFrame:
    """Gap differences between diagnoses, as text."""
    names = ("diagnosis", "n_subjects", "n_controls", "difference", "adjusted", "adjusted_for")
    return text_table(found.diagnosis.to_dict("records"), names)


def rates_tables(rates: Rates) -> list[pd.DataFrame]:
    """What the rate of one person is worth, then rates of groups, as text; empty where there is none."""
    if rates.scale is None:
        return []
    names = ["years between two visits", "error of a rate [years a year]", "reliability", "verdict"]
    groups = text_table(rates.groups.to_dict("records"), ("who", "n_subjects", "rate", "method"))
    return [rates.scale.table().round(2).set_axis(names, axis=1), *([groups] if len(groups) else [])]


def external_tables(found: ExternalEvaluation) -> dict[str, pd.DataFrame]:
    """Another cohort as text: `raw` figures of all its scans, `offsets` of its sites and, where named
    controls calibrated, the `rest` of it before and after."""
    names = ("n", "mae", "mean_predictor_mae", "r", "mean_gap")
    offsets = text_table(found.offsets.to_dict("records"), ("site", "value", "n"))
    return {
        "raw": text_table([flat(found.metrics)], ("n_subjects", *names)),
        "offsets": offsets.rename(columns={"value": "controls' mean gap [years]"}),
        "rest": text_table(found.rest.to_dict("records"), ("form", *names)),
    }


# --- the written evaluation ------------------------------------------------------------------------------


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
        `report.html` (one page that needs no other file and no network), `results.json`, `predictions.csv`,
        `model_card.md`, where people have several visits `rates.csv`, and the figures as PNG.

    Examples
    --------
    >>> write_report(evaluate_runs("workspace"))[0].name  # doctest: +SKIP
    'report.html'
    """
    folder = evaluation.workspace.path("evaluation")
    figures = draw_figures(evaluation) if figures is None else figures
    written = [
        write_json(evaluation.results, folder / "results.json"),
        write_csv(evaluation.predictions, folder / "predictions.csv"),
        write_text(model_card(evaluation), folder / "model_card.md"),
    ]
    people = {name: found.rates.people for name, found in evaluation.runs.items()}
    if rated := [table.assign(run=name) for name, table in people.items() if len(table)]:
        written.append(write_csv(pd.concat(rated), folder / "rates.csv"))
    pictures = [drawn.save(folder / "figures") for drawn in figures]
    encoded = [base64.b64encode(path.read_bytes()).decode("ascii") for path in pictures]
    page = _report_html(evaluation, list(zip(figures, encoded, strict=True)), title)
    return [write_text(page, folder / "report.html"), *written, *pictures]


def _report_html(evaluation: Evaluation, figures: list[tuple[ReportFigure, str]], title: str) -> str:
    headline = headline_table(evaluation.results).T.rename_axis(index="raw", columns=None)
    template = load_templates().get_template("report.html.j2")
    return template.render(
        title=title,
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        evaluation=evaluation,
        headline=headline.reset_index(),
        known=known_tables(evaluation),
        figures=figures,
        out_of_fold=[name for name, found in evaluation.runs.items() if found.run.judged_on != "test"],
        versions=pd.DataFrame([{"package": name, "version": version_of(name)} for name in PACKAGES]),
    )


def model_card(evaluation: Evaluation, run: str = "") -> str:
    """The card as Markdown, made from run and workspace alone: what it is for, from what, how good,
    and where not.

    Parameters
    ----------
    evaluation : Evaluation
    run : str
        One run's name; empty for all, under each other.
    """
    template = load_templates().get_template("model_card.md.j2")
    names = [run] if run else evaluation.runs
    cards = [template.render(_card_content(evaluation, name)).strip() for name in names]
    return "\n\n---\n\n".join(cards) + "\n"


def _card_content(evaluation: Evaluation, name: str) -> dict[str, Any]:
    found, cohort = evaluation.runs[name], evaluation.workspace.read("cohort.csv")
    figures = text_table([flat(found.figures)], HEADLINE).T.reset_index()
    return {
        "name": name,
        "when": datetime.now(UTC).strftime("%Y-%m-%d"),
        "version": version_of("brainage-nb"),
        "evaluation": evaluation,
        "found": found,
        "figures": figures.set_axis(["figure", "value [95 % interval]"], axis=1),
        "sources": sorted(set(cohort.get("source", ())) - {""}),
        "sites": sorted(set(cohort.get("site", ())) - {""}),
        "test_object": evaluation.is_test_object and TEST_OBJECT,
    }


def measured_recipe(settings: Mapping[str, Any]) -> str:
    """Name of the recipe that prepared and trained a run, as the card has figures of it; empty for another.

    What prepared it is judged by its steps: the same name may have meant others in an older release.
    """
    try:
        prepared = PreprocessingSettings.from_json(settings["preprocessing"]).recipe
    except (KeyError, ValueError):
        return ""
    return prepared if settings.get("recipe") == prepared else ""


@cache
def load_templates() -> Environment:
    """The jinja2 environment of report and cards; text is escaped in the page and in Markdown."""
    from jinja2 import Environment, PackageLoader, pass_eval_context, select_autoescape

    environment = Environment(
        loader=PackageLoader("brainage_nb.evaluation", "."),
        autoescape=select_autoescape(["html.j2"]),
        finalize=pass_eval_context(_escape_in_cards),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"table": as_html_table, "markdown": as_markdown}
    environment.globals |= {name: item for name, item in globals().items() if callable(item)}  # tables
    return environment


def _escape_in_cards(context: EvalContext, value: Any) -> Any:
    """Jinja's own escaping is for pages only; what has `__html__` was escaped before."""
    is_plain = isinstance(value, str) and not hasattr(value, "__html__")
    return escape_markdown(value) if is_plain and not context.autoescape else value


def escape_markdown(text: str) -> str:
    """A text on one line in which nothing is read as Markdown or HTML; `5.0 [4.0, 6.0]` stays as it is."""
    text = html.escape(" ".join(text.split()), quote=False).replace("`", "'")
    return re.sub(r"[\\*|~#]|(?<=\])\(|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


def as_markdown(frame: pd.DataFrame) -> Any:
    """A frame of text and numbers as a Markdown table, text escaped."""
    from markupsafe import Markup

    head, *rows = ([escape_markdown(str(cell)) for cell in row] for row in [frame.columns, *frame.to_numpy()])
    lines = [head, ["---"] * frame.shape[1], *rows]
    return Markup("\n".join(f"| {' | '.join(line)} |" for line in lines))


def as_html_table(frame: pd.DataFrame) -> Any:
    """A DataFrame as an HTML table, text escaped, a value and its interval on one line."""
    from markupsafe import Markup

    text = frame.to_html(index=False, border=0, na_rep="–", justify="left")
    return Markup(re.sub(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]", r"\1&nbsp;[\2,&nbsp;\3]", text))
