"""How far predicted ages are from true ages, with intervals that count people, not scans: arrays and frames
in, numbers out. Corrects no prediction and reads no file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

_CHUNK_BYTES = 32e6  # of resampling weights held at once; keeps 10,000 subjects far below a gigabyte
METRICS = {
    "mae": "MAE [years]",
    "mean_predictor_mae": "mean predictor's MAE [years]",
    "rmse": "RMSE [years]",
    "r": "r",
    "r2": "R²",
    "slope": "slope",
    "gap_age_r": "gap-age r",
    "mean_gap": "mean gap [years]",
}
TITLES = METRICS | {  # of the columns of tables for people
    "n": "scans",
    "n_subjects": "subjects",
    "n_controls": "controls",
    "coverage": "inside [%]",
    "mean_width": "width [years]",
    "difference": "gap difference [years]",
    "adjusted": "adjusted difference [years]",
    "adjusted_for": "adjusted for",
    "rate": "rate [years a year]",
}

Metrics = dict[str, Any]  # n, n_subjects: int; each name of METRICS: {"value", "low", "high"}


def regression_metrics(
    age: np.ndarray,
    predicted: np.ndarray,
    subject_id: np.ndarray | None = None,
    *,
    reference_age: float | None = None,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> Metrics:
    """Accuracy of predicted ages with 95 % subject bootstrap intervals.

    Parameters
    ----------
    age, predicted : array (n,)
        True and predicted age in years, one value per scan.
    subject_id : array (n,), optional
        Whose scan it is; a subject's scans are drawn together. Without it every scan is its own subject.
    reference_age : float, optional
        Mean age of the *training* subjects in years: what the mean predictor says for everyone. Without it
        `mean_predictor_mae` is NaN; it is never taken from the evaluated subjects.
    n_bootstrap, seed : int
        Number of draws, and their seed.

    Returns
    -------
    dict
        `n` (scans) and `n_subjects` as int; `mae`, `rmse`, `mean_gap`, `mean_predictor_mae` in years, `r`,
        `r2`, `slope` (of predicted on true age) and `gap_age_r` (of predicted minus true age with true age)
        as {"value", "low", "high"}. NaN stands where a figure is not defined, as r is for constant
        predictions. All of them depend on the age range of the scans (de Lange et al. 2022): compare models
        on the same people only.

    Examples
    --------
    >>> round(regression_metrics([20, 40, 60], [22, 40, 58], reference_age=40)["slope"]["value"], 2)
    0.9
    """
    age, predicted = _checked(age, predicted)
    away = np.full(len(age), np.nan) if reference_age is None else np.abs(reference_age - age)
    gap, a, p = predicted - age, age - age.mean(), predicted - predicted.mean()
    # Centred on the sample: second moments of raw ages would lose digits to their means.
    columns = np.column_stack([np.ones(len(age)), np.abs(gap), gap**2, gap, a, p, a * a, p * p, a * p, away])
    sums, n_subjects = _resampled_sums(columns, subject_id, n_bootstrap, seed)
    return {"n": len(age), "n_subjects": n_subjects} | {
        name: _value_with_interval(values) for name, values in _from_sums(sums).items()
    }


def measure_rows(rows: pd.DataFrame, column: str = "predicted_age", **options: Any) -> Metrics:
    """`regression_metrics` of a frame with `age`, `subject_id` and the given column of predicted ages."""
    return regression_metrics(rows["age"], rows[column], rows["subject_id"], **options)


def metrics_by_split(predictions: pd.DataFrame, variant: str) -> pd.DataFrame:
    """The first figures of a run as text, one row per split, with 95 % subject bootstrap intervals.

    Where folds were run, train and validation subjects are one row, `out of fold`: each was predicted by the
    model of the fold that had not seen them.

    Parameters
    ----------
    predictions : DataFrame
        As `predictions.csv`; may be empty.
    variant : str
        Which rows count: the headline of the run's `settings.json`.
    """
    if not len(predictions):
        return pd.DataFrame()
    rows = predictions[predictions["variant"] == variant]
    chosen = rows.groupby(rows["split"].mask(is_out_of_fold(rows), "out of fold"))
    reference_age = mean_training_age(predictions)
    rows = {
        split: flat(measure_rows(chosen.get_group(split), reference_age=reference_age))
        for split in ("train", "val", "out of fold", "test")
        if split in chosen.groups
    }
    table = text_table(rows.values(), ("n", "mae", "mean_predictor_mae", "r"))
    return table.set_axis(list(rows)).rename_axis("split")


def metrics_by_group(predictions: pd.DataFrame, by: str, **options: Any) -> pd.DataFrame:
    """The same figures within groups of scans: one row per group.

    Parameters
    ----------
    predictions : DataFrame
        Columns `age`, `predicted_age`, `subject_id` and, unless it is `age_bin`, the column `by`. Empty group
        names are left out.
    by : str
        `age_bin` (decades of true age), `sex`, `site`, `diagnosis` or any other column.
    **options
        `reference_age, n_bootstrap, seed` of `regression_metrics`.

    Returns
    -------
    DataFrame
        Columns `by`, `group`, `n`, `n_subjects`, and for each metric `<metric>`, `<metric>_low`,
        `<metric>_high`.
    """
    groups = age_bins(predictions["age"]) if by == "age_bin" else predictions[by].fillna("").astype(str)
    parts = predictions.groupby(groups.to_numpy())
    return pd.DataFrame(
        [{"by": by, "group": name} | flat(measure_rows(part, **options)) for name, part in parts if name]
    )


def paired_difference(
    age: np.ndarray,
    predicted_a: np.ndarray,
    predicted_b: np.ndarray,
    subject_id: np.ndarray | None = None,
    **bootstrap: int,
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
    error_a, error_b = (np.abs(np.subtract(*_checked(age, one))) for one in (predicted_a, predicted_b))
    return mean_with_interval(error_a - error_b, subject_id, **bootstrap)


def mean_with_interval(
    values: np.ndarray,
    subject_id: np.ndarray | None = None,
    *,
    over: np.ndarray | float = 1.0,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Mean of one value per scan (n,), divided by the mean of `over` (n,) where given, with its 95 % subject
    bootstrap interval, and `n`, `n_subjects`."""
    columns = np.column_stack([values, np.broadcast_to(over, len(values))]).astype(float)
    sums, n_subjects = _resampled_sums(columns, subject_id, n_bootstrap, seed)
    return _value_with_interval(sums[:, 0] / sums[:, 1]) | {"n": len(columns), "n_subjects": n_subjects}


def is_out_of_fold(predictions: pd.DataFrame) -> pd.Series:
    """Of each row, whether it is of train or validation and predicted out of fold (columns `split, fold`)."""
    return (predictions["split"] != "test") & (predictions["fold"] >= 0)


def has_folds(predictions: pd.DataFrame) -> bool:
    """Whether train and validation rows are out-of-fold predictions (columns `split, fold`)."""
    return bool(is_out_of_fold(predictions).any())


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


def age_bins(age: pd.Series | np.ndarray, width: int = 10) -> pd.Series:
    """Name of the age bin of each age, as `20-29`; `width` in years."""
    start = (np.floor(np.asarray(age, dtype=float) / width) * width).astype(int)
    return pd.Series([f"{low:02d}-{low + width - 1:02d}" for low in start])


def flat(figures: Metrics) -> dict[str, float]:
    """{"mae": {"value", "low", "high"}} as {"mae", "mae_low", "mae_high"}: one row of a table."""
    row = {}
    for name, figure in figures.items():
        ends = figure if isinstance(figure, dict) else {"value": figure}
        row |= {name if end == "value" else f"{name}_{end}": number for end, number in ends.items()}
    return row


def with_interval(figure: Mapping[str, Any], digits: int = 2, key: str = "value") -> str:
    """`7.10 [6.20, 8.00]`, or the bare value where there is no interval, or `not defined`.

    Parameters
    ----------
    figure : mapping
        {"value", "low", "high"} or, with a `key`, a row of `flat` with `<key>`, `<key>_low`, `<key>_high`.

    Examples
    --------
    >>> with_interval({"value": 7.123, "low": 6.0, "high": 8.006})
    '7.12 [6.00, 8.01]'
    """
    names = (key, "low", "high") if key == "value" else (key, f"{key}_low", f"{key}_high")
    numbers = [np.nan if figure.get(name) is None else figure[name] for name in names]
    value, low, high = (round(float(number), digits) + 0.0 for number in numbers)  # -0.00 becomes 0.00
    if not np.isfinite(value):
        return "not defined"
    ends = f" [{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite([low, high]).all() else ""
    return f"{value:.{digits}f}{ends}"


def text_table(rows: Iterable[Mapping[str, Any]], names: Iterable[str], digits: int = 2) -> pd.DataFrame:
    """Rows of `flat` figures as a table for people: what has an interval as `with_interval`, the rest as is.

    Parameters
    ----------
    rows : iterable of mappings
    names : keys of the rows
        Columns, under their titles in `TITLES` where they have one.
    """

    def cell(row: Mapping[str, Any], name: str) -> Any:
        has_interval = name == "value" or f"{name}_low" in row
        return with_interval(row, digits, name) if has_interval else row[name]

    return pd.DataFrame([{TITLES.get(name, name): cell(row, name) for name in names} for row in rows])


def _resampled_sums(
    columns: np.ndarray, subject_id: np.ndarray | None, n_bootstrap: int, seed: int
) -> tuple[np.ndarray, int]:
    """Column sums (1 + n_bootstrap, k) of columns (n_scans, k): over all scans, then over each draw of
    subjects; and the number of subjects.

    Every figure here follows from sums over scans, so a draw is one row of counts (how often each subject was
    taken) times the subjects' own sums: a matrix product instead of a loop.
    """
    codes = np.arange(len(columns)) if subject_id is None else pd.factorize(np.asarray(subject_id))[0]
    if len(codes) != len(columns):
        raise ValueError(f"subject_id has {len(codes)} entries for {len(columns)} scans.")
    n = int(codes.max()) + 1
    by_subject = np.column_stack([np.bincount(codes, column) for column in columns.T])
    sums, rng, size = [by_subject.sum(axis=0)], np.random.default_rng(seed), int(_CHUNK_BYTES / (8 * n)) + 1
    for start in range(0, n_bootstrap, size):
        rows = min(size, n_bootstrap - start)
        taken = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]  # one bincount for all rows
        sums.append(
            np.bincount(taken.ravel(), minlength=rows * n).reshape(rows, n).astype(float) @ by_subject
        )
    return np.vstack(sums), n


def _value_with_interval(values: np.ndarray) -> dict[str, float]:
    """{"value", "low", "high"} of a value and its draws: 95 % percentile interval, NaN without one."""
    value, draws = float(values[0]), values[1:][np.isfinite(values[1:])]
    known = np.isfinite(value) and len(draws) > 1 and np.ptp(draws) > 0
    low, high = np.percentile(draws, [2.5, 97.5]) if known else (np.nan, np.nan)
    return {"value": value, "low": float(low), "high": float(high)}


def _from_sums(sums: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics of each row of sums (draws, 10), in the order of `METRICS`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        _, mae, mse, gap, a, p, aa, pp, ap, away = (sums / sums[:, :1]).T
        # Rounding leaves about 1e-16 of a zero variance: that is "no variance", not a tiny one.
        var_a, var_p, var_gap = (
            np.where(variance > 1e-12, variance, np.nan)
            for variance in (aa - a * a, pp - p * p, mse - gap * gap)
        )
        cov = ap - a * p
        return {
            "mae": mae,
            "mean_predictor_mae": away,
            "rmse": np.sqrt(mse),
            "r": cov / np.sqrt(var_a * var_p),
            "r2": 1 - mse / var_a,
            "slope": cov / var_a,
            "gap_age_r": (cov - var_a) / np.sqrt(var_gap * var_a),
            "mean_gap": gap,
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
    if bad := int((~np.isfinite(age + predicted)).sum()):
        raise ValueError(
            f"{bad} of {len(age)} scans have no finite age or prediction; drop or mend them first."
        )
    return age, predicted
