"""What a workspace holds for evaluation: each run's headline predictions, which rows may calibrate, and the
truth that was planted in a known-answer cohort. Stops where files contradict each other."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.rules import count_diagnoses, judge_controls
from brainage_nb.cohort.splits import check_splits
from brainage_nb.demo.cohort import FEWEST_ATTAINABLE, attainable_ages
from brainage_nb.evaluation import metrics
from brainage_nb.evaluation.correction import (
    LEVEL,
    AgeBiasCorrector,
    Calibration,
    ConformalInterval,
    CorrectionRefused,
    EvaluationError,
)
from brainage_nb.evaluation.rates import Rates
from brainage_nb.volumes.settings import name_of_modality
from brainage_nb.workspace import MissingInput, Workspace, read_csv, read_json, sha256_of

KEYS = ["scan_id", "subject_id", "session_id", "split"]
COLUMNS = [*KEYS, "fold", "seed", "variant", "age", "predicted_age"]  # of predictions.csv
PREDICTED = (-100.0, 250.0)  # years; a number beyond is a mistake in the file, however bad the model
OUT_OF_FOLD = "out_of_fold"
CHOSE = ", who also chose the epoch"
RECOVERED_KINDS = {
    "raw gap": "gap",
    "gap of the age-free corrected prediction": "corrected_gap",
    "gap adjusted by true age": "adjusted_gap",
}


@dataclass
class Run:
    """One training run as evaluation sees it.

    Attributes
    ----------
    name : str
    settings : dict
        `settings.json`.
    history : DataFrame
        `history.csv`; empty where the run has none.
    predictions : DataFrame
        Headline rows, one per scan: `scan_id, subject_id, session_id, split, fold, age, predicted_age` and,
        from the cohort, `control` ("yes", "no" or "") and, where known, `sex, site, diagnosis, source`.
        `fold` >= 0 on train and validation rows marks an out-of-fold prediction.
    """

    name: str
    settings: dict[str, Any]
    history: pd.DataFrame
    predictions: pd.DataFrame

    @property
    def modality(self) -> str:
        """Which scan of a session it reads, by its BIDS suffix."""
        return self.settings.get("modality", "T1w")

    @property
    def folds(self) -> bool:
        """Whether train and validation rows are out-of-fold predictions."""
        return metrics.has_folds(self.predictions)

    @property
    def judged_on(self) -> str:
        """The part that the run is judged by: `test`, or `out_of_fold` where everybody taught."""
        return "test" if len(self.part("test")) else OUT_OF_FOLD

    @property
    def calibrated_on(self) -> str:
        """Which scans may calibrate, in words."""
        return "out-of-fold" if self.folds else "validation"

    @property
    def chose_epoch(self) -> bool:
        """Whether those who calibrate also chose the epoch that was kept."""
        keep = self.settings.get("settings", {}).get("keep", "last")
        return keep == "best" and not self.folds and "val_mae" in self.history

    @property
    def reference_age(self) -> float:
        """What the mean predictor says for everybody, in years (`mean_training_age`)."""
        return metrics.mean_training_age(self.predictions)

    def part(self, split: str) -> pd.DataFrame:
        """Rows of `train`, `val` or `test`, or all out-of-fold rows (`out_of_fold`)."""
        rows = self.predictions
        if split == OUT_OF_FOLD:
            return rows[metrics.is_out_of_fold(rows)]
        return rows[rows["split"] == split]

    @property
    def unseen(self) -> pd.DataFrame:
        """Rows of people whom the model that predicted them had not seen: test and out of fold."""
        return pd.concat([self.part("test"), self.part(OUT_OF_FOLD)])

    def splits(self) -> list[str]:
        """Names of the parts that have rows, test last."""
        return [name for name in ("train", "val", OUT_OF_FOLD, "test") if len(self.part(name))]

    def calibration_rows(self, *, controls_only: bool = True) -> pd.DataFrame:
        """Rows that may fit the bias correction (controls, see `pick_controls`) and the interval (everybody):
        out-of-fold where folds were run, else validation."""
        rows = self.part(OUT_OF_FOLD if self.folds else "val")
        return pick_controls(rows) if controls_only else rows


@dataclass
class RunEvaluation:
    """What was found for one run.

    Attributes
    ----------
    run : Run
    rows : DataFrame
        Headline rows with `gap`, `corrected_age`, `corrected_gap`, `adjusted_gap` and the interval's ends
        `low`, `high` (years). `predicted_age` stays raw.
    calibration : Calibration
        Bias correction and prediction interval, as the run's bundle has them.
    metrics, corrected : dict
        split -> figures (`regression_metrics`) of the raw and, kept apart, of the age-free corrected
        prediction (empty where the correction was refused).
    bias : DataFrame
        Slope and gap-age r before and after, on calibration and judging scans.
    coverage : DataFrame
        Of that interval on the scans that judge, by age bin.
    groups, diagnosis : DataFrame
        Figures of the judging scans by age bin, sex, site and diagnosis; gap differences between diagnoses
        (empty without them).
    known : dict
        Known-answer checks (`check_known_answers`); empty where no truth was planted.
    planted : DataFrame
        The judging rows behind them.
    rates : Rates
        Of ageing between visits, from test and out-of-fold rows.
    """

    run: Run
    rows: pd.DataFrame
    calibration: Calibration
    metrics: dict[str, metrics.Metrics]
    corrected: dict[str, metrics.Metrics]
    bias: pd.DataFrame
    coverage: pd.DataFrame
    groups: pd.DataFrame
    diagnosis: pd.DataFrame
    known: dict[str, Any]
    planted: pd.DataFrame
    rates: Rates

    @property
    def judged(self) -> pd.DataFrame:
        """The rows that the run is judged by (`Run.judged_on`)."""
        return self.rows.loc[self.run.part(self.run.judged_on).index]

    @property
    def figures(self) -> metrics.Metrics:
        """Raw figures of those rows."""
        return self.metrics[self.run.judged_on]

    @property
    def judged_words(self) -> str:
        """Those scans in words, for a title."""
        return "test" if self.run.judged_on == "test" else "out of fold"


def read_run(ws: Workspace, name: str) -> Run:
    """Read `runs/<name>` and check it against what it was trained on.

    Raises
    ------
    MissingInput
        A file is not there; the message names the notebook that makes it.
    ValueError
        `predictions.csv` is not as the run wrote it, holds what is no prediction, puts a subject into two
        splits, or differs from `splits.csv` or `cohort.csv`; `splits.csv` contradicts itself.
    """
    source, history = f"runs/{name}/predictions.csv", ws.path("runs", name, "history.csv")
    members = read_csv(ws.need(source))
    settings = read_json(ws.need(f"runs/{name}/settings.json"), "variant", "fingerprint")
    if altered := find_altered(history.parent, settings):
        raise EvaluationError(
            f"runs/{name}: {' and '.join(altered)} {'is' if len(altered) == 1 else 'are'} not as this run "
            "wrote it and noted in settings.json: edited, gone, or another run's. Run the training notebook "
            "(04 or 05) again, with the same parameters; it writes the tables anew."
        )
    rows = check_splits(headline_rows(members, settings.get("variant", ""), source), source=source)
    splits = read_splits(ws)
    if settings.get("final"):
        splits = splits.assign(split="train", fold=-1)  # training dealt everybody to folds
    _compare(rows, splits, source)
    cohort = ws.read("cohort.csv")
    cohort["control"] = judge_controls(cohort)
    about = cohort.filter(["scan_id", "sex", "site", "diagnosis", "source", "control"])
    if "diagnosis" in about:
        about["diagnosis"] = about["diagnosis"].fillna("").astype(str)
    return Run(
        name=name,
        settings=settings,
        history=read_csv(history) if history.exists() else pd.DataFrame(),
        predictions=rows.merge(about, on="scan_id", how="left"),
    )


def digest_tables(**tables: pd.DataFrame) -> dict[str, str]:
    """Entries of settings.json: the SHA-256 of the CSV file that `write_csv` makes of each table.

    >>> list(digest_tables(predictions=pd.DataFrame({"age": [54.0]})))
    ['predictions_sha256']
    """
    texts = {name: table.to_csv(index=False, lineterminator="\n") for name, table in tables.items()}
    return {f"{name}_sha256": hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def find_altered(run_folder: Path, settings: dict[str, Any]) -> list[str]:
    """Tables of a run that are gone, or not as its settings.json noted (`digest_tables`); runs of earlier
    releases noted none."""
    noted = {f"{name}.csv": settings.get(f"{name}_sha256") for name in ("predictions", "history")}
    paths = {name: run_folder / name for name, digest in noted.items() if digest}
    return [n for n, path in paths.items() if not path.is_file() or sha256_of(path) != noted[n]]


def list_runs(workspace: Workspace) -> list[str]:
    """Names of the runs that have predictions, oldest first."""
    found = sorted(workspace.path("runs").glob("*/predictions.csv"), key=lambda path: path.stat().st_mtime)
    return [path.parent.name for path in found]


def reported_level(workspace: Workspace) -> float:
    """The level of the prediction interval in the workspace's report; `LEVEL` before there is one."""
    with suppress(MissingInput, KeyError, TypeError):
        return float(read_json(workspace.path("evaluation", "results.json"))["_parameters"]["level"])
    return LEVEL


def headline_rows(members: pd.DataFrame, variant: str, source: str = "predictions.csv") -> pd.DataFrame:
    """One row per scan from `predictions.csv`: the rows of the headline variant.

    A scan that several members predicted has their mean row where one was written (`fold` -1 on test scans),
    else the mean is taken here. Where the headline is `mean` and a scan has no such row (out-of-fold scans
    have one fold each), its members' mean stands for it.

    Raises
    ------
    EvaluationError
        No row has the headline variant, a column is missing, a row stands twice, or an age or prediction is
        no number of years that could be one. The message names `source`.
    """
    _check_members(members, source)
    known = sorted(members["variant"].unique())
    variant = known[0] if not variant and len(known) == 1 else variant
    if variant not in (*known, "mean"):
        raise EvaluationError(
            f"settings.json names the headline variant {variant!r}, but {source} has {known}. Run the "
            "training notebook again, or set `variant` in settings.json to one of these."
        )
    chosen = members[members["variant"] == variant]
    if variant == "mean":
        chosen = pd.concat([chosen, members[~members["scan_id"].isin(chosen["scan_id"])]])
    is_mean = (chosen["split"] == "test") & (chosen["fold"] == -1)
    chosen = chosen[~chosen["scan_id"].isin(chosen.loc[is_mean, "scan_id"]) | (chosen["fold"] == -1)]
    rows = chosen.groupby(KEYS, sort=False, dropna=False).agg(
        fold=("fold", "first"), age=("age", "first"), predicted_age=("predicted_age", "mean")
    )
    rows = rows.reset_index()
    rows.loc[rows["split"] == "test", "fold"] = -1
    return rows


def _check_members(members: pd.DataFrame, source: str) -> None:
    """Stop where `predictions.csv` has other columns, a row twice, or numbers that cannot be."""
    again = "Run the training notebook (04 or 05) again."
    if missing := [name for name in COLUMNS if name not in members]:
        raise EvaluationError(f"{source} lacks the columns {missing}; it has {list(members)}. {again}")
    predicted, (low, high) = members["predicted_age"], PREDICTED
    ages = members.groupby("scan_id")["age"].transform("nunique")
    for wrong, what in (
        (predicted.isna(), "scans have no predicted age"),
        (~predicted.between(low, high), f"scans have a predicted age beyond {low:g} to {high:g} years"),
        (~np.isfinite(members["age"]), "scans have no age"),
        (ages > 1, "scans have two ages"),
        (members.duplicated([*KEYS, "fold", "seed", "variant"]), "scans have the same row twice"),
    ):
        _refuse(members["scan_id"], wrong, f"{source}: {{}} {what}{{}}. {again}")


def read_splits(
    workspace: Workspace, with_volume: Sequence[str] | None = None, modality: str = "T1w"
) -> pd.DataFrame:
    """`splits.csv`, once it fits the cohort and, where given, the volumes.

    Parameters
    ----------
    workspace : Workspace
    with_volume : sequence of str, optional
        `scan_id` of every volume (`VolumeStore.scan_ids`). Then each scan must have one, or stand among those
        that gave none in notebook 03.
    modality : str
        What those volumes are of.

    Raises
    ------
    ValueError
        A subject is in two splits, a scan in two rows, a split or fold is none, or scans and ages are not
        those of the cohort or of the volumes; the message says which, and what to run from.

    Examples
    --------
    >>> splits = read_splits(ws, store.scan_ids)  # doctest: +SKIP
    """
    failed, known = workspace.path(name_of_modality("scans_without_volume.csv", modality)), None
    if with_volume is not None:
        known = [*with_volume, *(read_csv(failed)["scan_id"] if failed.exists() else ())]
    splits, cohort = check_splits(workspace.read("splits.csv"), known), workspace.read("cohort.csv")
    twice = cohort["scan_id"].duplicated()
    _refuse(cohort["scan_id"], twice, "cohort.csv: {} scans stand twice{}. Run from 01_data_access.")
    _refuse(
        splits["scan_id"],
        _differs(splits, cohort),
        "{} scans of splits.csv are not in cohort.csv, or have another age there{}. One of the two changed "
        "after 02_data_cleaning. Put it right and run from 02_data_cleaning.",
    )
    return splits


def _differs(rows: pd.DataFrame, others: pd.DataFrame) -> np.ndarray:
    """Whether each scan is absent from another table, or has another age there."""
    age = others.set_index("scan_id")["age"].reindex(rows["scan_id"])
    return ~np.isclose(age, rows["age"], rtol=0, atol=0.01)


def _compare(rows: pd.DataFrame, splits: pd.DataFrame, source: str) -> None:
    """Stop where the predictions are not of the scans, splits, folds and ages of `splits.csv`."""
    scans, dealt = rows["scan_id"], splits.set_index("scan_id").reindex(rows["scan_id"])
    same_folds = set(dealt["fold"]) == set(rows["fold"])  # else training dealt its own
    moved = (dealt["split"].to_numpy() != rows["split"]) | _differs(rows, splits)
    moved |= same_folds & (dealt["fold"].to_numpy() != rows["fold"])
    _refuse(
        scans,
        ~scans.isin(splits["scan_id"]),
        f"{source}: {{}} predicted scans are not in splits.csv{{}}. They were dropped after training; train "
        "again on the cleaned scans.",
    )
    _refuse(
        scans,
        moved,
        f"{source}: {{}} predicted scans differ from splits.csv in split, fold or age{{}}. One of the two "
        "changed after training; train again (04 or 05), or restore the splits the run was trained with.",
    )


def _refuse(scans: pd.Series, wrong: pd.Series | np.ndarray, sentence: str) -> None:
    """Raise the sentence with how many scans are wrong, and the first of them; nothing where none is."""
    if names := scans[np.asarray(wrong)].unique().tolist():
        raise EvaluationError(sentence.format(len(names), f" (first: {names[:5]})"))


def pick_controls(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of controls (`control` is "yes"; everybody where there are no diagnoses).

    Raises
    ------
    CorrectionRefused
        There are diagnoses, and none of them is known to be a word for controls.
    """
    control = judge_controls(rows)
    if len(rows) and (control == "").all():
        raise CorrectionRefused(
            f"None of the diagnoses is a known word for controls ({count_diagnoses(rows)}), and nothing is "
            "fitted on patients. Set control_words to the word for controls in notebook 01 of that workspace "
            "and run from there again (controls_only = False keeps the patients in the cohort)."
        )
    return rows[control == "yes"]


def calibrate(run: Run, level: float = LEVEL) -> Calibration:
    """Fit the bias correction on a run's calibration controls and the interval on all its calibration scans.

    Calibration scans are validation, or out-of-fold where folds were run. Test scans take no part. The one
    place where both are fitted, for the report and the bundle alike.
    """
    corrector, interval, reason = None, None, ""
    everybody = run.calibration_rows(controls_only=False)
    try:
        rows = run.calibration_rows()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what few subjects support is kept in the fitted corrector
            corrector = AgeBiasCorrector().fit(
                *(rows[name] for name in ("predicted_age", "age", "split")), subject_id=rows["subject_id"]
            )
    except CorrectionRefused as refused:
        reason = str(refused)
    if len(everybody):
        interval = ConformalInterval(level, run.calibrated_on + CHOSE * run.chose_epoch)
        interval.fit(*(everybody[name] for name in ("predicted_age", "age", "split", "subject_id")))
    return Calibration(corrector, reason, interval)


def add_gaps(run: Run, calibration: Calibration, level: float = LEVEL) -> pd.DataFrame:
    """The run's rows with gaps, corrected ages and intervals (`Calibration.add_gaps`).

    Where the run is judged out of fold, each fold's rows are corrected by what the other folds say, since the
    calibration of the bundle has seen them all.
    """
    if run.judged_on == "test":
        return calibration.add_gaps(run.predictions)
    rows = run.predictions
    parts = []
    for fold, held_out in rows.groupby("fold"):
        others = replace(run, predictions=rows[rows["fold"] != fold])
        parts.append(calibrate(others, level).add_gaps(held_out))
    return pd.concat(parts).loc[rows.index]


# --- known answers: only meaningful where the truth was planted; nothing here is accuracy on people ------


def read_truth(workspace: Workspace, path: str | Path = "") -> pd.DataFrame | None:
    """The planted truth: from `path`, else `demo/truth.csv` (or another folder's) in the workspace; None
    where there is none.

    With `attainable` (years, see `attainable_ages`) where there are people enough to fit it on.
    """
    places = [
        place for name in ("demo/", "", "*/") for place in sorted(workspace.root.glob(f"{name}truth.csv"))
    ]
    if not (str(path) or places):
        return None
    truth = read_csv(path or places[0])
    if truth["subject_id"].nunique() >= FEWEST_ATTAINABLE:
        truth["attainable"] = attainable_ages(truth)
    return truth


def add_truth(rows: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Rows that have a planted gap, with `planted_gap`, `brain_age` and, where the truth has it, `attainable`
    (years).

    Matched by `scan_id`, or by subject and session where a scan goes by another name. EvaluationError where
    the truth has other ages: it is another cohort's.
    """
    planted = truth.rename(columns={"gap": "planted_gap"})
    names = [name for name in ("planted_gap", "brain_age", "attainable") if name in planted]
    by_scan, by_session = (
        rows[keys].merge(planted[[*keys, *names]].drop_duplicates(keys), on=keys, how="left")[names]
        for keys in (["scan_id"], ["subject_id", "session_id"])
    )
    found = rows.reset_index(drop=True).join(by_scan.fillna(by_session)).dropna(subset=["planted_gap"])
    if "gap" in truth and "brain_age" in truth:
        true_age = found["brain_age"] - found["planted_gap"]
        sentence = (
            "{} scans have another age in truth.csv{}: it is another cohort's. Run 01_data_access again."
        )
        _refuse(found["scan_id"], ~np.isclose(true_age, found["age"], rtol=0, atol=0.1), sentence)
    return found


def check_known_answers(
    planted: pd.DataFrame, truth: pd.DataFrame | None, **bootstrap: int
) -> dict[str, Any]:
    """Errors beside those of the two references, and how much of the planted gap was recovered.

    Parameters
    ----------
    planted : DataFrame
        Test rows from `add_truth`; fewer than three say nothing.
    truth : DataFrame or None
        Of the whole cohort.

    Returns
    -------
    dict
        `mae` (`ours`, `oracle`, `attainable`), `mae_whole_cohort` and `recovered` (records); empty where
        nothing was planted.
    """
    if truth is None or len(planted) < 3:
        return {}
    ours = metrics.mean_with_interval(planted["gap"].abs(), planted["subject_id"], **bootstrap)
    return {
        "mae": {"ours": ours} | reference_errors(planted, **bootstrap),
        "mae_whole_cohort": reference_errors(truth, **bootstrap),
        "recovered": recovered_gap(planted, RECOVERED_KINDS, **bootstrap).to_dict("records"),
    }


def recovered_gap(planted: pd.DataFrame, kinds: dict[str, str], **bootstrap: int) -> pd.DataFrame:
    """How much of the planted gap is found: correlation and slope with 95 % subject bootstrap.

    Parameters
    ----------
    planted : DataFrame
        Test rows from `add_truth`, with the columns named in `kinds`.
    kinds : dict
        Name in words -> column of a recovered gap in years, such as {"raw": "gap"}; left out where it has
        gaps in it.

    Returns
    -------
    DataFrame
        Columns `kind`, `n`, `r`, `r_low`, `r_high`, `slope`, `slope_low`, `slope_high` (of recovered on
        planted; 1 is perfect).
    """
    found = {
        kind: metrics.measure_rows(planted.assign(age=planted["planted_gap"]), column, **bootstrap)
        for kind, column in kinds.items()
        if planted[column].notna().all()
    }
    rows = [{"kind": kind} | {name: one[name] for name in ("n", "r", "slope")} for kind, one in found.items()]
    return pd.DataFrame([metrics.flat(row) for row in rows])


def reference_errors(rows: pd.DataFrame, **bootstrap: int) -> dict[str, Any]:
    """MAE (years) of the two references of notebook 01 on the given scans.

    Parameters
    ----------
    rows : DataFrame
        From `add_truth`: the test rows, or those of the whole cohort.

    Returns
    -------
    dict
        `oracle`: knows the planted brain age and gives it as the age. `attainable`: the best regression of
        age on the planted anatomy, where there are people enough. Each {"value", "low", "high", "n",
        "n_subjects"}.
    """
    return {
        name: metrics.mean_with_interval((rows[column] - rows["age"]).abs(), rows["subject_id"], **bootstrap)
        for name, column in (("oracle", "brain_age"), ("attainable", "attainable"))
        if column in rows
    }
