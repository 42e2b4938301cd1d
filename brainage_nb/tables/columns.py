"""Which column of a participants table holds what, by its name. Reads no cells but the codes of a sex column.

Names are told apart by rules only: a column that merely might be an age at the scan is never taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from brainage_nb.tables.ages import LONG_UNITS, UNCLEAR, UNIT_OF, WORDS, fold, kind_of_words, words_of

COLUMN_PARAMETERS = {
    "subject_id": "subject_column",
    "age": "age_column",
    "sex": "sex_column",
    "site": "site_column",
    "session_id": "session_column",
    "diagnosis": "diagnosis_column",
    "image_id": "image_column",
    "age_unit": "age_unit",
}
"""Keyword of `read_table` -> parameter of notebook 01, the name that messages tell people to set."""

ROLE_NAMES = {role: tuple(names.split()) for role, names in WORDS["columns"].items()}
"""Known names of each role, the surest first; compared in lower case, punctuation as `_`."""

_WORDS = {kind: words_of(words) for kind, words in WORDS["age_names"].items()}
AGE_WORDS = _WORDS["age"] | _WORDS["other_languages"]
_SEX_OF = kind_of_words(WORDS["sex"])
_NUMBERED_WAVE = re.compile(
    r"(?:w|wave|t|tp|time|timepoint|v|visit|ses|session|scan|fu|followup|y|yr|year|m|mo)?\d+"
)
_GLUED = re.compile(rf"({'|'.join(AGE_WORDS)})(at|in)?(scan|mri)?({LONG_UNITS}|group|range|\d+)?")
_TURNED = re.compile(r"(scan|mri|subject|patient|participant)(age)")


@dataclass(frozen=True)
class AgeColumn:
    """What the name of a column that speaks of age says.

    Attributes
    ----------
    name : str
        The column.
    kind : {"age", "wave", "group", "other"}
        Age at the scan; age at one of several visits; age groups; another age (of onset, of a parent, …).
    unit : str
        Unit that the name states, or "", or UNCLEAR.
    wave : str
        The visit that the name states (`W1`), or "".
    at_scan : bool
        The name says that the age is that at the scan.
    t1w : bool
        The name says that this scan is the T1-weighted one.
    """

    name: str
    kind: str
    unit: str = ""
    wave: str = ""
    at_scan: bool = False
    t1w: bool = False


def plain_name(name: str) -> str:
    """A column name in lower case without accents, every run of other characters as one `_`."""
    return re.sub(r"[\W_]+", "_", fold(name)).strip("_")


def find_role(role: str, names: Iterable[str]) -> str | None:
    """The column of a role by its name, or None; of several, the one whose name is surest."""
    known = ROLE_NAMES[role]
    ranked = {}
    for name in names:
        # `SEX_ID (1=m, 2=f)` and `Age [years]`: what stands in brackets explains, it does not name
        plain = plain_name(re.sub(r"[(\[{].*", "", name)) or plain_name(name)
        if plain in known:
            ranked.setdefault(known.index(plain), name)
    return ranked[min(ranked)] if ranked else None


def is_header(names: list[str]) -> bool:
    """Whether a row of cells names ids and ages and holds no number, as only headers do."""
    if any(re.fullmatch(r"[\d.,]+", name) for name in names):
        return False
    return find_role("subject_id", names) is not None and bool(find_age_columns(names))


def find_age_columns(names: Iterable[str]) -> list[AgeColumn]:
    """Every column whose name speaks of age, with what the name says."""
    of_units = ROLE_NAMES["age_unit"]
    spoken = {name: set(_split_words(name)) for name in names if plain_name(name) not in of_units}
    found = [name for name, words in spoken.items() if words & AGE_WORDS]
    # `eta` and `alter` have other meanings in English
    surest = [name for name in found if not spoken[name] & _WORDS["other_languages"]]
    return [read_age_name(name) for name in surest or found]


def read_age_name(name: str) -> AgeColumn:
    """What the name of a column of ages says."""
    words = _split_words(name)
    waves = [word for word in words if word in _WORDS["waves"] or _NUMBERED_WAVE.fullmatch(word)]
    rest = {word for word in words if word not in waves} - AGE_WORDS
    unknown = rest - _WORDS["harmless"] - _WORDS["t1w"] - UNIT_OF.keys()
    units = {UNIT_OF[word] for word in words if word in UNIT_OF}
    in_brackets = set(_split_words(" ".join(re.findall(r"[(\[{](.*?)[)\]}]", name))))
    if len(units) > 1 or unknown & _WORDS["no_unit"] or (not units and unknown & in_brackets):
        units = {UNCLEAR}
    unit, wave = "".join(units), "".join(waves)
    if _WORDS["groups"] & unknown:
        return AgeColumn(name, "group", unit)
    if plain_name(name) in _WORDS["not_said"]:
        return AgeColumn(name, "other", unit or UNCLEAR, wave)
    if unknown or unit == UNCLEAR:
        return AgeColumn(name, "other", unit, wave)
    t1w = bool(_WORDS["t1w"] & rest)
    return AgeColumn(name, "wave" if wave else "age", unit, wave, t1w or bool(_WORDS["scan"] & rest), t1w)


def _split_words(name: str) -> list[str]:
    """Words of a column name, split at punctuation and capitals; `ageyears`, `ageatscan` come apart too."""
    split = re.sub(r"([a-z])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3_\2\4", name)
    words = []
    for word in plain_name(split).split("_"):
        match = _GLUED.fullmatch(word) or _TURNED.fullmatch(word)
        words += [part for part in match.groups() if part] if match else [word]
    return words


# --- sex ------------------------------------------------------------------------------------------------


def read_sex(cell: str, coding: dict[str, str]) -> str:
    """'F', 'M', or '' where the cell does not say or its code is nowhere explained."""
    text = cell.strip().lower()
    return coding.get(re.sub(r"\.0+$", "", text), "") or _SEX_OF.get(text, "")


def read_sex_codes(texts: Iterable[str]) -> dict[str, str]:
    """Codes of a sex column, where its name (`SEX_ID (1=m, 2=f)`) or its sidecar explains them.

    Parameters
    ----------
    texts : iterable of str
        The name, and what the sidecar says (`0=Men, 1=Women`; `Levels` as `0: Men`).

    Returns
    -------
    dict
        Code in lower case -> 'F' or 'M'; empty where nothing is explained (1 and 2 alone say nothing). A code
        that is explained as both is none.
    """
    coding: dict[str, set[str]] = {}
    for left, right in re.findall(r"(\w+)\s*[=:]\s*(\w+)", "; ".join(texts).lower()):
        code, word = (left, right) if right in _SEX_OF else (right, left)
        if word in _SEX_OF and _SEX_OF.get(code, _SEX_OF[word]) == _SEX_OF[word]:
            coding.setdefault(code, set()).add(_SEX_OF[word])
    return {code: sexes.pop() for code, sexes in coding.items() if len(sexes) == 1}
