"""A trained model on another cohort: raw figures first, then site offset and calibration on named controls.
Frames in, frames out; predicting is the models' business."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from brainage_nb.cohort.rules import judge_controls
from brainage_nb.evaluation.correction import AgeBiasCorrector, CorrectionRefused, EvaluationError
from brainage_nb.evaluation.metrics import Metrics, flat, mean_with_interval, measure_rows
from brainage_nb.evaluation.runs import pick_controls

FEWEST_FOR_LINE = 20  # calibration subjects below which only an offset is fitted, not a slope


@dataclass
class ExternalEvaluation:
    """What a trained model does on another cohort.

    Attributes
    ----------
    metrics : dict
        Raw figures of all external scans. `mean_predictor_mae` is of the *training* cohort's mean age.
    offsets : DataFrame
        Mean gap of controls by site: `site, value, low, high, n, n_subjects` (years). Empty where nobody is
        known to be a control; a warning then says why.
    calibration : dict
        How it was calibrated: `kind` (`offset` or `line`), `n_subjects`, `subjects` (their names) and the
        fitted numbers.
    rest : DataFrame
        Raw and calibrated figures of everybody who did *not* calibrate: one row each; empty without
        calibration.
    predictions : DataFrame
        The rows given, with `gap`, `calibrates` and, where calibrated, `calibrated_age`, `calibrated_gap`.
        `predicted_age` stays raw.
    warnings : list of str
    """

    metrics: Metrics
    predictions: pd.DataFrame
    offsets: pd.DataFrame = field(default_factory=pd.DataFrame)
    calibration: dict[str, Any] = field(default_factory=dict)
    rest: pd.DataFrame = field(default_factory=pd.DataFrame)
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """All but the predictions, for `results.json`; names of people are left out."""
        return {
            "metrics": self.metrics,
            "offsets": self.offsets.to_dict("records"),
            "calibration": {name: value for name, value in self.calibration.items() if name != "subjects"},
            "rest": self.rest.to_dict("records"),
            "warnings": self.warnings,
        }


def refuse_trained_on(names: Sequence[str], seen: Sequence[bool], what: str = "subjects") -> None:
    """Stop where the model was trained on some of these.

    Parameters
    ----------
    names : sequence of str
        Subject ids, or image files, of the external cohort.
    seen : sequence of bool
        For each, whether it took part in training (a bundle knows by salted hashes: `trained_on`,
        `trained_on_files`).
    what : str
        Their kind, for the message.

    Raises
    ------
    EvaluationError
        Any of them did.
    """
    shared = sorted({str(name) for name, known in zip(names, seen, strict=True) if known})
    if shared:
        raise EvaluationError(
            f"{len(shared)} of {len(set(names))} {what} of this cohort took part in training (first: "
            f"{shared[:5]}). The figures would be too good: leave them out, or, where only the ids happen to "
            "be equal, rename them."
        )


def evaluate_external(
    predictions: pd.DataFrame,
    *,
    reference_age: float,
    trained_ages: tuple[float, float],
    calibrate_on: Collection[str] = (),
    **bootstrap: int,
) -> ExternalEvaluation:
    """Raw figures of an external cohort and, where controls are named for it, a calibration reported on the
    rest.

    Parameters
    ----------
    predictions : DataFrame
        One row per scan: `scan_id, subject_id, age, predicted_age` (raw, years) and, where known, `site,
        diagnosis, control`.
    reference_age : float
        Mean age of the training subjects, years.
    trained_ages : (float, float)
        Youngest and oldest training subject, years.
    calibrate_on : subject ids
        Controls that may calibrate; they are left out of the calibrated figures. Empty: no calibration.
    n_bootstrap, seed : int
        Of the subject bootstrap.

    Raises
    ------
    ValueError
        A named subject is not in the cohort or is not a control.
    """
    rows = predictions.reset_index(drop=True).assign(gap=lambda table: table["predicted_age"] - table["age"])
    rows["control"] = judge_controls(rows)
    rows["calibrates"] = rows["subject_id"].isin(set(calibrate_on))
    options, (low, high) = {"reference_age": reference_age} | bootstrap, trained_ages
    found = ExternalEvaluation(measure_rows(rows, **options), rows)
    if outside := int((~rows["age"].between(low, high)).sum()):
        found.warnings.append(
            f"{outside} of {len(rows)} scans are of people outside the ages the model was trained on "
            f"({low:.0f} to {high:.0f} years); its predictions there are extrapolations."
        )
    try:
        found.offsets = site_offsets(rows, **bootstrap)
        if lost := sorted(set(_sites(rows)) - set(found.offsets.get("site", ()))):
            found.warnings.append(f"No offset of {', '.join(lost)}: there are no controls.")
        if len(calibrate_on):
            found.calibration = _calibrate(rows, calibrate_on)
            found.rest = _measure_rest(rows[~rows["calibrates"]], options)
    except CorrectionRefused as refused:
        lost = ["site offset"] * found.offsets.empty + ["calibration"] * bool(len(calibrate_on))
        found.warnings.append(f"No {' and no '.join(lost)}. {refused}")
    return found


def site_offsets(rows: pd.DataFrame, **bootstrap: int) -> pd.DataFrame:
    """Mean raw gap of controls at each site, in years: what a new scanner adds, mixed with age bias."""
    controls = pick_controls(rows)
    return pd.DataFrame(
        [
            {"site": site} | mean_with_interval(part["gap"], part["subject_id"], **bootstrap)
            for site, part in controls.groupby(_sites(controls))
        ]
    )


def _sites(rows: pd.DataFrame) -> pd.Series:
    sites = rows["site"] if "site" in rows else pd.Series("all", index=rows.index)
    return sites.fillna("").astype(str).replace("", "not known")


def _calibrate(rows: pd.DataFrame, names: Collection[str]) -> dict[str, Any]:
    """Fit offset or line on the named controls and add the calibrated columns to `rows`."""
    chosen = rows[rows["calibrates"]]
    subjects = sorted(chosen["subject_id"].unique())
    patients = chosen.loc[~chosen.index.isin(pick_controls(chosen).index), "subject_id"]
    for wrong, what in (
        (sorted(set(names) - set(subjects)), "not in this cohort"),
        (sorted(set(patients)), "not controls"),
    ):
        if wrong:
            raise ValueError(
                f"{len(wrong)} calibration subjects are {what} (first: {wrong[:5]}); name its controls."
            )
    fitted: dict[str, Any] = {"n_subjects": len(subjects), "subjects": subjects}
    if len(subjects) >= FEWEST_FOR_LINE:
        line = AgeBiasCorrector().fit(
            chosen["predicted_age"], chosen["age"], "calibration", subject_id=chosen["subject_id"]
        )
        rows["calibrated_age"] = line.transform(rows["predicted_age"])
        fitted = {"kind": "line"} | fitted | line.to_dict()
    else:
        offset = float(chosen.groupby("subject_id")["gap"].mean().mean())
        rows["calibrated_age"] = rows["predicted_age"] - offset
        fitted = {"kind": "offset", "offset": offset} | fitted
    rows["calibrated_gap"] = rows["calibrated_age"] - rows["age"]
    return fitted


def _measure_rest(rest: pd.DataFrame, options: dict[str, Any]) -> pd.DataFrame:
    if not len(rest):
        raise ValueError(
            "Every subject of this cohort was named for calibration; nobody is left to report on."
        )
    forms = {"raw": "predicted_age", "calibrated on named controls": "calibrated_age"}
    return pd.DataFrame(
        [{"form": form} | flat(measure_rows(rest, column, **options)) for form, column in forms.items()]
    )
