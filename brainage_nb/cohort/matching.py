"""Which row of the table an image belongs to. Tolerant of padding, case and punctuation, never guessing.

`sub-1` is not `sub-10`, and what fits two subjects fits none. Knows names only: opens no file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pandas as pd

from brainage_nb.cohort.id_forms import (
    FORMS,
    Number,
    common_prefix,
    is_telling,
    joined,
    leading_number,
    longest_parts,
    number_of,
)
from brainage_nb.cohort.images import has_session, image_stem, parts_of

_SESSION_WORDS = {"ses", "session", "visit", "v", "timepoint", "time", "tp", "t", "wave", "w", "mr"}


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
    whole file name; the subject that the name states (`sub-01`, `IXI002-…`), else whole parts of file and
    folder names. Ids are compared as they are, then in any case, then without punctuation, then without
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
        self.forms = [(form, _index((form(one), one) for one in subjects)) for form in FORMS]
        stems = [(_stem(name), one) for one, name in zip(rows["subject_id"], rows["table_id"], strict=True)]
        stems += [(_stem(one), one) for one in subjects]
        self.files = [(form, _index((form(stem), one) for stem, one in stems)) for form in FORMS]
        self.parts = _index((joined(parts_of(one)), one) for one in subjects if is_telling(one))
        self.numbers = _index((number, one) for one in subjects if (number := number_of(one)))
        # patients A1…A60 and controls B1…B40: a file named 12 may be either, so one prefix has to be all
        prefixes = {prefix for prefix, _ in self.numbers}
        self.common_prefix = prefixes.pop() if len(prefixes) == 1 else ""
        self.image_prefix = common_prefix(_number_of_image(image) for image in images.itertuples())
        self.rows_of = {one: list(group.index) for one, group in rows.groupby("subject_id", sort=False)}
        self.subject_of = rows["subject_id"].to_dict()
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
    if found := _by_form([image.stem], people.files):
        return _found(found, image.subject_hint)
    # `sub-01-T1` is no BIDS label: such a name is searched like any other
    if image.subject_hint and "-" not in image.subject_hint:
        return _subject_by_label(image.subject_hint, people)
    folders = [name for name in reversed(image.folders.split("/")) if name]
    telling = [name for name in folders if is_telling(name)]
    if found := set().union(*(longest_parts(name, people.parts) for name in [image.stem, *telling])):
        return _found(found)
    if found := _by_form(telling, people.forms):
        return _found(found)
    return _subject_by_number([image.stem, *(name for name in folders if not has_session(name))], people)


def _by_form(names: list[str], forms: list[tuple[Callable[[str], str], dict[str, set]]]) -> set[str]:
    """Subjects whose id is one of the names: as it is, else in any case, else without punctuation."""
    for form, index in forms:
        if found := set().union(*(index.get(form(name), ()) for name in names)):
            return found
    return set()


def _subject_by_label(label: str, people: _People) -> Match:
    if found := _by_form([label], people.forms):
        return _found(found)
    number = number_of(label)
    return _found(people.by_number(number) if number else set(), label)


def _subject_by_number(names: list[str], people: _People) -> Match:
    """The subject whose number begins a name; several numbers in one path decide only if one is labelled."""
    claims = {number: (label, sure) for name in names for number, label, sure in leading_number(name)}
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
            prefixes[match.subjects[0]].add(number_of(match.label))
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
        stem = _stem(name)
        # a bare number is ADNI's image id, before which file names write an I
        yield (f"i{stem}" if stem.isdigit() else _telling_or_nothing(stem)), row
    written = rows["table_id"].str.replace(r"^sub-", "", case=False, regex=True)
    for row, name in written[written.str.len() > rows["subject_id"].str.len()].items():
        yield _telling_or_nothing(name), row


# --- the row --------------------------------------------------------------------------------------------


def _with_row(image: Any, match: Match, people: _People, sessions: dict[str, set[str]]) -> Match:
    named = longest_parts(image.stem, people.images)
    owners = {people.subject_of[row] for row in named}
    if image.contrast == "other" and (match.subjects or named) and not _is_named_whole(image.stem, people):
        return replace(match, reason="its name says that it is no T1-weighted scan")
    if len(named) == 1 and (not match.subjects or owners & set(match.subjects)):
        return Match(row=next(iter(named)), subjects=tuple(owners))
    if match.reason:
        return match
    if not match.subjects:
        stated = f": no row is of subject '{image.subject_hint}'" if image.subject_hint else ""
        return replace(match, reason=f"no id of the table is in its name{stated}")
    row, reason = _row_of_session(image.session_hint, match.subjects[0], people, sessions[match.subjects[0]])
    return replace(match, row=row, reason=reason)


def _is_named_whole(stem: str, people: _People) -> bool:
    return bool(_by_form([stem], people.files)) or joined(parts_of(stem)) in people.images


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
    number = number_of(label)
    if number is None:
        return label.casefold()
    return ("", number[1]) if number[0] in _SESSION_WORDS else number


def _are_numbered_apart(label: str, other: str) -> bool:
    return isinstance(_session(label), tuple) and isinstance(_session(other), tuple)


def _index(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, set]:
    index = defaultdict(set)
    for key, value in pairs:
        if key != "":
            index[key].add(value)
    return dict(index)


def _stem(name: str) -> str:
    """What a cell that may hold a path or a file name says without folders and ending."""
    return image_stem(PurePosixPath(name.replace("\\", "/")).name)


def _telling_or_nothing(name: str) -> str:
    return joined(parts_of(name)) if is_telling(name) else ""


def _number_of_image(image: Any) -> Number | None:
    if image.subject_hint:
        return number_of(image.subject_hint)
    for name in [image.stem, *reversed(image.folders.split("/"))]:
        if found := leading_number(name):
            return found[0][0]
    return None
