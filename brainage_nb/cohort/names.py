"""What the parts of names tell: who, when, where, what was measured. The words are in `words.toml`.

Knows no cohort and no table; which part of a path is the subject is for matching to decide.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple


def read_toml(name: str) -> dict:
    """A table of texts that lies beside this module."""
    return tomllib.loads((files(__package__) / name).read_text(encoding="utf-8"))


WORDS: dict[str, dict[str, list[str]]] = {
    topic: {kind: words.split() for kind, words in kinds.items()}
    for topic, kinds in read_toml("words.toml").items()
}
"""The words of `words.toml`, by topic and by what they tell."""
ROLES = {role: set(words) for role, words in WORDS["parts"].items()}
_CONTRASTS = {kind: set(WORDS["images"][kind]) for kind in ("label", "T1", "other")}
_LABELS = ("when", "maybe when", "where")
"""Roles of words that a number may follow: `visit 2`, `site_1`."""
_PART = re.compile(
    r"[^\s!-/:-@\[-`{-~\u00a0-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u2000-\u206f\u3000-\u303f]+"
)
DATE = re.compile(
    r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{0,9}"
    r"|(?:[0-2]\d|3[01])(?:[0-2]\d|3[01])(?:19|20)\d\d|(?:19|20)\d\d"
    r"|\d{1,2}(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)(?:\d\d)?\d\d"
)
_SPANS_OF_WHEN = (
    re.compile(r"(?:^|_)((?:ses|run|task|acq|rec|dir|desc|space|res|ce|echo)-[^_]+)", re.IGNORECASE),
    re.compile(
        r"(?<!\d)(?=((?:19|20)\d\d([^\d])(?:\d|[012]\d|3[01])\2(?:\d|[012]\d|3[01])(?!\d)"
        r"|(?:\d|[012]\d|3[01])([^\d])(?:\d|[012]\d|3[01])\3(?:19|20)\d\d(?!\d)))"
    ),
)
"""BIDS entities, and dates of three numbers in any order that people write."""
_GLUED = re.compile(
    rf"((?:{'|'.join(ROLES['who'])})(?=\d))?(.*?)((?<=\d)(?:ses|v|visit|run|tp|t1|t1w|mprage)\d*)?",
    re.IGNORECASE,
)
_ENOUGH_DIGITS = 5
"""A number this long may name a subject by itself; a shorter one needs the cohort."""


class Part(NamedTuple):
    """A part of a name: as compared, as written, what it tells, its letters before a digit, its shape."""

    text: str
    written: str
    role: str
    letters: str
    shape: str


def parts_of(name: str) -> list[str]:
    """The parts of a name between blanks and punctuation of any script."""
    return _PART.findall(name)


def read_contrast(parts: Iterable[str]) -> str:
    """What the parts of a file name say was measured: "T1", "other" or ""."""
    words = {part.lower() for part in parts}
    return next((kind.replace("label", "other") for kind in _CONTRASTS if words & _CONTRASTS[kind]), "")


@lru_cache(maxsize=100_000)
def read_parts(name: str) -> tuple[Part, ...]:
    """The parts of a folder's or a file's name, with what their words say they are."""
    name = re.sub(r"(?<!\d)(\d)\.(\d)(?=T)", r"\1\2", name, flags=re.IGNORECASE)  # 1.5T
    whens = [match.span(1) for pattern in _SPANS_OF_WHEN for match in pattern.finditer(name)]
    glued = [_GLUED.fullmatch(name, *part.span()) for part in _PART.finditer(name)]
    spans = [match.span(group) for match in glued for group in (1, 2, 3) if match[group]]
    texts = [unicodedata.normalize("NFKC", name[start:end]).casefold() for start, end in spans]
    parts = []
    for (start, end), before, text, after in zip(spans, ["", *texts], texts, [*texts[1:], ""], strict=False):
        is_when = any(first <= start < last for first, last in whens)
        role = "when" if is_when else _find_role(text, before, after)
        shape = re.sub(r"\d+", "n", re.sub(r"\D+", "a", text))
        parts.append(Part(text, name[start:end], role, re.match(r"\D*", text)[0], shape))
    return tuple(parts)


def _find_role(text: str, before: str, after: str) -> str:
    """What a part tells: `who` announces a subject; "" is open."""
    word = re.fullmatch(r"(\D*)(\d{0,4})", text)
    letters, digits = word.groups() if word else (text, "")
    if text in ROLES["who"] and after and (text == "sub" or re.search(r"\d", after)):
        known = re.match(r"\D*", after)[0]
        return "" if known in ROLES["when"] | ROLES["where"] else "who"
    if DATE.fullmatch(text):
        return "maybe when" if len(text) < 5 else "when"
    if not letters and (role := next((role for role in _LABELS if before in ROLES[role]), "")):
        return role
    if read_contrast([text]) or text in ROLES["what"]:
        return "what"
    if re.fullmatch(r"\d{1,2}(t|tesla)", text):
        return "where"
    known = next((role for role in (*_LABELS, "maybe where") if letters in ROLES[role]), "")
    return known if digits or known == "when" else ""


def read_id(name: str) -> list[Part]:
    """The parts of a table's id, without the words that announce it."""
    parts = read_parts(name)
    return [part for part in parts if part.text not in ROLES["who"]] or list(parts)


def find_forms(parts: Iterable[Part]) -> tuple[str, ...]:
    """A run of parts as written, in lower case, without punctuation (but `1_23` is not `12_3`), unpadded."""
    written, text = "_".join(part.written for part in parts), join_parts(parts)
    together = re.sub(r"(?<!\d)_|_(?!\d)", "", text)
    return written, text, together, unpadded(together)


def join_parts(parts: Iterable[Part]) -> str:
    """A run of parts as they are compared, with `_` between."""
    return "_".join(part.text for part in parts)


def unpadded(text: str) -> str:
    """Text without the zeros before its numbers."""
    return re.sub(r"(?<!\d)0+(?=\d)", "", text)


@lru_cache(maxsize=100_000)
def is_telling(name: str) -> bool:
    """Whether a name may identify someone by itself, wherever in a path it stands."""
    if all(read_contrast([part]) or part.casefold() in ROLES["who"] for part in parts_of(name)):
        return False
    longest = max(map(len, re.findall(r"\d+", name)), default=0)
    return longest >= _ENOUGH_DIGITS or (len(name) > 1 and bool(re.search(r"[^\W\d_]", name)))
