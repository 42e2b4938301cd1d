"""Who of a cohort is taken: the default rules of public sets (dementia, controls, retests), each shown.

Applied to scans that have found their row. Opens no file and judges no image: that is for cleaning.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pandas as pd

from brainage_nb.parameters import check_fields

DROPPED_COLUMNS = ["scan_id", "subject_id", "session_id", "rule", "detail"]
_WORDS = """
    control controls ctrl ctl con hc nc cn nl td healthy normal unaffected nondemented healthycontrol
    healthycontrols healthyvolunteer healthysubject hv normalcontrol normalcontrols cognitivelynormal
    typicallydeveloping"""
CONTROL_WORDS = frozenset(_WORDS.split())
"""What tables call people without a diagnosis; compared without case and punctuation. Bare numbers are not
among them: 1 is a patient in one table and a control in the next."""
_FIRST_VISITS = {"bl", "sc", "baseline", "screening", "m00", "init"}


@dataclass(frozen=True)
class CohortRules:
    """Rules for whom to take.

    Attributes
    ----------
    max_cdr : float
        People with a Clinical Dementia Rating above this at any of their scans are left out; a blank rating
        counts as none (OASIS-1 did not rate its young). Negative: nobody is left out for it.
    controls_only : bool
        Leave out whose diagnosis is not a control's, or blank, where the table has a diagnosis that knows
        controls.
    control_words : str
        Further words for controls, parted by commas.
    retests : {"all", "per_session", "first"}
        Scans of one person: all (they stay together in every split), one a session, or the first one.
    """

    max_cdr: float = 0.0
    controls_only: bool = True
    control_words: str = ""
    retests: str = "all"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Ruled:
    """A cohort after its rules.

    Attributes
    ----------
    cohort : DataFrame
        The scans that stay, in their order.
    dropped : DataFrame
        `scan_id, subject_id, session_id, rule, detail`, a row a scan that was left out.
    summary : DataFrame
        A row a rule: `rule, setting, scans left out, people left out, remark`.
    """

    cohort: pd.DataFrame
    dropped: pd.DataFrame
    summary: pd.DataFrame


def apply_rules(cohort: pd.DataFrame, rules: CohortRules) -> Ruled:
    """Apply the rules in the order CDR, controls, retests; each sees what the one before left.

    Parameters
    ----------
    cohort : DataFrame
        As `cohort.csv`; `cdr` and `diagnosis` may be absent.
    rules : CohortRules

    Returns
    -------
    Ruled
        Every scan is in `cohort` or in `dropped`.
    """
    steps = (
        ("max_cdr", rules.max_cdr, _by_cdr),
        ("controls_only", rules.controls_only, _by_diagnosis),
        ("retests", rules.retests, _by_repeat),
    )
    left, dropped, summary = cohort, [], []
    for rule, setting, judge in steps:
        details, remark = judge(left, rules)
        out = left[details != ""]
        # plain values: a Series would be aligned, and an empty frame would grow to its length
        told = details[out.index].to_numpy()
        dropped.append(out[["scan_id", "subject_id", "session_id"]].assign(rule=rule, detail=told))
        summary.append((rule, str(setting), len(out), out["subject_id"].nunique(), remark))
        left = left[details == ""]
    columns = ["rule", "setting", "scans left out", "people left out", "remark"]
    return Ruled(
        left.reset_index(drop=True),
        pd.concat(dropped, ignore_index=True)[DROPPED_COLUMNS],
        pd.DataFrame(summary, columns=columns),
    )


def _nobody(cohort: pd.DataFrame) -> pd.Series:
    return pd.Series("", index=cohort.index, dtype=str)


def _by_cdr(cohort: pd.DataFrame, rules: CohortRules) -> tuple[pd.Series, str]:
    """Why each scan is left out ("" where it stays), and a remark on the rule."""
    if rules.max_cdr < 0:
        return _nobody(cohort), "switched off"
    if "cdr" not in cohort or not (cohort["cdr"] != "").any():
        return _nobody(cohort), "the table has no CDR"
    rating = pd.to_numeric(cohort["cdr"], errors="coerce")
    worst = rating.groupby(cohort["subject_id"]).transform("max")
    details = worst.map(lambda cdr: f"CDR {cdr:g}, above {rules.max_cdr:g}" if cdr > rules.max_cdr else "")
    blank = int(rating.isna().sum())
    return details, f"{blank} scans have no rating and stay" if blank else "every scan is rated"


def _by_diagnosis(cohort: pd.DataFrame, rules: CohortRules) -> tuple[pd.Series, str]:
    if not rules.controls_only:
        return _nobody(cohort), "switched off"
    if "diagnosis" not in cohort or not (cohort["diagnosis"] != "").any():
        return _nobody(cohort), "the table has no diagnosis"
    words = CONTROL_WORDS | {_plain(word) for word in rules.control_words.split(",") if word.strip()}
    written = cohort["diagnosis"]
    known = ", ".join(
        f"{name} {count}" for name, count in written.replace("", "blank").value_counts().items()
    )
    control = written.map(_plain).isin(words)
    if not control.any():
        return (
            _nobody(cohort),
            f"NOT APPLIED: none of the diagnoses is a word for controls ({known}); set control_words",
        )
    details = written.map(lambda name: f"diagnosis '{name}', not a control" if name else "no diagnosis given")
    return details.where(~control, ""), f"diagnoses: {known}"


def _by_repeat(cohort: pd.DataFrame, rules: CohortRules) -> tuple[pd.Series, str]:
    people, scans = cohort["subject_id"].nunique(), len(cohort)
    repeated = f"{scans} scans of {people} people; all scans of a person stay in one split"
    if rules.retests == "all" or cohort.empty:
        return _nobody(cohort), repeated
    order = pd.DataFrame(
        {
            "subject": cohort["subject_id"],
            "session": cohort["session_id"],
            "age": pd.to_numeric(cohort["age"], errors="coerce").fillna(math.inf),
            "visit": cohort["session_id"].map(_visit_order),
            "scan": cohort["scan_id"],
        },
        index=cohort.index,
    ).sort_values(["age", "visit", "scan"], kind="stable")
    key = ["subject", "session"] if rules.retests == "per_session" else ["subject"]
    first = order.groupby(key, sort=False)["scan"].transform("first").reindex(cohort.index)
    details = "a repeat of " + first
    return details.where(first != cohort["scan_id"], ""), repeated


def _visit_order(label: str) -> tuple:
    """Baseline words first, then numbers by value (`MR2` before `MR10`)."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", label))
    return (label.lower() not in _FIRST_VISITS, numbers, label)


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower())
