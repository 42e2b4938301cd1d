"""Judges recipes on people who did not choose them: nested cross-validation on real scans.

The subjects are dealt to outer folds. For each, the people of the other folds are cross-validated among
themselves with every recipe, and the simplest recipe whose error is within one standard error (of the paired
difference) of the least is chosen; then every recipe learns from all of them and is judged on the outer fold,
which chose nothing. The row `chosen without seeing them` is the honest figure of choosing. Printed beside it:
how many recipes were tried, and how much below their common error the best of so many equal ones would seem
to be by luck.

`--everybody DRAWS` answers another question: 30 people are held out by a hash of their id; the others teach
either as 70/15/15 (70 % learn), or all of them (a model a fold, averaged; or one on all).

On two cores a night, on a GPU (`--jobs 8`) minutes. What is done is kept under `--cache`.

Run: `python benchmarks/accuracy.py --data FOLDER [--quick]`; FOLDER holds `images/NAME.nii.gz`,
`dlmuse/NAME_DLMUSE.nii.gz` and `IXI.xls`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
from accuracy_models import MEAN, REGIONS, VGG, Models, Task, fold_of

from brainage_nb.cohort.splits import deal_splits
from brainage_nb.evaluation.metrics import age_bins, mean_with_interval, with_interval
from brainage_nb.sources.folder import match_scans

OUTER, INNER, HELD_OUT = 5, 3, 30
RIDGE, NETWORK = "ridge on grey matter", "network on grey matter"
# Those to choose from, the simplest first; a recipe is the mean of its models.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "ridge on brightness": ("ridge on brightness",),
    RIDGE: (RIDGE,),
    "network on brightness": ("network on brightness",),
    NETWORK: (NETWORK,),
    "network and ridge on brightness": ("network on brightness", "ridge on brightness"),
    "network and ridge on grey matter": (NETWORK, RIDGE),
}
BASELINES = {name: (name,) for name in (MEAN, REGIONS, VGG, "reference")}
QUICK = {name: CANDIDATES[name] for name in ("ridge on brightness", RIDGE)}
CHOSEN = "chosen without seeing them"


class Fold:
    """One outer fold: the people who choose and teach, the people who judge."""

    def __init__(self, cohort: pd.DataFrame, repeat: int, fold: int):
        everyone = np.arange(len(cohort))
        outer = fold_of(cohort, everyone, OUTER, seed=repeat)
        self.repeat, self.learn, self.judged = repeat, everyone[outer != fold], everyone[outer == fold]
        inner = fold_of(cohort, self.learn, INNER, seed=1000 + OUTER * repeat + fold)
        self.inner = [(self.learn[inner != part], self.learn[inner == part]) for part in range(INNER)]

    def tasks(self, models: tuple[str, ...], *, choose: bool) -> list[Task]:
        """What a recipe needs here: one fit a model, and one an inner fold where it is a candidate."""
        parts = [(self.learn, self.judged), *(self.inner if choose else [])]
        return [task_of(model, *part, self.repeat) for part in parts for model in models]


def task_of(model: str, learn: np.ndarray, judged: np.ndarray, seed: int) -> Task:
    return Task(model, tuple(map(int, learn)), tuple(map(int, judged)), seed)


def predict(fits: Models, models: tuple[str, ...], learn: np.ndarray, judged: np.ndarray, seed: int):
    """Ages (n,) of a recipe, years: the mean of its models."""
    return np.mean([fits.predict(task_of(model, learn, judged, seed)) for model in models], axis=0)


def choose(fits: Models, fold: Fold, candidates: dict[str, tuple[str, ...]]) -> str:
    """The simplest candidate within one standard error of the least, by those who teach alone."""
    errors = {}
    for name, models in candidates.items():
        ages = [predict(fits, models, *part, fold.repeat) for part in fold.inner]
        rows = np.concatenate([judged for _, judged in fold.inner])
        errors[name] = np.abs(np.concatenate(ages) - fits.age[rows])
    return simplest(errors)


def simplest(errors: dict[str, np.ndarray]) -> str:
    """The first recipe whose paired difference (n,) to the least error is within its standard error."""
    least = min(errors.values(), key=np.mean)
    for name, error in errors.items():
        difference = error - least
        if difference.mean() <= difference.std(ddof=1) / np.sqrt(len(difference)):
            return name
    raise AssertionError("the least is within one standard error of itself")


def luck(errors: list[np.ndarray], draws: int = 5000) -> float:
    """How far below their common mean error the least of these recipes would lie if all were equal, years."""
    equal = np.array(errors) - np.mean(errors, axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    n = equal.shape[1]
    drawn = [equal[:, rng.integers(n, size=n)].mean(axis=1).min() for _ in range(draws)]
    return float(-np.mean(drawn))


def judge(
    fits: Models, baselines: dict, candidates: dict, repeats: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Ages (repeats, n) of each recipe by people who did not choose it, and what each outer fold chose."""
    recipes = baselines | candidates
    made = {name: np.full((repeats, len(fits.age)), np.nan) for name in (*recipes, CHOSEN)}
    choices = []
    for repeat in range(repeats):
        for number in range(OUTER):
            fold = Fold(fits.cohort, repeat, number)
            for name, models in recipes.items():
                made[name][repeat, fold.judged] = predict(fits, models, fold.learn, fold.judged, repeat)
            choices.append(choose(fits, fold, candidates))
            made[CHOSEN][repeat, fold.judged] = made[choices[-1]][repeat, fold.judged]
    return made, choices


def errors_of(ages: np.ndarray, fits: Models) -> np.ndarray:
    """Mean absolute error of each scan (n,) over repeats, years."""
    return np.abs(ages - fits.age).mean(axis=0)


def difference(ages: np.ndarray, against: np.ndarray, fits: Models) -> str:
    """Paired change of the MAE with its 95 % subject bootstrap interval."""
    return with_interval(mean_with_interval(errors_of(ages, fits) - errors_of(against, fits), fits.subjects))


def tabulate(made: dict[str, np.ndarray], fits: Models, against: str) -> pd.DataFrame:
    """One row per recipe: MAE, r, slope of predicted on true age, paired changes."""
    rows = {}
    for name, ages in made.items():
        steady = name == MEAN
        rows[name] = {
            "MAE": with_interval(mean_with_interval(errors_of(ages, fits), fits.subjects)),
            "r": "" if steady else f"{np.mean([np.corrcoef(one, fits.age)[0, 1] for one in ages]):.3f}",
            "slope": "" if steady else f"{np.mean([np.polyfit(fits.age, one, 1)[0] for one in ages]):.2f}",
            "against regions": "" if name == REGIONS else difference(ages, made[REGIONS], fits),
            f"against {against}": "" if name == against else difference(ages, made[against], fits),
        }
    return pd.DataFrame(rows).T


def tabulate_ages(made: dict[str, np.ndarray], fits: Models) -> pd.DataFrame:
    """MAE and mean signed error, years, in each decade."""
    decade = age_bins(fits.age).to_numpy()
    columns = {"n": pd.Series(1, index=decade).groupby(level=0).sum()}
    for name, ages in made.items():
        columns[f"{name}: MAE"] = pd.Series(errors_of(ages, fits)).groupby(decade).mean()
        columns[f"{name}: mean gap"] = pd.Series(ages.mean(axis=0) - fits.age).groupby(decade).mean()
    return pd.DataFrame(columns).round(2)


class Draw:
    """30 people held out by a hash of their id; the others teach in three ways."""

    def __init__(self, cohort: pd.DataFrame, draw: int):
        hashed = cohort["subject_id"].map(lambda one: hashlib.sha256(f"{draw} {one}".encode()).hexdigest())
        held_out = hashed.isin(sorted(hashed.unique())[:HELD_OUT]).to_numpy()
        rows = np.flatnonzero(~held_out)
        split = deal_splits(cohort.iloc[rows], seed=draw).set_index("scan_id")["split"]
        fold = fold_of(cohort, rows, OUTER, seed=draw)
        self.draw, self.judged = draw, np.flatnonzero(held_out)
        self.ways = {
            "70/15/15": [rows[(cohort["scan_id"].iloc[rows].map(split) == "train").to_numpy()]],
            "everybody, one model a fold": [rows[fold != number] for number in range(OUTER)],
            "everybody, one model": [rows],
        }

    def tasks(self, models: tuple[str, ...]) -> list[Task]:
        """The fits of all three ways."""
        return [
            task_of(model, learn, self.judged, self.draw)
            for ways in self.ways.values()
            for learn in ways
            for model in models
        ]


def tabulate_everybody(fits: Models, draws: list[Draw], recipes: dict) -> pd.DataFrame:
    """One row per recipe and way of teaching: MAE on the held-out over all draws, paired change."""
    rows = {}
    subjects = np.concatenate([fits.subjects[draw.judged] for draw in draws])
    for name, models in recipes.items():
        errors = {}
        for way in draws[0].ways:
            ages = [
                np.mean([predict(fits, models, learn, d.judged, d.draw) for learn in d.ways[way]], axis=0)
                for d in draws
            ]
            truth = [fits.age[draw.judged] for draw in draws]
            errors[way] = np.abs(np.concatenate(ages) - np.concatenate(truth))
            paired = mean_with_interval(errors[way] - errors["70/15/15"], subjects)
            rows[name, way] = {
                "MAE": with_interval(mean_with_interval(errors[way], subjects)),
                "against 70/15/15": "" if way == "70/15/15" else with_interval(paired),
            }
    return pd.DataFrame(rows).T


def list_tasks(cohort: pd.DataFrame, baselines: dict, candidates: dict, repeats: int) -> list[Task]:
    """Every fit of the outer and inner folds, in the order of their use."""
    tasks = []
    for repeat in range(repeats):
        for number in range(OUTER):
            fold = Fold(cohort, repeat, number)
            for name, models in (baselines | candidates).items():
                tasks += fold.tasks(models, choose=name in candidates)
    return tasks


def main() -> None:
    """Print the tables and, as the last line, the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ixi_hh"))
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "out" / "accuracy")
    parser.add_argument("--repeats", type=int, default=2, help="of the outer folds")
    parser.add_argument("--everybody", type=int, default=0, metavar="DRAWS")
    parser.add_argument("--epochs", type=int, default=60, help="of the networks")
    parser.add_argument("--jobs", type=int, default=1, help="models fitted side by side")
    parser.add_argument("--vgg", default="random_projection", help="or imagenet")
    parser.add_argument("--quick", action="store_true", help="ridges and baselines only, one repeat")
    options = parser.parse_args()
    if not (options.data / "IXI.xls").is_file():
        print(json.dumps({"name": "accuracy", "skipped": f"no scans under {options.data}"}))
        return
    cohort = match_scans(options.data / "images", options.data / "IXI.xls").cohort.reset_index(drop=True)
    fits = Models(cohort, options.data, options.cache, epochs=options.epochs, vgg_weights=options.vgg)
    baselines, candidates, repeats = BASELINES, CANDIDATES, options.repeats
    if options.quick:  # no networks
        baselines = {name: models for name, models in BASELINES.items() if name != "reference"}
        candidates, repeats = QUICK, 1
    fits.run(list_tasks(cohort, baselines, candidates, repeats), options.jobs)
    made, choices = judge(fits, baselines, candidates, repeats)
    errors = {name: errors_of(made[name], fits) for name in candidates}
    shipped = simplest(errors)
    print(
        f"{len(cohort)} scans of {cohort['subject_id'].nunique()} subjects, {OUTER} outer folds x {repeats}, "
        f"{INNER} inner; years, 95 % subject bootstrap"
    )
    table = tabulate(made, fits, shipped)
    print(table.to_string(), "\n")
    print(tabulate_ages({name: made[name] for name in (REGIONS, shipped)}, fits).to_string(), "\n")
    print(f"Chosen in the outer folds: {pd.Series(choices).value_counts().to_dict()}")
    print(
        f"{len(candidates)} recipes tried; if all were equal, the best of them would seem "
        f"{luck(list(errors.values())):.2f} years better than they are. By everybody: {shipped}."
    )
    if options.everybody:
        recipes = {name: candidates[name] for name in (RIDGE, shipped)}
        draws = [Draw(cohort, number) for number in range(options.everybody)]
        tasks = [task for draw in draws for models in recipes.values() for task in draw.tasks(models)]
        fits.run(tasks, options.jobs)
        print(tabulate_everybody(fits, draws, recipes).to_string())
    mae = {name: round(float(errors_of(ages, fits).mean()), 2) for name, ages in made.items()}
    verdict = {"value": mae[shipped], "bar": mae[REGIONS], "holds": mae[shipped] <= mae[REGIONS]}
    print(json.dumps({"name": "accuracy", **verdict, "best": shipped, "table": table.to_dict("index")}))


if __name__ == "__main__":
    main()
