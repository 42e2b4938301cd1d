"""Do groups of people differ in their brain-age gap? Differences with intervals, plain and adjusted.

About gaps only; how accurate a model is within a group is `metrics.metrics_by_group`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from brainage_nb.cohort.rules import judge_controls

FEWEST = 3  # subjects a diagnosis needs to be compared at all
CONTROLS = "(controls)"  # all of them together, however their diagnosis is written


def diagnosis_differences(rows: pd.DataFrame, gap: str = "gap", controls: str | None = None) -> pd.DataFrame:
    """Mean gap of each diagnosis minus that of controls, plain and adjusted for age, sex and site.

    Ordinary least squares with standard errors that count subjects, not scans (cluster-robust, statsmodels).
    The adjusted form takes care of groups of different age, which the age bias of a model would otherwise
    turn into a gap.

    Parameters
    ----------
    rows : DataFrame
        A row a scan of test subjects: `subject_id, age, diagnosis`, the column `gap` (years) and, where
        known, `sex, site`.
    gap : str
        Column to compare.
    controls : str, optional
        The diagnosis to compare with; by default all controls (`judge_controls`), in any spelling.

    Returns
    -------
    DataFrame
        Columns `diagnosis`, `n_subjects`, `n_controls`, `difference`, `difference_low`, `difference_high`,
        `adjusted`, `adjusted_low`, `adjusted_high` (years, 95 %) and `adjusted_for`. Empty where there is
        nothing to compare.
    """
    rows = rows[rows["diagnosis"].fillna("").astype(str) != ""] if "diagnosis" in rows else rows.iloc[:0]
    if not len(rows):
        return pd.DataFrame()
    if controls is None:
        named = CONTROLS
        rows = rows.assign(diagnosis=rows["diagnosis"].mask(judge_controls(rows) == "yes", CONTROLS))
    else:
        named = _checked_name(rows, controls)
    counts = rows.groupby("diagnosis")["subject_id"].nunique()
    others = [name for name in counts.index if name != named and counts[name] >= FEWEST]
    if counts.get(named, 0) < FEWEST or not others:
        return pd.DataFrame()
    rows = rows[rows["diagnosis"].isin([named, *others])].reset_index(drop=True)
    covariates = ["age", *(name for name in ("sex", "site") if _varies(rows, name))]
    plain = _differences(rows, gap, named, others, [])
    adjusted = _differences(rows, gap, named, others, covariates)
    return pd.DataFrame(
        {
            "diagnosis": others,
            "n_subjects": [int(counts[name]) for name in others],
            "n_controls": int(counts[named]),
            "difference": plain[:, 0],
            "difference_low": plain[:, 1],
            "difference_high": plain[:, 2],
            "adjusted": adjusted[:, 0],
            "adjusted_low": adjusted[:, 1],
            "adjusted_high": adjusted[:, 2],
            "adjusted_for": ", ".join(covariates),
        }
    )


def _checked_name(rows: pd.DataFrame, controls: str) -> str:
    if controls not in set(rows["diagnosis"]):
        known = sorted(rows["diagnosis"].unique())
        raise ValueError(f"controls = {controls!r} is not a diagnosis here; there are {known}.")
    return controls


def _varies(rows: pd.DataFrame, name: str) -> bool:
    return (
        name in rows
        and rows[name].notna().all()
        and (rows[name] != "").all()
        and len(rows[name].unique()) > 1
    )


def _differences(
    rows: pd.DataFrame, gap: str, named: str, others: list[str], covariates: list[str]
) -> np.ndarray:
    """(len(others), 3): difference, low, high in years."""
    from statsmodels.regression.linear_model import OLS

    columns = {f"is {name}": (rows["diagnosis"] == name).astype(float) for name in others}
    design = pd.DataFrame({"constant": 1.0} | columns, index=rows.index)
    for name in covariates:
        if name == "age":
            design["age"] = rows["age"] - rows["age"].mean()
        else:
            design = design.join(pd.get_dummies(rows[name], prefix=name, drop_first=True, dtype=float))
    fitted = OLS(rows[gap], design).fit(
        cov_type="cluster", cov_kwds={"groups": pd.factorize(rows["subject_id"])[0]}, use_t=True
    )
    interval = fitted.conf_int(0.05)
    return np.array([[fitted.params[f"is {name}"], *interval.loc[f"is {name}"]] for name in others])
