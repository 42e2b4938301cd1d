"""Forms in which an id and a name can be compared: without case, punctuation, padding. Knows no table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from brainage_nb.cohort.images import is_contrast_word, parts_of

_LABELS = {"sub", "subject", "subj", "patient", "participant", "person", "case"}
"""Words that announce a subject's number."""

_ENOUGH_DIGITS = 5
"""A number this long may name a subject anywhere in a path; a shorter one only where a name begins."""

Number = tuple[str, int]
"""An id of letters and one number, without padding: `IXI002` is ("ixi", 2), and `2` is ("", 2)."""


def without_punctuation(name: str) -> str:
    """Letters and digits in lower case; numbers that punctuation parts stay parted (`1_23` is not `12_3`)."""
    return re.sub(r"(?<!\d)_|_(?!\d)", "", joined(parts_of(name)))


FORMS = (str, str.casefold, without_punctuation)
"""Ways to write a name so that two of them can be equal, the strictest first."""


def joined(parts: list[str]) -> str:
    """Parts of a name, put together in the one way in which runs of parts are compared."""
    return "_".join(parts).lower()


def is_telling(name: str) -> bool:
    """Whether a name may identify someone by itself, wherever in a path it stands."""
    parts = parts_of(name)
    if all(is_contrast_word(part) or part.lower() in _LABELS for part in parts):
        return False
    longest = max((len(digits) for digits in re.findall(r"\d+", name)), default=0)
    return longest >= _ENOUGH_DIGITS or (len(name) > 1 and bool(re.search(r"[^\W\d_]", name)))


def longest_parts(name: str, index: dict[str, set]) -> set:
    """What whole runs of a name's parts stand for; a run inside a longer one that fits does not count."""
    parts = parts_of(name)
    spans = [
        (start, end)
        for start in range(len(parts))
        for end in range(start + 1, len(parts) + 1)
        if joined(parts[start:end]) in index
    ]
    outer = [a for a in spans if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in spans)]
    return set().union(*(index[joined(parts[start:end])] for start, end in outer))


def number_of(name: str) -> Number | None:
    """A whole name as letters and one number, or None; `sub` and its like are no letters of an id."""
    match = re.fullmatch(r"([a-z]*)[-_ ]*(\d+)", name.strip().lower())
    return (match[1] if match[1] not in _LABELS else "", int(match[2])) if match else None


def leading_number(name: str) -> list[tuple[Number, str, bool]]:
    """The number that begins a name, how it is written, and whether a word labels it as a subject's."""
    parts = parts_of(name)
    while parts and is_contrast_word(parts[0]):
        parts = parts[1:]
    for text in (parts[:1], parts[:2]):
        written = "".join(text)
        if number := number_of(written):
            labelled = re.match(r"[a-z]*", written.lower())[0] in _LABELS
            return [(number, re.sub(r"\D+", "", written) if labelled else written, labelled)]
    return []


def common_prefix(numbers: Iterable[Number | None]) -> str:
    """The letters that numbered names begin with, or "" where they do not agree.

    More than half have to, and the others have to be few (a fifth) or all different, as stray files are.
    """
    prefixes = Counter(number[0] for number in numbers if number).most_common()
    if not prefixes:
        return ""
    (prefix, count), *others = prefixes
    rest = sum(other for _, other in others)
    stray = rest <= (count + rest) / 5 or all(other == 1 for _, other in others)
    return prefix if count > rest and stray else ""
