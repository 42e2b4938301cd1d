"""Early and late fusion of triplet features into an age, fitted on the rows given and on nothing else.

Which rows may train is decided in `run`; files are read and written in `cache` and `vgg_svr`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from brainage_nb.models.vgg.features import SLICES, at_position, mean_over_triplets, present
from brainage_nb.models.vgg.fusion_rules import DEFAULT_RULE, Fusion, compare_rules, learn_fusion
from brainage_nb.models.vgg.linear_svr import (
    GRID,
    Choice,
    LinearSvr,
    best_choice,
    fit_svr,
    out_of_fold,
    score_grid,
)

EARLY, LATE = "early", "late"
MIN_SHARE = 0.5  # a position is used where at least this share of the training scans shows brain


@dataclass(frozen=True)
class EarlyFusion:
    """Mean over the triplets, then one SVR.

    Attributes
    ----------
    positions : int array
        Triplets in use.
    svr : LinearSvr
    choice : Choice
        C and epsilon chosen by inner cross-validation.
    inner_mae : float
        Their inner cross-validated MAE over the training scans, years.
    grid : DataFrame
        `C, epsilon, mae` of every choice tried; empty in a loaded model.
    """

    positions: np.ndarray
    svr: LinearSvr
    choice: Choice
    inner_mae: float
    grid: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)

    def predict(self, scans: Sequence[np.ndarray]) -> np.ndarray:
        """Ages in years of scans given as (positions, features); NaN for one without usable triplet."""
        return self.svr.predict(mean_over_triplets(scans, self.positions))

    def contributions(self, rows: np.ndarray) -> np.ndarray:
        """Years each triplet in use moves this scan's age from the intercept: (triplets,), NaN: no brain."""
        each = self.svr.contribution(rows[self.positions].astype(np.float32))
        return each / np.isfinite(each).sum()


@dataclass(frozen=True)
class LateFusion:
    """One SVR a triplet position, their ages combined by learned weights.

    Attributes
    ----------
    positions : int array
        Triplets in use; `svrs` and `fusion.weights` are in their order.
    svrs : list of LinearSvr
    fusion : Fusion
    choice : Choice
        C and epsilon, one pair for all positions: the lowest inner cross-validated MAE over all of them.
    inner_mae : float
        Of the combined age, weights learned and scored on different training subjects, years.
    grid, by_position, rules : DataFrame
        Inner cross-validated MAE of every choice, position and fusion rule; empty in a loaded model.
    """

    positions: np.ndarray
    svrs: list[LinearSvr] = field(repr=False)
    fusion: Fusion
    choice: Choice
    inner_mae: float
    grid: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    by_position: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    rules: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)

    def predict(self, scans: Sequence[np.ndarray]) -> np.ndarray:
        """Ages in years of scans given as (positions, features); NaN for one without usable triplet."""
        return self.fusion.combine(self._each(scans))

    def contributions(self, rows: np.ndarray) -> np.ndarray:
        """Years each triplet in use moves this scan's age from the centre: (triplets,), NaN for no brain."""
        return self.fusion.contributions(self._each([rows]))[0]

    def _each(self, scans: Sequence[np.ndarray]) -> np.ndarray:
        columns = zip(self.svrs, self.positions, strict=True)
        return np.stack([svr.predict(at_position(scans, position)) for svr, position in columns], axis=1)


# --- fitting --------------------------------------------------------------------------------------------


def positions_in_use(scans: Sequence[np.ndarray]) -> np.ndarray:
    """Triplet positions at which at least half of these (training) scans show brain."""
    positions = np.flatnonzero(present(scans).mean(axis=0) >= MIN_SHARE)
    if not len(positions):
        raise ValueError(
            "No triplet position shows brain in half of the training scans: look at the volumes."
        )
    return positions


def fit_early(
    scans: Sequence[np.ndarray], age: np.ndarray, subject_id: Sequence[str], grid: Sequence[Choice] = GRID
) -> EarlyFusion:
    """Choose C and epsilon by inner cross-validation grouped by subject, then fit on all rows.

    Parameters
    ----------
    scans : sequence of arrays (positions, features)
        Training scans only, as `FeatureCache.rows` gives them.
    age : array (n,)
        Years.
    subject_id : sequence of str
        A person's scans never part in the inner cross-validation.
    grid : sequence of Choice
        Default: 15 pairs, the published one among them.
    """
    positions = positions_in_use(scans)
    features = mean_over_triplets(scans, positions)
    usable = np.isfinite(features[:, 0])
    scores = score_grid(out_of_fold(features, age, subject_id, grid), age, grid)
    best = best_choice(scores)
    svr = fit_svr(features[usable], age[usable], grid[best])
    return EarlyFusion(positions, svr, grid[best], float(scores["mae"][best]), scores)


def fit_late(
    scans: Sequence[np.ndarray], age: np.ndarray, subject_id: Sequence[str], grid: Sequence[Choice] = GRID
) -> LateFusion:
    """One SVR a position and the weights that combine them, all from these rows.

    The weights come from inner out-of-fold predictions, so no SVR is judged on a scan it was fitted to.
    Parameters as in `fit_early`.
    """
    from tqdm import tqdm

    positions = positions_in_use(scans)
    predicted = np.empty((len(grid), len(age), len(positions)))
    for column, position in enumerate(tqdm(positions, desc="late fusion", unit="position", leave=False)):
        predicted[:, :, column] = out_of_fold(at_position(scans, position), age, subject_id, grid)
    scores = score_grid(predicted, age, grid)
    best = best_choice(scores)
    predicted = predicted[best]
    some = np.isfinite(predicted).any(axis=1)
    rules = compare_rules(predicted[some], age[some], np.asarray(subject_id)[some])
    fusion = learn_fusion(predicted[some], age[some])
    by_position = pd.DataFrame(
        {
            "position": positions,
            "first_slice": positions * SLICES,
            "n_scans": np.isfinite(predicted).sum(axis=0),
            "mae": np.nanmean(np.abs(predicted - age[:, None]), axis=0),
            "weight": fusion.weights,
        }
    )
    svrs = [_fit_position(scans, position, age, grid[best]) for position in positions]
    inner_mae = float(rules.loc[rules["rule"] == DEFAULT_RULE, "mae"].item())
    return LateFusion(positions, svrs, fusion, grid[best], inner_mae, scores, by_position, rules)


def _fit_position(scans: Sequence[np.ndarray], position: int, age: np.ndarray, choice: Choice) -> LinearSvr:
    features = at_position(scans, position)
    usable = np.isfinite(features[:, 0])
    return fit_svr(features[usable], age[usable], choice)
