"""Resampling of subjects, vectorised: what every interval of a metric comes from. Knows no metric.

How far predicted ages are from true ages, with intervals that count people, not scans.

Arrays and frames in, numbers out. Nothing here corrects a prediction or reads a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

_CHUNK_BYTES = 32e6  # of resampling weights held at once; keeps 10,000 subjects far below a gigabyte


def bootstrap_sums(columns: np.ndarray, codes: np.ndarray, n_bootstrap: int, seed: int) -> np.ndarray:
    """Column sums under resampling of subjects.

    Every figure here follows from sums over scans, so a draw is one row of counts (how often each subject was
    taken) times the subjects' own sums: a matrix product instead of a loop.

    Parameters
    ----------
    columns : array (n_scans, k)
    codes : array (n_scans,) of int
        0 … n_subjects - 1.

    Returns
    -------
    array (n_bootstrap, k)
    """
    n_subjects = int(codes.max()) + 1
    by_subject = np.column_stack([np.bincount(codes, column, minlength=n_subjects) for column in columns.T])
    draws = [counts @ by_subject for counts in _draws(n_subjects, n_bootstrap, seed)]
    return np.concatenate([np.empty((0, columns.shape[1])), *draws])


def value_with_interval(value: float, draws: np.ndarray) -> dict[str, float]:
    """{"value", "low", "high"}: 95 % percentile interval of the draws; NaN ends where there is none."""
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(draws) < 2 or np.ptp(draws) == 0:
        return {"value": float(value), "low": np.nan, "high": np.nan}
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def subject_codes(subject_id: np.ndarray | None, n_scans: int) -> np.ndarray:
    """Subjects as 0 … n_subjects - 1, one code a scan; without ids every scan is its own subject."""
    if subject_id is None:
        return np.arange(n_scans)
    if len(subject_id) != n_scans:
        raise ValueError(f"subject_id has {len(subject_id)} entries for {n_scans} scans.")
    return pd.factorize(np.asarray(subject_id))[0]


def _draws(n_subjects: int, n_bootstrap: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    size = max(1, int(_CHUNK_BYTES / (8 * n_subjects)))
    for start in range(0, n_bootstrap, size):
        rows = min(size, n_bootstrap - start)
        taken = rng.integers(0, n_subjects, (rows, n_subjects))
        taken += np.arange(rows)[:, None] * n_subjects  # one bincount for all rows of the chunk
        yield np.bincount(taken.ravel(), minlength=rows * n_subjects).reshape(rows, n_subjects).astype(float)


METRICS = (
    "mae",
    "rmse",
    "r",
    "r2",
    "slope",
    "gap_age_r",
    "mean_gap",
    "mean_predictor_mae",
)


def regression_metrics(
    age: np.ndarray,
    predicted: np.ndarray,
    subject_id: np.ndarray | None = None,
    *,
    reference_age: float | None = None,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, int | dict[str, float]]:
    """Accuracy of predicted ages with 95 % subject bootstrap intervals.

    Parameters
    ----------
    age, predicted : array (n,)
        True and predicted age in years, a value a scan.
    subject_id : array (n,), optional
        Whose scan it is; a subject's scans are drawn together. Without it every scan is its own subject.
    reference_age : float, optional
        Mean age of the *training* subjects in years: what the mean predictor says for everyone. Without it
        `mean_predictor_mae` is NaN; it is never taken from the evaluated subjects.
    n_bootstrap : int
        Number of draws.
    seed : int
        Seed of the draws.

    Returns
    -------
    dict
        `n` (scans) and `n_subjects` as int; `mae`, `rmse`, `mean_gap`, `mean_predictor_mae` in years, `r`,
        `r2`, `slope` (of predicted on true age) and `gap_age_r` (of predicted minus true age with true age)
        as {"value", "low", "high"}. NaN stands where a figure is not defined, as r is for constant
        predictions. All of them depend on the age range of the scans (de Lange et al. 2022): compare models
        on the same people only.
    """
    age, predicted = _checked(age, predicted)
    subjects = subject_codes(subject_id, len(age))
    columns = _moment_columns(age, predicted, reference_age)
    value = _figures(columns.sum(axis=0, keepdims=True))
    draws = _figures(bootstrap_sums(columns, subjects, n_bootstrap, seed))
    counts = {"n": len(age), "n_subjects": int(subjects.max()) + 1}
    return counts | {name: value_with_interval(value[name][0], draws[name]) for name in METRICS}


def has_folds(predictions: pd.DataFrame) -> bool:
    """Whether train and validation rows are out-of-fold predictions (columns `split, fold`)."""
    return bool(((predictions["split"] != "test") & (predictions["fold"] >= 0)).any())


def mean_training_age(predictions: pd.DataFrame) -> float:
    """What the mean predictor says for everybody: the mean age in years of the training subjects.

    A subject counts once, however many scans it has. With folds, validation subjects were trained on too.

    Parameters
    ----------
    predictions : DataFrame
        Columns `subject_id, split, fold, age`, as `predictions.csv`.
    """
    pool = ("train", "val") if has_folds(predictions) else ("train",)
    rows = predictions[predictions["split"].isin(pool)]
    return float(rows.groupby("subject_id")["age"].mean().mean())


def metrics_by_split(predictions: pd.DataFrame, variant: str) -> pd.DataFrame:
    """The first figures of a run, a row a split, as text with 95 % subject-bootstrap intervals.

    Parameters
    ----------
    predictions : DataFrame
        As `predictions.csv`; may be empty.
    variant : str
        Which rows count: the headline of the run's `settings.json`.
    """
    titles = {"mae": "MAE [years]", "mean_predictor_mae": "mean predictor's MAE [years]", "r": "r"}
    rows = {}
    headline = predictions[predictions["variant"] == variant] if len(predictions) else predictions
    for split in [
        name for name in ("train", "val", "test") if len(headline) and (headline["split"] == name).any()
    ]:
        part = headline[headline["split"] == split]
        figures = regression_metrics(
            part["age"],
            part["predicted_age"],
            part["subject_id"],
            reference_age=mean_training_age(predictions),
        )
        rows[split] = {"scans": len(part)} | {
            title: with_interval(figures[key]) for key, title in titles.items()
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("split")


def metrics_by_group(
    predictions: pd.DataFrame,
    by: str,
    *,
    reference_age: float | None = None,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """The same figures within groups of scans: a row a group.

    Parameters
    ----------
    predictions : DataFrame
        Columns `age`, `predicted_age`, `subject_id` and, unless it is `age_bin`, the column `by`. Empty group
        names are left out.
    by : str
        `age_bin` (decades of true age), `sex`, `site`, `diagnosis` or any other column.
    reference_age, n_bootstrap, seed
        As in `regression_metrics`.

    Returns
    -------
    DataFrame
        Columns `by`, `group`, `n`, `n_subjects`, and for each metric `<metric>`, `<metric>_low`,
        `<metric>_high`.
    """
    groups = age_bins(predictions["age"]) if by == "age_bin" else predictions[by].fillna("").astype(str)
    rows = []
    for name, part in predictions.groupby(groups.to_numpy(), sort=True):
        if name == "":
            continue
        figures = regression_metrics(
            part["age"].to_numpy(),
            part["predicted_age"].to_numpy(),
            part["subject_id"].to_numpy(),
            reference_age=reference_age,
            n_bootstrap=n_bootstrap,
            seed=seed,
        )
        rows.append({"by": by, "group": name} | flat(figures))
    return pd.DataFrame(rows)


def paired_difference(
    age: np.ndarray,
    predicted_a: np.ndarray,
    predicted_b: np.ndarray,
    subject_id: np.ndarray | None = None,
    *,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """MAE of model A minus MAE of model B on the same scans, in years; the subjects are drawn for both at
    once.

    Parameters
    ----------
    age, predicted_a, predicted_b : array (n,)
        Years; entry i of all three is the same scan.
    subject_id, n_bootstrap, seed
        As in `regression_metrics`.

    Returns
    -------
    dict
        `value`, `low`, `high` (95 %) in years, negative where A is nearer, and `n`, `n_subjects`.
    """
    age, predicted_a = _checked(age, predicted_a)
    age, predicted_b = _checked(age, predicted_b)
    subjects = subject_codes(subject_id, len(age))
    difference = np.abs(predicted_a - age) - np.abs(predicted_b - age)
    return mean_with_interval(difference, subjects, n_bootstrap=n_bootstrap, seed=seed)


def mean_with_interval(
    values: np.ndarray, subject_id: np.ndarray | None = None, *, n_bootstrap: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Mean of one value a scan with its 95 % subject bootstrap interval."""
    values = np.asarray(values, dtype=float)
    subjects = subject_codes(subject_id, len(values))
    sums = bootstrap_sums(np.column_stack([np.ones(len(values)), values]), subjects, n_bootstrap, seed)
    counts = {"n": len(values), "n_subjects": int(subjects.max()) + 1}
    return value_with_interval(values.mean(), sums[:, 1] / sums[:, 0]) | counts


def correlation_with_interval(
    x: np.ndarray,
    y: np.ndarray,
    subject_id: np.ndarray | None = None,
    *,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Pearson r of x and y and slope of y on x, each with a 95 % subject bootstrap interval."""
    figures = regression_metrics(x, y, subject_id, n_bootstrap=n_bootstrap, seed=seed)
    return {"r": figures["r"], "slope": figures["slope"]}


def age_bins(age: pd.Series | np.ndarray, width: int = 10) -> pd.Series:
    """Name of the age bin of each age, as `20-29`; `width` in years."""
    start = (np.floor(np.asarray(age, dtype=float) / width) * width).astype(int)
    return pd.Series([f"{low:02d}-{low + width - 1:02d}" for low in start])


def flat(figures: dict[str, int | dict[str, float]]) -> dict[str, float]:
    """{"mae": {"value", "low", "high"}} as {"mae", "mae_low", "mae_high"}: one row of a table."""
    row = {}
    for name, figure in figures.items():
        if isinstance(figure, dict):
            row |= {name: figure["value"], f"{name}_low": figure["low"], f"{name}_high": figure["high"]}
        else:
            row[name] = figure
    return row


def with_interval(figure: dict[str, float], digits: int = 2) -> str:
    """`7.10 [6.20, 8.00]`, or the bare value where there is no interval, or `not defined`."""
    value, low, high = (
        np.nan if figure.get(key) is None else figure[key] for key in ("value", "low", "high")
    )
    if not np.isfinite(value):
        return "not defined"
    value, low, high = (
        round(number, digits) + 0.0 for number in (value, low, high)
    )  # + 0.0 turns -0.00 into 0.00
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _moment_columns(age: np.ndarray, predicted: np.ndarray, reference_age: float | None) -> np.ndarray:
    gap = predicted - age
    # Centred on the sample: second moments of raw ages would lose digits to their means.
    a, p = age - age.mean(), predicted - predicted.mean()
    away = np.full(len(age), np.nan) if reference_age is None else np.abs(reference_age - age)
    return np.column_stack([np.ones(len(age)), np.abs(gap), gap**2, gap, a, p, a * a, p * p, a * p, away])


def _figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics of each row of moment sums (draws, 10)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        _, mae, mse, gap, a, p, aa, pp, ap, away = (sums / sums[:, :1]).T
        var_a, var_p, cov = aa - a * a, pp - p * p, ap - a * p
        # Rounding leaves about 1e-16 of a zero variance: that is "no variance", not a tiny one.
        var_a = np.where(var_a > 1e-12, var_a, np.nan)
        var_p = np.where(var_p > 1e-12, var_p, np.nan)
        var_gap = mse - gap * gap
        var_gap = np.where(var_gap > 1e-12, var_gap, np.nan)
        return {
            "mae": mae,
            "rmse": np.sqrt(mse),
            "r": cov / np.sqrt(var_a * var_p),
            "r2": 1 - mse / var_a,
            "slope": cov / var_a,
            "gap_age_r": (cov - var_a) / np.sqrt(var_gap * var_a),
            "mean_gap": gap,
            "mean_predictor_mae": away,
        }


def _checked(age: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    age, predicted = np.asarray(age, dtype=float), np.asarray(predicted, dtype=float)
    if age.ndim != 1 or age.shape != predicted.shape:
        # (n, 1) against (n,) would broadcast to (n, n) and give a plausible, wrong number.
        raise ValueError(
            f"age {age.shape} and predicted {predicted.shape} must be one-dimensional and equally long; "
            "flatten (n, 1) predictions first."
        )
    if not len(age):
        raise ValueError("No scans to evaluate: age and predicted are empty.")
    if not (np.isfinite(age).all() and np.isfinite(predicted).all()):
        bad = int((~np.isfinite(age) | ~np.isfinite(predicted)).sum())
        raise ValueError(
            f"{bad} of {len(age)} scans have no finite age or prediction; drop or mend them first."
        )
    return age, predicted


def text_of(row: dict[str, Any], key: str) -> str:
    return with_interval({"value": row[key], "low": row[f"{key}_low"], "high": row[f"{key}_high"]})
