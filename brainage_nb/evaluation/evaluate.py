"""All runs of a workspace evaluated and compared: raw figures, correction, interval, groups, known answers,
and what a reader must be told first. Draws and writes nothing (see `report`); raw figures stay raw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.bundle_format import FUSED
from brainage_nb.cohort.rules import count_diagnoses, judge_controls, name_controls
from brainage_nb.cohort.splits import SPLITS
from brainage_nb.evaluation import metrics
from brainage_nb.evaluation.correction import (
    LEVEL,
    AgeBiasCorrector,
    Calibration,
    EvaluationError,
    conformal_rank,
    coverage,
)
from brainage_nb.evaluation.external import ExternalEvaluation
from brainage_nb.evaluation.fusion import Fusion, fuse_runs
from brainage_nb.evaluation.rates import measure_rates
from brainage_nb.evaluation.runs import (
    OUT_OF_FOLD,
    Run,
    RunEvaluation,
    add_gaps,
    add_truth,
    calibrate,
    check_known_answers,
    list_runs,
    read_run,
    read_truth,
)
from brainage_nb.workspace import MissingInput, Workspace, open_workspace

FEWEST = 3  # subjects a diagnosis needs to be compared at all
FEW_TEST_SUBJECTS = 30
FEWEST_COMPARED = 6  # with fewer, errors that all differ in one direction are chance more often than in 5 %
TEST_OBJECT = (
    "These scans are a known-answer cohort: heads built by rule, with planted ageing. It is a test object; "
    "no figure on this page says how accurate a model is on people."
)
HEADLINE = ("mae", "mean_predictor_mae", "rmse", "r", "r2", "slope", "gap_age_r")


@dataclass
class Evaluation:
    """Everything `write_report` needs; `results` is what goes into `results.json`.

    `external` is filled by whoever applied a model to another cohort: its name -> what `evaluate_external`
    found. `fusion` is None where no runs were fused; else `runs` holds the fused run too.
    """

    workspace: Workspace
    runs: dict[str, RunEvaluation]
    comparisons: pd.DataFrame
    is_test_object: bool
    warnings: list[str]
    parameters: dict[str, Any]
    external: dict[str, ExternalEvaluation] = field(default_factory=dict)
    fusion: Fusion | None = None

    @property
    def predictions(self) -> pd.DataFrame:
        """All runs' headline rows; `predicted_age` is raw."""
        rows = pd.concat({name: found.rows for name, found in self.runs.items()}, names=["run", None])
        return rows.reset_index(level="run").reset_index(drop=True)

    @property
    def bootstrap(self) -> dict[str, int]:
        """`n_bootstrap` and `seed` of every interval."""
        return {name: self.parameters[name] for name in ("n_bootstrap", "seed")}

    @property
    def results(self) -> dict[str, Any]:
        """{run: {split: {metric: {"value", "low", "high"}}}}; keys that start with `_` hold what is not a raw
        figure."""
        each = self.runs.items()
        tables = {
            f"_{table}": {name: getattr(found, table).to_dict("records") for name, found in each}
            for table in ("coverage", "groups", "diagnosis")
        }
        corrected = {name: found.corrected or {"refused": found.calibration.refused} for name, found in each}
        return {
            **{name: found.metrics for name, found in each},
            "_age_free_corrected": corrected,
            "_calibration": {name: found.calibration.to_dict() for name, found in each},
            **tables,
            "_known_answers": {name: found.known for name, found in each if found.known},
            "_rates": {name: found.rates.to_dict() for name, found in each},
            "_external": {name: found.summary() for name, found in self.external.items()},
            "_comparisons": self.comparisons.to_dict("records"),
            **({"_fusion": self.fusion.to_dict(**self.bootstrap)} if self.fusion else {}),
            "_test_object": self.is_test_object,
            "_warnings": self.warnings,
            "_parameters": self.parameters,
        }


def evaluate_runs(
    workspace: Workspace | Path | str = "",
    runs: Sequence[str] | str = (),
    *,
    fuse: Sequence[str] | str = (),
    truth: str | Path = "",
    controls: str | None = None,
    level: float = LEVEL,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """Evaluate training runs of a workspace.

    Parameters
    ----------
    workspace : Workspace or path
    runs : names, or one string with commas
        By default every run that has predictions.
    fuse : names, or one string with commas
        Runs whose ages are fused (`fuse_runs`) into one more, called `fused`.
    truth : path, optional
        `truth.csv` of the known-answer cohort; looked for in the workspace where not given.
    controls : str, optional
        The diagnosis to compare others with.
    level : float
        Share of people whose age the prediction interval should hold.
    n_bootstrap, seed : int
        Of the subject bootstrap.

    Raises
    ------
    MissingInput
        A file is missing; the message names the notebook that makes it.
    EvaluationError
        A run contradicts the cohort.

    Examples
    --------
    >>> evaluation = evaluate_runs("workspace", "resnet18,vgg16_svr")  # doctest: +SKIP
    >>> headline_table(evaluation.results)  # doctest: +SKIP
    """
    ws = workspace if isinstance(workspace, Workspace) else open_workspace(workspace)
    names, fused = _list_names(runs) or list_runs(ws), _list_names(fuse)
    names += [name for name in fused if name not in names]
    if fused and ws.path("runs", FUSED, "predictions.csv").exists():
        raise EvaluationError(
            f"fuse = {','.join(fused)}: runs/{FUSED} is a training run, whose place and name the fused ages "
            "take. Rename its folder, or train it again under another name."
        )
    if not names:
        raise MissingInput(f"No run in {ws.path('runs')} has a predictions.csv. Run notebook 04 or 05 first.")
    planted, bootstrap = read_truth(ws, truth), {"n_bootstrap": n_bootstrap, "seed": seed}
    options = {"level": level, "truth": planted, "controls": controls} | bootstrap
    read = {name: read_run(ws, name) for name in names}
    fusion = fuse_runs({name: read[name] for name in fused}, level) if fused else None
    found = {name: evaluate_run(run, **options) for name, run in read.items()}
    if fusion:
        calibrated = (fusion.whole.calibration, fusion.rows)
        found[FUSED] = evaluate_run(fusion.run, calibrated=calibrated, **options)
    sources = ws.read("cohort.csv").get("source", pd.Series(dtype=str))
    is_test_object = planted is not None or bool((sources == "demo").any())
    comparisons = compare_runs(found, **bootstrap)
    cautions = find_cautions(found, comparisons, ws, is_test_object=is_test_object)
    return Evaluation(
        workspace=ws,
        runs=found,
        comparisons=comparisons,
        is_test_object=is_test_object,
        warnings=cautions + [f"{FUSED}: {note}" for note in (fusion.notes if fusion else ())],
        parameters={"runs": names, "fuse": fused, "level": level} | bootstrap,
        fusion=fusion,
    )


def _list_names(names: Sequence[str] | str) -> list[str]:
    given = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in given if name.strip()]


def evaluate_run(
    run: Run,
    *,
    level: float = LEVEL,
    truth: pd.DataFrame | None = None,
    controls: str | None = None,
    calibrated: tuple[Calibration, pd.DataFrame] | None = None,
    **bootstrap: int,
) -> RunEvaluation:
    """Evaluate one run; see `evaluate_runs` for the parameters.

    `calibrated` is another calibration than `calibrate`'s, with the run's rows as `add_gaps` gives them.
    """
    if not len(run.part(run.judged_on)):
        raise EvaluationError(
            f"{run.name} has no test predictions and none out of fold, so there is nothing to evaluate "
            "honestly. Train it on more subjects, or with final = True."
        )
    if calibrated is None:
        calibration = calibrate(run, level)
        calibrated = calibration, add_gaps(run, calibration, level)
    calibration, rows = calibrated
    corrector = calibration.corrector
    test, options = rows.loc[run.part(run.judged_on).index], {"reference_age": run.reference_age} | bootstrap

    def measure(column: str) -> dict[str, metrics.Metrics]:
        parts = {split: rows.loc[run.part(split).index] for split in run.splits()}
        return {split: metrics.measure_rows(part, column, **options) for split, part in parts.items()}

    known = [name for name in ("sex", "site", "diagnosis") if name in test and test[name].ne("").any()]
    groups = [metrics.metrics_by_group(test, name, **options) for name in ("age_bin", *known)]
    planted = pd.DataFrame() if truth is None else add_truth(test, truth)
    return RunEvaluation(
        run=run,
        rows=rows,
        calibration=calibration,
        metrics=measure("predicted_age"),
        corrected=measure("corrected_age") if corrector else {},
        bias=_bias_before_and_after(run, corrector) if corrector else pd.DataFrame(),
        coverage=coverage(test["age"], test["low"], test["high"]),
        groups=pd.concat(groups, ignore_index=True),
        diagnosis=diagnosis_differences(test, "adjusted_gap" if corrector else "gap", controls),
        known=check_known_answers(planted, truth, **bootstrap),
        planted=planted,
        rates=measure_rates(run.unseen, calibration, controls=controls, truth=truth),
    )


def _bias_before_and_after(run: Run, corrector: AgeBiasCorrector) -> pd.DataFrame:
    parts = {f"{run.calibrated_on} (fitted on)": run.calibration_rows(), "test": run.part("test")}
    parts = {name: part for name, part in parts.items() if len(part)}
    tables = {name: corrector.summary(part["predicted_age"], part["age"]) for name, part in parts.items()}
    return pd.concat(tables, names=["split", "kind"]).reset_index()


def diagnosis_differences(rows: pd.DataFrame, gap: str = "gap", controls: str | None = None) -> pd.DataFrame:
    """Mean gap of each diagnosis minus that of controls, plain and adjusted for age, sex and site.

    Ordinary least squares with standard errors that count subjects, not scans (cluster-robust, statsmodels).
    The adjusted form takes care of groups of different age, which the age bias of a model would otherwise
    turn into a gap.

    Parameters
    ----------
    rows : DataFrame
        One row per scan of test subjects: `subject_id, age, diagnosis`, the column `gap` (years) and, where
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
    rows = rows[rows["diagnosis"].fillna("") != ""] if "diagnosis" in rows else rows.iloc[:0]
    if rows.empty:
        return pd.DataFrame()
    if controls is not None and controls not in (known := sorted(rows["diagnosis"].unique())):
        raise ValueError(f"controls = {controls!r} is not a diagnosis here; there are {known}.")
    diagnosis, controls = name_controls(rows, controls)
    rows = rows.assign(diagnosis=diagnosis)
    counts = rows.groupby("diagnosis")["subject_id"].nunique()[lambda n: n >= FEWEST]
    if controls not in counts or len(counts) < 2:
        return pd.DataFrame()
    rows = rows[rows["diagnosis"].isin(counts.index)].assign(gap=rows[gap])
    covariates = ["age", *(name for name in ("sex", "site") if _varies(rows, name))]
    table = pd.DataFrame({"n_subjects": counts.drop(controls), "n_controls": counts[controls]})
    for name, others in (("difference", []), ("adjusted", covariates)):
        table[[name, f"{name}_low", f"{name}_high"]] = _fit_differences(rows, controls, others)
    return table.assign(adjusted_for=", ".join(covariates)).reset_index()


def _fit_differences(rows: pd.DataFrame, controls: str, covariates: list[str]) -> np.ndarray:
    """Difference, low and high (years) of each other diagnosis, in alphabetical order."""
    import statsmodels.formula.api as smf

    terms = [f"C(diagnosis, Treatment({controls!r}))"]
    terms += [covariate if covariate == "age" else f"C({covariate})" for covariate in covariates]
    subjects = {"groups": pd.factorize(rows["subject_id"])[0]}
    model = smf.ols(f"gap ~ {' + '.join(terms)}", rows)
    fitted = model.fit(cov_type="cluster", cov_kwds=subjects, use_t=True)
    table = pd.concat([fitted.params, fitted.conf_int(0.05)], axis=1)
    return table.filter(like="C(diagnosis", axis=0).to_numpy()


def _varies(rows: pd.DataFrame, name: str) -> bool:
    return name in rows and rows[name].fillna("").ne("").all() and len(set(rows[name])) > 1


def compare_runs(found: dict[str, RunEvaluation], **bootstrap: int) -> pd.DataFrame:
    """Paired MAE differences (years) on the test scans two runs share, and of each run with the mean
    predictor.

    Returns
    -------
    DataFrame
        Columns `a`, `b`, `value`, `low`, `high` (MAE of a minus MAE of b; negative: a is nearer), `n`,
        `n_subjects`.
    """
    rows, pairs = [], [*((name, "mean predictor") for name in found), *combinations(found, 2)]
    for a, b in pairs:
        both = found[a].judged.assign(other=found[a].run.reference_age)
        if b in found:
            other = found[b].judged.set_index("scan_id")["predicted_age"]
            both = both.assign(other=both["scan_id"].map(other)).dropna(subset=["other"])
        if len(both):
            ages = (both[name] for name in ("age", "predicted_age", "other", "subject_id"))
            rows.append({"a": a, "b": b} | metrics.paired_difference(*ages, **bootstrap))
    return pd.DataFrame(rows)


def headline_table(results: dict[str, Any]) -> pd.DataFrame:
    """The raw figures that judge, one row per run: `7.10 [6.20, 8.00]`, each MAE beside the mean predictor's.

    On test; out of fold, and named so, where everybody taught.
    """
    runs = {name: parts for name, parts in results.items() if not name.startswith("_")}
    judged = {f"{name}, test": parts["test"] for name, parts in runs.items() if "test" in parts}
    judged |= {
        f"{name}, out of fold": parts[OUT_OF_FOLD] for name, parts in runs.items() if "test" not in parts
    }
    table = metrics.text_table(map(metrics.flat, judged.values()), ("n", "n_subjects", *HEADLINE))
    return table.set_axis(list(judged)).rename_axis("run")


# --- what a reader must be told first -----------------------------------------------------------------------


def find_cautions(
    found: dict[str, RunEvaluation], comparisons: pd.DataFrame, ws: Workspace, *, is_test_object: bool
) -> list[str]:
    """Warnings of a whole evaluation, gravest first."""
    sentences, splits = [TEST_OBJECT] if is_test_object else [], ws.read("splits.csv")
    cleaning = ws.read("cleaning.csv")
    with_mean = comparisons[comparisons["b"] == "mean predictor"].set_index("a")
    for name, one in found.items():
        own = [_of_figures(one, with_mean.loc[name]), _of_calibration(one), _of_missing(one, splits)]
        own += [_of_twins(one, cleaning), one.rates.warnings]
        sentences += [f"{name}: {text}" for texts in own for text in texts if text]
    return sentences + [text for text in _of_workspace(found, ws.read("cohort.csv"), cleaning) if text]


def _of_figures(one: RunEvaluation, difference: pd.Series) -> list[str | bool]:
    """Sentences, and something false in place of each that does not hold."""
    test, bias, words = one.figures, one.figures["gap_age_r"], one.judged_words
    few = difference["n_subjects"] < FEWEST_COMPARED
    return [
        few
        and "judged by too few people to show whether it is better than the mean training age for everyone.",
        not few
        and not difference["high"] < 0
        and "not shown to be better than predicting the mean training age for everyone (MAE difference in "
        f"years, with its 95 % interval where there is one: {metrics.with_interval(difference)}).",
        test["n_subjects"] < FEW_TEST_SUBJECTS
        and f"only {test['n_subjects']} subjects judge ({words}), so every figure is uncertain, and "
        "bootstrap intervals from so few come out too narrow. "
        + ("Set final = True in 04 and 05, and everybody judges." if words == "test" else ""),
        (bias["high"] < 0 or bias["low"] > 0)
        and f"the raw gap depends on age (r {metrics.with_interval(bias)}, {words}): do not compare raw gaps "
        "between people or groups of different age.",
        one.run.chose_epoch
        and "validation figures are a little too good, since the best epoch was chosen on them; quote test.",
    ]


def _of_calibration(one: RunEvaluation) -> Iterator[str]:
    """Of correction and interval; coverage is doubted where chance in calibration and test scans does not
    explain it (beta-binomial, 2.5 %)."""
    from scipy import stats

    corrector, interval = one.calibration.corrector, one.calibration.interval
    yield corrector.support_ if corrector else f"no age-bias correction. {one.calibration.refused}"
    if interval is None:
        yield "no validation or out-of-fold predictions, so there are no prediction intervals."
        return
    yield interval.support_
    row, n, level = one.coverage.iloc[0], interval.n_calibration_, interval.level
    k, inside = conformal_rank(n, level), round(row["coverage"] * row["n"])
    if k <= n and stats.betabinom.cdf(inside, row["n"], k, n + 1 - k) < 0.025:
        yield (
            f"prediction intervals hold {row['coverage']:.0%} of the true ages ({one.judged_words}) "
            f"[{row['coverage_low']:.0%}, {row['coverage_high']:.0%}], fewer than the {level:.0%} they "
            "promise and than chance explains: "
            "calibration subjects and those who judge differ."
        )


def _of_missing(one: RunEvaluation, splits: pd.DataFrame) -> Iterator[str]:
    for split in SPLITS:
        dealt = splits.loc[splits["split"] == split, "scan_id"]
        if n := int((~dealt.isin(one.rows["scan_id"])).sum()):
            yield f"{n} of {len(dealt)} {split} scans have no prediction and are in no figure."


def _of_twins(one: RunEvaluation, cleaning: pd.DataFrame) -> Iterator[str]:
    if "sha256" not in cleaning:
        return
    pictures = cleaning.loc[cleaning["sha256"].fillna("") != "", ["scan_id", "sha256"]]
    splits = one.rows.merge(pictures, on="scan_id").groupby("sha256")["split"].nunique()
    if (splits > 1).any():
        yield (
            f"{(splits > 1).sum()} identical image files lie in more than one split under different names; "
            "the test figures are too good until they are removed."
        )


def _of_workspace(
    found: dict[str, RunEvaluation], cohort: pd.DataFrame, cleaning: pd.DataFrame
) -> Iterator[str]:
    control = judge_controls(cohort)
    if {"yes", "no"} <= set(control) and "diagnosis" in cohort:
        known, others = (count_diagnoses(cohort[control == verdict]) for verdict in ("yes", "no"))
        yield (
            f"Controls are those with the diagnosis {known}; the others ({others}) take no part in bias "
            "correction and site offset. Where that is wrong, set control_words in notebook 01."
        )
    volumes = {(one.run.modality, one.run.settings.get("fingerprint")) for one in found.values()}
    known = [modality for modality, fingerprint in volumes if fingerprint]
    if len(known) > len({*known}):
        yield (
            "The runs were trained on differently preprocessed volumes; differences between them may come "
            "from that."
        )
    if len({frozenset(one.judged["scan_id"]) for one in found.values()}) > 1:
        yield "The runs were tested on different scans; compare them only by the paired differences below."
    if (
        "source" in cohort
        and (cohort["source"] == "demo").any()
        and all(one.planted.empty for one in found.values())
    ):
        yield (
            "demo/truth.csv is not there, or names other scans, so what was planted is not looked for. Run "
            "notebook 01 again: it writes that table anew."
        )
    kept = cleaning["kept"].mean()
    if kept < 0.8:
        yield f"Cleaning dropped {1 - kept:.0%} of the scans; the figures hold for what was kept."
