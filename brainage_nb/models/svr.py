"""Linear support vector regression on many features and few scans, with an honest inner cross-validation.

Arrays in, arrays out: it knows no volumes and no files. Whoever calls passes training rows only.

How the predictions of several regressors become one: rules, and weights learned on training subjects only.

Used by late fusion, one regressor a triplet position. Learns from out-of-fold predictions; fits no regressor.

Early and late fusion of triplet features into an age, fitted on the rows given and on nothing else.

Which rows may train is decided in `run`; files are read and written in `cache` and `vgg_svr`.

The VGG16 + SVR model as it is kept and used: volumes to ages, saved as plain arrays and JSON, no pickle.

Fits nothing (`vgg.fusion`), chooses no rows (`vgg.run`).

One run of the VGG16 + SVR baseline: who trains, who is predicted by what, and the files it leaves.

The only place here that sees splits and test rows. It fits through `fusion` and hands it training rows alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import nnls
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from brainage_nb.evaluation.metrics import mean_training_age, regression_metrics
from brainage_nb.models.vgg16 import (
    IMAGENET,
    SLICES,
    FeatureCache,
    FeatureSettings,
    Vgg16Features,
    WeightsError,
    at_position,
    mean_over_triplets,
    present,
    save_features,
    saved_features,
    vgg16_features,
    volume_features,
)
from brainage_nb.workspace import read_csv, read_json, write_csv, write_json, writing

INNER_FOLDS = 5
# A feature's standard deviation counts as at least this share of the root mean square over all features.
# Behind a ReLU some features are active in one or two scans only; divided by their tiny deviation, such a
# feature of a new scan throws its prediction off by decades.
SCALE_FLOOR = 0.3


class Choice(NamedTuple):
    """Hyper-parameters of an SVR. Both are in years, since ages are not scaled: C bounds a scan's pull on the
    fit (the kernel's mean diagonal is 1), and an error below epsilon costs nothing."""

    C: float
    epsilon: float


PUBLISHED = Choice(98.0, 0.064)
GRID = tuple(
    Choice(c, epsilon)
    for c in (0.1, 1.0, 10.0, PUBLISHED.C, 1000.0)
    for epsilon in (PUBLISHED.epsilon, 1.0, 3.0)
)


@dataclass(frozen=True)
class LinearSvr:
    """A fitted SVR with linear kernel, as one weight a standardised feature (support vectors are not kept).

    Attributes
    ----------
    mean, scale : float32 arrays (features,)
        Of the training rows, from `standardisation`.
    weight : float32 array (features,)
        Years a standard deviation of the feature.
    intercept : float
        Years; the prediction at the training rows' mean.
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    intercept: float

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, features) to ages in years (n,); NaN for a NaN row."""
        return self.contribution(features) + self.intercept

    def contribution(self, features: np.ndarray) -> np.ndarray:
        """Years by which (n, features) move the prediction away from the intercept: (n,)."""
        return ((features - self.mean) / self.scale @ self.weight).astype(np.float64)


def fit_svr(features: np.ndarray, age: np.ndarray, choice: Choice) -> LinearSvr:
    """Standardise, scale the linear kernel to a mean diagonal of 1, fit.

    Parameters
    ----------
    features : float32 array (n, features)
        Training rows only.
    age : array (n,)
        Years.
    """
    mean, scale = standardisation(features)
    rows = (features - mean) / scale
    kernel, unit = scaled_kernel(rows)
    svr = SVR(kernel="precomputed", C=choice.C, epsilon=choice.epsilon).fit(kernel, age)
    dual = np.zeros(len(rows), dtype=np.float64)
    dual[svr.support_] = svr.dual_coef_[0]
    weight = ((dual / unit) @ rows).astype(np.float32)
    return LinearSvr(mean, scale, weight, intercept=float(svr.intercept_[0]))


def standardisation(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale of each feature over (training) rows, float32: the standard deviation, with a floor."""
    scaler = StandardScaler().fit(features)
    floor = SCALE_FLOOR * np.sqrt(scaler.var_.mean())
    scale = np.maximum(np.sqrt(scaler.var_), floor if floor > 0 else 1.0)
    return scaler.mean_.astype(np.float32), scale.astype(np.float32)


def scaled_kernel(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Linear kernel (n, n) divided by its mean diagonal, and that divisor.

    Without it the kernel of 25,088 standardised features has a diagonal near 25,088, every C from 0.01 to
    1000 gives the same fit, and the grid chooses nothing.
    """
    kernel = rows @ rows.T
    unit = float(kernel.diagonal().mean())
    if unit <= 0:
        raise ValueError(
            "All features are constant over the training scans: nothing can be learned from them."
        )
    return kernel / unit, unit


def inner_folds(subject_id: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers (train, held out) of the inner cross-validation; a subject's scans stay together.

    Raises
    ------
    ValueError
        Fewer than five subjects.
    """
    subjects = np.asarray(subject_id, dtype=str)
    n_subjects = len(np.unique(subjects))
    if n_subjects < INNER_FOLDS:
        raise ValueError(
            f"{n_subjects} training subjects with features; expected at least {INNER_FOLDS}, since the "
            "settings are chosen by cross-validation over them. Add subjects, or see why scans were left out."
        )
    return GroupKFold(INNER_FOLDS).split(subjects, groups=subjects)


def out_of_fold(
    features: np.ndarray, age: np.ndarray, subject_id: Sequence[str], grid: Sequence[Choice] = GRID
) -> np.ndarray:
    """Inner cross-validated predictions in years for every choice: (choices, n).

    The scaler, the kernel's unit and the SVR are learned anew in every fold. A NaN row (a scan without these
    features) takes no part and stays NaN.
    """
    predicted = np.full((len(grid), len(age)), np.nan)
    usable = np.isfinite(features[:, 0])
    for train, held_out in inner_folds(subject_id):
        train, held_out = train[usable[train]], held_out[usable[held_out]]
        if not len(held_out):
            continue
        mean, scale = standardisation(features[train])
        rows = (features[train] - mean) / scale
        kernel, unit = scaled_kernel(rows)
        kernel_held_out = (features[held_out] - mean) / scale @ rows.T / unit
        for row, choice in zip(predicted, grid, strict=True):
            svr = SVR(kernel="precomputed", C=choice.C, epsilon=choice.epsilon).fit(kernel, age[train])
            row[held_out] = svr.predict(kernel_held_out)
    return predicted


def score_grid(predicted: np.ndarray, age: np.ndarray, grid: Sequence[Choice] = GRID) -> pd.DataFrame:
    """Inner cross-validated MAE in years, a row a choice: `C, epsilon, mae`. `predicted` is (choices, n) or
    (choices, n, positions)."""
    target = age if predicted.ndim == 2 else age[:, None]
    mae = np.nanmean(np.abs(predicted - target).reshape(len(grid), -1), axis=1)
    return pd.DataFrame(grid, columns=["C", "epsilon"]).assign(mae=mae)


def best_choice(scores: pd.DataFrame) -> int:
    """Row number of the lowest MAE; among equals (to 0.001 years) the first, which has the smallest C."""
    return int(np.flatnonzero(scores["mae"] <= scores["mae"].min() + 1e-3)[0])


LINEAR_RULES = ("inverse_error", "nnls")
RULES = (*LINEAR_RULES, "median")
DEFAULT_RULE = "nnls"
# Neighbouring positions say nearly the same, so plain least squares gives all weight to a few, by luck.
# A pull towards equal weights, as strong as this many typical scans, keeps them together where data are few.
EQUAL_SCANS = 10


@dataclass(frozen=True)
class Fusion:
    """age = centre + slope * (weighted mean of (prediction - centre) over the regressors that have one).

    Attributes
    ----------
    rule : str
    centre : float
        Mean age of the training scans, years.
    slope : float
        Above 1 where the regressors all pull towards the mean, as SVRs with little to go by do.
    weights : float array (regressors,)
        Not negative, summing to 1. A regressor without a prediction is left out and the others' weights are
        scaled up to 1 again.
    """

    rule: str
    centre: float
    slope: float
    weights: np.ndarray

    def combine(self, predicted: np.ndarray) -> np.ndarray:
        """(n, regressors) in years, NaN where there is none, to (n,); NaN where none with weight is left."""
        contributions = self.contributions(predicted)
        lost = np.isnan(contributions).all(axis=1)
        return np.where(lost, np.nan, self.centre + np.nansum(contributions, axis=1))

    def contributions(self, predicted: np.ndarray) -> np.ndarray:
        """Years by which each regressor moves the result away from the centre: (n, regressors), NaN kept."""
        weights = np.where(np.isfinite(predicted), self.weights, 0.0)
        total = weights.sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            return self.slope * (weights / np.where(total > 0, total, np.nan)) * (predicted - self.centre)


def learn_fusion(predicted: np.ndarray, age: np.ndarray, rule: str = DEFAULT_RULE) -> Fusion:
    """Learn the weights from out-of-fold predictions.

    Parameters
    ----------
    predicted : array (n, regressors)
        Out-of-fold predictions of training scans, years; NaN where a regressor has none.
    age : array (n,)
        Their ages, years.
    rule : {"inverse_error", "nnls"}
        Weights proportional to 1 / MAE^2 and one least-squares slope for their mean; or non-negative least
        squares of the ages on all predictions, pulled towards equal weights. Both work on differences from
        the mean age.
    """
    centre = float(np.mean(age))
    deviation = predicted - centre
    # A missing cell takes the mean of the same scan's others: it neither favours nor punishes its regressor.
    deviation = np.where(np.isnan(deviation), np.nanmean(deviation, axis=1, keepdims=True), deviation)
    if rule == "inverse_error":
        weights = np.nanmean(np.abs(predicted - age[:, None]), axis=0) ** -2.0
        weights *= _slope(deviation @ weights, age - centre)
    elif rule == "nnls":
        weights = _nnls(deviation, age - centre)
    else:
        raise ValueError(f"rule = {rule!r}: expected one of {', '.join(LINEAR_RULES)}.")
    slope = float(weights.sum())
    if slope <= 0:  # no regressor knows anything about age: everyone gets the mean
        return Fusion(rule, centre, 0.0, np.full(len(weights), 1 / len(weights)))
    return Fusion(rule, centre, slope, weights / slope)


def _nnls(deviation: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Non-negative least squares with a ridge penalty on the weights' differences from their own mean."""
    n_regressors = deviation.shape[1]
    strength = np.sqrt(EQUAL_SCANS * (deviation**2).mean())
    penalty = strength * (np.eye(n_regressors) - 1 / n_regressors)
    weights, _ = nnls(np.vstack([deviation, penalty]), np.concatenate([target, np.zeros(n_regressors)]))
    return weights


def _slope(deviation: np.ndarray, target: np.ndarray) -> float:
    """Least-squares slope through the origin, 0 where it would be negative."""
    return max(0.0, float(deviation @ target) / max(float(deviation @ deviation), 1e-12))


def compare_rules(predicted: np.ndarray, age: np.ndarray, subject_id: Sequence[str]) -> pd.DataFrame:
    """Cross-validated MAE (years) of every rule over training subjects: `rule, mae, default`.

    The weights are learned on some subjects' out-of-fold predictions and scored on the others', so that a
    rule with many weights gains nothing by fitting its own noise.
    """
    combined = {rule: np.full(len(age), np.nan) for rule in RULES}
    for train, held_out in inner_folds(subject_id):
        for rule in LINEAR_RULES:
            fusion = learn_fusion(predicted[train], age[train], rule)
            combined[rule][held_out] = fusion.combine(predicted[held_out])
        centre, median = age[train].mean(), np.nanmedian(predicted, axis=1)
        slope = _slope(median[train] - centre, age[train] - centre)
        combined["median"][held_out] = centre + slope * (median[held_out] - centre)
    mae = [np.nanmean(np.abs(combined[rule] - age)) for rule in RULES]
    return pd.DataFrame({"rule": RULES, "mae": mae, "default": [rule == DEFAULT_RULE for rule in RULES]})


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


ARRAYS, FACTS, NETWORK = "vgg_svr.safetensors", "vgg_svr.json", "vgg16_features.safetensors"


@dataclass
class VggSvr:
    """Both fusions with the network they read, from volumes to ages.

    Parameters
    ----------
    early, late : EarlyFusion, LateFusion
    network : Vgg16Features
    settings : FeatureSettings
    spacing_mm : float
        Of the volumes it was fitted to.
    variant : {"early", "late"}
        The headline: the lower inner cross-validated MAE on training subjects.
    facts : dict
        What was said of it when it was fitted; not used for predicting.
    """

    early: EarlyFusion
    late: LateFusion
    network: Vgg16Features
    settings: FeatureSettings
    spacing_mm: float
    variant: str
    facts: dict[str, Any] = field(default_factory=dict, repr=False)

    def fusion(self, variant: str = "") -> EarlyFusion | LateFusion:
        """The named fusion; the headline one where no name is given."""
        known = {EARLY: self.early, LATE: self.late}
        if (variant or self.variant) not in known:
            raise ValueError(f"variant = {variant!r}: expected one of {', '.join(known)}.")
        return known[variant or self.variant]

    def features(self, volume: np.ndarray) -> np.ndarray:
        """(positions, features) of one volume (size, size, size), RAS, float16 as in a store."""
        return volume_features(volume, self.spacing_mm, self.network, self.settings)

    def predict(self, volumes: Sequence[np.ndarray], variant: str = "") -> np.ndarray:
        """Ages in years (n,) of volumes (n, size, size, size), RAS, float16 as in a store."""
        return self.fusion(variant).predict([self.features(volume) for volume in volumes])

    def contributions(self, volume: np.ndarray, variant: str = "") -> pd.DataFrame:
        """What each triplet adds to one volume's age: `position, first_slice, last_slice, years`.

        The years add up to the predicted age less the model's starting point (early: the SVR's intercept;
        late: the training scans' mean age); NaN where the volume shows no brain.
        """
        fusion = self.fusion(variant)
        first = fusion.positions * SLICES
        years = fusion.contributions(self.features(volume))
        columns = {"position": fusion.positions, "first_slice": first, "last_slice": first + SLICES - 1}
        return pd.DataFrame({**columns, "years": years})

    def save(self, folder: Path | str, *, with_network: bool = False) -> list[Path]:
        """Write arrays and JSON; `with_network` adds VGG16's convolutional weights (59 MB)."""
        from safetensors.numpy import save_file

        paths = [Path(folder) / name for name in (ARRAYS, FACTS)]
        with writing(paths[0]) as temporary:
            save_file(_arrays(self), temporary)
        write_json(_facts(self), paths[1])
        if with_network:
            paths.append(Path(folder) / NETWORK)
            with writing(paths[2]) as temporary:
                save_features(self.network, temporary)
        return paths

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> VggSvr:
        """Read what `save` wrote. Without a copy of the network in the folder, a random projection is drawn
        again and ImageNet weights are fetched.

        Raises
        ------
        WeightsError
            The network at hand is not the one this model was fitted with.
        """
        from safetensors.numpy import load_file

        facts = read_json(Path(folder) / FACTS)
        arrays = load_file(Path(folder) / ARRAYS)
        network = _network(Path(folder), facts["network"]).place(device)
        early = EarlyFusion(
            arrays["early.positions"],
            _svrs(arrays, EARLY, facts[EARLY]["intercepts"])[0],
            Choice(**facts[EARLY]["choice"]),
            facts[EARLY]["inner_mae"],
        )
        late = LateFusion(
            arrays["late.positions"],
            _svrs(arrays, LATE, facts[LATE]["intercepts"]),
            Fusion(**facts[LATE]["fusion"], weights=arrays["late.fusion"]),
            Choice(**facts[LATE]["choice"]),
            facts[LATE]["inner_mae"],
        )
        settings = FeatureSettings(**facts["settings"])
        return cls(early, late, network, settings, facts["spacing_mm"], facts["variant"], facts["facts"])


def _arrays(model: VggSvr) -> dict[str, np.ndarray]:
    arrays = {"early.positions": model.early.positions, "late.positions": model.late.positions}
    arrays["late.fusion"] = model.late.fusion.weights
    for name, svrs in ((EARLY, [model.early.svr]), (LATE, model.late.svrs)):
        for part in ("mean", "scale", "weight"):
            arrays[f"{name}.{part}"] = np.stack([getattr(svr, part) for svr in svrs])
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _facts(model: VggSvr) -> dict[str, Any]:
    described = {
        name: {
            "choice": fitted.choice._asdict(),
            "inner_mae": fitted.inner_mae,
            "intercepts": [svr.intercept for svr in svrs],
        }
        for name, fitted, svrs in (
            (EARLY, model.early, [model.early.svr]),
            (LATE, model.late, model.late.svrs),
        )
    }
    fusion = model.late.fusion
    described[LATE]["fusion"] = {"rule": fusion.rule, "centre": fusion.centre, "slope": fusion.slope}
    network = model.network
    return {
        "variant": model.variant,
        "spacing_mm": model.spacing_mm,
        "settings": asdict(model.settings),
        "network": {
            "weights": network.mode,
            "weights_sha256": network.weights_sha256,
            "pooling": network.pooling,
            "seed": network.seed,
        },
        **described,
        "facts": model.facts,
    }


def _svrs(arrays: dict[str, np.ndarray], name: str, intercepts: list[float]) -> list[LinearSvr]:
    parts = (arrays[f"{name}.{part}"] for part in ("mean", "scale", "weight"))
    return [LinearSvr(*row, intercept) for *row, intercept in zip(*parts, intercepts, strict=True)]


def _network(folder: Path, facts: dict[str, Any]) -> Vgg16Features:
    mode, pooling = facts["weights"], facts["pooling"]
    if (folder / NETWORK).exists():
        network = saved_features(folder / NETWORK, mode, pooling, facts["seed"])
    else:
        network = vgg16_features(mode, pooling=pooling, seed=facts["seed"])
    if network.weights_sha256 != facts["weights_sha256"]:
        raise WeightsError(
            f"The VGG16 weights found have hash {network.weights_sha256[:8]}…, this model was fitted with "
            f"{facts['weights_sha256'][:8]}…. Save the model again where it was fitted, "
            "with its network: `save(folder, with_network=True)`."
        )
    return network


COLUMNS = ("scan_id", "subject_id", "session_id", "split", "fold", "seed", "variant", "age", "predicted_age")
METHOD = "vgg16_svr"


@dataclass
class VggRun:
    """What a run left behind.

    Attributes
    ----------
    folder : Path
    predictions : DataFrame
        `predictions.csv`: with folds, train and validation rows are out-of-fold (`fold` >= 0).
    grid, by_position, rules : DataFrame
        Inner cross-validated MAE (years, training subjects) of hyper-parameters, positions, fusion rules.
    left_out : DataFrame
        `scan_id, split, reason`.
    settings : dict
        `settings.json`.
    reused : bool
        The run was there with equal settings, nothing was fitted.
    changed : list of str
        Where a run of that name with other settings was replaced: what differed.
    """

    folder: Path
    predictions: pd.DataFrame
    grid: pd.DataFrame
    by_position: pd.DataFrame
    rules: pd.DataFrame
    left_out: pd.DataFrame
    settings: dict[str, Any]
    reused: bool
    changed: list[str]

    def summary(self) -> pd.DataFrame:
        """What was chosen on training subjects, a column a fusion."""
        rows = {
            name: {**self.settings[name], "headline": name == self.settings["variant"]}
            for name in (EARLY, LATE)
        }
        return pd.DataFrame(rows).fillna("")

    @property
    def reference_age(self) -> float:
        """What the mean predictor says for everybody, years."""
        return mean_training_age(self.predictions)

    def accuracy(self, split: str = "test", *, n_bootstrap: int = 2000) -> dict[str, dict[str, Any]]:
        """`regression_metrics` of both fusions on one split; the mean predictor says the training mean."""
        rows = self.predictions[self.predictions["split"] == split]
        known = {"reference_age": self.reference_age, "n_bootstrap": n_bootstrap}
        return {
            variant: regression_metrics(part["age"], part["predicted_age"], part["subject_id"], **known)
            for variant, part in rows.groupby("variant")
        }


def train_vgg_svr(
    cache: FeatureCache,
    splits: pd.DataFrame,
    run_folder: Path | str,
    network: Vgg16Features,
    *,
    failed: pd.DataFrame | None = None,
) -> VggRun:
    """Fit both fusions on training subjects, predict every scan, write the run.

    Without folds: fitted on `train`, all rows with `fold` -1. With folds: a fit a fold over train and
    validation gives their out-of-fold rows, and a last fit on all of them gives the test rows. Test ages (and
    validation ages without folds) are copied into the table and used for nothing else.

    Parameters
    ----------
    cache : FeatureCache
        From `extract_features`.
    splits : DataFrame
        `splits.csv`.
    run_folder : path
        `ws.run("vgg16_svr")`; gets settings.json, predictions.csv, grid.csv, positions.csv, rules.csv,
        left_out.csv and model/.
    network : Vgg16Features
        The one the features were extracted with.
    failed : DataFrame, optional
        `scan_id, reason` of the extraction, to be repeated in `left_out`.
    """
    folder = Path(run_folder)
    inputs = _inputs(cache, splits, network)
    before = read_json(folder / "settings.json") if (folder / "settings.json").exists() else {}
    if before.get("inputs") == inputs:
        return _read(folder, before)
    if network.weights_sha256 != cache.facts["weights_sha256"]:
        raise ValueError(
            "The features come from other weights than this network's: extract them again with it."
        )
    known = np.array([cache.has(scan_id) for scan_id in splits["scan_id"]], dtype=bool)
    scans = splits[known].reset_index(drop=True)
    early, late, rows = _fit_and_predict(cache, scans, network.seed)
    lost = rows["predicted_age"].isna()
    left_out = _left_out(splits[~known], failed, rows[lost])
    variant = EARLY if early.inner_mae <= late.inner_mae else LATE
    settings = _settings(cache, network, variant, early, late, inputs)
    settings["n_scans"] = {name: int(n) for name, n in scans["split"].value_counts().items()}
    settings["n_left_out"] = int(left_out["scan_id"].nunique())
    model = VggSvr(early, late, network, cache.settings, cache.facts["spacing_mm"], variant, settings)
    grid = pd.concat([early.grid.assign(variant=EARLY), late.grid.assign(variant=LATE)])
    run = VggRun(folder, rows[~lost], grid, late.by_position, late.rules, left_out, settings, False, [])
    run.changed = _differences(before.get("inputs", {}), inputs)
    _write(run, model)
    return run


def _fit_and_predict(
    cache: FeatureCache, scans: pd.DataFrame, seed: int
) -> tuple[EarlyFusion, LateFusion, pd.DataFrame]:
    folds = sorted(fold for fold in scans["fold"].unique() if fold >= 0)
    learning = scans["split"].isin(["train", "val"]) if folds else scans["split"] == "train"
    early, late = _fit(cache, scans[learning])
    parts = []
    for fold in folds:
        held_out = scans["fold"] == fold
        parts.append(_predict(cache, scans[held_out], *_fit(cache, scans[learning & ~held_out])))
    rest = scans[~learning] if folds else scans
    parts.append(_predict(cache, rest.assign(fold=-1), early, late))
    return early, late, pd.concat(parts, ignore_index=True).assign(seed=seed)[list(COLUMNS)]


def _fit(cache: FeatureCache, training: pd.DataFrame) -> tuple[EarlyFusion, LateFusion]:
    rows = [cache.rows(scan_id) for scan_id in training["scan_id"]]
    age, subject_id = training["age"].to_numpy(dtype=np.float64), training["subject_id"].to_numpy()
    return fit_early(rows, age, subject_id), fit_late(rows, age, subject_id)


def _predict(cache: FeatureCache, scans: pd.DataFrame, early: EarlyFusion, late: LateFusion) -> pd.DataFrame:
    if scans.empty:
        return pd.DataFrame(columns=[*scans.columns, "variant", "predicted_age"])
    rows = [cache.rows(scan_id) for scan_id in scans["scan_id"]]
    return pd.concat(
        [
            scans.assign(variant=variant, predicted_age=model.predict(rows))
            for variant, model in ((EARLY, early), (LATE, late))
        ]
    )


def _left_out(absent: pd.DataFrame, failed: pd.DataFrame | None, lost: pd.DataFrame) -> pd.DataFrame:
    reasons = {} if failed is None else dict(zip(failed["scan_id"], failed["reason"], strict=True))
    reason = absent["scan_id"].map(reasons).fillna("no features: run the extraction for this scan")
    absent = absent.assign(reason=reason)
    lost = lost.assign(reason=lost["variant"] + ": none of the triplets the model uses shows brain")
    return pd.concat([absent, lost])[["scan_id", "split", "reason"]].reset_index(drop=True)


def _inputs(cache: FeatureCache, splits: pd.DataFrame, network: Vgg16Features) -> dict[str, Any]:
    """What decides a run's outcome; equal inputs need no second fit."""
    used = splits[["scan_id", "subject_id", "age", "split", "fold"]].sort_values("scan_id")
    known = [scan_id + cache.volume_sha256[scan_id] for scan_id in used["scan_id"] if cache.has(scan_id)]
    return {
        "features": cache.facts["fingerprint"],
        "volumes": hashlib.sha256("\n".join(known).encode()).hexdigest()[:12],
        "splits": hashlib.sha256(used.to_csv(index=False).encode()).hexdigest()[:12],
        "grid": [list(choice) for choice in GRID],
        "seed": network.seed,
    }


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {before[name]} -> {now[name]}"
        for name in now
        if name in before and before[name] != now[name]
    ]


def _settings(
    cache: FeatureCache,
    network: Vgg16Features,
    variant: str,
    early: EarlyFusion,
    late: LateFusion,
    inputs: dict[str, Any],
) -> dict[str, Any]:
    return {
        "method": METHOD,
        "title": network.title,
        "variant": variant,
        "variant_chosen_by": "inner cross-validation on training subjects",
        "fingerprint": cache.facts["volumes"],
        "weights": network.mode,
        "weights_sha256": network.weights_sha256,
        "features": cache.facts,
        EARLY: {
            **early.choice._asdict(),
            "inner_cv_mae_years": early.inner_mae,
            "n_triplets": len(early.positions),
        },
        LATE: {
            **late.choice._asdict(),
            "inner_cv_mae_years": late.inner_mae,
            "n_triplets": len(late.positions),
            "rule": late.fusion.rule,
            "slope": late.fusion.slope,
        },
        "inputs": inputs,
    }


def _write(run: VggRun, model: VggSvr) -> None:
    """Tables and model first, settings.json last: it is the sign that the rest is whole."""
    (run.folder / "settings.json").unlink(missing_ok=True)
    # A drawn network can be drawn again; ImageNet's weights go along, so that predicting needs no internet.
    model.save(run.folder / "model", with_network=model.network.mode == IMAGENET)
    for name in ("predictions", "grid", "positions", "rules", "left_out"):
        write_csv(_tables(run)[name], run.folder / f"{name}.csv")
    write_json(run.settings, run.folder / "settings.json")


def _tables(run: VggRun) -> dict[str, pd.DataFrame]:
    return {
        "predictions": run.predictions,
        "grid": run.grid,
        "positions": run.by_position,
        "rules": run.rules,
        "left_out": run.left_out,
    }


def _read(folder: Path, settings: dict[str, Any]) -> VggRun:
    names = ("predictions", "grid", "positions", "rules", "left_out")
    return VggRun(folder, *(read_csv(folder / f"{name}.csv") for name in names), settings, True, [])
