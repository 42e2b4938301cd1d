"""What an evaluation found and what the workspace holds, as small tables of text for people. Computes no
figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation.evaluate import Evaluation
from brainage_nb.evaluation.external import ExternalEvaluation
from brainage_nb.evaluation.metrics import with_interval
from brainage_nb.evaluation.one_run import RunEvaluation
from brainage_nb.evaluation.runs import OUT_OF_FOLD
from brainage_nb.workspace import Workspace

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


def text_of(row: dict[str, Any], key: str) -> str:
    return with_interval({"value": row[key], "low": row[f"{key}_low"], "high": row[f"{key}_high"]})


def _verdict(row: dict[str, Any]) -> str:
    if row["high"] < 0:
        return f"{row['a']} is nearer"
    if row["low"] > 0:
        return f"{row['b']} is nearer"
    return "no difference shown"
