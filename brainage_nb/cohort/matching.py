"""Which row of the table an image belongs to. Tolerant of padding, case and punctuation, never guessing.

`sub-1` is not `sub-10`, and what fits two subjects fits none. Knows names only: opens no file.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pandas as pd

from brainage_nb.cohort.images import has_session, image_stem, is_contrast_word, parts_of

_LABELS = {"sub", "subject", "subj", "patient", "participant", "person", "case"}
"""Words that announce a subject's number."""

_SESSION_WORDS = {"ses", "session", "visit", "v", "timepoint", "time", "tp", "t", "wave", "w", "mr"}
_ENOUGH_DIGITS = 5
"""A number this long may name a subject anywhere in a path; a shorter one only where a name begins."""

Number = tuple[str, int]
"""An id of letters and one number, without padding: `IXI002` is ("ixi", 2), and `2` is ("", 2)."""


@dataclass(frozen=True)
class Match:
    """What was found for one image.

    Attributes
    ----------
    row : int or None
        Index of the row, or None.
    reason : str
        Why there is no row; empty where there is one.
    subjects : tuple of str
        Subjects of the table that the image's name fits.
    label : str
        The id as the image writes it, where it differs from the table's by padding or prefix.
    """

    row: int | None = None
    reason: str = ""
    subjects: tuple[str, ...] = ()
    label: str = ""


def match_images(images: pd.DataFrame, rows: pd.DataFrame) -> list[Match]:
    """Find the row of every image.

    In this order, and the first that finds anything counts: the table's own image ids and file names; the
    subject that the name states (`sub-01`, `IXI002-…`), else the whole file name, else whole parts of file
    and folder names. Ids are compared as they are, then in any case, then without punctuation, then without
    padding; a bare number (`2`) only meets a name that begins with it, after the one prefix that most images
    share (`IXI002`). What then fits two subjects is refused. The session has to fit as well.

    Parameters
    ----------
    images : DataFrame
        As `find_images` gives.
    rows : DataFrame
        `subject_id, session_id, table_id` and, where known, `image_id`; index 0, 1, …

    Returns
    -------
    list of Match
        One an image, in order.
    """
    people = _People(rows, images)
    matches = _refuse_mixed_prefixes([_subject_of(image, people) for image in images.itertuples()])
    sessions = defaultdict(set)
    for image, match in zip(images.itertuples(), matches, strict=True):
        if len(match.subjects) == 1:
            sessions[match.subjects[0]].add(image.session_hint)
    return [
        _with_row(image, match, people, sessions)
        for image, match in zip(images.itertuples(), matches, strict=True)
    ]


class _People:
    """The subjects of a table, by every form in which the path of an image may name them."""

    def __init__(self, rows: pd.DataFrame, images: pd.DataFrame) -> None:
        subjects = list(dict.fromkeys(rows["subject_id"]))
        self.forms = [(form, _index((form(one), one) for one in subjects)) for form in _FORMS]
        self.parts = _index((_joined(parts_of(one)), one) for one in subjects if _is_telling(one))
        self.numbers = _index((number, one) for one in subjects if (number := _number(one)))
        # patients A1…A60 and controls B1…B40: a file named 12 may be either, so one prefix has to be all
        prefixes = {prefix for prefix, _ in self.numbers}
        self.common_prefix = prefixes.pop() if len(prefixes) == 1 else ""
        self.image_prefix = _common_prefix(_number_of_image(image) for image in images.itertuples())
        self.rows_of = {one: list(group.index) for one, group in rows.groupby("subject_id", sort=False)}
        self.session_of = rows["session_id"].to_dict()
        self.images = _index(_image_names(rows))

    def by_number(self, number: Number) -> set[str]:
        """Subjects of the same prefix and number; a bare number also meets the other side's common prefix."""
        prefix, value = number
        found = set(self.numbers.get(number, ()))
        if prefix and prefix == self.image_prefix:
            found |= self.numbers.get(("", value), set())
        if not prefix and self.common_prefix:
            found |= self.numbers.get((self.common_prefix, value), set())
        return found


# --- the subject ----------------------------------------------------------------------------------------


def _subject_of(image: Any, people: _People) -> Match:
    # `sub-01-T1` is no BIDS label: such a name is searched like any other
    if image.subject_hint and "-" not in image.subject_hint:
        return _subject_by_label(image.subject_hint, people)
    folders = [name for name in reversed(image.folders.split("/")) if name]
    telling = [name for name in folders if _is_telling(name)]
    if found := _by_form([image.stem], people):
        return _found(found)
    if found := set().union(*(_longest_parts(name, people.parts) for name in [image.stem, *telling])):
        return _found(found)
    if found := _by_form(telling, people):
        return _found(found)
    return _subject_by_number([image.stem, *(name for name in folders if not has_session(name))], people)


def _by_form(names: list[str], people: _People) -> set[str]:
    """Subjects whose id is one of the names: as it is, else in any case, else without punctuation."""
    for form, index in people.forms:
        if found := set().union(*(index.get(form(name), ()) for name in names)):
            return found
    return set()


def _subject_by_label(label: str, people: _People) -> Match:
    if found := _by_form([label], people):
        return _found(found)
    number = _number(label)
    return _found(people.by_number(number) if number else set(), label)


def _subject_by_number(names: list[str], people: _People) -> Match:
    """The subject whose number begins a name; several numbers in one path decide only if one is labelled."""
    claims = {number: (label, sure) for name in names for number, label, sure in _leading_number(name)}
    if len(claims) > 1:
        claims = {number: claim for number, claim in claims.items() if claim[1]} or claims
    if len(claims) > 1:
        shown = ", ".join(label for label, _ in claims.values())
        return Match(reason=f"several parts of its path could be the subject ({shown}): none taken")
    found = {one for number in claims for one in people.by_number(number)}
    return _found(found, next(iter(claims.values()))[0] if claims else "")


def _found(subjects: Iterable[str], label: str = "") -> Match:
    subjects = tuple(sorted(subjects))
    if len(subjects) > 1:
        shown = ", ".join(subjects[:5])
        return Match(reason=f"fits several subjects of the table ({shown}): none taken", subjects=subjects)
    return Match(subjects=subjects, label=label if subjects else "")


def _refuse_mixed_prefixes(matches: list[Match]) -> list[Match]:
    """Refuse images of different prefixes (`A12`, `B12`) that only a bare number ties to one subject."""
    prefixes = defaultdict(set)
    for match in matches:
        if match.label and len(match.subjects) == 1:
            prefixes[match.subjects[0]].add(_number(match.label))
    reason = "another image with another prefix claims the same bare number in the table: none taken"
    return [
        replace(match, reason=reason)
        if match.label and len(match.subjects) == 1 and len(prefixes[match.subjects[0]]) > 1
        else match
        for match in matches
    ]


def _image_names(rows: pd.DataFrame) -> Iterable[tuple[str, int]]:
    """Rows by the image they name: by an image id, a file name, or an id that carries a session."""
    for row, name in rows["image_id"].items() if "image_id" in rows else ():
        stem = image_stem(PurePosixPath(name.replace("\\", "/")).name)
        # a bare number is ADNI's image id, before which file names write an I
        yield (f"i{stem}" if stem.isdigit() else _telling_or_nothing(stem)), row
    written = rows["table_id"].str.replace(r"^sub-", "", case=False, regex=True)
    for row, name in written[written.str.len() > rows["subject_id"].str.len()].items():
        yield _telling_or_nothing(name), row


# --- the row --------------------------------------------------------------------------------------------


def _with_row(image: Any, match: Match, people: _People, sessions: dict[str, set[str]]) -> Match:
    named = _longest_parts(image.stem, people.images)
    owners = {subject for subject, rows in people.rows_of.items() if named & set(rows)}
    if len(named) == 1 and owners >= set(match.subjects):
        return Match(row=next(iter(named)), subjects=tuple(owners))
    if match.reason:
        return match
    if not match.subjects:
        stated = f": no row is of subject '{image.subject_hint}'" if image.subject_hint else ""
        return replace(match, reason=f"no id of the table is in its name{stated}")
    if image.contrast == "other" and not _is_named_whole(image.stem, people):
        return replace(match, reason="its name says that it is no T1-weighted scan")
    row, reason = _row_of_session(image.session_hint, match.subjects[0], people, sessions[match.subjects[0]])
    return replace(match, row=row, reason=reason)


def _is_named_whole(stem: str, people: _People) -> bool:
    return any(form(stem) in index for form, index in people.forms)


def _row_of_session(session: str, subject: str, people: _People, on_disk: set[str]) -> tuple[int | None, str]:
    """The row of a subject's session, or why there is none.

    A row without session serves all sessions of its subject. Where a subject has one row and one session on
    disk, the two belong together unless both are numbered, differently.
    """
    labels = {row: people.session_of[row] for row in people.rows_of[subject]}
    fitting = [row for row, label in labels.items() if session and _session(label) == _session(session)]
    fitting = fitting or [row for row, label in labels.items() if not label]
    if not fitting and len(labels) == 1 and len(on_disk) == 1:
        fitting = [row for row, label in labels.items() if not _are_numbered_apart(label, session)]
    if len(fitting) == 1:
        return fitting[0], ""
    known = ", ".join(label or "none" for label in labels.values())
    if fitting:
        return None, f"the table has {len(fitting)} rows for this session of subject {subject}: none taken"
    if not session:
        return None, f"its name states no session, and subject {subject} has rows for sessions {known}"
    return None, f"the table has no row for session {session} of subject {subject}, only for {known}"


def _session(label: str) -> Number | str:
    """A session's label in a form to compare: `01`, `1`, `W1` and `wave01` agree, `M12` stays apart."""
    number = _number(label)
    if number is None:
        return label.casefold()
    return ("", number[1]) if number[0] in _SESSION_WORDS else number


def _are_numbered_apart(label: str, other: str) -> bool:
    return isinstance(_session(label), tuple) and isinstance(_session(other), tuple)


# --- names ----------------------------------------------------------------------------------------------


def _without_punctuation(name: str) -> str:
    """Letters and digits in lower case; numbers that punctuation parts stay parted (`1_23` is not `12_3`)."""
    return re.sub(r"(?<!\d)_|_(?!\d)", "", _joined(parts_of(name)))


_FORMS = (str, str.casefold, _without_punctuation)


def _joined(parts: list[str]) -> str:
    return "_".join(parts).lower()


def _is_telling(name: str) -> bool:
    """Whether a name may identify someone by itself, wherever in a path it stands."""
    parts = parts_of(name)
    if all(is_contrast_word(part) or part.lower() in _LABELS for part in parts):
        return False
    longest = max((len(digits) for digits in re.findall(r"\d+", name)), default=0)
    return longest >= _ENOUGH_DIGITS or (len(name) > 1 and bool(re.search(r"[^\W\d_]", name)))


def _telling_or_nothing(name: str) -> str:
    return _joined(parts_of(name)) if _is_telling(name) else ""


def _longest_parts(name: str, index: dict[str, set]) -> set:
    """What whole runs of a name's parts stand for; a run inside a longer one that fits does not count."""
    parts = parts_of(name)
    spans = [
        (start, end)
        for start in range(len(parts))
        for end in range(start + 1, len(parts) + 1)
        if _joined(parts[start:end]) in index
    ]
    outer = [a for a in spans if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in spans)]
    return set().union(*(index[_joined(parts[start:end])] for start, end in outer))


def _number(name: str) -> Number | None:
    """A whole name as letters and one number, or None; `sub` and its like are no letters of an id."""
    match = re.fullmatch(r"([a-z]*)[-_ ]*(\d+)", name.strip().lower())
    return (match[1] if match[1] not in _LABELS else "", int(match[2])) if match else None


def _leading_number(name: str) -> list[tuple[Number, str, bool]]:
    """The number that begins a name, how it is written, and whether a word labels it as a subject's."""
    parts = parts_of(name)
    while parts and is_contrast_word(parts[0]):
        parts = parts[1:]
    for text in (parts[:1], parts[:2]):
        written = "".join(text)
        if number := _number(written):
            labelled = re.match(r"[a-z]*", written.lower())[0] in _LABELS
            return [(number, re.sub(r"\D+", "", written) if labelled else written, labelled)]
    return []


def _number_of_image(image: Any) -> Number | None:
    if image.subject_hint:
        return _number(image.subject_hint)
    for name in [image.stem, *reversed(image.folders.split("/"))]:
        if found := _leading_number(name):
            return found[0][0]
    return None


def _common_prefix(numbers: Iterable[Number | None]) -> str:
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


def _index(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, set]:
    index = defaultdict(set)
    for key, value in pairs:
        if key != "":
            index[key].add(value)
    return dict(index)
