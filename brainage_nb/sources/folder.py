"""A folder of images and a table of ages become a cohort; what found no partner is listed. Opens no image."""

from __future__ import annotations

import os
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import chain, count
from pathlib import Path
from typing import Any

import pandas as pd

from brainage_nb.cohort.images import clean_text, describe_images, find_images, take_named
from brainage_nb.cohort.matching import Match, match_images
from brainage_nb.cohort.pairing import pair_modalities
from brainage_nb.tables.columns import COLUMN_PARAMETERS
from brainage_nb.tables.files import TABLE_SUFFIXES, TableError
from brainage_nb.tables.participants import read_participants
from brainage_nb.workspace import MODALITIES

COHORT_COLUMNS = ["scan_id", "subject_id", "session_id", "image", "age", "sex", "site", "source"]
_NAMES = ("subject_id", "table_id", "image_id")  # of people and images, in a table
_OTHER_ROW = "images seem to be of this subject, but none is of this row: see the unmatched images"


class SourceError(ValueError):
    """A folder and a table that do not make a cohort; the message says what to set."""


@dataclass(frozen=True)
class FolderCohort:
    """Scans put together with their ages, and what was left over.

    Attributes
    ----------
    cohort : DataFrame
        As `cohort.csv`: `scan_id, subject_id, session_id, image, age` [years]`, sex, site, source`, then
        `diagnosis` and `cdr` where the table knows them, and `age_note`: how the age came from several
        rows, or, where `age` is empty, why the table gives none. Cleaning drops those scans with that reason.
        Last a column per further modality.
    unmatched_images : DataFrame
        `image, reason`.
    unmatched_rows : DataFrame
        `subject_id, session_id, reason`.
    notes : list of str
        What was resolved and by what rule.
    tables : list of Path
        The tables that were read.
    """

    cohort: pd.DataFrame
    unmatched_images: pd.DataFrame
    unmatched_rows: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)


def match_scans(
    data_dir: Path | str,
    table: Path | str = "",
    *,
    columns: Mapping[str, str] | None = None,
    root: Path | str | None = None,
    source: str = "folder",
    modalities: Sequence[str] = (),
) -> FolderCohort:
    """Put the images of a folder and the rows of a table together.

    Parameters
    ----------
    data_dir : path
        Folder with the images, in any nesting.
    table : path
        Participants table, from here or from `data_dir`; "" for `participants.tsv` in `data_dir`, or the only
        table there.
    columns : mapping
        Column names and the age unit for `read_table`, where they are not to be found by themselves.
    root : path, optional
        The workspace: images inside it are written relative to it, all others absolute.
    source : str
        What the column `source` says.
    modalities : sequence of str
        What else of `MODALITIES` is put beside the T1w scan of each session, see `pair_modalities`.

    Returns
    -------
    FolderCohort
        Every image and every row is in it: matched, or listed with the reason.

    Raises
    ------
    FileNotFoundError, TableError, SourceError
        Where the folder is missing, the table cannot be read safely, or nothing fits together.

    Examples
    --------
    >>> found = match_scans("scans", "participants.tsv")
    >>> found.cohort[["subject_id", "age"]]
      subject_id   age
    0         01  34.2
    1         02  71.0
    >>> found.unmatched_images["reason"].tolist()
    ["no id of the table is in its name: no row is of subject '99'"]
    """
    data_dir = Path(data_dir).expanduser().absolute()
    if unknown := set(columns or {}) - set(COLUMN_PARAMETERS):
        raise TableError(f"columns names {sorted(unknown)}; expected some of {', '.join(COLUMN_PARAMETERS)}.")
    images = find_images(data_dir)
    if images.empty:
        raise SourceError(_no_image(images, data_dir))
    if not str(table) and (sets := _sets_side_by_side(data_dir)):
        how = {"columns": columns, "root": root, "source": source, "modalities": modalities}
        return _join_sets(sets, images, how)
    path = find_table(data_dir, table)
    rows, notes = _read_rows(path, data_dir, columns or {})
    if not str(table) and path.parent != data_dir:
        notes = [f"The only table was read: {path.relative_to(data_dir)}.", *notes]
    images = take_named(images, [name for role in _NAMES if role in rows for name in rows[role]])
    matches = _match_own_images(images, rows, path, data_dir)
    if all(match.row is None for match in matches):
        raise SourceError(_nothing_fits(images, rows, matches, path))
    reasons = images.assign(reason=[match.reason for match in matches])
    every = pd.concat([reasons, images.attrs["left_out"]], ignore_index=True)  # what fits no row first
    cohort, paired, told = pair_modalities(_join_rows(images, rows, matches, source), every, modalities)
    if cohort.empty:
        others = ", ".join(modalities)
        raise SourceError(f"All images with a row are of {others}; these need the T1w scan of their session.")
    every["reason"] = every["image"].map(paired).fillna(every["reason"])
    unmatched = every.loc[every["reason"] != "", ["image", "reason"]].reset_index(drop=True)
    return FolderCohort(
        _write_relative(cohort, root),
        _write_relative(unmatched, root),
        _list_unmatched_rows(rows, matches),
        [*images.attrs["notes"], *notes, *_notes_on_matching(rows, matches), *told],
        [path, *sorted(data_dir.glob("sub-*/sub-*_sessions.tsv"))],
    )


def ages_of_scans(
    scans: Sequence[Path], table: Path | str
) -> tuple[list[float | None], list[str], list[str]]:
    """True ages of named scans, matched with a table as notebook 01 does; the scans are the whole cohort.

    Parameters
    ----------
    scans : sequence of path
    table : path
        Participants table. Where it lies above the scans, all folders below it may name the subject.

    Returns
    -------
    ages : list
        Years or None, one per scan.
    reasons : list of str
        Why a scan has no age, or "", one per scan.
    notes : list of str
        What was resolved in the table and in matching, by what rule.

    Raises
    ------
    TableError
        Where the table cannot be read safely.
    """
    scans, table = [Path(scan).absolute() for scan in scans], Path(table).expanduser().absolute()
    folder = Path(os.path.commonpath([scan.parent for scan in scans]))
    inside = folder.is_relative_to(table.parent)
    rows, notes = _read_rows(table, table.parent if inside else folder, {})
    unique = list(dict.fromkeys(scans))
    # a scan given alone may be named by its folders only: `S001/anat/T1.nii.gz`
    for top in [table.parent] if inside else [folder, *list(folder.parents)[:3]]:
        images = describe_images(unique, top)
        matches = _match_own_images(images, rows, table, top)
        if any(match.row is not None for match in matches):
            break
    found = dict(zip(unique, matches, strict=True))
    ages, reasons = [], []
    for scan in scans:
        row = None if found[scan].row is None else rows.loc[found[scan].row]
        has_age = row is not None and row["age"] == row["age"]
        ages.append(float(row["age"]) if has_age else None)
        no_age = "" if has_age else found[scan].reason or f"its row gives no usable age: {row['age_note']}"
        reasons.append(no_age)
    return ages, reasons, [*notes, *_notes_on_matching(rows, matches)]


def _sets_side_by_side(data_dir: Path) -> list[Path]:
    """Folders with a `participants.tsv` of their own, where `data_dir` has none and they are several."""
    tables = sorted(data_dir.glob("*/participants.tsv"))
    return [path.parent for path in tables] if len(tables) > 1 and not _has_participants(data_dir) else []


def _has_participants(folder: Path) -> bool:
    # a link to an annex that was not fetched does not exist, yet it is the table
    return (folder / "participants.tsv").exists() or (folder / "participants.tsv").is_symlink()


def _join_sets(sets: list[Path], images: pd.DataFrame, how: dict[str, Any]) -> FolderCohort:
    """Several data sets, each with its own table; ids take the folder's name: `site1_01`, `site2_01`."""
    found, refused = {}, {}
    for folder in sets:
        try:
            found[clean_text(folder.name)] = match_scans(folder, folder / "participants.tsv", **how)
        except (TableError, SourceError) as error:
            refused[folder] = str(error)
    if not found:
        raise SourceError(" ".join(dict.fromkeys(refused.values())))
    for name, one in found.items():
        for frame in (one.cohort, one.unmatched_rows):
            frame["subject_id"] = name + "_" + frame["subject_id"]
        one.cohort["scan_id"] = name + "_" + one.cohort["scan_id"]
        one.cohort["site"] = one.cohort["site"].where(one.cohort["site"] != "", name)
    cohort = pd.concat([one.cohort for one in found.values()], ignore_index=True)
    cohort["scan_id"] = _make_distinct(cohort["scan_id"])
    refused[None] = "no participants.tsv lies in its data set"
    within = [[one for one in sets if Path(image).is_relative_to(one)] for image in images["image"]]
    aside = images[["image"]].assign(reason=[refused.get((*own, None)[0], "") for own in within])
    aside = _write_relative(aside[aside["reason"] != ""], how["root"])
    names = ", ".join(f"{name}_…" for name in found)
    return FolderCohort(
        cohort.fillna(dict.fromkeys(cohort.columns.drop("age"), "")),
        pd.concat([*(one.unmatched_images for one in found.values()), aside], ignore_index=True),
        pd.concat([one.unmatched_rows for one in found.values()], ignore_index=True),
        [
            f"{len(found)} data sets side by side, each with its own table; subjects are named {names}.",
            *(f"{name}: {note}" for name, one in found.items() for note in one.notes),
        ],
        [table for one in found.values() for table in one.tables],
    )


def _match_own_images(images: pd.DataFrame, rows: pd.DataFrame, path: Path, data_dir: Path) -> list[Match]:
    """Match the images but those in the folder of another `participants.tsv`: their people are others."""
    path, foreign = path.absolute(), {}
    for folder in dict.fromkeys(Path(image).parent for image in images["image"]):
        above = [one for one in (folder, *folder.parents) if one.is_relative_to(data_dir) and one != data_dir]
        owner = next((one for one in above if _has_participants(one)), None)
        if owner and not path.is_relative_to(owner) and not folder.is_relative_to(path.parent):
            foreign[folder] = f"it belongs to the data set of {owner}/participants.tsv, not to {path.name}"
    reasons = [foreign.get(Path(image).parent, "") for image in images["image"]]
    own = images[[not reason for reason in reasons]].reset_index(drop=True)
    matches = iter(match_images(own, rows))
    return [Match(reason=reason) if reason else next(matches) for reason in reasons]


def find_table(data_dir: Path | str, table: Path | str = "") -> Path:
    """The table named, or, for "", `participants.tsv` in the folder, or the only table in it.

    Raises
    ------
    TableError
        Where there is none, or several; the message lists them.
    """
    data_dir = Path(data_dir)
    if str(table):
        named = Path(table).expanduser()
        return named if named.exists() or not (data_dir / named).exists() else data_dir / named
    if _has_participants(data_dir):
        return data_dir / "participants.tsv"
    listed = list_tables(data_dir)
    if len(listed) == 1:
        return listed[0]
    if not listed:
        raise TableError(f"No table lies in {data_dir}. Set table to a CSV, TSV, XLS or XLSX file with ages.")
    shown = ", ".join(str(path.relative_to(data_dir)) for path in listed[:10])
    raise TableError(f"{len(listed)} tables lie in {data_dir}: {shown}. Set table to the one with the ages.")


def list_tables(folder: Path) -> list[Path]:
    """Tables in a folder and one below that may hold participants: none of sessions, scans or events."""
    aside = re.compile(r"(?i)[.~]|readme|license|changes|.*_(sessions|scans|events|channels)\.tsv$")
    found = [path for path in [*folder.glob("*"), *folder.glob("*/*")] if not aside.match(path.name)]
    return sorted(path for path in found if path.suffix.lower() in TABLE_SUFFIXES)


def _read_rows(path: Path, data_dir: Path, columns: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """Rows and notes of `read_participants`; ids without what nobody sees in them."""
    rows = read_participants(path, data_dir, columns)
    for column in rows.columns.intersection([*_NAMES, "session_id"]):
        rows[column] = rows[column].map(clean_text)
    return rows, rows.attrs["notes"]


def _join_rows(images: pd.DataFrame, rows: pd.DataFrame, matches: list[Match], source: str) -> pd.DataFrame:
    """One row per matched image, in the order of paths."""
    seen = images[[match.row is not None for match in matches]].reset_index(drop=True)
    matches = [match for match in matches if match.row is not None]
    known = rows.loc[[match.row for match in matches]].reset_index(drop=True)
    labels = pd.Series([match.label for match in matches], dtype=str)
    sessions = pd.Series([match.session for match in matches], dtype=str)
    # ids as the images write them (`IXI002` for the table's 2), as long as all images of a subject agree
    agreed = (labels.groupby(known["subject_id"]).transform("nunique") == 1) & (labels != "")
    cohort = known.assign(
        subject_id=labels.where(agreed, known["subject_id"]),
        session_id=sessions.where(sessions != "", known["session_id"]),
        site=known["site"].where(known["site"] != "", seen["site_hint"]),
        image=seen["image"],
        source=source,
    )
    cohort["scan_id"] = _scan_ids(cohort, seen)
    extra = [column for column in ("diagnosis", "cdr", "age_note") if column in cohort]
    return cohort[[*COHORT_COLUMNS, *extra]]


def _scan_ids(cohort: pd.DataFrame, images: pd.DataFrame) -> list[str]:
    """`subject[_session][_run]`; where several images would share it, their names, then their paths."""
    parts = zip(cohort["subject_id"], cohort["session_id"], images["run_hint"], strict=True)
    ids = pd.Series(["_".join(filter(None, part)) for part in parts], dtype=str).map(_to_file_name)
    for longer in (images["stem"], images["folders"] + "_" + images["stem"], images["image"]):
        # two ids that differ in case alone would be one file on some disks
        ids = longer.map(_to_file_name).where(ids.str.casefold().duplicated(keep=False), ids)
    return _make_distinct(ids)


def _to_file_name(name: str) -> str:
    """A name that can be that of a file: letters of any script, digits, `.`, `_` and `-`."""
    safe = (one if one in "._-" or unicodedata.category(one)[0] in "LNM" else "-" for one in clean_text(name))
    return re.sub("-+", "-", "".join(safe)).strip("-")


def _make_distinct(names: pd.Series) -> list[str]:
    """Names of which no two are the same file: later ones are numbered."""
    taken: set[str] = set()
    distinct = []
    for name in names:
        candidates = chain([name], (f"{name}-{number}" for number in count(2)))
        distinct.append(next(one for one in candidates if one.casefold() not in taken))
        taken.add(distinct[-1].casefold())
    return distinct


def _write_relative(frame: pd.DataFrame, root: Path | str | None) -> pd.DataFrame:
    """Images inside the workspace relative to it, all others absolute; those of other modalities too."""
    top = Path(root).absolute() if root else None

    def show(image: str) -> str:
        path = Path(image)
        return path.relative_to(top).as_posix() if top and path.is_relative_to(top) else str(path)

    columns = frame.columns.intersection(["image", *MODALITIES])
    return frame.assign(**{name: [image and show(image) for image in frame[name]] for name in columns})


def _list_unmatched_rows(rows: pd.DataFrame, matches: list[Match]) -> pd.DataFrame:
    left = rows.drop(index={match.row for match in matches if match.row is not None})
    seen = left["subject_id"].isin({subject for match in matches for subject in match.subjects})
    reasons = seen.map({True: _OTHER_ROW, False: "no image carries this id"})
    no_age = ("; no age either: " + left["age_note"]).where(left["age"].isna(), "")
    return left[["subject_id", "session_id"]].assign(reason=reasons + no_age).reset_index(drop=True)


def _notes_on_matching(rows: pd.DataFrame, matches: list[Match]) -> list[str]:
    notes, joined = [], [match for match in matches if match.row is not None]
    if padded := [match for match in joined if match.label]:
        example = f"'{padded[0].label}' is the table's '{padded[0].subjects[0]}'"
        notes.append(f"Ids matched by number: {len(padded)}; {example}.")
    visits = {(one.row, one.session, one.visit) for one in joined if not rows["session_id"][one.row]}
    scans = Counter(row for row, _, _ in visits)
    if several := sum(number > 1 for number in scans.values()):
        told = "" if any(session for _, session, _ in visits) else " (or dates, or numbers after the id)"
        problem = f"Subjects with several sessions{told} on disk and one age in the table: {several}"
        notes.append(f"{problem}; all sessions take this age, which is probably that at the first.")
    if missing := int(rows["age"][[match.row for match in joined]].isna().sum()):
        notes.append(f"Images whose row gives no usable age: {missing}; cleaning drops them with the reason.")
    return notes


def check_names(data_dir: Path, table: str = "") -> None:
    """Raise what `match_scans` would before it opens a file: no image, no table, or several tables."""
    images = find_images(data_dir)
    if images.empty:
        raise SourceError(_no_image(images, data_dir))
    if table or not _sets_side_by_side(data_dir):
        find_table(data_dir, table)


def _no_image(images: pd.DataFrame, data_dir: Path) -> str:
    left = images.attrs["left_out"]
    if left.empty:
        return " ".join([f"No NIfTI or MGZ image lies in {data_dir}.", *images.attrs["notes"]])
    return (
        f"None of the {len(left)} images in {data_dir} is taken for a scan. The first, "
        f"{Path(left['image'][0]).name}: {left['reason'][0]}. Set data_dir to the folder of the scans "
        "themselves, or give these files' names in the table."
    )


def _nothing_fits(images: pd.DataFrame, rows: pd.DataFrame, matches: list[Match], path: Path) -> str:
    names = ", ".join(images["stem"].head(3))
    ids = ", ".join(rows["subject_id"].head(3))
    return (
        f"None of the {len(images)} images has a row in {path}. Images are named like {names}; "
        f"ids look like {ids}. The first image: {matches[0].reason}. Set subject_column or image_column "
        "to the column that names them."
    )


@dataclass(frozen=True)
class Terms:
    """Where data come from and what is owed for them.

    Attributes
    ----------
    name : str
        The data set in words.
    needs : str
        What a person has to have or to set.
    licence : str
        The terms of use.
    cite : str
        What a publication has to name.
    url : str
        The publisher's page, where the terms stand in full.
    caution : str
        What to know before figures are compared, or "".
    """

    name: str
    needs: str
    licence: str
    cite: str
    url: str = ""
    caution: str = ""

    def markdown(self) -> str:
        """The terms as a short list, for a notebook or a terminal."""
        lines = [f"**{self.name}**", "", f"- **Terms of use:** {self.licence}", f"- **Cite:** {self.cite}"]
        lines += [f"- **Publisher:** <{self.url}>"] if self.url else []
        lines += [f"- **Mind:** {self.caution}"] if self.caution else []
        return "\n".join(lines)


_ENTRIES = tomllib.loads((files(__package__) / "terms.toml").read_text(encoding="utf-8"))
TERMS = {source: Terms(**entry) for source, entry in _ENTRIES.items()}
