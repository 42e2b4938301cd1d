"""Resampling of subjects, vectorised: what every interval of a metric comes from. Knows no metric."""

from __future__ import annotations

from collections.abc import Iterator

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
