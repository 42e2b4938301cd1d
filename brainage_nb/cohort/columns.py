"""Which column of a participants table holds what, by its name. Reads no cells but the codes of a sex column.

Names are told apart by rules only: a column that merely might be an age at the scan is never taken.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from brainage_nb.cohort.ages import UNIT_OF
from brainage_nb.cohort.cells import TextTable

_NAMES = {
    "subject_id": """
        participant_id participantid participant subject_id subjectid subject subj_id sub_id subid subj sub
        patient_id patientid patient ixi_id ptid src_subject_id subjectkey person_id case_id rid id ids mri_id
        mr_id mrid scan_id image_id image_data_id file_name filename file image""",
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
}
ROLE_NAMES = {role: tuple(names.split()) for role, names in _NAMES.items()}
"""Known names of each role, the surest first; compared in lower case, punctuation as `_`.

`SES` is not among them: in OASIS it is the socio-economic status.
"""

AGE_WORDS = {"age", "ages"}
_HARMLESS = {
    *(
        "at",
        "in",
        "of",
        "the",
        "scan",
        "scanning",
        "mri",
        "mr",
        "imaging",
        "image",
        "acquisition",
        "acq",
        "exam",
    ),
    *("examination", "visit", "session", "ses", "test", "testing", "study", "subject", "subj", "participant"),
    *("patient", "person", "current", "chronological", "exact", "decimal"),
}
_SCAN = {"scan", "scanning", "mri", "mr", "imaging", "image", "acquisition", "acq", "session", "ses", "visit"}
_GROUPS = {"group", "groups", "range", "ranges", "bin", "bins", "band", "bracket", "category", "cat", "class"}
_NOT_SAID = {"interview_age", "scan_age"}
"""Names with a fixed other meaning in one place: months (NDA), weeks after conception (dHCP)."""
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
        Unit that the name states, or "".
    wave : str
        The visit that the name states (`W1`), or "".
    at_scan : bool
        The name says that the age is that at the scan.
    """

    name: str
    kind: str
    unit: str = ""
    wave: str = ""
    at_scan: bool = False


def plain_name(name: str) -> str:
    """A column name in lower case without accents, every run of other characters as one `_`."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "_", letters.lower()).strip("_")


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


def existing_column(table: TextTable, wanted: str, role: str) -> str:
    """The column that a person named for a role; case and punctuation may differ where that leaves one."""
    if wanted in table.cells:
        return wanted
    alike = [name for name in table.cells if plain_name(name) == plain_name(wanted)]
    if len(alike) != 1:
        raise table.error(f"{role} = {wanted!r} is not a column", f"set {role} to one of the columns")
    return alike[0]


def age_columns(names: Iterable[str]) -> list[AgeColumn]:
    """Every column whose name speaks of age, with what the name says."""
    return [column for name in names if (column := _age_column(name))]


def _age_column(name: str) -> AgeColumn | None:
    words = _words(name)
    if not AGE_WORDS & set(words):
        return None
    rest = [word for word in words if word not in AGE_WORDS]
    waves = [word for word in rest if word in _NAMED_WAVES or _NUMBERED_WAVE.fullmatch(word)]
    rest = [word for word in rest if word not in waves]
    units = {UNIT_OF[word] for word in rest if word in UNIT_OF}
    unknown = [word for word in rest if word not in _HARMLESS and word not in UNIT_OF]
    unit = units.pop() if len(units) == 1 else ""
    wave = "".join(waves)
    if _GROUPS & set(unknown):
        return AgeColumn(name, "group")
    if unknown or units or plain_name(name) in _NOT_SAID:
        return AgeColumn(name, "other", unit, wave)
    return AgeColumn(name, "wave" if wave else "age", unit, wave, bool(_SCAN & set(rest)))


def _words(name: str) -> list[str]:
    """Words of a column name, parted at punctuation and capitals; `ageyears`, `ageatscan` come apart too."""
    parted = re.sub(r"([a-z])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3_\2\4", name)
    words = []
    for word in plain_name(parted).split("_"):
        glued = re.fullmatch(
            r"(age)(at|in)?(scan|mri|years?|yrs?|months?|weeks?|days?|group|range|\d+)", word
        )
        turned = re.fullmatch(r"(scan|mri|subject|patient|participant)(age)", word)
        match = glued or turned
        words += [part for part in match.groups() if part] if match else [word]
    return words


# --- sex ------------------------------------------------------------------------------------------------

_SEX_WORDS = {
    "F": {"f", "female", "females", "woman", "women", "girl", "fem"},
    "M": {"m", "male", "males", "man", "men", "boy"},
}
_SEX_OF = {word: sex for sex, words in _SEX_WORDS.items() for word in words}


def read_sex(cell: str, coding: Mapping[str, str]) -> str:
    """'F', 'M', or '' where the cell does not say or its code is nowhere explained."""
    text = cell.strip().lower()
    return coding.get(re.sub(r"\.0+$", "", text), "") or _SEX_OF.get(text, "")


def sex_coding(name: str, levels: Mapping[str, str] | None = None) -> dict[str, str]:
    """Codes of a sex column, where its name (`SEX_ID (1=m, 2=f)`) or its sidecar's `Levels` explains them.

    Returns
    -------
    dict
        Code in lower case -> 'F' or 'M'; empty where nothing is explained (1 and 2 alone say nothing).
    """
    pairs = re.findall(r"(\w+)\s*[=:]\s*(\w+)", name)
    pairs += [(str(code), str(word)) for code, word in (levels or {}).items()]
    coding = {}
    for left, right in pairs:
        code, word = (left, right) if right.lower() in _SEX_OF else (right, left)
        if word.lower() in _SEX_OF:
            coding[code.lower()] = _SEX_OF[word.lower()]
    return coding
