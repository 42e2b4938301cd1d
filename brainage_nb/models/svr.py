"""VGG16 features to ages: linear support vector regression, early and late fusion, and one run of both.

Fusions are scikit-learn estimators and see training rows only; `train_vgg_svr` alone sees splits and test
rows.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import nnls
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin
from sklearn.model_selection import GroupKFold, ParameterGrid
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from brainage_nb.cohort.splits import check_splits, deal_everybody
from brainage_nb.evaluation.metrics import mean_training_age, regression_metrics
from brainage_nb.evaluation.runs import digest_tables, find_altered
from brainage_nb.models.settings import COLUMNS, FINAL_FOLDS, load_run_table, read_run_settings
from brainage_nb.models.vgg16 import (
    SLICES,
    Features,
    FeatureSettings,
    Vgg16Features,
    WeightsError,
    empty_layers,
    volume_features,
)
from brainage_nb.workspace import read_json, write_csv, write_json, writing

INNER_FOLDS = 5
# Both are in years, since ages are not scaled: C bounds a scan's pull on the fit (the kernel's mean diagonal
# is 1), and an error below epsilon costs nothing.
PUBLISHED = {"C": 98.0, "epsilon": 0.064}
GRID = {"C": (0.1, 1.0, 10.0, PUBLISHED["C"], 1000.0), "epsilon": (PUBLISHED["epsilon"], 1.0, 3.0)}
# A feature's standard deviation counts as at least this share of the root mean square over all. Behind a ReLU
# some features are active in one or two scans only; divided by their tiny deviation, such a feature of a new
# scan throws its prediction off by decades.
LEAST_SD = 0.3
MIN_SHARE = 0.5  # a position is used where at least this share of the training scans shows brain
# Neighbouring positions say nearly the same, so plain least squares gives all weight to a few, by luck.
# A pull towards equal weights, as strong as this many typical scans, keeps them together where data are few.
EQUAL_SCANS = 10


# --- the regression of one triplet position -------------------------------------------------------------


class LinearKernel(TransformerMixin, BaseEstimator):
    """Standardised features to their linear kernel with the training rows, divided by its mean diagonal.

    Without the division the kernel of 25,088 standardised features has a diagonal near 25,088, every C from
    0.01 to 1000 gives the same fit, and a grid chooses nothing.

    Attributes
    ----------
    mean_, scale_ : float32 arrays (features,)
    rows_ : float32 array (n, features)
        The standardised training rows.
    unit_ : float
        The divisor.
    """

    def fit(self, X: np.ndarray, y: Any = None) -> LinearKernel:
        """Learn from (n, features); `ValueError` where all features are constant."""
        scaler = StandardScaler().fit(X)
        least = LEAST_SD * np.sqrt(scaler.var_.mean())
        if least == 0:
            raise ValueError("All features are constant over the training scans: nothing can be learned.")
        self.mean_ = scaler.mean_.astype(np.float32)
        self.scale_ = np.maximum(np.sqrt(scaler.var_), least).astype(np.float32)
        self.rows_ = (X - self.mean_) / self.scale_
        self.unit_ = float(np.square(self.rows_).sum(axis=1).mean())
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """(m, features) to the kernel (m, n) with the training rows."""
        return (X - self.mean_) / self.scale_ @ self.rows_.T / self.unit_


def make_svr(C: float = PUBLISHED["C"], epsilon: float = PUBLISHED["epsilon"]) -> Pipeline:
    """The regression as a scikit-learn pipeline: (n, features) to years.

    Examples
    --------
    >>> make_svr().fit(features[train], age[train]).predict(features[test])  # doctest: +SKIP
    """
    return make_pipeline(LinearKernel(), SVR(kernel="precomputed", C=C, epsilon=epsilon))


def fit_svr(features: np.ndarray, age: np.ndarray, **choice: float) -> tuple[np.ndarray, float, float]:
    """Fit `make_svr` and fold it to one weight per feature.

    Parameters
    ----------
    features : float32 array (n, features)
        Training rows; NaN rows are left out.
    age : array (n,)
        Years.
    **choice
        C and epsilon.

    Returns
    -------
    coef, intercept, centre
        Years = features @ coef + intercept; `centre` is what that is at the training rows' mean.
    """
    usable = np.isfinite(features[:, 0])
    kernel, svr = make_svr(**choice).fit(features[usable], age[usable])
    coef = svr.dual_coef_[0] @ kernel.rows_[svr.support_] / kernel.unit_ / kernel.scale_
    centre = float(svr.intercept_[0])
    return coef, centre - float(coef @ kernel.mean_), centre


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


def predict_out_of_fold(
    features: np.ndarray,
    age: np.ndarray,
    subject_id: Sequence[str],
    grid: Mapping[str, Sequence[float]] = GRID,
) -> np.ndarray:
    """Inner cross-validated predictions in years for every choice of `ParameterGrid(grid)`: (choices, n).

    What `GridSearchCV(make_svr(), …)` would fit, ten times faster: a fold's kernel serves all choices.
    A NaN row (a scan without these features) takes no part and stays NaN.
    """
    choices = ParameterGrid(grid)
    predicted = np.full((len(choices), len(age)), np.nan)
    usable = np.isfinite(features[:, 0])
    for train, held_out in inner_folds(subject_id):
        train, held_out = train[usable[train]], held_out[usable[held_out]]
        if not len(held_out):
            continue
        kernel = LinearKernel().fit(features[train])
        among, beside = kernel.transform(features[train]), kernel.transform(features[held_out])
        for row, choice in zip(predicted, choices, strict=True):
            svr = SVR(kernel="precomputed", **choice).fit(among, age[train])
            row[held_out] = svr.predict(beside)
    return predicted


# --- fusion ---------------------------------------------------------------------------------------------


def find_positions(scans: Sequence[np.ndarray]) -> np.ndarray:
    """Triplet positions at which at least half of these (training) scans show brain."""
    share = np.mean([np.isfinite(rows[:, 0]) for rows in scans], axis=0)
    if share.max() < MIN_SHARE:
        raise ValueError("No triplet shows brain in half of the training scans: look at the volumes.")
    return np.flatnonzero(share >= MIN_SHARE)


def average_triplets(scans: Sequence[np.ndarray], positions: np.ndarray) -> np.ndarray:
    """Mean over those of `positions` that show brain: float32 (scans, features); NaN where none does."""
    means = np.full((len(scans), scans[0].shape[1]), np.nan, dtype=np.float32)
    for mean, rows in zip(means, scans, strict=True):
        shown = positions[np.isfinite(rows[positions, 0])]
        if len(shown):
            mean[:] = rows[shown].mean(axis=0, dtype=np.float32)
    return means


class Weighting(NamedTuple):
    """age = centre + slope * (weighted mean of (age of a triplet - centre) over the triplets with brain).

    `weights` (triplets,) are not negative and sum to 1; without a triplet the others are scaled up to 1
    again. `slope` is above 1 where all triplets pull towards the mean, as SVRs with little to go by do.
    """

    weights: np.ndarray
    centre: float
    slope: float

    def contributions(self, ages: np.ndarray) -> np.ndarray:
        """Years by which each triplet's age (n, triplets) moves the result away from the centre; NaN kept."""
        weights = np.where(np.isfinite(ages), self.weights, 0.0)
        total = weights.sum(axis=1, keepdims=True)
        return self.slope * (weights / np.where(total > 0, total, np.nan)) * (ages - self.centre)

    def combine(self, ages: np.ndarray) -> np.ndarray:
        """(n, triplets) in years, NaN where there is none, to (n,); NaN where none with weight is left."""
        moved = self.contributions(ages)
        return np.where(np.isnan(moved).all(axis=1), np.nan, self.centre + np.nansum(moved, axis=1))


def learn_weights(ages: np.ndarray, age: np.ndarray) -> Weighting:
    """Non-negative least squares with a ridge penalty on the weights' differences from their own mean.

    Parameters
    ----------
    ages : array (n, triplets)
        Out-of-fold predictions of training scans, years; NaN where a triplet has none.
    age : array (n,)
        Their ages, years.
    """
    centre, n = float(np.mean(age)), ages.shape[1]
    deviation = ages - centre
    # A missing cell takes the mean of the same scan's others: it neither favours nor punishes its triplet.
    deviation = np.where(np.isnan(deviation), np.nanmean(deviation, axis=1, keepdims=True), deviation)
    penalty = np.sqrt(EQUAL_SCANS * (deviation**2).mean()) * (np.eye(n) - 1 / n)
    weights, _ = nnls(np.vstack([deviation, penalty]), np.concatenate([age - centre, np.zeros(n)]))
    slope = float(weights.sum())
    if slope <= 0:  # no triplet knows anything about age: everyone gets the mean
        return Weighting(np.full(n, 1 / n), centre, 0.0)
    return Weighting(weights / slope, centre, slope)


class _Fusion(RegressorMixin, BaseEstimator):
    """Features of triplets to an age; `fit`, `predict` and `contributions` of both fusions."""

    def __init__(self, grid: Mapping[str, Sequence[float]] = GRID):
        self.grid = grid

    def fit(self, X: Sequence[np.ndarray], y: np.ndarray, groups: Sequence[str]) -> _Fusion:
        """Choose C and epsilon, then fit.

        Parameters
        ----------
        X : sequence of arrays (positions, features)
            Training scans only, as `extract_features` gives them.
        y : array (n,)
            Ages, years.
        groups : sequence of str
            Subjects: a person's scans never part in the inner cross-validation.
        """
        self.positions_ = find_positions(X)
        inner = [predict_out_of_fold(rows, y, groups, self.grid) for rows in self._columns(X, "choosing")]
        errors = np.abs(np.stack(inner, axis=-1) - y[:, None])
        self.grid_ = pd.DataFrame(ParameterGrid(self.grid)).assign(mae=np.nanmean(errors, axis=(1, 2)))
        # Of choices equal to 0.001 years the first is the best: it has the smallest C.
        best = int(np.argmax(self.grid_["mae"] <= self.grid_["mae"].min() + 1e-3))
        self.choice_ = ParameterGrid(self.grid)[best]
        fitted = [fit_svr(rows, y, **self.choice_) for rows in self._columns(X, "fitting")]
        self.coef_, self.intercept_, centres = (np.stack(part) for part in zip(*fitted, strict=True))
        self._weigh(np.stack([ages[best] for ages in inner], axis=-1), y, np.asarray(groups), centres)
        return self

    def to_arrays(self) -> dict[str, Any]:
        """All that `predict` needs; `from_arrays` reads it back."""
        known = {"positions": self.positions_, "coef": self.coef_, "intercept": self.intercept_}
        return known | self.weighting_._asdict()

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> _Fusion:
        """A fitted model that predicts, from what `to_arrays` gave."""
        fusion = cls()
        fusion.positions_, fusion.coef_ = arrays["positions"], arrays["coef"]
        fusion.intercept_ = arrays["intercept"]
        centre, slope = (float(np.squeeze(arrays[key])) for key in ("centre", "slope"))
        fusion.weighting_ = Weighting(arrays["weights"], centre, slope)
        return fusion

    def predict(self, X: Sequence[np.ndarray]) -> np.ndarray:
        """Ages in years of scans, each (positions, features); NaN for one without usable triplet."""
        return self.weighting_.combine(self._predict_triplets(X))

    def contributions(self, X: Sequence[np.ndarray]) -> np.ndarray:
        """Years by which each triplet in use moves a scan's age from `weighting_.centre`: (n, triplets)."""
        return self.weighting_.contributions(self._predict_triplets(X))

    def _predict_triplets(self, X: Sequence[np.ndarray]) -> np.ndarray:
        each = [(rows[self.positions_].astype(np.float64) * self.coef_).sum(axis=1) for rows in X]
        return np.stack(each) + self.intercept_


class EarlyFusion(_Fusion):
    """Mean of the features over the triplets that show brain, then one SVR.

    The SVR is linear, so its age is also the mean of what it says of each triplet alone.

    Parameters
    ----------
    grid : dict
        Values of C and epsilon to choose from by inner cross-validation; by default 15 pairs, the published
        one among them.

    Attributes
    ----------
    positions_ : int array (triplets,)
        Triplets in use.
    coef_, intercept_ : float arrays (1, features) and (1,)
        Years = features @ coef + intercept. Late fusion has one row per triplet.
    weighting_ : Weighting
        Around the SVR's age of the training scans' mean features.
    choice_ : dict
        The C and epsilon chosen.
    inner_mae_ : float
        Inner cross-validated MAE over the training scans, years.
    grid_ : DataFrame
        `C, epsilon, mae` of every choice tried. A loaded model has neither this nor the two above.
    """

    def _columns(self, X: Sequence[np.ndarray], _stage: str) -> Iterator[np.ndarray]:
        yield average_triplets(X, self.positions_)

    def _weigh(self, ages: np.ndarray, age: np.ndarray, groups: np.ndarray, centres: np.ndarray) -> None:
        n = len(self.positions_)
        self.weighting_ = Weighting(np.full(n, 1 / n), float(centres[0]), 1.0)
        self.inner_mae_ = float(np.nanmean(np.abs(ages[:, 0] - age)))


class LateFusion(_Fusion):
    """One SVR per triplet position, their ages weighted by `learn_weights`.

    The weights come from inner out-of-fold predictions, so no SVR is judged on a scan it was fitted to. C and
    epsilon are one pair for all positions. Parameters and attributes are those of `EarlyFusion`, with
    `weighting_` around the training scans' mean age, and

    Attributes
    ----------
    by_position_ : DataFrame
        `position, first_slice, n_scans, mae, weight` of every triplet in use.
    """

    def _columns(self, X: Sequence[np.ndarray], stage: str) -> Iterator[np.ndarray]:
        from tqdm import tqdm

        for position in tqdm(self.positions_, desc=f"late fusion, {stage}", unit="position", leave=False):
            yield np.stack([rows[position] for rows in X]).astype(np.float32)

    def _weigh(self, ages: np.ndarray, age: np.ndarray, groups: np.ndarray, centres: np.ndarray) -> None:
        some = np.isfinite(ages).any(axis=1)
        self.weighting_ = learn_weights(ages[some], age[some])
        self.inner_mae_ = score_weights(ages[some], age[some], groups[some])
        self.by_position_ = pd.DataFrame({"position": self.positions_}).assign(
            first_slice=self.positions_ * SLICES,
            n_scans=np.isfinite(ages).sum(axis=0),
            mae=np.nanmean(np.abs(ages - age[:, None]), axis=0),
            weight=self.weighting_.weights,
        )


def score_weights(ages: np.ndarray, age: np.ndarray, subject_id: Sequence[str]) -> float:
    """MAE in years of weighted ages, the weights learned on some training subjects and scored on others."""
    combined = np.full(len(age), np.nan)
    for train, held_out in inner_folds(subject_id):
        combined[held_out] = learn_weights(ages[train], age[train]).combine(ages[held_out])
    return float(np.nanmean(np.abs(combined - age)))


FUSIONS = {"early": EarlyFusion, "late": LateFusion}
Fusions = dict[str, EarlyFusion | LateFusion]


# --- the model ------------------------------------------------------------------------------------------

ARRAYS, FACTS, NETWORK = "vgg_svr.safetensors", "vgg_svr.json", "vgg16_features.safetensors"


@dataclass
class VggSvr:
    """Both fusions with the network they read, from volumes to ages.

    Parameters
    ----------
    early, late : EarlyFusion, LateFusion
        Fitted.
    network : Vgg16Features
    settings : FeatureSettings
    spacing_mm : float
        Of the volumes it was fitted on.
    variant : {"early", "late"}
        Chosen on training subjects; the one that `predict` uses unless told otherwise.
    facts : dict
        What the run knows about itself, for the model card.
    """

    early: EarlyFusion
    late: LateFusion
    network: Vgg16Features
    settings: FeatureSettings
    spacing_mm: float
    variant: str
    facts: dict[str, Any]

    def fusion(self, variant: str = "") -> EarlyFusion | LateFusion:
        """One of the two by name; the chosen one without."""
        if (variant or self.variant) not in FUSIONS:
            raise ValueError(f"variant = {variant!r}: expected {' or '.join(FUSIONS)}.")
        return getattr(self, variant or self.variant)

    def features(self, volume: np.ndarray) -> np.ndarray:
        """VGG16 features of one volume: (positions, features), as both fusions read them."""
        return volume_features(volume, self.spacing_mm, self.network, self.settings)

    def predict(self, volumes: Sequence[np.ndarray], variant: str = "") -> np.ndarray:
        """Ages in years (n,) of volumes (n, size, size, size), RAS, float16 as in a store."""
        return self.fusion(variant).predict([self.features(volume) for volume in volumes])

    def contributions(self, volume: np.ndarray, variant: str = "") -> pd.DataFrame:
        """What each triplet adds to one volume's age: `position, first_slice, last_slice, years`.

        The years add up to the predicted age less `weighting_.centre` (early: the age of the training scans'
        mean features; late: their mean age); NaN where the volume shows no brain.
        """
        fusion = self.fusion(variant)
        first = fusion.positions_ * SLICES
        columns = {"position": fusion.positions_, "first_slice": first, "last_slice": first + SLICES - 1}
        return pd.DataFrame({**columns, "years": fusion.contributions([self.features(volume)])[0]})

    def save(self, folder: Path | str) -> None:
        """Write arrays and JSON; VGG16's convolutions go along (59 MB), so that no download is needed."""
        from safetensors.numpy import save_file

        folder, network = Path(folder), self.network
        fusions = {f"{name}.{key}": a for name in FUSIONS for key, a in self.fusion(name).to_arrays().items()}
        layers = {name: tensor.cpu().numpy() for name, tensor in network.layers.state_dict().items()}
        for name, arrays in ((ARRAYS, fusions), (NETWORK, layers)):
            with writing(folder / name) as temporary:
                save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, temporary)
        facts = {name: getattr(self, name) for name in ("variant", "spacing_mm", "facts")}
        facts["settings"], facts["network"] = asdict(self.settings), {"weights": network.mode}
        facts["network"] |= {name: getattr(network, name) for name in ("weights_sha256", "pooling", "seed")}
        write_json(facts, folder / FACTS)

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> VggSvr:
        """Read what `save` wrote; `WeightsError` where the network is not the one it was fitted with."""
        from safetensors.numpy import load_file

        arrays = (load_file(Path(folder) / name) for name in (ARRAYS, NETWORK))
        return cls.from_parts(read_json(Path(folder) / FACTS), *arrays, device)

    @classmethod
    def from_parts(
        cls,
        facts: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        network: Mapping[str, np.ndarray],
        device: str = "cpu",
    ) -> VggSvr:
        """The model from the contents of the files that `save` wrote; see `load`."""
        fusions = []
        for name, kind in FUSIONS.items():
            own = {key.removeprefix(f"{name}."): a for key, a in arrays.items() if key.startswith(f"{name}.")}
            own = _fold_standardisation(own, facts[name]) if "scale" in own else own
            fusions.append(kind.from_arrays(own))
        layers, known = empty_layers(), facts["network"]
        layers.load_state_dict({name: torch.tensor(array) for name, array in network.items()})
        vgg16 = Vgg16Features(layers, known["weights"], known["pooling"], known["seed"])
        if vgg16.weights_sha256 != known["weights_sha256"]:
            raise WeightsError(
                f"The VGG16 weights found have hash {vgg16.weights_sha256[:8]}…, this model was fitted with "
                f"{known['weights_sha256'][:8]}…. Save the model again where it was fitted."
            )
        rest = (facts[name] for name in ("spacing_mm", "variant", "facts"))
        return cls(*fusions, vgg16.place(device), FeatureSettings(**facts["settings"]), *rest)


def _fold_standardisation(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a fusion from a bundle that kept means and scales of features beside the weights."""
    mean, scale, weight = (arrays[key].astype(np.float64) for key in ("mean", "scale", "weight"))
    coef, centres, n = weight / scale, np.array(facts["intercepts"]), len(arrays["positions"])
    return {
        "positions": arrays["positions"],
        "coef": coef,
        "intercept": centres - (coef * mean).sum(axis=1),
        "weights": arrays.get("fusion", np.full(n, 1 / n)),
        **facts.get("fusion", {"centre": centres[0], "slope": 1.0}),
    }


# --- the run --------------------------------------------------------------------------------------------

TABLES = {
    "predictions": COLUMNS,
    "grid": ["variant", "C", "epsilon", "mae"],
    "positions": ["position", "first_slice", "n_scans", "mae", "weight"],
    "left_out": ["scan_id", "split", "reason"],
}


@dataclass
class VggRun:
    """What a run left behind.

    Attributes
    ----------
    folder : Path
    predictions : DataFrame
        `predictions.csv`: with folds, train and validation rows are out-of-fold (`fold` >= 0).
    grid, positions : DataFrame
        Inner cross-validated MAE (years, training subjects) of hyper-parameters and of triplet positions.
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
    positions: pd.DataFrame
    left_out: pd.DataFrame
    settings: dict[str, Any]
    reused: bool = False
    changed: Sequence[str] = ()

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
    features: Features,
    splits: pd.DataFrame,
    run_folder: Path | str,
    network: Vgg16Features,
    *,
    final: bool = False,
) -> VggRun:
    """Fit both fusions on training subjects, predict every scan, write the run.

    Without folds: fitted on `train`, all rows with `fold` -1. With folds: one fit per fold over train and
    validation gives their out-of-fold rows, and a last fit on all of them gives the test rows. Test ages (and
    validation ages without folds) are copied into the table and used for nothing else.

    Parameters
    ----------
    features : Features
        From `extract_features`.
    splits : DataFrame
        `splits.csv`.
    run_folder : path
        `ws.run("vgg16_svr")`; gets settings.json, predictions.csv, grid.csv, positions.csv, left_out.csv and
        model/. A run with equal settings is read, not fitted again.
    network : Vgg16Features
        The one the features were extracted with.
    final : bool
        Trained on everybody, the test split too (`deal_everybody`); the run is evaluated out of fold.

    Examples
    --------
    >>> run = train_vgg_svr(features, splits, ws.run("vgg16_svr"), network)  # doctest: +SKIP
    >>> run.accuracy("test")["late"]["mae"]  # doctest: +SKIP
    """
    splits = deal_everybody(check_splits(splits), FINAL_FOLDS) if final else check_splits(splits)
    folder, inputs = Path(run_folder), _inputs(features, splits, network)
    before = read_run_settings(folder)
    is_ours = not find_altered(folder, before)
    if before.get("inputs") == inputs and is_ours and (found := _read_run(folder, before)):
        return found
    if network.weights_sha256 != features.facts["weights_sha256"]:
        raise ValueError("The features come from other weights than this network's: extract them again.")
    known = splits["scan_id"].isin(list(features.files))
    scans = splits[known].reset_index(drop=True)
    fusions, rows = _fit_and_predict(features, scans, network.seed)
    lost = rows["predicted_age"].isna()
    left_out = _left_out(splits[~known], features.failed, rows[lost])
    settings = _settings(features, network, fusions, inputs) | {
        "n_scans": {name: int(n) for name, n in scans["split"].value_counts().items()},
        "n_left_out": int(left_out["scan_id"].nunique()),
        "final": final,
    }
    grid = pd.concat([fusion.grid_.assign(variant=name) for name, fusion in fusions.items()])
    was = before.get("inputs", inputs)
    changed = [f"{name}: {was.get(name)} -> {new}" for name, new in inputs.items() if was.get(name) != new]
    changed += ["predictions.csv: not as this run wrote it"] * bool(before and not is_ours)
    positions = fusions["late"].by_position_
    run = VggRun(folder, rows[~lost], grid, positions, left_out, settings, changed=changed)
    spacing_mm, variant = features.facts["spacing_mm"], settings["variant"]
    model = VggSvr(*fusions.values(), network, features.settings, spacing_mm, variant, settings)
    (folder / "settings.json").unlink(missing_ok=True)  # comes last: it is the sign that the rest is whole
    model.save(folder / "model")
    for name, columns in TABLES.items():
        write_csv(getattr(run, name)[columns], folder / f"{name}.csv")
    settings |= digest_tables(predictions=run.predictions[TABLES["predictions"]])
    write_json(settings, folder / "settings.json")
    return run


def _read_run(folder: Path, settings: dict[str, Any]) -> VggRun | None:
    """A run as it was written; None, with a warning, where something of it is absent or damaged."""
    try:
        VggSvr.load(folder / "model")
        tables = [load_run_table(folder / f"{name}.csv", columns) for name, columns in TABLES.items()]
        return VggRun(folder, *tables, settings, reused=True)
    except Exception as error:
        warnings.warn(f"The run {folder} is not whole and fitted again: {error}", stacklevel=1)
        return None


def _fit_and_predict(features: Features, scans: pd.DataFrame, seed: int) -> tuple[Fusions, pd.DataFrame]:
    folds = sorted(fold for fold in scans["fold"].unique() if fold >= 0)
    if len(folds) == 1:
        raise ValueError(
            f"In splits.csv all scans with a volume are in one fold ({folds[0]}), so nobody is left to learn "
            "from. Run notebook 02 with other folds (folds_by = age, or folds = 0)."
        )
    learning = scans["split"].isin(["train", "val"]) if folds else scans["split"] == "train"
    fusions = _fit(features, scans[learning])
    parts = []
    for fold in folds:
        held_out = scans["fold"] == fold
        parts.append(_predict(features, scans[held_out], _fit(features, scans[learning & ~held_out])))
    rest = (scans[~learning] if folds else scans).assign(fold=-1)
    parts += [_predict(features, rest, fusions)] if len(rest) else []
    return fusions, pd.concat(parts, ignore_index=True).assign(seed=seed)[COLUMNS]


def _fit(features: Features, training: pd.DataFrame) -> Fusions:
    rows = [features[scan_id] for scan_id in training["scan_id"]]
    age, subject_id = training["age"].to_numpy(dtype=np.float64), training["subject_id"].to_numpy()
    return {name: fusion().fit(rows, age, subject_id) for name, fusion in FUSIONS.items()}


def _predict(features: Features, scans: pd.DataFrame, fusions: Fusions) -> pd.DataFrame:
    rows = [features[scan_id] for scan_id in scans["scan_id"]]
    return pd.concat(
        scans.assign(variant=name, predicted_age=fusion.predict(rows)) for name, fusion in fusions.items()
    )


def _left_out(absent: pd.DataFrame, failed: pd.DataFrame, lost: pd.DataFrame) -> pd.DataFrame:
    reasons = dict(zip(failed["scan_id"], failed["reason"], strict=True))
    reason = absent["scan_id"].map(reasons).fillna("no features: run the extraction for this scan")
    lost = lost.assign(reason=lost["variant"] + ": none of the triplets the model uses shows brain")
    left_out = pd.concat([absent.assign(reason=reason), lost], ignore_index=True)
    return left_out[TABLES["left_out"]]


def _inputs(features: Features, splits: pd.DataFrame, network: Vgg16Features) -> dict[str, Any]:
    """What decides a run's outcome; equal inputs need no second fit."""
    used = splits[["scan_id", "subject_id", "age", "split", "fold"]].sort_values("scan_id")
    volumes = sorted(features.files[scan_id].name for scan_id in used["scan_id"] if scan_id in features.files)
    texts = {"volumes": "\n".join(volumes), "splits": used.to_csv(index=False)}
    return {
        "features": features.facts["fingerprint"],
        **{name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in texts.items()},
        "grid": {name: list(values) for name, values in GRID.items()},
        "seed": network.seed,
    }


def _settings(features: Features, network: Vgg16Features, fusions: Fusions, inputs: dict) -> dict[str, Any]:
    settings = {
        "method": "vgg16_svr",
        "title": network.title,
        "variant": min(fusions, key=lambda name: fusions[name].inner_mae_),
        "variant_chosen_by": "inner cross-validation on training subjects",
        "fingerprint": features.facts["volumes"],
        "modality": features.facts.get("modality", "T1w"),
        "weights": network.mode,
        "weights_sha256": network.weights_sha256,
        "features": features.facts,
        "inputs": inputs,
    }
    for name, fusion in fusions.items():
        known = {"inner_cv_mae_years": fusion.inner_mae_, "n_triplets": len(fusion.positions_)}
        settings[name] = {**fusion.choice_, **known, "slope": fusion.weighting_.slope}
    return settings
