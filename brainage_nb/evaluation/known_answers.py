"""Checks against what was planted in the known-answer cohort, and between two sessions of one person.

Only meaningful where the truth is known (a test object) or where people came twice; says nothing about
accuracy on people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.phantom_references import FEWEST_ATTAINABLE, attainable_ages
from brainage_nb.evaluation.metrics import correlation_with_interval, mean_with_interval
from brainage_nb.workspace import Workspace, read_csv

FEWEST_TWICE = 10  # subjects with two sessions, below which a reliability means little


def read_truth(workspace: Workspace, path: str | Path = "") -> pd.DataFrame | None:
    """The planted truth: from `path`, else `demo/truth.csv` (or another folder's) in the workspace; None
    where there is none.

    With `attainable` (years, see `attainable_ages`) where there are people enough to fit it on.
    """
    places = [Path(path)] if str(path) else []
    if not places:
        places = [workspace.path("demo", "truth.csv"), workspace.path("truth.csv")]
        places += sorted(workspace.root.glob("*/truth.csv"))
    found = next((place for place in places if str(path) or place.exists()), None)
    if found is None:
        return None
    truth = read_csv(found)
    if truth["subject_id"].nunique() >= FEWEST_ATTAINABLE:
        truth["attainable"] = attainable_ages(truth)
    return truth


def with_truth(rows: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Rows that have a planted gap, with `planted_gap`, `brain_age` and, where the truth has it, `attainable`
    (years).

    Matched by `scan_id`, or by subject and session where a scan goes by another name.
    """
    planted = truth.rename(columns={"gap": "planted_gap"})
    found = [name for name in ("planted_gap", "brain_age", "attainable") if name in planted]
    by_scan = rows[["scan_id"]].merge(planted[["scan_id", *found]].drop_duplicates("scan_id"), how="left")
    keys = ["subject_id", "session_id"]
    by_session = rows[keys].merge(planted[[*keys, *found]].drop_duplicates(keys), on=keys, how="left")
    known = by_scan[found].fillna(by_session[found])
    return rows.reset_index(drop=True).join(known).dropna(subset=["planted_gap"])


def recovered_gap(
    rows: pd.DataFrame, kinds: dict[str, str], *, n_bootstrap: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How much of the planted gap is found: correlation and slope with 95 % subject bootstrap.

    Parameters
    ----------
    rows : DataFrame
        Test rows from `with_truth`, with the columns named in `kinds`.
    kinds : dict
        Name in words -> column of a recovered gap in years, such as {"raw": "gap"}.

    Returns
    -------
    DataFrame
        Columns `kind`, `n`, `r`, `r_low`, `r_high`, `slope`, `slope_low`, `slope_high` (of recovered on
        planted; 1 is perfect).
    """
    table = []
    for kind, column in kinds.items():
        known = rows.dropna(subset=[column])
        found = correlation_with_interval(
            known["planted_gap"],
            known[column],
            known["subject_id"].to_numpy(),
            n_bootstrap=n_bootstrap,
            seed=seed,
        )
        row = {"kind": kind, "n": len(known)}
        for name in ("r", "slope"):
            row |= {
                name: found[name]["value"],
                f"{name}_low": found[name]["low"],
                f"{name}_high": found[name]["high"],
            }
        table.append(row)
    return pd.DataFrame(table)


def reference_errors(rows: pd.DataFrame, *, n_bootstrap: int = 2000, seed: int = 0) -> dict[str, Any]:
    """MAE (years) of the two references of notebook 01 on the given scans.

    Parameters
    ----------
    rows : DataFrame
        From `with_truth`: the test rows, or those of the whole cohort.

    Returns
    -------
    dict
        `oracle`: knows the planted brain age and gives it as the age. `attainable`: the best regression of
        age on the planted anatomy, where there are people enough. Each {"value", "low", "high", "n",
        "n_subjects"}.
    """
    subjects = rows["subject_id"].to_numpy()
    return {
        name: mean_with_interval(
            (rows[column] - rows["age"]).abs(), subjects, n_bootstrap=n_bootstrap, seed=seed
        )
        for name, column in (("oracle", "brain_age"), ("attainable", "attainable"))
        if column in rows
    }


def two_session_reliability(
    rows: pd.DataFrame, *, column: str = "gap", n_bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any] | None:
    """Two-session reliability of a gap in test subjects: ICC(2,1), absolute agreement (Shrout & Fleiss 1979).

    Of the gap, not the predicted age: ages differ so much between people that any model's predicted ages
    agree.

    Returns
    -------
    dict or None
        `icc` and `difference` (mean absolute, years) as {"value", "low", "high"} and `n_subjects`; None with
        fewer than ten subjects who came twice.
    """
    sessions = rows.groupby(["subject_id", "session_id"], sort=True)[column].mean()
    twice = (
        sessions.groupby("subject_id").filter(lambda values: len(values) >= 2).groupby("subject_id").head(2)
    )
    pairs = twice.to_numpy().reshape(-1, 2)
    if len(pairs) < FEWEST_TWICE:
        return None
    rng = np.random.default_rng(seed)
    draws = [icc(pairs[rng.integers(0, len(pairs), len(pairs))]) for _ in range(n_bootstrap)]
    low, high = np.percentile(draws, [2.5, 97.5]) if draws else (np.nan, np.nan)
    return {
        "icc": {"value": icc(pairs), "low": float(low), "high": float(high)},
        "difference": mean_with_interval(
            np.abs(pairs[:, 0] - pairs[:, 1]), n_bootstrap=n_bootstrap, seed=seed
        ),
        "n_subjects": len(pairs),
    }


def icc(pairs: np.ndarray) -> float:
    """ICC(2,1) of an array (n_subjects, k sessions): two-way random effects, absolute agreement, single
    measure."""
    n, k = pairs.shape
    grand = pairs.mean()
    between_people = k * ((pairs.mean(axis=1) - grand) ** 2).sum() / (n - 1)
    between_sessions = n * ((pairs.mean(axis=0) - grand) ** 2).sum() / (k - 1)
    rest = pairs - pairs.mean(axis=1, keepdims=True) - pairs.mean(axis=0) + grand
    error = (rest**2).sum() / ((n - 1) * (k - 1))
    below = between_people + (k - 1) * error + k * (between_sessions - error) / n
    return float((between_people - error) / below) if below > 0 else float("nan")
