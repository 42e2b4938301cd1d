"""Which row of the table an image belongs to, or a refusal where that is not sure; opens no file.

1. `_Path` takes the path of an image apart; `names` says of each part whether it tells who, when, where or
   what.
2. `_People` finds the candidates: runs of parts that equal an id of the table, as written or but for padding,
   punctuation and a prefix.
3. `_Cohort` compares all images. A slot is a way to say where in a path a part stands: after `sub-`, or the
   second part of the file name. Where a slot holds ids, different ones in different images, there the subject
   stands: in `site1_003`, `site1_004` and `site2_005` it is the last part that gives three people. The slot
   that explains most is read first; an image that another slot explains as well, with another subject, is
   refused.
4. `_with_row` takes the row of the session that the name states.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pandas as pd

from brainage_nb.cohort import names
from brainage_nb.cohort.images import image_stem

_PASSING = {"who", "what", "when", "maybe when"}
"""Roles of parts in which images of one person may differ; where they were made is none of them."""
_VISIT = re.compile(rf"{names.DATE.pattern}|(?:fu|followup)\d*")
_LATER = re.compile(r"[dmwyre]\d{1,3}|\d{1,3}(?:m|mo|months?|y|yrs?|w|wk|d|days?)")
_LISTED, _STATED, _TELLING, _WHOLE_NUMBER, _NUMBER, _LOOSE_NUMBER = 16.0, 8.0, 4.0, 1.9, 1.0, 0.9
"""What a candidate is worth; a slot is preferred to another that is worth less than half as much."""


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
        What else may set images of one person apart in time: a date, a number after the id.
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
    slots of a path (after `sub-`, the second part of the file name, the first folder, …) where ids of the
    table stand are compared, and the one that gives most people, best as the table writes them, explains all
    images that have it. Where another slot explains them about as well and gives other people, they are
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
        One per image, in order.
    """
    people = _People(rows)
    paths = [_Path(image) for image in images.itertuples()]
    cohort = _Cohort(paths, people)
    cohort.settle_slots()
    cohort.refuse_shared()
    matches = [cohort.match(n) for n in range(len(paths))]
    sessions = defaultdict(set)
    for match in matches:
        if len(match.subjects) == 1:
            sessions[match.subjects[0]].add(match.session)
    return [_with_row(*pair, people, sessions) for pair in zip(paths, matches, strict=True)]


# --- paths ----------------------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    """Parts of a path that equal an id. `prefix` is what only one of the two begins with, or None."""

    start: int
    end: int
    subjects: tuple[str, ...] = ()
    strength: float = 0.0
    prefix: str | None = None
    is_as_written: bool = True

    def covers(self, number: int) -> bool:
        """Whether a part of the path is one of these."""
        return self.start <= number < self.end


class _Path:
    """The path of an image, taken apart."""

    def __init__(self, image: Any) -> None:
        components = [*map(names.read_parts, filter(None, image.folders.split("/")))]
        components += [names.read_parts(image.stem)]
        self.image = image
        self.name = "/".join(filter(None, [image.folders, image.stem]))
        self.parts = [part for parts in components for part in parts]
        self.texts = [part.text for part in self.parts]
        self.tails = _ends([names.join_parts(parts) for parts in components])
        self.stem_start = len(self.parts) - len(components[-1])
        self.places = [
            (depth, depth - len(components), index, index - len(parts))
            for depth, parts in enumerate(components)
            for index in range(len(parts))
        ]
        self.stated = {n for n in range(1, len(self.parts)) if self.parts[n - 1].role == "who"}
        # a data set's own pattern (IXI, OASIS, ADNI): its ids are the same people wherever they stand
        self.is_known = bool(image.subject_hint) and "sub" not in self.texts
        if self.is_known:
            hint = [part.text for part in names.read_parts(image.subject_hint)]
            starts = (n for n in range(len(self.texts)) if self.texts[n : n + len(hint)] == hint)
            self.stated = set([*starts][:1])

    def slots(self, number: int) -> Iterator[Hashable]:
        """Every way to say where a part stands: folder and part counted from either end, or its letters."""
        part, (depth, back, index, end) = self.parts[number], self.places[number]
        yield depth, index, part.shape
        yield back, end, part.shape
        if label := self.parts[number - 1].text if number in self.stated and number else part.letters:
            yield "label", label, part.shape

    def write(self, own: _Candidate) -> str:
        """The parts of a candidate as the path writes them."""
        return "_".join(part.written for part in self.parts[own.start : own.end])

    def outside(self, own: _Candidate) -> list[int]:
        """Parts that are none of a candidate's."""
        return [n for n in range(len(self.parts)) if not own.covers(n)]

    def others(self, own: _Candidate, roles: Iterable[str] = ("",)) -> list[int]:
        """Parts outside of a candidate with a number that might be the subject as well."""
        mine = self.texts[own.start : own.end]
        return [
            n
            for n, part in enumerate(self.parts)
            if part.role in roles and part.text not in mine and "n" in part.shape
        ]

    def rest(self, own: _Candidate, later: set[int]) -> tuple[str, ...]:
        """What must be the same in all images of a person, and the id as this one writes it."""
        mine = self.texts[own.start : own.end]
        end = len(self.parts) if self.is_known and mine else own.end  # the rest tells of the picture
        free = {*later, *range(own.start, end)}
        parts = [part for n, part in enumerate(self.parts) if n not in free and part.text not in mine]
        rest = (part.text for part in parts if part.role not in _PASSING)
        return (*sorted(rest), "", *mine)

    def session(self, own: _Candidate, labels: Iterable[str] = ()) -> str:
        """The session that the name states outside of the id, or the one of `labels` that stands there."""
        others = [self.parts[n] for n in self.outside(own)]
        found = (re.fullmatch(r"(?:v|vis|visit|ses|tp)(\d{1,2})", part.text) for part in others)
        if known := self.image.session_hint or next((match[1] for match in found if match), ""):
            return known
        texts = [part.text for part in others if part.role != "what"]  # T1 is what was measured
        told = {label for label in labels if len(label) > 1 and not label.isdecimal() and label in texts}
        return told.pop() if len(told) == 1 else ""

    def is_other_contrast(self, own: _Candidate) -> bool:
        """Whether the name, less the id (`PD_001`), says that this is no T1-weighted scan."""
        words = [self.texts[n] for n in self.outside(own) if n >= self.stem_start]
        return self.image.contrast == "other" and names.read_contrast(words) == "other"


# --- people ---------------------------------------------------------------------------------------------


class _People:
    """The subjects of a table, by every form in which the path of an image may name them."""

    def __init__(self, rows: pd.DataFrame) -> None:
        subjects = list(dict.fromkeys(rows["subject_id"]))
        self.forms = {one: names.find_forms(names.read_id(one)) for one in subjects}
        self.written = {forms[1] for forms in self.forms.values()}
        self.plain = _index((forms[-1], one) for one, forms in self.forms.items())
        prefixes = {match[1] for key in self.plain if (match := re.fullmatch(r"(\D*)\d+", key))}
        # patients A1…A60 and controls B1…B40: a file named 12 may be either, so one prefix has to be all
        self.prefix = prefixes.pop() if len(prefixes) == 1 else ""
        self.longest = 2 + max((len(re.findall(r"\d+|\D+", key)) for key in self.plain), default=1)
        self.rows_of = {one: list(group.index) for one, group in rows.groupby("subject_id", sort=False)}
        self.subject_of = rows["subject_id"].to_dict()
        self.session_of = rows["session_id"].to_dict()
        cells = [*zip(rows["table_id"], rows["subject_id"], strict=True), *((one, one) for one in subjects)]
        self.files = _index((tail, one) for cell, one in cells for tail in _tails(cell))
        listed = rows["image_id"] if "image_id" in rows else rows["table_id"].iloc[:0]
        self.listed = _index((tail, row) for row, cell in listed.items() for tail in _tails(cell))
        ids = rows["table_id"].str.replace(r"^sub-", "", case=False, regex=True)
        ids = ids[ids.str.len() > rows["subject_id"].str.len()]  # they carry a session
        stems = ((row, image_stem(re.split(r"[/\\]", cell)[-1])) for row, cell in listed.items())
        # a bare number is ADNI's image id, before which file names write an I
        named = [(row, f"i{name}" if name.isdigit() else name) for row, name in [*stems, *ids.items()]]
        self.images = _index((_compared(name), row) for row, name in named if names.is_telling(name))

    def find_rows(self, path: _Path) -> set[int]:
        """Rows whose image id is the end of the path, or a run of parts in the file name."""
        if found := _look_up(self.listed, path):
            return found
        numbers = range(path.stem_start, len(path.texts) + 1) if self.images else ()
        runs = [
            (a, b) for a in numbers for b in numbers if a < b and "_".join(path.texts[a:b]) in self.images
        ]
        return {row for a, b in _outermost(runs) for row in self.images["_".join(path.texts[a:b])]}

    def find_candidates(self, path: _Path) -> list[_Candidate]:
        """Every run of parts that is an id, outermost ones only; one where the table lists the file."""
        found = [one for start in range(len(path.parts)) if (one := self._find_longest(path, start))]
        if subjects := _look_up(self.files, path):
            stem = _Candidate(path.stem_start, len(path.parts))
            subjects, _ = self._nearest(subjects, names.find_forms(path.parts[path.stem_start :]))
            inside = (one for one in found if one.start >= path.stem_start and {*one.subjects} >= {*subjects})
            return [next(inside, stem)._replace(subjects=subjects, strength=_LISTED)]
        found = _outermost(found)
        if not path.stated:
            return found
        stated = [one for one in found if any(map(one.covers, path.stated))]
        if stated or path.is_known:
            return [one._replace(strength=_STATED) for one in stated]
        return [one for one in found if one.strength >= _TELLING]

    def find_later(self, path: _Path, own: _Candidate) -> set[int]:
        """Parts after an id that tell a time (`m12`) or a run: small numbers that are no id (`AB1_1`)."""
        later = set()
        for n in range(own.end, len(path.texts)):
            text = path.texts[n]
            is_run = n >= path.stem_start and len(text) <= 2 and text.isdecimal() and text not in self.written
            is_free = own.prefix is None and is_run and str(int(text)) not in self.plain
            if _LATER.fullmatch(text) or (is_run and (is_free or own.strength >= _WHOLE_NUMBER)):
                later.add(n)
        return later

    def _find_longest(self, path: _Path, start: int) -> _Candidate | None:
        """The longest run from a part on that is an id."""
        first, key, best = path.parts[start], "", None
        letters = "" if first.role == "who" or first.letters == first.text else first.letters
        for end in range(start + 1, min(len(path.parts), start + self.longest) + 1):
            part = path.parts[end - 1]
            if part.role == "who" and end > start + 1:
                continue
            plain = names.unpadded(part.text)
            key += "_" * (key[-1:].isdecimal() and plain[:1].isdecimal()) + plain
            if key in self.plain:
                best = self._weigh(path, start, end, key, None) or best
            elif letters and key[len(letters) :] in self.plain:
                best = self._weigh(path, start, end, key[len(letters) :], letters) or best
            elif self.prefix and key.isdecimal() and self.prefix + key in self.plain:
                best = self._weigh(path, start, end, self.prefix + key, "") or best
        return best

    def _weigh(self, path: _Path, start: int, end: int, key: str, prefix: str | None) -> _Candidate | None:
        """A run that is an id in some form, with how much it says, or None where it cannot be a subject."""
        run = [part for n, part in enumerate(path.parts[start:end]) if n == 0 or part.role != "who"]
        forms = [form.removeprefix(prefix or "") for form in names.find_forms(run)]
        subjects, level = self._nearest(self.plain[key], forms, self.prefix if prefix == "" else "")
        text, is_same = forms[1], level < 2
        telling = names.is_telling(text if prefix is None else re.sub(r"\D", " ", text))
        roles = {part.role for part in run} - {"", "who"}
        is_year = text.isdecimal() and len(text) == 4
        found = _Candidate(start, end, subjects, _NUMBER, prefix, prefix is None and level < 3)
        if roles and (prefix is not None or not (is_year or (is_same and telling))):
            unsure = {"maybe when", "maybe where"}
            if not roles <= unsure or len(run) > 1 or path.others(found, {"", *unsure}):
                return None
        if telling:
            return found._replace(strength=_TELLING)
        if prefix and len(text) < 3:
            return found._replace(strength=_LOOSE_NUMBER)
        is_whole = is_same and not roles and (len(text) >= 3 or text.startswith("0"))
        return found._replace(strength=_WHOLE_NUMBER if is_whole else _NUMBER)

    def _nearest(
        self, subjects: set[str], forms: Iterable[str], prefix: str = ""
    ) -> tuple[tuple[str, ...], int]:
        """Of subjects whose ids are alike, those written most like here, and at which form they agree."""
        for level, form in enumerate(forms):
            if same := [one for one in subjects if self.forms[one][level].removeprefix(prefix) == form]:
                return tuple(sorted(same)), level
        return tuple(sorted(subjects)), len(self.forms)


def _tails(cell: str) -> list[str]:
    """The ends of a cell that is a file name or path, as they are compared with the ends of images' paths."""
    path = PurePosixPath(cell.replace("\\", "/"))
    folders = [part for part in path.parent.parts if part not in ("/", ".", "..")]
    tails = _ends([_compared(name) for name in (*folders, image_stem(path.name))])
    return tails if names.is_telling(image_stem(path.name)) else tails[:-1]


def _compared(name: str) -> str:
    """A name in the form in which it is compared."""
    return names.join_parts(names.read_parts(name))


def _ends(components: list[str]) -> list[str]:
    """The ends of a path, the longest first."""
    return ["/".join(components[start:]) for start in range(len(components))]


def _look_up(index: dict[str, set], path: _Path) -> set:
    """What a table of files says of an image: the entry that agrees with most of its path."""
    return next((index[tail] for tail in path.tails if tail in index), set()) if index else set()


def _outermost(runs: list[tuple]) -> list[tuple]:
    """Of runs (start, end, …) those that lie in no other one."""
    return [
        one for one in runs if not any(o[0] <= one[0] and one[1] <= o[1] and o[:2] != one[:2] for o in runs)
    ]


def _index(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, set]:
    index = defaultdict(set)
    for key, value in pairs:
        if key != "":
            index[key].add(value)
    return dict(index)


# --- the cohort -----------------------------------------------------------------------------------------


class _Cohort:
    """All images, read by the slots of their paths that explain them together.

    Attributes
    ----------
    taken : dict of int to _Candidate
        Image -> the parts that are its subject.
    reasons : dict of int to str
        Image -> why none is.
    rows : dict of int to int
        Image -> the one row that lists it by image id or file name.
    """

    def __init__(self, paths: list[_Path], people: _People) -> None:
        self.paths, self.people = paths, people
        self.found = [people.find_candidates(path) for path in paths]
        rows = [people.find_rows(path) for path in paths]
        self.rows = {n: min(named) for n, named in enumerate(rows) if len(named) == 1}
        self.taken: dict[int, _Candidate] = {}
        self.reasons: dict[int, str] = {}
        self.rests: dict[tuple, tuple[str, ...]] = {}
        for n, path in enumerate(paths):
            best = max(self.found[n], key=lambda one: one.strength, default=_Candidate(0, 0))
            if best.strength == _LISTED:
                self.taken[n] = best
            elif not _look_up(people.listed, path) and path.is_other_contrast(best):
                self.reasons[n] = "its name says that it is no T1-weighted scan"
        self.open = set(range(len(paths))) - self.taken.keys() - self.reasons.keys()
        self.slots: dict[Hashable, dict[int, _Candidate]] = defaultdict(dict)
        self.at: dict[Hashable, dict[int, int]] = defaultdict(dict)
        self._find_slots()

    def _find_slots(self) -> None:
        """Fill `slots` (slot and prefix -> image -> candidate) and `at` (slot -> image -> its part there)."""
        for n in self.open:
            for one in self.found[n]:
                for slot in self.paths[n].slots(one.start):
                    if not (one.prefix and slot[0] == "label"):  # those letters must be of nearly all images
                        self.slots[(*slot, one.prefix)].setdefault(n, one)
        wanted = {slot[:-1] for slot in self.slots}
        for n in self.open:
            for number, part in enumerate(self.paths[n].parts):
                for slot in wanted.intersection(self.paths[n].slots(number)) if part.role != "who" else ():
                    self.at[slot].setdefault(n, number)

    def settle_slots(self) -> None:
        """Read all images by the slots that explain them, the best first; then what only one part can be."""
        judged = {slot: self._judge(slot) for slot in self.slots}
        refuted = {slot for slot, (weight, _) in judged.items() if weight < 0}
        judged = {slot: one for slot, one in judged.items() if one[0] > 0 and self._has_one_prefix(slot)}
        order = [slot for slot, (_, clean) in judged.items() if self._is_credible(slot, clean)]
        for slot in sorted(order, key=lambda slot: (-judged[slot][0], slot[-1] is not None)):
            if not self._contradicts(slot):
                self._settle(slot, [one for one in judged if 2 * judged[one][0] >= judged[slot][0]])
        for n in sorted(self.open):
            strong = [one for one in self.found[n] if one.strength >= _TELLING]
            self._take(n, strong or self.found[n], is_sure=bool(strong))
            slots = ((*slot, one.prefix) for one in strong for slot in self.paths[n].slots(one.start))
            if n in self.taken and refuted.issuperset(slots):
                self.reasons[n] = (
                    f"'{self.paths[n].write(self.taken[n])}' is at a place where most paths differ in more "
                    "than session, run and contrast though they have one subject there: none taken"
                )

    def _rest(self, n: int, own: _Candidate) -> tuple[str, ...]:
        key = n, own.start, own.end, own.prefix
        if key not in self.rests:
            self.rests[key] = self.paths[n].rest(own, self.people.find_later(self.paths[n], own))
        return self.rests[key]

    def _judge(self, slot: Hashable) -> tuple[float, list[tuple[int, _Candidate]]]:
        """What speaks for a slot: the people it gives, less images that would wrongly share one."""
        groups = defaultdict(list)
        for n, one in self.slots[slot].items():
            groups[one.subjects].append((n, one))
        weight, clean = 0.0, []
        for group in groups.values():
            alike = len(group) == 1 or len({self._rest(n, one) for n, one in group}) == 1
            weight += sum(one.strength for _, one in group) * (1 if alike else -1)
            clean += group[:1] if alike else []
        return weight, clean

    def _contradicts(self, slot: Hashable) -> bool:
        """Whether a slot gives images other people than those taken for them."""
        here = self.slots[slot].items()
        return any(n in self.taken and self.taken[n].subjects != one.subjects for n, one in here)

    def _has_one_prefix(self, slot: Hashable) -> bool:
        """Whether letters that only the images write before their numbers are those of nearly all images."""
        *place, prefix = slot
        if not prefix:
            return True
        here = Counter(self.paths[n].parts[number].letters for n, number in self.at[tuple(place)].items())
        own, rest = here.pop(prefix, 0), here.total()
        return own > rest and (4 * rest <= own or max(here.values()) == 1)

    def _is_credible(self, slot: Hashable, clean: list[tuple[int, _Candidate]]) -> bool:
        """Whether short numbers in a slot are ids: most are, or most of the table, and no others vary."""
        if any(one.strength >= _TELLING for _, one in clean):
            return True
        *place, prefix = slot
        letters = [self.paths[n].parts[number].letters for n, number in self.at[tuple(place)].items()]
        count = letters.count(prefix) if prefix else len(letters)
        if max(len(self.slots[slot]) / count, len(clean) / len(self.people.rows_of)) < 0.5:
            return False
        several, weakest = len(clean) > 2, min(one.strength for _, one in clean)
        if several and weakest >= _WHOLE_NUMBER:
            return True
        others, rivals = [], set()
        for n, one in clean:
            later = self.people.find_later(self.paths[n], one) if several else ()
            others.append(tuple(self.paths[n].texts[m] for m in self.paths[n].others(one) if m not in later))
            rivals |= {o.subjects for o in self.found[n] if o.strength >= weakest} - {one.subjects}
        if rivals and (prefix or not several or len(rivals) == 1):
            return False
        return not any(others) or len(set(others)) < len(clean)

    def _settle(self, best: Hashable, rivals: list[Hashable]) -> None:
        """Read all images that have a slot by it, unless a rival slot gives them other people."""
        here = {n: one for n, one in self.slots[best].items() if n in self.open and one in self.found[n]}
        rivals = [
            slot
            for slot in rivals
            if any(n in here and here[n].subjects != one.subjects for n, one in self.slots[slot].items())
        ]
        for n, one in here.items():
            against = [self._read_slot(n, slot) for slot in rivals]
            self._take(n, [one, *(other for other in against if other and other.subjects != one.subjects)])
        for n in self.open & self.at[best[:-1]].keys():
            # it has the slot, and what stands there is no id: a number elsewhere is none either
            self.found[n] = [one for one in self.found[n] if one.strength >= _TELLING]

    def _read_slot(self, n: int, slot: Hashable) -> _Candidate | None:
        """What an image has in a slot: an id, or a part that is none, or nothing."""
        number = self.at[slot[:-1]].get(n)
        nobody = None if number is None else _Candidate(number, number + 1)
        return self.slots[slot].get(n, nobody)

    def _take(self, n: int, found: list[_Candidate], *, is_sure: bool = True) -> None:
        """Take the subject that all readings of an image give, or say why none is taken."""
        self.open.discard(n)
        readings = {one.subjects: one for one in found}
        shown = [(self.paths[n].write(one), ", ".join(one.subjects[:5])) for one in readings.values()]
        if len(shown) > 1:
            told = " or ".join(f"'{part}' (subject {who or 'without a row'})" for part, who in shown)
            self.reasons[n] = f"several parts of its path could be the subject: {told}; none taken"
        elif shown and len(found[0].subjects) > 1:
            self.reasons[n] = f"fits several subjects of the table ({shown[0][1]}): none taken"
        elif shown and is_sure:
            self.taken[n] = found[0]
        elif shown:
            self.reasons[n] = (
                f"'{shown[0][0]}' alone does not tell that it is of subject {shown[0][1]}: the number is "
                "short, and other names or parts speak against it; none taken"
            )

    def refuse_shared(self) -> None:
        """Take no subject, and no listed row, for images that differ in more than session and contrast."""
        groups = defaultdict(lambda: defaultdict(list))
        for n, own in self.taken.items():
            groups[f"subject {own.subjects[0]}"][self._rest(n, own)].append(n)
        for n, row in self.rows.items():
            if n not in self.taken:
                nobody = _Candidate(len(self.paths[n].parts), len(self.paths[n].parts))
                groups[f"row {row + 1}"][self._rest(n, nobody)].append(n)
        for what, alike in groups.items():
            first, second = [*alike.values(), []][:2]
            for n in chain(*alike.values()) if second else ():
                other = self.paths[(second if n in first else first)[0]]
                self.reasons[n] = (
                    f"{self.paths[n].name} and {other.name} differ in more than session, run and contrast, "
                    f"and both would be {what}: none taken"
                )

    def match(self, n: int) -> Match:
        """What is known of an image before its session is compared with those of the table."""
        path, reason = self.paths[n], self.reasons.get(n, "")
        own = self.taken.get(n) or (next(iter(self.found[n]), None) if reason else None)
        row = None if reason else self.rows.get(n)
        if own is None:
            return Match(row, reason, session=path.session(_Candidate(0, 0)))
        if row is not None and self.people.subject_of[row] not in own.subjects:
            row = None
        label = "" if own.is_as_written or row is not None else path.write(own)
        if own.strength == _LISTED:  # by file name, which says whose file it is
            label = path.image.subject_hint
        later = self.people.find_later(path, own)
        visit = [path.texts[m] for m in path.outside(own) if m in later or _VISIT.fullmatch(path.texts[m])]
        labels = [self.people.session_of[one].casefold() for one in self.people.rows_of[own.subjects[0]]]
        return Match(row, reason, own.subjects, label, path.session(own, labels), "_".join(visit))


# --- the row --------------------------------------------------------------------------------------------


def _with_row(path: _Path, match: Match, people: _People, sessions: dict[str, set[str]]) -> Match:
    if match.row is not None:
        return replace(match, subjects=(people.subject_of[match.row],))
    if match.reason:
        return match
    if not match.subjects:
        stated = [path.parts[number].written for number in sorted(path.stated)][-1:]
        told = f": no row is of subject '{stated[0]}'" if stated else ""
        return replace(match, reason=f"no id of the table is in its name{told}")
    row, reason = _find_row_of_session(match.session, match.subjects[0], people, sessions[match.subjects[0]])
    return replace(match, row=row, reason=reason)


def _find_row_of_session(
    session: str, subject: str, people: _People, on_disk: set[str]
) -> tuple[int | None, str]:
    """The row of a subject's session, or why there is none.

    A row without session serves all sessions of its subject. Where a subject has one row and one session on
    disk, the two belong together unless both are numbered, differently.
    """
    labels = {row: people.session_of[row] for row in people.rows_of[subject]}
    fitting = [row for row, label in labels.items() if session and _session(label) == _session(session)]
    fitting = fitting or [row for row, label in labels.items() if not label]
    if not fitting and len(labels) == 1 and len(on_disk) == 1:
        both = {type(_session(label)) for label in (session, *labels.values())}
        fitting = list(labels) if both != {tuple} else []
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
