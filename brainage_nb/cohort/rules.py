"""Who of a cohort is taken: the default rules of public sets (dementia, controls, retests), each shown.

Applied to scans that have found their row. Opens no file and judges no image: that is for cleaning.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass

import pandas as pd

from brainage_nb.cohort.names import WORDS
from brainage_nb.parameters import check_fields

_CONTROL, _PEOPLE, _ABBREVIATED = (
    "|".join(unicodedata.normalize("NFKD", term) for term in terms) for terms in WORDS["diagnoses"].values()
)
CONTROLS = "(controls)"  # all of them together
_FIRST_VISITS = set(WORDS["visits"]["first"])


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
        The scans that stay, in their order; where there are diagnoses or ratings, with `control` (see
        `judge_controls`).
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
        stays = details == ""
        # plain values: a Series would be aligned, and an empty frame would grow to its length
        told = details[~stays].to_numpy()
        out = left.loc[~stays, ["scan_id", "subject_id", "session_id"]].assign(rule=rule, detail=told)
        dropped.append(out)
        summary.append((rule, str(setting), len(out), out["subject_id"].nunique(), remark))
        left = left[stays]
    if "diagnosis" in cohort or "cdr" in cohort:
        left = left.assign(control=judge_controls(cohort, rules.control_words)[left.index])
    columns = ["rule", "setting", "scans left out", "people left out", "remark"]
    return Ruled(
        left.reset_index(drop=True),
        pd.concat(dropped, ignore_index=True),
        pd.DataFrame(summary, columns=columns),
    )


def judge_controls(cohort: pd.DataFrame, control_words: str = "") -> pd.Series:
    """Say of each scan whether it is of a control: "yes", "no", or "" where that cannot be known.

    The one judgement that the cohort rules, the bias correction, site offsets and group differences share.
    Notebook 01 keeps it in the column `control` of `cohort.csv`, which is taken as it stands.

    Parameters
    ----------
    cohort : DataFrame
        A row per scan of the *whole* cohort: one known word makes all other diagnoses patients. Without a
        diagnosis everybody is a control. Who was ever rated with a CDR above 0 is none.
    control_words : str
        Further words for controls, parted by commas; compared without case, accents and punctuation.

    Returns
    -------
    Series of str
        "" for everybody where there are diagnoses and none of them is a word for controls.
    """
    blank = pd.Series("", index=cohort.index, dtype=str)
    if "control" in cohort and (known := cohort["control"].fillna("")).ne("").any():
        return known.astype(str)
    written = cohort.get("diagnosis", blank).fillna("").astype(str).str.strip()
    own = {_plain(word) for word in re.split("[,;]", control_words)} - {""}
    control = written.map(lambda name: _plain(name) in own or _is_control_word(name)).astype(bool)
    if (written == "").all():
        control[:] = True
    elif not control.any():
        return blank
    if "cdr" in cohort:
        rating = pd.to_numeric(cohort["cdr"], errors="coerce")
        control &= ~(rating.groupby(cohort["subject_id"]).transform("max") > 0)
    return control.map({True: "yes", False: "no"}).astype(str)


def name_controls(rows: pd.DataFrame, controls: str | None = None) -> tuple[pd.Series, str]:
    """Each row's diagnosis, and the name of controls: the one given, else one name for all of them, however
    their diagnosis is written."""
    diagnosis = rows["diagnosis"].fillna("")
    if controls is not None:
        return diagnosis, controls
    return diagnosis.mask((judge_controls(rows) == "yes") & (diagnosis != ""), CONTROLS), CONTROLS


def count_diagnoses(cohort: pd.DataFrame) -> str:
    """The diagnoses of a cohort with their numbers of scans, as `AD 40, blank 2`."""
    counts = cohort["diagnosis"].fillna("").astype(str).replace("", "blank").value_counts()
    return ", ".join(f"{name} {count}" for name, count in counts.items())


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
    known = count_diagnoses(cohort)
    control = judge_controls(cohort.drop(columns="cdr", errors="ignore"), rules.control_words)
    if (control == "").all():
        remark = f"NOT APPLIED: none of the diagnoses is a word for controls ({known}); set control_words"
        return _nobody(cohort), remark
    named = cohort["diagnosis"].fillna("").astype(str)
    details = ("diagnosis '" + named + "', not a control").where(named != "", "no diagnosis given")
    return details.where(control != "yes", ""), f"diagnoses: {known}"


def _by_repeat(cohort: pd.DataFrame, rules: CohortRules) -> tuple[pd.Series, str]:
    people, scans = cohort["subject_id"].nunique(), len(cohort)
    repeated = f"{scans} scans of {people} people; all scans of a person stay in one split"
    if rules.retests == "all" or cohort.empty:
        return _nobody(cohort), repeated
    order = cohort.assign(
        age=pd.to_numeric(cohort["age"], errors="coerce").fillna(math.inf),
        visit=cohort["session_id"].map(_visit_order),
    ).sort_values(["age", "visit", "scan_id"], kind="stable")
    key = ["subject_id", "session_id"] if rules.retests == "per_session" else ["subject_id"]
    first = order.groupby(key, sort=False)["scan_id"].transform("first").reindex(cohort.index)
    details = "a repeat of " + first
    return details.where(first != cohort["scan_id"], ""), repeated


def _visit_order(label: str) -> tuple:
    """Baseline words first, then numbers by value (`MR2` before `MR10`)."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", label))
    return (label.lower() not in _FIRST_VISITS, numbers, label)


def _plain(word: str) -> str:
    """Letters and digits of any script, without case, accents and a number's `.0`."""
    word = unicodedata.normalize("NFKD", re.sub(r"\.0+$", "", word.strip())).casefold()
    return re.sub(r"[\W_]", "", word)


def _is_control_word(diagnosis: str) -> bool:
    """Whether every word of it is a word for controls or for people, and at least one for controls."""
    if "+" in diagnosis:  # `CU+` is another diagnosis than `CU`
        return False
    words = [_plain(word) for word in re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", diagnosis))]
    long = re.sub(r"\d", "", "".join(word for word in words if not re.fullmatch(_ABBREVIATED, word)))
    if not re.fullmatch(f"(?:{_CONTROL}|{_PEOPLE})*", long):
        return False
    return bool(re.search(_CONTROL, long)) or any(re.fullmatch(_ABBREVIATED, word) for word in words)
