"""Checks against what was planted in the known-answer cohort, and between two sessions of one person.

Only meaningful where the truth is known (a test object) or where people came twice; says nothing about
accuracy on people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.evaluation.metrics import correlation_with_interval, mean_with_interval
from brainage_nb.planted import ANATOMY, anatomy_regressions
from brainage_nb.workspace import Workspace, read_csv

FEWEST_TWICE = 10  # subjects with two sessions, below which a reliability means little


def read_truth(workspace: Workspace, path: str | Path = "") -> pd.DataFrame | None:
    """The planted truth: from `path`, else `demo/truth.csv` (or another folder's) in the workspace; None
    where there is none."""
    if str(path):
        return read_csv(path)
    found = [
        workspace.path("demo", "truth.csv"),
        workspace.path("truth.csv"),
        *sorted(workspace.root.glob("*/truth.csv")),
    ]
    return next((read_csv(place) for place in found if place.exists()), None)


def with_truth(rows: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Rows that have a planted gap, with `planted_gap`, `brain_age` (years) and the planted anatomy.

    Matched by `scan_id`, or by subject and session where a scan goes by another name.
    """
    planted = truth.rename(columns={"gap": "planted_gap"})
    found = ["planted_gap", "brain_age", *(name for name in ANATOMY if name in planted)]
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


def reference_errors(
    rows: pd.DataFrame, training: pd.DataFrame, *, n_bootstrap: int = 2000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """MAE (years) of the two references on the same test rows as ours.

    Parameters
    ----------
    rows, training : DataFrame
        Test rows and rows that the attainable regression is fitted on, both from `with_truth`.

    Returns
    -------
    dict
        `oracle`: knows the planted brain age. `attainable`: the best regression of age on the planted
        anatomy, where the truth holds it. Each {"value", "low", "high", "n", "n_subjects"}.
    """
    subjects = rows["subject_id"].to_numpy()
    bootstrap = {"n_bootstrap": n_bootstrap, "seed": seed}
    errors = {"oracle": mean_with_interval((rows["brain_age"] - rows["age"]).abs(), subjects, **bootstrap)}
    anatomy = [name for name in ANATOMY if name in rows]
    if anatomy and len(training) >= 5 * len(anatomy):
        predicted = attainable_ages(training[anatomy], training["age"], rows[anatomy])
        errors["attainable"] = mean_with_interval(
            np.abs(predicted - rows["age"].to_numpy()), subjects, **bootstrap
        )
    return errors


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


def attainable_ages(train: pd.DataFrame, age: pd.Series, test: pd.DataFrame) -> np.ndarray:
    """Ages (n_test,) in years by the regression on planted anatomy that does best in cross-validation on the
    training rows, whose ages are `age`; both tables hold columns of `ANATOMY`.
    """
    from sklearn.model_selection import cross_val_score

    models = anatomy_regressions()
    x, y = train.to_numpy(), age.to_numpy()
    scores = [cross_val_score(model, x, y, scoring="neg_mean_absolute_error").mean() for model in models]
    return models[int(np.argmax(scores))].fit(x, y).predict(test.to_numpy())
