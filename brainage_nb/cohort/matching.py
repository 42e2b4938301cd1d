"""Which row of the table an image belongs to: one pattern read over the whole cohort, or a refusal.

Every part of every path that equals an id of the table is a candidate. Where in the path the subject stands
is decided by all images together: the place whose values are ids, and where different images give different
people. `sub-1` is not `sub-10`, and what fits two subjects fits none. Knows names only: opens no file.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pandas as pd

from brainage_nb.cohort.images import contrast_of, image_stem, is_contrast_word, parts_of, spans_of_parts

_WORDS = {
    role: set(words.split())
    for role, words in {
        "who": "sub subj subject participant",
        "when": """
            ses sess session visit vis tp timepoint time wave baseline bl fu followup retest pre post
            screening run rec acq echo mr rep repeat task""",
        "maybe when": "v t scan img image im series ser day file vol",
        "where": "site center centre scanner",
        "maybe where": "study project proj cohort group grp batch arm lab block",
        "what": """
            anat mri nii nifti raw rawdata quasiraw preproc orig original struct structural anatomical
            brain head defaced deface anon reface bet stripped n4 crop cropped norm gd 3d iso sag sagittal
            ax axial cor coronal scan scans image images data file""",
    }.items()
}
"""Words of names by what they tell; those with `maybe` do so where another number may be the subject."""
_LABELS = ("when", "maybe when", "where")
"""Roles of words that a number may follow: `visit 2`, `site_1`."""
_PASSING = {"who", "what", "when", "maybe when"}
"""Roles of parts in which images of one person may differ; where they were made is none of them."""
_LATER = re.compile(r"[dmwyre]\d{1,3}|\d{1,3}(?:m|mo|months?|y|yrs?|w|wk|d|days?)")
_DATE = re.compile(
    r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{0,9}"
    r"|(?:[0-2]\d|3[01])(?:[0-2]\d|3[01])(?:19|20)\d\d|(?:19|20)\d\d"
    r"|\d{1,2}(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)(?:\d\d)?\d\d"
)
_ENTITY = re.compile(r"(?:^|_)(?:ses|run|task|acq|rec|dir|desc|space|res|ce|echo)-[^_]+", re.IGNORECASE)
_GLUED = re.compile(
    rf"((?:{'|'.join(_WORDS['who'])})(?=\d))?(.*?)((?<=\d)(?:ses|v|visit|run|tp|t1|t1w|mprage)\d*)?"
)

_STATED, _TELLING, _WHOLE_NUMBER, _NUMBER, _LOOSE_NUMBER = 8.0, 4.0, 1.9, 1.0, 0.9
"""What an id in a path is worth; a place is preferred to another that is worth less than half as much."""
_ENOUGH_DIGITS = 5
"""A number this long may name a subject by itself; a shorter one needs the cohort."""


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
    session : str
        The session that the name states, or "".
    visit : str
        What else may part images of one person in time: a date, a number after the id.
    """

    row: int | None = None
    reason: str = ""
    subjects: tuple[str, ...] = ()
    label: str = ""
    session: str = ""
    visit: str = ""


def match_images(images: pd.DataFrame, rows: pd.DataFrame) -> list[Match]:
    """Find the row of every image.

    Image ids and file names that the table lists decide by themselves. All else the cohort decides: the
    places in a path (after `sub-`, the second part of the file name, the first folder, …) where ids of the
    table stand are compared, and the one that gives most people, best as the table writes them, explains all
    images that have it. Where another place explains them about as well and gives other people, they are
    refused with both readings. Images whose paths differ in more than session, run and contrast never share a
    subject. The session has to fit as well.

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
    names = [_Name(image) for image in images.itertuples()]
    people = _People(rows)
    cohort = _Cohort(names, people)
    _refuse_shared(cohort)
    matches = [_match_of(n, cohort) for n in range(len(names))]
    sessions = defaultdict(set)
    for match in matches:
        if len(match.subjects) == 1:
            sessions[match.subjects[0]].add(match.session)
    return [_with_row(*pair, people, sessions) for pair in zip(names, matches, strict=True)]


# --- names ----------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A part of a name: as compared, as written, what it tells, and its letters before the first digit."""

    text: str
    written: str
    role: str
    letters: str
    shape: str


@lru_cache(maxsize=100_000)
def _read_parts(name: str) -> tuple[_Part, ...]:
    """The parts of a folder's or a file's name, with what their words say they are."""
    name = re.sub(r"(?<!\d)(\d)\.(\d)(?=T)", r"\1\2", name, flags=re.IGNORECASE)  # 1.5T
    entities = [match.span() for match in _ENTITY.finditer(name)]
    written, inside, gaps, last = [], [], [], 0
    for start, end in spans_of_parts(name):
        gaps.append(name[last:start])
        last = end
        glued = [piece for piece in _GLUED.fullmatch(name[start:end].casefold()).groups() if piece]
        for piece in glued:
            written.append(name[start : start + len(piece)] if len(glued) > 1 else name[start:end])
            inside.append(any(first <= start < stop for first, stop in entities))
            start += len(piece)
        gaps += [""] * (len(glued) - 1)
    texts = [unicodedata.normalize("NFKC", piece).casefold() for piece in written]
    roles: list[str] = []
    for number, text in enumerate(texts):
        after = texts[number + 1] if number + 1 < len(texts) else ""
        before = texts[number - 1] if number else ""
        roles.append("when" if inside[number] else _role(text, after, before))
    for start in range(len(texts)):
        if _is_date(texts[start : start + 3]) and gaps[start + 1] == gaps[start + 2]:
            roles[start : start + 3] = ["when"] * 3
    return tuple(
        _Part(text, raw, role, re.match(r"\D*", text)[0], re.sub(r"\d+", "n", re.sub(r"\D+", "a", text)))
        for text, raw, role in zip(texts, written, roles, strict=True)
    )


def _role(text: str, after: str, before: str) -> str:
    """What a part tells: `who` announces a subject; "" is open."""
    word = re.fullmatch(r"(\D*)(\d{0,4})", text)
    letters, digits = word.groups() if word else (text, "")
    if text in _WORDS["who"] and after and (text == "sub" or re.search(r"\d", after)):
        known = re.match(r"\D*", after)[0]
        return "" if known in _WORDS["when"] | _WORDS["where"] else "who"
    if _DATE.fullmatch(text):
        return "maybe when" if len(text) < 5 else "when"
    if not letters and (role := next((role for role in _LABELS if before in _WORDS[role]), "")):
        return role
    if is_contrast_word(text) or text in _WORDS["what"]:
        return "what"
    if re.fullmatch(r"\d{1,2}(t|tesla)", text):
        return "where"
    known = next((role for role in (*_LABELS, "maybe where") if letters in _WORDS[role]), "")
    return known if digits or known == "when" else ""


def _is_date(texts: list[str]) -> bool:
    """Whether three parts are day, month and year, in any order that people write."""
    if len(texts) < 3 or not all(text.isdecimal() for text in texts):
        return False
    first, middle, last = texts
    first, last = (last, first) if len(first) == 4 else (first, last)
    return bool(
        re.fullmatch(r"(?:19|20)\d\d", last)
        and max(len(first), len(middle)) <= 2
        and 1 <= min(int(first), int(middle)) <= 12
        and 1 <= max(int(first), int(middle)) <= 31
    )


class _Name:
    """The path of an image, taken apart."""

    def __init__(self, image: Any) -> None:
        self.folders = [_read_parts(name) for name in image.folders.split("/") if name]
        self.stem = _read_parts(image.stem)
        self.shown = "/".join(filter(None, [image.folders, image.stem]))
        self.session_hint, self.subject_hint = image.session_hint, image.subject_hint
        self.contrast = image.contrast
        components = [*self.folders, self.stem]
        self.parts = [part for parts in components for part in parts]
        self.stem_start = len(self.parts) - len(self.stem)
        self.places = [
            (depth, depth - len(components), index, index - len(parts))
            for depth, parts in enumerate(components)
            for index in range(len(parts))
        ]
        texts = [part.text for part in self.parts]
        stated = {number + 1 for number, part in enumerate(self.parts) if part.role == "who"}
        # a data set's own pattern (IXI, OASIS, ADNI): its ids are the same people wherever they stand
        self.is_known = bool(image.subject_hint) and not any(part.text == "sub" for part in self.parts)
        if self.is_known:
            hint = [part.text for part in _read_parts(image.subject_hint)]
            starts = range(len(texts) - len(hint) + 1)
            stated = {next((n for n in starts if texts[n : n + len(hint)] == hint), -1)}
        self.stated = stated - {len(texts), -1}

    def keys(self, number: int) -> Iterator[Hashable]:
        """Every way to say where a part stands: folder and part counted from either end, or its letters."""
        part, (depth, back, index, end) = self.parts[number], self.places[number]
        for folder in (depth, back):
            for place in (index, end):
                yield folder, place, part.shape
        label = self.parts[number - 1].text if number in self.stated and number else part.letters
        if label:
            yield "label", label, part.shape

    def rest(self, hit: _Hit | None, people: _People) -> tuple[str, ...]:
        """What must be the same in all images of a person, and the id as this one writes it."""
        hit = hit or _Hit(len(self.parts), len(self.parts), (), 0)
        own = [part.text for part in self.parts[hit.start : hit.end]]
        if self.is_known and own and own[0].startswith("oas"):
            return tuple(own)  # names of OASIS tell no more of the person, and much of the picture
        others = (
            part.text
            for number, part in enumerate(self.parts)
            if not hit.start <= number < (len(self.parts) if self.is_known else hit.end)
            and part.role not in _PASSING
            and part.text not in own
            and not (number >= hit.end and (_LATER.fullmatch(part.text) or self.is_run(number, hit, people)))
        )
        return (*sorted(others), "", *own)

    def is_run(self, number: int, hit: _Hit, people: _People) -> bool:
        """Whether a part is a small number after the id that is no id itself: `AB1_1`, `AB1_2`."""
        text = self.parts[number].text
        return (
            max(hit.end, self.stem_start) <= number
            and text.isdecimal()
            and len(text) <= 2
            and text not in people.written
            and (hit.strength >= _WHOLE_NUMBER or (hit.prefix is None and str(int(text)) not in people.plain))
        )

    def other_numbers(self, start: int, end: int, roles: Collection[str] = ("",)) -> list[int]:
        """Parts outside a run with a number that might be the subject as well."""
        own = {part.text for part in self.parts[start:end]}
        return [
            number
            for number, part in enumerate(self.parts)
            if part.role in roles and part.text not in own and "n" in part.shape
        ]

    def session(self, hit: _Hit | None) -> str:
        """The session that the name states outside of the id."""
        if self.session_hint:
            return self.session_hint
        for number, part in enumerate(self.parts):
            if not (hit and hit.start <= number < hit.end) and (
                match := re.fullmatch(r"(?:v|vis|visit|ses|tp)(\d{1,2})", part.text)
            ):
                return match[1]
        return ""

    def visit(self, hit: _Hit, people: _People) -> str:
        """A date, and numbers after the id."""
        return "_".join(
            part.text
            for number, part in enumerate(self.parts)
            if _DATE.fullmatch(part.text)
            or self.is_run(number, hit, people)
            or (number >= hit.end and _LATER.fullmatch(part.text))
        )

    def is_other_contrast(self, hit: _Hit | None) -> bool:
        """Whether the name, less the id (`PD_001`), says that this is no T1-weighted scan."""
        if self.contrast != "other":
            return False
        own = range(hit.start, hit.end) if hit else ()
        words = [part.text for n, part in enumerate(self.parts) if n >= self.stem_start and n not in own]
        return contrast_of(words) == "other"


# --- people ---------------------------------------------------------------------------------------------


class _Hit(NamedTuple):
    """Parts of a name that equal an id. `prefix` is what only one of the two begins with, or None."""

    start: int
    end: int
    subjects: tuple[str, ...]
    strength: float
    prefix: str | None = None
    is_as_written: bool = True


class _People:
    """The subjects of a table, by every form in which the path of an image may name them."""

    def __init__(self, rows: pd.DataFrame) -> None:
        subjects = list(dict.fromkeys(rows["subject_id"]))
        parts = {one: _id_parts(one) for one in subjects}
        self.raw = {one: "_".join(part.written for part in parts[one]) for one in subjects}
        self.written = _index(("_".join(part.text for part in parts[one]), one) for one in subjects)
        self.strict = {one: "_".join(part.text for part in parts[one]) for one in subjects}
        self.loose = {one: _run_together(part.text for part in parts[one]) for one in subjects}
        self.plain = _index((_unpadded(self.loose[one]), one) for one in subjects)
        numbered = [re.fullmatch(r"(\D+)(\d+)", key) for key in self.plain if re.fullmatch(r"\D*\d+", key)]
        prefixes = {match[1] if match else "" for match in numbered}
        # patients A1…A60 and controls B1…B40: a file named 12 may be either, so one prefix has to be all
        self.prefix = prefixes.pop() if len(prefixes) == 1 else ""
        self.longest = max((len(re.findall(r"\d+|\D+", key)) for key in self.plain), default=1)
        cells = [*zip(rows["table_id"], rows["subject_id"], strict=True), *((one, one) for one in subjects)]
        self.files = _index((tail, one) for cell, one in cells for tail in _tails(cell))
        self.rows_of = {one: list(group.index) for one, group in rows.groupby("subject_id", sort=False)}
        self.subject_of = rows["subject_id"].to_dict()
        self.session_of = rows["session_id"].to_dict()
        listed = rows["image_id"].items() if "image_id" in rows else ()
        self.listed = _index((tail, row) for row, cell in listed for tail in _tails(cell))
        self.images = _index(_image_names(rows))

    def hits(self, name: _Name) -> list[_Hit]:
        """Every run of a path's parts that is an id; of runs inside one another the longest."""
        hits = [hit for start in range(len(name.parts)) if (hit := self._hit(name, start))]
        if found := _listed(self.files, name):
            found = self._same(found, name.stem)
            whole = _Hit(name.stem_start, len(name.parts), found, 2 * _STATED)
            inside = (hit for hit in hits if hit.start >= name.stem_start and set(hit.subjects) >= set(found))
            return [next(inside, whole)._replace(subjects=found, strength=2 * _STATED)]
        hits = [
            hit
            for hit in hits
            if not any(o.start <= hit.start and hit.end <= o.end and o[:2] != hit[:2] for o in hits)
        ]
        if not name.stated:
            return hits
        stated = [hit for hit in hits if any(hit.start <= number < hit.end for number in name.stated)]
        if stated or name.is_known:
            return [hit._replace(strength=_STATED) for hit in stated]
        return [hit for hit in hits if hit.strength >= _TELLING]

    def _same(self, subjects: set[str], run: Iterable[_Part]) -> tuple[str, ...]:
        """Of subjects whose ids are alike, those written as here."""
        raw, text = "_".join(part.written for part in run), "_".join(part.text for part in run)
        for form, key in ((self.raw, raw), (self.strict, text)):
            if same := [one for one in subjects if form[one] == key]:
                return tuple(same)
        return tuple(sorted(subjects))

    def _hit(self, name: _Name, start: int) -> _Hit | None:
        """The longest run from a part on that is an id."""
        key, best = "", None
        for end in range(start + 1, min(len(name.parts), start + self.longest + 2) + 1):
            part = name.parts[end - 1]
            if part.role == "who" and end > start + 1:
                continue
            key = _run_together([key, _unpadded(part.text)]) if key else _unpadded(part.text)
            first = name.parts[start]
            letters = "" if first.role == "who" or first.letters == first.text else first.letters
            if key in self.plain:
                best = self._judged(name, start, end, self.plain[key], None) or best
            elif letters and key[len(letters) :] in self.plain:
                best = self._judged(name, start, end, self.plain[key[len(letters) :]], letters) or best
            elif self.prefix and key.isdecimal() and self.prefix + key in self.plain:
                best = self._judged(name, start, end, self.plain[self.prefix + key], "") or best
        return best

    def _judged(
        self, name: _Name, start: int, end: int, subjects: set[str], prefix: str | None
    ) -> _Hit | None:
        """A run that is an id in some form, with how much it says, or None where it cannot be a subject."""
        first, *others = name.parts[start:end]
        run = [first, *(part for part in others if part.role != "who")]
        roles = {part.role for part in run} - {"", "who"}
        text = "_".join(part.text for part in run)
        bare = text[len(prefix or "") :]
        own = self.prefix if prefix == "" else ""
        same = [one for one in subjects if self.strict[one].removeprefix(own) == bare]
        is_as_written = bool(same) or any(self.loose[one] == _run_together([bare]) for one in subjects)
        telling = is_telling(text) if prefix is None else is_telling(re.sub(r"\D", " ", bare))
        is_year = text.isdecimal() and len(text) == 4
        if roles and (prefix is not None or not (is_year or (same and telling))):
            unsure = {"maybe when", "maybe where"}
            if not roles <= unsure or len(run) > 1 or name.other_numbers(start, end, {"", *unsure}):
                return None
        whole = same and (len(bare) >= 3 or bare.startswith("0"))
        strength = _TELLING if telling else _WHOLE_NUMBER if whole and not roles else _NUMBER
        if prefix and len(bare) < 3 and not telling:
            strength = _LOOSE_NUMBER
        found = self._same(set(same or subjects), run) if prefix is None else tuple(sorted(same or subjects))
        return _Hit(start, end, found, strength, prefix, is_as_written and prefix is None)

    def rows_named_by(self, name: _Name) -> set[int]:
        """Rows whose image id or file name is in the path."""
        return _listed(self.listed, name) or _longest_runs([part.text for part in name.stem], self.images)


def _id_parts(name: str) -> list[_Part]:
    """The parts of a table's id, without the words that announce it."""
    parts = _read_parts(name)
    return [part for part in parts if part.text not in ("sub", "subj", "subject", "participant")] or list(
        parts
    )


def _run_together(texts: Iterable[str]) -> str:
    """Parts without punctuation; numbers that it parts stay parted (`1_23` is not `12_3`)."""
    return re.sub(r"(?<!\d)_|_(?!\d)", "", "_".join(texts))


def _unpadded(text: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", text)


def is_telling(name: str) -> bool:
    """Whether a name may identify someone by itself, wherever in a path it stands."""
    parts = parts_of(name)
    if all(is_contrast_word(part) or part.casefold() in _WORDS["who"] for part in parts):
        return False
    longest = max((len(digits) for digits in re.findall(r"\d+", name)), default=0)
    return longest >= _ENOUGH_DIGITS or (len(name) > 1 and bool(re.search(r"[^\W\d_]", name)))


def _tails(cell: str) -> list[str]:
    """The ends of a cell that is a file name or path, as they are compared with the ends of images' paths."""
    path = PurePosixPath(cell.replace("\\", "/"))
    names = [*(part for part in path.parent.parts if part not in ("/", ".", "..")), image_stem(path.name)]
    joined = ["_".join(part.text for part in _read_parts(name)) for name in names]
    tails = ["/".join(joined[start:]) for start in range(len(joined))]
    return tails if is_telling(names[-1]) else tails[:-1]


def _listed(index: dict[str, set], name: _Name) -> set:
    """What a table of files says of an image: the entry that agrees with most of its path."""
    if not index:
        return set()
    tail, found = "", set()
    for parts in [name.stem, *reversed(name.folders)]:
        joined = "_".join(part.text for part in parts)
        tail = f"{joined}/{tail}" if tail else joined
        found = index.get(tail, found)
    return found


def _image_names(rows: pd.DataFrame) -> Iterable[tuple[str, int]]:
    """Rows by the image they name: by an image id, or an id that carries a session."""
    for row, cell in rows["image_id"].items() if "image_id" in rows else ():
        stem = image_stem(PurePosixPath(cell.replace("\\", "/")).name)
        # a bare number is ADNI's image id, before which file names write an I
        name = f"i{stem}" if stem.isdigit() else stem
        yield _joined_if_telling(name), row
    written = rows["table_id"].str.replace(r"^sub-", "", case=False, regex=True)
    for row, name in written[written.str.len() > rows["subject_id"].str.len()].items():
        yield _joined_if_telling(name), row


def _joined_if_telling(name: str) -> str:
    return "_".join(part.text for part in _read_parts(name)) if is_telling(name) else ""


def _longest_runs(texts: list[str], index: dict[str, set]) -> set:
    """What whole runs of parts stand for; a run inside a longer one that fits does not count."""
    spans = [
        (start, end)
        for start in range(len(texts) if index else 0)
        for end in range(start + 1, len(texts) + 1)
        if "_".join(texts[start:end]) in index
    ]
    outer = [a for a in spans if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in spans)]
    return set().union(*(index["_".join(texts[start:end])] for start, end in outer))


def _index(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, set]:
    index = defaultdict(set)
    for key, value in pairs:
        if key != "":
            index[key].add(value)
    return dict(index)


# --- the cohort -----------------------------------------------------------------------------------------


class _Cohort:
    """All images, read by the place in their paths that explains them together.

    Attributes
    ----------
    taken : dict of int to _Hit
        Image -> the parts that are its subject.
    reasons : dict of int to str
        Image -> why none is.
    rows : dict of int to int
        Image -> the one row that lists it by image id or file name.
    """

    def __init__(self, names: list[_Name], people: _People) -> None:
        self.names, self.people = names, people
        hits = [people.hits(name) for name in names]
        rows = {n: people.rows_named_by(name) for n, name in enumerate(names)}
        self.rows = {n: next(iter(named)) for n, named in rows.items() if len(named) == 1}
        self.taken = {n: found[0] for n, found in enumerate(hits) if found and found[0].strength > _STATED}
        self.reasons: dict[int, str] = {}
        self.refuted: set[Hashable] = set()
        self.unsure: set[int] = set()
        self.others = {
            n
            for n, name in enumerate(names)
            if n not in self.taken
            and not _listed(people.listed, name)
            and name.is_other_contrast(max(hits[n], key=lambda hit: hit.strength, default=None))
        }
        self.open = set(range(len(names))) - set(self.taken) - self.others
        self.hits = hits
        self.places: dict[Hashable, dict[int, _Hit]] = defaultdict(dict)
        for n in self.open:
            for hit in hits[n]:
                for key in names[n].keys(hit.start):
                    if hit.prefix and key[0] == "label":
                        continue  # the letters are no id here: they have to be those of nearly all images
                    self.places[(*key, hit.prefix)].setdefault(n, hit)
        self._count_places()
        self._settle_all()

    def _count_places(self) -> None:
        """How many images have a part at each place where some have an id, by the letters it begins with."""
        self.letters: dict[Hashable, Counter] = defaultdict(Counter)
        wanted = {key[:-1] for key in self.places}
        for n in self.open:
            seen = {
                key: part.letters
                for number, part in enumerate(self.names[n].parts)
                if part.role != "who"
                for key in self.names[n].keys(number)
                if key in wanted
            }
            for key, letters in seen.items():
                self.letters[key][letters] += 1

    def _settle_all(self) -> None:
        for _ in range(10 if self.open else 0):
            judged = {key: self._judge(key) for key in self.places}
            self.refuted = self.refuted or {key for key, (weight, _) in judged.items() if weight < 0}
            judged = {key: one for key, one in judged.items() if one[0] > 0 and self._has_one_prefix(key)}
            credible = [key for key, (_, clean) in judged.items() if self._is_credible(key, clean)]
            if not credible or not self.open:
                break
            best = max(credible, key=lambda key: (judged[key][0], key[-1] is None))
            self._settle(best, [key for key, (weight, _) in judged.items() if 2 * weight >= judged[best][0]])
        for n in sorted(self.open):
            strong = [hit for hit in self.hits[n] if hit.strength >= _TELLING]
            self._take(n, strong or self.hits[n], is_sure=bool(strong))
            if all(
                (*key, hit.prefix) in self.refuted for hit in strong for key in self.names[n].keys(hit.start)
            ):
                self.unsure.add(n)

    def _judge(self, key: Hashable) -> tuple[float, list[tuple[int, _Hit]]]:
        """What speaks for a place: the people it gives, less images that would wrongly share one."""
        here = self.places[key]
        if any(n in self.taken and self.taken[n].subjects != hit.subjects for n, hit in here.items()):
            return 0, []
        groups = defaultdict(list)
        for n, hit in here.items():
            if n in self.open:
                groups[hit.subjects].append((n, hit))
        weight, clean = 0.0, []
        for group in groups.values():
            alike = len(group) == 1 or len({self.names[n].rest(hit, self.people) for n, hit in group}) == 1
            weight += sum(hit.strength for _, hit in group) * (1 if alike else -1)
            clean += group[:1] if alike else []
        return weight, clean

    def _has_one_prefix(self, key: Hashable) -> bool:
        """Whether letters that only the images write before their numbers are those of nearly all images."""
        *place, prefix = key
        letters = self.letters[tuple(place)]
        rest = letters.total() - letters[prefix]
        few = rest <= letters.total() / 5 or all(letters[one] == 1 for one in letters if one != prefix)
        return not prefix or (letters[prefix] > rest and few)

    def _is_credible(self, key: Hashable, clean: list[tuple[int, _Hit]]) -> bool:
        """Whether short numbers at a place are ids: most are, or all of the table, and no others vary."""
        *place, prefix = key
        if any(hit.strength >= _TELLING for _, hit in clean):
            return True
        count = self.letters[tuple(place)]
        count = count[prefix] if prefix else count.total()
        if max(len(self.places[key]) / count, len(clean) / len(self.people.rows_of)) < 0.5:
            return False
        several, weakest = len(clean) > 2, min(hit.strength for _, hit in clean)
        if several and weakest >= _WHOLE_NUMBER:
            return True
        rivals = {
            other
            for n, hit in clean
            for other in self.hits[n]
            if other.subjects != hit.subjects and other.strength >= weakest
        }
        if rivals and (not several or len({one.subjects for one in rivals}) == 1):
            return False
        if prefix and any(one.strength > weakest for one in rivals):
            return False
        others = [
            tuple(
                name.parts[number].text
                for number in name.other_numbers(hit.start, hit.end)
                if not (several and name.is_run(number, hit, self.people))
            )
            for name, hit in ((self.names[n], hit) for n, hit in clean)
        ]
        return not any(others) or len(set(others)) < len(clean)

    def _settle(self, best: Hashable, rivals: list[Hashable]) -> None:
        """Read all images that have a place by it, unless a rival place gives them other people."""
        here = {n: hit for n, hit in self.places[best].items() if n in self.open}
        rivals = [
            key
            for key in rivals
            if any(n in here and here[n].subjects != hit.subjects for n, hit in self.places[key].items())
        ]
        for n, hit in here.items():
            against = [self._at(n, key) for key in rivals]
            self._take(n, [hit, *(one for one in against if one and one.subjects != hit.subjects)])
        for n in self.open:
            if self._at(n, (*best[:-1], None)):
                # it has the place, and what stands there is no id: a number elsewhere is none either
                self.hits[n] = [hit for hit in self.hits[n] if hit.strength >= _TELLING]
        self.places = {
            key: {n: hit for n, hit in there.items() if n not in self.open or hit in self.hits[n]}
            for key, there in self.places.items()
        }

    def _at(self, n: int, key: Hashable) -> _Hit | None:
        """What an image has at a place: an id, or a part that is none, or nothing."""
        if hit := self.places.get(key, {}).get(n):
            return hit
        name = self.names[n]
        numbers = (number for number in range(len(name.parts)) if key[:-1] in name.keys(number))
        number = next(numbers, None)
        return None if number is None else _Hit(number, number + 1, (), 0)

    def _take(self, n: int, hits: list[_Hit], *, is_sure: bool = True) -> None:
        subjects = sorted({one for hit in hits for one in hit.subjects})
        self.open.discard(n)
        if len(subjects) == 1 and is_sure and all(hit.subjects for hit in hits):
            self.taken[n] = hits[0]
        elif len({hit.subjects for hit in hits}) > 1:
            shown = " or ".join(
                f"'{self.written(n, hit)}' (subject {', '.join(hit.subjects[:3]) or 'without a row'})"
                for hit in {hit.subjects: hit for hit in hits}.values()
            )
            self.reasons[n] = f"several parts of its path could be the subject: {shown}; none taken"
        elif len(subjects) > 1:
            shown = ", ".join(subjects[:5])
            self.reasons[n] = f"fits several subjects of the table ({shown}): none taken"
        elif subjects:
            self.reasons[n] = (
                f"'{self.written(n, hits[0])}' alone does not tell that it is of subject {subjects[0]}: the "
                "number is short, and other names or parts speak against it; none taken"
            )

    def written(self, n: int, hit: _Hit) -> str:
        return "_".join(part.written for part in self.names[n].parts[hit.start : hit.end])


def _agree(one: _Hit | None, other: _Hit) -> bool:
    return one is not None and one.subjects == other.subjects


def _refuse_shared(cohort: _Cohort) -> None:
    """Take no subject, and no listed row, for images that differ in more than session, run and contrast."""
    names, groups = cohort.names, defaultdict(lambda: defaultdict(list))
    for n, hit in cohort.taken.items():
        groups[f"subject {hit.subjects[0]}"][names[n].rest(hit, cohort.people)].append(n)
    for n, row in cohort.rows.items():
        if n not in cohort.taken:
            groups[f"row {row + 1}"][names[n].rest(None, cohort.people)].append(n)
    for n in cohort.unsure & set(cohort.taken):
        cohort.reasons[n] = (
            f"'{cohort.written(n, cohort.taken[n])}' is at a place where most paths differ in more than "
            "session, run and contrast though they have one subject there: none taken"
        )
    for what, alike in groups.items():
        firsts = [own[0] for own in alike.values()]
        for n in (n for own in alike.values() for n in own if len(alike) > 1):
            other = firsts[1] if n in alike[next(iter(alike))] else firsts[0]
            cohort.reasons[n] = (
                f"{names[n].shown} and {names[other].shown} differ in more than session, run and contrast, "
                f"and both would be {what}: none taken"
            )


def _match_of(n: int, cohort: _Cohort) -> Match:
    name, hit = cohort.names[n], cohort.taken.get(n)
    reason = cohort.reasons.get(n, "")
    if n in cohort.others:
        reason, hit = "its name says that it is no T1-weighted scan", next(iter(cohort.hits[n]), None)
    row = None if reason else cohort.rows.get(n)
    if hit is None:
        return Match(row, reason, session=name.session(None))
    if row is not None and cohort.people.subject_of[row] not in hit.subjects:
        row = None
    label = "" if hit.is_as_written or row is not None else cohort.written(n, hit)
    if hit.strength > _STATED:  # listed by file name, which says whose file it is
        label = name.subject_hint
    return Match(row, reason, hit.subjects, label, name.session(hit), name.visit(hit, cohort.people))


# --- the row --------------------------------------------------------------------------------------------


def _with_row(name: _Name, match: Match, people: _People, sessions: dict[str, set[str]]) -> Match:
    if match.row is not None:
        return replace(match, subjects=(people.subject_of[match.row],))
    if match.reason:
        return match
    if not match.subjects:
        stated = [name.parts[number].written for number in sorted(name.stated)][-1:]
        said = f": no row is of subject '{stated[0]}'" if stated else ""
        return replace(match, reason=f"no id of the table is in its name{said}")
    row, reason = _row_of_session(match.session, match.subjects[0], people, sessions[match.subjects[0]])
    return replace(match, row=row, reason=reason)


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


_SESSION_WORDS = {"ses", "session", "visit", "v", "timepoint", "time", "tp", "t", "wave", "w", "mr"}


def _session(label: str) -> tuple[str, int] | str:
    """A session's label in a form to compare: `01`, `1`, `W1` and `wave01` agree, `M12` stays apart."""
    match = re.fullmatch(r"([a-z]*)[-_ ]*(\d+)", label.strip().casefold())
    if match is None:
        return label.casefold()
    return "" if match[1] in _SESSION_WORDS else match[1], int(match[2])


def _are_numbered_apart(label: str, other: str) -> bool:
    return isinstance(_session(label), tuple) and isinstance(_session(other), tuple)
