"""What one age cell says, and what a text says of the unit of ages. Knows no table and no file.

An age is read, never completed: a bound (`89+`), a range (`20-25`) or a guess (`~35`) is not an age.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from dataclasses import dataclass
from importlib.resources import files

OLDEST = 120.0
"""Ages above this, in years, are codes or in other units (the longest documented life was 122 years)."""

DAYS_PER_YEAR = 365.25
PER_YEAR = {"years": 1.0, "months": 12.0, "weeks": DAYS_PER_YEAR / 7, "days": DAYS_PER_YEAR}
"""How many of a unit make one year."""


def fold(text: str) -> str:
    """A text without accents and in lower case, wide forms of letters and brackets as the usual ones."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()


def words_of(text: str) -> set[str]:
    """The words of a text, folded."""
    return set(fold(text).split())


def kind_of_words(kinds: dict[str, str]) -> dict[str, str]:
    """Word -> kind, from kind -> its words."""
    return {word: kind for kind, words in kinds.items() for word in words_of(words)}


WORDS = tomllib.loads((files(__package__) / "words.toml").read_text(encoding="utf-8"))
UNIT_OF = kind_of_words(WORDS["units"])
MISSING_CODES = set(WORDS["missing_codes"])
UNCLEAR = "unclear"
"""In place of a unit: something is said that is none of the units, or may be one of several."""

# Letters that are a unit where nothing else stands (UCUM and others); `m` may be months, minutes or men.
_CODES = {"a": "years", "d": "days", "w": "weeks"}
_ONE = words_of(WORDS["one"]["words"])
_UNITS = "|".join(sorted((re.escape(word) for word in UNIT_OF), key=len, reverse=True))
LONG_UNITS = "|".join(re.escape(word) for word in sorted(UNIT_OF, key=len, reverse=True) if len(word) > 1)
"""Alternatives of a regular expression: the words for units that are longer than a letter."""

_MENTION = re.compile(rf"(?<![^\W_])(?:{LONG_UNITS})(?![^\W_])")
_PARTS = r"\b(?:half|quarter|tenth|decade|trimest|semest|halb|quartal|hour|minute|second|lunar)\w*"
# What stands beside the word for a unit: `in months` states it, `6 months after` is a duration, …
_BEFORE = {
    "duration": r"(?:\d[\s-]*|\b(?:one|two|three|four|five|six|ten|twelve|few|several|some|many|over|within"
    r"|during)\s*)$",
    "part": rf"{_PARTS}\W*$",
    "in": r"\b(?:in|en|em|i|w|v|в|number of)\s+"
    r"(?:(?:full|whole|completed?|decimal|exact|rounded|ganzen)\s+)?$",
    "and": r"(?:\band|\bund|\bet|\by|\be|[&/+])\s*$",
    "opens": r"(?:^\W*|[(\[:;,=/]\s*(?:\w+ed\s+)?)$",
    "last": rf"\b(?:age|scan|mri|imaging|visit|session|test|study|birth|completed|full|whole|calendar|as"
    rf"|{LONG_UNITS})\W*$",
}
_AFTER = {
    "relative": r"\s*(?:after|before|later|apart|prior|ago|from|of follow|nach|vor|apres|avant)\b",
    "since": r"\s+(?:old|of age|since|seit|depuis|desde|dopo)\b",
    "end": r"\W*(?:$|[)\].;,])",
}
_IN_PARTS = re.compile(
    rf"\b(?:in|en|em)\s+(?:\S+\s+)?(?:{_PARTS}|bins|groups|bands|categories)\b|[(\[]m\.?[)\]]|\bmonthly age"
)
FROM_CONCEPTION = re.compile(
    r"gesta[tcz]ion|menstrual|conception|amenorrh|schwangersch|\b(pma|lmp|ssw)\b|^ga\b|\bga (in|at|weeks)\b"
)
"""Words of a folded text for an age that does not count from birth."""


def read_unit(text: str, *, is_unit: bool = False) -> str:
    """The unit that a text states (`age at the scan in months`).

    Parameters
    ----------
    text : str
        Plain words in any of the languages of `words.toml`.
    is_unit : bool
        The text is the entry of a field for units (`Months (rounded)`, `mo.`).

    Returns
    -------
    str
        A unit; "" where the text speaks of none; UNCLEAR where it states several, or speaks of months, weeks
        or days and does not say that the age is in them, or is an entry that is no unit.

    Examples
    --------
    >>> read_unit("Age in years; scans were 6 months apart")
    'years'
    """
    text = fold(text)
    found = _find_units_of_entry(text) if is_unit else _find_units_of_prose(text)
    return (found.pop() if len(found) == 1 else UNCLEAR) if found else ""


def _find_units_of_entry(text: str) -> set[str]:
    words = set(re.findall(r"[^\W\d_]+", text))
    units = {UNIT_OF[word] for word in words & UNIT_OF.keys()}
    if len(words) == 1:
        units |= {_CODES[word] for word in words & _CODES.keys()}
    has_parts = re.search(rf"{_PARTS}|\d[\s/-]*(?:{LONG_UNITS})|/\s*\d", text)
    return {UNCLEAR} if has_parts or not units else units


def _find_units_of_prose(text: str) -> set[str]:
    """The units stated most surely: after `in`, else where they open or close a phrase, else in passing."""
    surest, stated, passing = set(), set(), {UNCLEAR} if _IN_PARTS.search(text) else set()
    for match in _MENTION.finditer(text):
        unit, is_plural = UNIT_OF[match[0]], match[0] not in _ONE
        before = {kind for kind, rule in _BEFORE.items() if re.search(rule, text[: match.start()])}
        after = {kind for kind, rule in _AFTER.items() if re.match(rule, text[match.end() :])}
        if "duration" in before:
            continue
        if "relative" in after or "part" in before:
            passing.add(UNCLEAR)
        elif "in" in before or (surest and "and" in before):
            surest.add(unit)
        elif "opens" in before or "since" in after or (is_plural and "last" in before and "end" in after):
            stated.add(unit)
        elif is_plural:
            passing.add(unit if unit == "years" else UNCLEAR)
    return surest or stated or passing


# --- one cell -------------------------------------------------------------------------------------------

_NUMBER = r"(?:\d+(?:[.,]\d*)?|[.,]\d+)"
_BARE = re.compile(rf"\+?{_NUMBER}(?:e[+-]?\d+)?")
_WITH_UNIT = re.compile(rf"({_NUMBER})\s*({_UNITS})\.?(?:\s*old)?")
_YEARS_MONTHS = re.compile(
    r"(\d+)\s*(?:years|year|yrs|yr|y)\.?,?\s*(?:and\s*)?(\d+)\s*(?:months|month|mos|mo|m)\.?"
)
# A DICOM age string (VR `AS`) has three digits: `35M` may be a man of 35 and is not one.
_DICOM = re.compile(r"(\d{3})([ymwd])")
_DICOM_UNITS = {"y": "years", "m": "months", "w": "weeks", "d": "days"}
_NO_AGE = {
    rf"-{_NUMBER}": "is negative: a code for missing, not an age",
    rf"(?:[<>≤≥]=?|over|under|above|below|at least|up to)\s*{_NUMBER}.*|{_NUMBER}\s*(?:\+|>|<).*"
    rf"|{_NUMBER}\s*(?:{_UNITS})?\s*(?:and|or)\s*(?:older|over|above|more|younger|under|below|less).*": (
        "is a bound, not an age"
    ),
    rf"[\[(]?\s*{_NUMBER}\s*(?:{_UNITS})?\s*(?:-|to|\.\.|…|;|,\s)\s*{_NUMBER}\s*(?:{_UNITS})?\s*[\])]?": (
        "is a range, not an age"
    ),
    r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}(?:[ t]\d.*)?|\d{1,2}[-. ]?[a-z]{3,9}[-. ]?\d{0,4}"
    r"|[a-z]{3}[-. ]\d{2,4}": "looks like a date, not an age",
    r"(?s).*": "cannot be read as one age",
}
_DASHES = str.maketrans("‐‑‒–—−", "------")


@dataclass(frozen=True)
class Age:
    """One age cell as read.

    Attributes
    ----------
    years : float or None
        The age in years; None where the cell holds no usable age.
    reason : str
        Why there is no age; empty where there is one.
    rule : str
        What was done beyond reading a number of years (`84 months / 12`); empty where nothing.
    blank : bool
        The cell says nothing at all, or a code for missing.
    """

    years: float | None = None
    reason: str = ""
    rule: str = ""
    blank: bool = False


def is_missing(cell: str) -> bool:
    """Whether a cell says nothing (`n/a`, blank, `NaN`, `unknown`, …)."""
    return clean_cell(cell).lower() in WORDS["missing"]


def clean_cell(cell: str) -> str:
    """A cell's text without surrounding blanks and quotes, and with plain hyphens.

    No Unicode normalisation: it would turn `8²`, an 8 with a footnote, into 82.
    """
    return cell.translate(_DASHES).strip().strip("'\"").strip()


def bare_number(cell: str) -> float | None:
    """The number in a cell that holds nothing else, unless it is a code for missing; None otherwise."""
    text = clean_cell(cell)
    value = float(text.replace(",", ".")) if re.fullmatch(_NUMBER, text) else 0
    return None if value == 0 or value in MISSING_CODES else value


def parse_age(cell: str, unit: str = "years") -> Age:
    """Read one age cell.

    Parameters
    ----------
    cell : str
        The cell's text.
    unit : {"years", "months", "weeks", "days"}
        Unit of a bare number, which is no age where this is another word. A unit written in the cell
        (`023Y`, `11 months`) goes before it.

    Returns
    -------
    Age
        Years, or the reason why there are none. Decimal commas are read; `89+`, ranges, dates, negative
        numbers, 0, codes for missing and ages above 120 years are not ages.
    """
    text = clean_cell(cell).lower()
    if text in WORDS["missing"]:
        return Age(reason="no age in the table", blank=True)
    if _BARE.fullmatch(text):
        return _in_years(text, unit, stated=False)
    if match := _DICOM.fullmatch(text):
        return _in_years(match[1], _DICOM_UNITS[match[2]], stated=True)
    if match := _YEARS_MONTHS.fullmatch(text):
        shown = f"{int(match[1])} years {int(match[2])} months"
        return _check_plausible(int(match[1]) + int(match[2]) / 12, shown, shown)
    if match := _WITH_UNIT.fullmatch(text):
        return _in_years(match[1], UNIT_OF[match[2]], stated=True)
    why = next(why for rule, why in _NO_AGE.items() if re.fullmatch(rule, text))
    return Age(reason=f"'{cell.strip()}' {why}", blank=bool(re.fullmatch(r"-[\d.]+", text)))


def _in_years(number: str, unit: str, *, stated: bool) -> Age:
    if unit not in PER_YEAR:
        why = f"its unit '{unit}' is not one of {', '.join(PER_YEAR)}" if unit else "its unit is not said"
        return Age(reason=f"{number}: {why}")
    if unit == "days" and re.fullmatch(r"\d{1,3},\d{3}", number):
        return Age(reason=f"'{number}' days: the comma may stand between thousands or before decimals")
    value = float(number.replace(",", "."))
    if value in MISSING_CODES and unit in ("years", "months") and not stated:
        return Age(reason=f"'{number}' is a code for missing, not an age", blank=True)
    if value == 0:
        return Age(reason=f"'{number}' stands for missing or for a newborn: not used as an age")
    decimals = "decimal comma" if "," in number else ""
    rule = decimals if unit == "years" else f"{number} {unit} / {PER_YEAR[unit]:g}"
    return _check_plausible(value / PER_YEAR[unit], f"{number} {unit}", rule)


def _check_plausible(years: float, shown: str, rule: str) -> Age:
    if not 0 < years <= OLDEST:
        return Age(reason=f"{shown}: impossible, above {OLDEST:g} years")
    return Age(years=years, rule=rule)
