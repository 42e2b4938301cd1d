"""Several runs' ages of the same people made one: each calibrated, then weighted, and judged beside each run.

All of it is fitted on held-out ages, and those themselves are fused by what other people say. Reads no file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.bundle_format import FUSED
from brainage_nb.cohort.splits import deal_folds
from brainage_nb.evaluation import metrics
from brainage_nb.evaluation.correction import LEVEL, Calibration, EvaluationError
from brainage_nb.evaluation.runs import OUT_OF_FOLD, Run, add_gaps, calibrate

FEWEST, ENOUGH_TO_STACK = 10, 200  # people who hold out ages of all runs: for any weights, for ridge's
MOST_RUNS = 6
PENALTIES = np.logspace(-1, 4, 11)
CUTS = 5


@dataclass(frozen=True)
class FusionSettings:
    """What notebook 06 makes one of.

    Parameters
    ----------
    fuse : str
        Runs whose ages of the same people become one, with commas, as resnet18,resnet18_t2w; empty for none.
    """

    fuse: str = ""


@dataclass(frozen=True)
class Combination:
    """One age from those of several runs: `intercept` + the sum of `weights` times predicted ages, in years.

    Attributes
    ----------
    runs : tuple of str
    intercept : float
        Years.
    weights : tuple of float
        Of the runs' raw ages.
    shares : tuple of float
        Of their calibrated ages: what people are told. 0 for a run whose ages do not follow true age.
    kind : {"mean", "ridge"}
    n_subjects : int
        Held-out people behind it.
    """

    runs: tuple[str, ...]
    intercept: float
    weights: tuple[float, ...]
    shares: tuple[float, ...]
    kind: str
    n_subjects: int

    @classmethod
    def fit(cls, ages: pd.DataFrame, age: pd.Series) -> Combination:
        """Fit on held-out people.

        Each run's ages are calibrated by a straight line, true age on predicted. Below 200 people each then
        weighs by the inverse of its mean squared error; from 200 on a ridge regression on them decides.

        Parameters
        ----------
        ages : DataFrame (n_people, n_runs)
            Predicted ages, years; a column a run.
        age : Series (n_people,)
            True ages, years.
        """
        from sklearn.linear_model import RidgeCV

        lines = np.array([_fit_line(ages[run].to_numpy(), age.to_numpy()) for run in ages])
        slopes, starts = lines.T
        calibrated = ages.to_numpy() * slopes + starts
        if len(ages) >= ENOUGH_TO_STACK:
            ridge = RidgeCV(PENALTIES).fit(calibrated, age)
            kind, shares, intercept = "ridge", np.where(slopes > 0, ridge.coef_, 0), float(ridge.intercept_)
        else:
            error = np.square(calibrated - age.to_numpy()[:, None]).mean(axis=0)
            precision = (slopes > 0) / np.maximum(error, 1e-6)
            kind, shares, intercept = "mean", precision / max(precision.sum(), 1e-12), 0.0
        weights, intercept = shares * slopes, float(intercept + shares @ starts)
        return cls(tuple(ages), intercept, tuple(weights.tolist()), tuple(shares.tolist()), kind, len(ages))

    @property
    def says_nothing(self) -> bool:
        """Whether no run's ages follow true age, so that everybody would be given one age."""
        return not any(self.weights)

    @property
    def words(self) -> str:
        """`ridge, 0.61 × resnet18 + 0.37 × resnet18_t2w (240 people)`."""
        terms = (f"{share:.2f} × {run}" for run, share in zip(self.runs, self.shares, strict=True))
        return f"{self.kind}, {' + '.join(terms)} ({self.n_subjects} people)"

    def predict(self, ages: pd.DataFrame) -> np.ndarray:
        """Fused ages (n,) in years, from a column of predicted ages for each of `runs`."""
        return self.intercept + ages[list(self.runs)].to_numpy(dtype=float) @ np.array(self.weights)


def _fit_line(predicted: np.ndarray, age: np.ndarray) -> tuple[float, float]:
    """Slope and intercept (years) of true age on predicted; the slope is 0 where none above 0 is shown."""
    from scipy import stats

    bias = stats.linregress(age, predicted)
    follows = bias.slope > stats.t.ppf(0.975, len(age) - 2) * bias.stderr
    slope = bias.rvalue**2 / bias.slope if follows else 0.0
    return slope, age.mean() - slope * predicted.mean()


@dataclass
class FusedPart:
    """What one set of runs gives all who have an age from each of them.

    Attributes
    ----------
    combination : Combination
        Fitted on all held-out controls.
    run : Run
        The fused ages as a run; of those who calibrate, each is fused by what the others say.
    calibration : Calibration
        Bias correction and interval of these ages.
    rows : DataFrame
        The run's rows with gaps, corrected ages and intervals.
    """

    combination: Combination
    run: Run
    calibration: Calibration
    rows: pd.DataFrame


@dataclass
class Fusion:
    """The fused run, and what it is made of.

    Attributes
    ----------
    modalities : dict
        Run -> which scan of a session it reads, as T2w.
    parts : dict
        `resnet18 + resnet18_t2w` -> `FusedPart`: of all runs first, then of fewer.
    rows : DataFrame
        Everybody once, fused from what they have (`fused_from`, a key of `parts`), with gaps and intervals.
    notes : list of str
        What a reader must know of it.
    """

    modalities: dict[str, str]
    parts: dict[str, FusedPart]
    rows: pd.DataFrame
    notes: list[str]

    @property
    def names(self) -> tuple[str, ...]:
        """The runs."""
        return tuple(self.modalities)

    @property
    def whole(self) -> FusedPart:
        """What those have who have everything."""
        return self.parts[_join(self.names)]

    def find_part(self, modalities: Collection[str]) -> FusedPart | None:
        """What all runs of these modalities give together; None where that is nothing."""
        return self.parts.get(_join(name for name, one in self.modalities.items() if one in modalities))

    @property
    def run(self) -> Run:
        """Everybody's fused ages as one more run."""
        return replace(self.whole.run, predictions=self.rows[[*self.whole.run.predictions]])

    @property
    def judged(self) -> pd.DataFrame:
        """The rows that judge it."""
        return self.rows.loc[self.run.part(self.run.judged_on).index]

    def count_people(self, **options: Any) -> list[dict[str, Any]]:
        """Of those who judge, by what they have: figures, half the interval's width (years), its coverage."""
        rows = []
        for name, own in self.judged.groupby("fused_from"):
            interval = self.parts[name].calibration.interval
            inside = float(own["age"].between(own["low"], own["high"]).mean())
            found = metrics.measure_rows(own, reference_age=self.run.reference_age, **options)
            half_width = interval.quantile_ if interval else np.inf
            rows.append({"fused_from": name} | found | {"half_width": half_width, "inside": inside})
        return rows

    def compare_parts(self, **options: Any) -> list[dict[str, Any]]:
        """On the judging people who have everything: the error of each set of runs, calibrated alike, and how
        much nearer all runs together are (`gain`, years, paired; above 0: all together err less)."""
        whole, rows = self.judged[self.judged["fused_from"] == _join(self.names)], []
        for name, part in self.parts.items() if len(whole) else ():
            own = part.run.predictions.loc[whole.index]
            ages = (whole["age"], own["predicted_age"], whole["predicted_age"], whole["subject_id"])
            found = {"mae": metrics.measure_rows(own, **options)["mae"], "n": len(own)}
            rows.append({"from": name} | found | {"gain": metrics.paired_difference(*ages, **options)})
        return rows

    def to_dict(self, **options: Any) -> dict[str, Any]:
        """Plain JSON values for results.json."""
        weights = {name: vars(part.combination) for name, part in self.parts.items()}
        tables = {"people": self.count_people(**options), "parts": self.compare_parts(**options)}
        return {"runs": list(self.names), "weights": weights, **tables, "notes": self.notes}


def fuse_runs(runs: Mapping[str, Run], level: float = LEVEL) -> Fusion:
    """Fuse the ages that several runs give the same scans.

    Parameters
    ----------
    runs : mapping
        Name -> `Run`; as `read_run` gives them, trained on the same splits.
    level : float
        Of the prediction intervals.

    Raises
    ------
    EvaluationError
        A person is in different parts of two runs, or too few hold out ages of all runs.

    Examples
    --------
    >>> runs = {name: read_run(ws, name) for name in ("resnet18", "resnet18_t2w")}  # doctest: +SKIP
    >>> fuse_runs(runs).whole.combination.words  # doctest: +SKIP
    'mean, 0.62 × resnet18 + 0.38 × resnet18_t2w (87 people)'
    """
    names = tuple(runs)
    if not 2 <= len(names) <= MOST_RUNS or FUSED in names:
        raise EvaluationError(
            f"fuse = {','.join(names)!r}: expected two to {MOST_RUNS} different runs, with commas, as "
            f"resnet18,resnet18_t2w; none of them called {FUSED}."
        )
    _refuse_other_splits(runs)
    about = pd.concat([run.predictions for run in runs.values()]).drop_duplicates("scan_id")
    about = about.drop(columns="predicted_age").reset_index(drop=True)
    known = {name: run.predictions.set_index("scan_id")["predicted_age"] for name, run in runs.items()}
    ages = pd.DataFrame({name: about["scan_id"].map(known[name]) for name in names})
    about["fused_from"] = ages.notna().dot(pd.Index([f"{name} + " for name in names])).str.removesuffix(" + ")
    sets = [some for n in range(len(names), 0, -1) for some in combinations(names, n)]
    frame = Run(FUSED, _describe(runs), pd.DataFrame(columns=["val_mae"]), about)
    fused = {_join(some): _fuse(frame, ages[list(some)], level) for some in sets}
    parts = {name: part for name, part in fused.items() if part is not None}
    if _join(names) not in parts:
        raise EvaluationError(f"fuse = {','.join(names)!r}: no run's held-out ages follow true age.")
    own = [part.rows[part.rows["fused_from"] == name] for name, part in parts.items()]
    modalities = {name: run.modality for name, run in runs.items()}
    fusion = Fusion(modalities, parts, pd.concat(own).sort_index(), [])
    fusion.notes = _list_notes(fusion, about)
    return fusion


def _join(names: Iterable[str]) -> str:
    return " + ".join(names)


def _describe(runs: Mapping[str, Run]) -> dict[str, Any]:
    """What stands for settings.json of the fused run."""
    keep = "best" if any(run.chose_epoch for run in runs.values()) else "last"
    modality = " + ".join(dict.fromkeys(run.modality for run in runs.values()))
    about = {"run": FUSED, "variant": FUSED, "fuse": ", ".join(runs), "modality": modality}
    return about | {"settings": {"keep": keep}}


def _refuse_other_splits(runs: Mapping[str, Run]) -> None:
    """Stop where a person was learned from in one run and judges, or calibrates, in another."""
    parts = {}
    for name, run in runs.items():
        rows = run.predictions
        part = rows["split"].mask(metrics.is_out_of_fold(rows), OUT_OF_FOLD)
        parts[name] = part.groupby(rows["subject_id"]).first()
    for a, b in combinations(runs, 2):
        both = pd.concat([parts[a], parts[b]], axis=1, join="inner", keys=[a, b])
        other = both[both[a] != both[b]]
        if len(other):
            person, first = other.index[0], other.iloc[0].str.replace("_", " ")
            raise EvaluationError(
                f"{len(other)} of the {len(both)} people of both {a} and {b} are in other splits there: "
                f"{person} is {first[a]} in {a} and {first[b]} in {b}. Some would be judged by a model "
                "that had learned from them. Train both from one splits.csv, with the same folds and final."
            )


def _fuse(frame: Run, ages: pd.DataFrame, level: float) -> FusedPart | None:
    """What these runs give those who have an age from each; None where no run's ages follow true age.

    Of everybody who calibrates, the age is fused by what the other parts of them say: the folds', or five
    where the other folds have too few.
    """
    has_all = ages.notna().all(axis=1)
    run = replace(frame, predictions=frame.predictions[has_all])
    teach, held_out = run.calibration_rows(), run.calibration_rows(controls_only=False)
    if (n := teach["subject_id"].nunique()) < FEWEST:
        raise EvaluationError(
            f"{n} people of the {run.calibrated_on} scans have ages from all of {_join(ages)}; fusing them "
            f"needs {FEWEST} or more. Cross-validate the runs (folds in notebook 02), or add people."
        )
    whole = _fit_on(teach, ages)
    if whole.says_nothing:
        return None
    fused = pd.Series(whole.predict(ages[has_all]), run.predictions.index)
    cut = held_out["fold"]
    people = teach.groupby("fold")["subject_id"].nunique()
    if not run.folds or people.sum() - people.max() < FEWEST:  # as where all who have a scan are of one site
        dealt = deal_folds(held_out.groupby("subject_id")["age"].mean(), CUTS)
        cut = held_out["subject_id"].map(dealt)
    for _, rows in held_out.groupby(cut):
        others = teach[~teach["subject_id"].isin(rows["subject_id"])]
        fused[rows.index] = _fit_on(others, ages).predict(ages.loc[rows.index])
    run = replace(run, predictions=run.predictions.assign(predicted_age=fused))
    calibration = calibrate(run, level)
    if calibration.corrector is None:
        return None
    return FusedPart(whole, run, calibration, add_gaps(run, calibration, level))


def _fit_on(rows: pd.DataFrame, ages: pd.DataFrame) -> Combination:
    """The combination that these people teach, each counting once."""
    people = ages.loc[rows.index].assign(true_age=rows["age"]).groupby(rows["subject_id"]).mean()
    return Combination.fit(people[list(ages)], people["true_age"])


def _list_notes(fusion: Fusion, about: pd.DataFrame) -> list[str]:
    """How it was fused, who lacks what, and which run takes no part."""
    combination, n = fusion.whole.combination, len(about)
    notes = [
        f"fused as {combination.words}; the ages are calibrated first, so shares of one add up to about 1."
    ]
    for name, weight in zip(combination.runs, combination.weights, strict=True):
        if not weight:
            notes.append(f"{name} takes no part: its ages do not follow true age on the held-out people.")
    for name, rows in about.groupby("fused_from"):
        if name not in fusion.parts:
            notes.append(f"{len(rows)} of {n} scans have {name} alone, and are given no fused age.")
        elif name != _join(fusion.names):
            notes.append(
                f"{len(rows)} of {n} scans are fused from {name} alone, with an interval of their own."
            )
    return notes
