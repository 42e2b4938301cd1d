"""Which column of a participants table holds what, by its name. Reads no cells but the codes of a sex column.

Names are told apart by rules only: a column that merely might be an age at the scan is never taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from brainage_nb.tables.ages import UNCLEAR, UNIT_OF, fold, words_of

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

_NAMES = {
    "subject_id": """
        participant_id participantid participant subject_id subjectid subject subj_id sub_id subid subj sub
        patient_id patientid patient ixi_id ptid src_subject_id subjectkey person_id case_id record_id rid id
        ids mri_id mr_id mrid scan_id image_id image_data_id file_name filename file image""",
    "session_id": """
        session_id sessionid session ses_id visit_id visit visit_code viscode visit_number timepoint
        time_point wave session_label visit_label""",
    "sex": "sex gender m_f f_m sex_id sexe sex_at_birth biological_sex ptgender",
    "site": """
        site site_id siteid sites site_name center centre center_id centre_id acquisition_site scan_site
        institution hospital scanner scanner_id""",
    "diagnosis": """
        diagnosis dx dx_group dx_bl diagnostic_group diagnosis_group group research_group patient_group
        clinical_group disease""",
    "image_id": """
        image_data_id image_id image_uid mri_id mr_id mrid scan_id file_name filename file image image_path
        file_path path t1 t1w t1_path nifti scan""",
    "cdr": "cdr",
    "age_unit": """
        age_unit age_units ageunit ageunits unit_of_age units_of_age age_uom unit_age unit units einheit
        unidad unite alterseinheit unite_age age_unidad unidad_edad unidad_de_edad unit_age unitage
        time_unit""",
}
ROLE_NAMES = {role: tuple(names.split()) for role, names in _NAMES.items()}
"""Known names of each role, the surest first; compared in lower case, punctuation as `_`.

`SES` is not among them: in OASIS it is the socio-economic status.
"""

_OTHER_AGE_WORDS = words_of("alter lebensalter edad idade eta leeftijd alder wiek vek возраст 年龄 年齢 月龄")
AGE_WORDS = {"age", "ages"} | _OTHER_AGE_WORDS
_HARMLESS = words_of(
    """at in of the scan scanning mri mr imaging image acquisition acq exam examination visit session ses test
    testing study subject subj participant patient person current chronological exact decimal en em full
    completed rounded"""
)
_T1W = {"t1w", "mprage", "anat", "smri"}
"""Names the scan whose brain age is read, beside columns for other scans and for tests."""

_SCAN = {"scan", "scanning", "mri", "mr", "imaging", "image", "acquisition", "acq", "session", "ses", "visit"}
_GROUPS = {"group", "groups", "range", "ranges", "bin", "bins", "band", "bracket", "category", "cat", "class"}
_NOT_SAID = {"interview_age", "scan_age"}
"""Names with a fixed other meaning in one place: months (NDA), weeks after conception (dHCP)."""
_NO_UNIT = {"m", "w", "d", "h", "q", "j", "quarters", "half", "decades", "decade", "hours"}
"""Words beside an age that may be or are a unit which cannot be obeyed: `m` is months, or men."""
_NAMED_WAVES = {"baseline", "bl", "followup", "fu", "screening"}
_NUMBERED_WAVE = re.compile(
    r"(?:w|wave|t|tp|time|timepoint|v|visit|ses|session|scan|fu|followup|y|yr|year|m|mo)?\d+"
)


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
    units = ROLE_NAMES["age_unit"]
    found = [read_age_name(name) for name in names if plain_name(name) not in units]
    found = [column for column in found if AGE_WORDS & set(_words(column.name))]
    # `eta` and `alter` have other meanings in English
    return [column for column in found if not _OTHER_AGE_WORDS & set(_words(column.name))] or found


def read_age_name(name: str) -> AgeColumn:
    """What the name of a column of ages says."""
    words = _words(name)
    rest = [word for word in words if word not in AGE_WORDS]
    waves = [word for word in rest if word in _NAMED_WAVES or _NUMBERED_WAVE.fullmatch(word)]
    rest = [word for word in rest if word not in waves]
    unknown = [word for word in rest if word not in _HARMLESS | _T1W and word not in UNIT_OF]
    wave = "".join(waves)
    units = {UNIT_OF[word] for word in words if word in UNIT_OF}
    in_brackets = set(_words(" ".join(re.findall(r"[(\[{](.*?)[)\]}]", name))))
    if len(units) > 1 or set(unknown) & (_NO_UNIT | (in_brackets if not units else set())):
        units = {UNCLEAR}
    unit = "".join(units)
    if _GROUPS & set(unknown):
        return AgeColumn(name, "group", unit)
    if unknown or unit == UNCLEAR or plain_name(name) in _NOT_SAID:
        return AgeColumn(name, "other", unit or UNCLEAR * (plain_name(name) in _NOT_SAID), wave)
    kind = "wave" if wave else "age"
    return AgeColumn(name, kind, unit, wave, bool((_SCAN | _T1W) & set(rest)), bool(_T1W & set(rest)))


def _words(name: str) -> list[str]:
    """Words of a column name, split at punctuation and capitals; `ageyears`, `ageatscan` come apart too."""
    split = re.sub(r"([a-z])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3_\2\4", name)
    words = []
    for word in plain_name(split).split("_"):
        match = _GLUED.fullmatch(word) or _TURNED.fullmatch(word)
        words += [part for part in match.groups() if part] if match else [word]
    return words


_UNITS = "|".join(word for word in UNIT_OF if len(word) > 1)
_GLUED = re.compile(rf"({'|'.join(AGE_WORDS)})(at|in)?(scan|mri)?({_UNITS}|group|range|\d+)?")
_TURNED = re.compile(r"(scan|mri|subject|patient|participant)(age)")


# --- sex ------------------------------------------------------------------------------------------------

_SEX_WORDS = {
    "F": {"f", "female", "females", "woman", "women", "girl", "fem"},
    "M": {"m", "male", "males", "man", "men", "boy"},
}
_SEX_OF = {word: sex for sex, words in _SEX_WORDS.items() for word in words}


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
    for left, right in re.findall(r"(\w+)\s*[=:]\s*(\w+)", "; ".join(texts)):
        code, word = (
            (left.lower(), right.lower()) if right.lower() in _SEX_OF else (right.lower(), left.lower())
        )
        if word in _SEX_OF and _SEX_OF.get(code, _SEX_OF[word]) == _SEX_OF[word]:
            coding.setdefault(code, set()).add(_SEX_OF[word])
    return {code: sexes.pop() for code, sexes in coding.items() if len(sexes) == 1}
