"""From any participants table, and BIDS sessions files, to ages in years: one row per subject and session.

What a rule can decide is decided and noted; what none can is refused. Knows no images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from brainage_nb.tables.age_column import (
    SAME_AGE_YEARS,
    find_age,
    find_units,
    read_named_ages,
    set_labels_aside,
)
from brainage_nb.tables.ages import PER_YEAR, Age, is_missing, parse_age
from brainage_nb.tables.columns import (
    COLUMN_PARAMETERS,
    AgeColumn,
    find_age_columns,
    find_role,
    plain_name,
    read_sex,
    read_sex_codes,
)
from brainage_nb.tables.files import TableError, TextTable, read_cells, read_sidecar


def merge_repeats(rows: pd.DataFrame, table: TextTable) -> pd.DataFrame:
    """One row for each subject, session and image.

    Equal ages are one age; ages within a year give their mean; ages further apart, or a readable age beside
    one that is not (`89+`), give none. Blank cells give way to filled ones. What else differs (sex, site,
    diagnosis) is left blank.

    Parameters
    ----------
    rows : DataFrame
        `subject_id, session_id, age` (`Age` objects) and any columns of text.
    table : TextTable
        Takes the notes.
    """
    key = [column for column in ("subject_id", "session_id", "image_id") if column in rows]
    repeated = rows.duplicated(key, keep=False)
    if not repeated.any():
        return rows
    count = len(rows[repeated].drop_duplicates(key))
    table.note(f"Ids with several rows: {count} (in {repeated.sum()} rows); each gives one row.")
    rows = rows.drop_duplicates()  # rows that say the same need no rule
    repeated = rows.duplicated(key, keep=False)
    merged = [_merge_rows(group, table) for _, group in rows[repeated].groupby(key, sort=False)]
    return pd.concat([rows[~repeated], pd.DataFrame(merged)]).sort_index().reset_index(drop=True)


def _merge_rows(group: pd.DataFrame, table: TextTable) -> pd.Series:
    name = " ".join(filter(None, group.iloc[0][["subject_id", "session_id"]]))
    age = _merge_ages(list(group["age"]))
    if age.rule or (age.reason and any(other.years is not None for other in group["age"])):
        table.note(f"{name}: {age.rule or f'{age.reason}; refused'}.")
    row: dict[str, Any] = {"age": age}
    for column in group.columns.drop("age"):
        first, *others = [value for value in group[column].unique() if value] or [""]
        if others and column != "table_id":
            table.note(f"{name}: its rows disagree on {column} ({', '.join([first, *others])}): left blank.")
            first = ""
        row[column] = first
    return pd.Series(row, name=group.index[0])


def _merge_ages(ages: list[Age]) -> Age:
    years = sorted({age.years for age in ages if age.years is not None})
    unusable = [age for age in ages if age.years is None and not age.blank]
    shown = " and ".join(f"{year:.2f}" for year in years)
    if not years:
        return (unusable or ages)[0]
    if unusable:
        return Age(reason=f"its rows disagree on the age: {shown}, but {unusable[0].reason}")
    if years[-1] - years[0] > SAME_AGE_YEARS:
        return Age(reason=f"its rows give ages over {SAME_AGE_YEARS:g} year apart: {shown}")
    if len(years) == 1:
        return next(age for age in ages if age.years is not None)
    return Age(years=sum(years) / len(years), rule=f"mean of {shown}, ages of its rows within a year")


_SESSION_IN_ID = re.compile(
    r"(?i)^(.+?)[-_](ses-?[a-z0-9]+|MR\d+|MR_d\d+|baseline(?:_\d+)?|retest(?:_\d+)?|visit_?\d+)$"
)


def read_table(path: Path | str, *, age_unit: str = "auto", **columns: str | None) -> pd.DataFrame:
    """Read a participants table of any common kind.

    Parameters
    ----------
    path : path
        CSV, TSV, XLS or XLSX.
    age_unit : {"auto", "years", "months", "weeks", "days"}
        Unit of bare numbers. "auto": what the column's name, the sidecar (`participants.json`), a line of
        labels below the header or a column `age_unit` says, else years.
    **columns : str
        Names of columns by role: `subject_id`, `age`, `sex`, `site`, `session_id`, `diagnosis`, `image_id`;
        what is not named is found by its name. `age` may list one column per visit, with commas between
        (`"AgeMRI_W1,AgeMRI_W2"`): each gives a row, and the visit becomes the session.

    Returns
    -------
    DataFrame
        One row per subject and session (and image, where the table lists images) with a usable age:
        `subject_id, session_id, age` [years], `sex` ("F", "M" or ""), `site`; `diagnosis`, `cdr`, `image_id`
        where the table knows them; `table_id` (the id as written) and `age_note` (how an age came from
        several rows, mostly ""). Ids are text as written, without `sub-`. `attrs["notes"]` lists what was
        resolved and by what rule, `attrs["refused"]` the rows without usable age (see `refused_rows`). Read
        both at once: some pandas operations drop `attrs`.

    Raises
    ------
    TableError
        Where no age can be read safely; the message says what to set.

    Examples
    --------
    >>> people = read_table("participants.tsv", age_unit="years")
    >>> people[["subject_id", "age", "sex"]]
      subject_id   age sex
    0         01  34.2   F
    1         02  71.0   M
    >>> refused_rows(people)[["subject_id", "reason"]]
      subject_id                        reason
    0         03  '89+' is a bound, not an age
    """
    if unknown := columns.keys() - COLUMN_PARAMETERS:
        roles = ", ".join(COLUMN_PARAMETERS)
        raise TypeError(f"read_table knows no {', '.join(unknown)}; roles are {roles}.")
    rows = read_participants(path, None, columns | {"age_unit": age_unit})
    usable = rows["age"].notna()
    refused = rows[~usable].drop(columns="age").rename(columns={"age_note": "reason"})
    found = rows[usable].copy()
    found.attrs["refused"] = refused.to_dict("records")
    return found


def refused_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the table that gave no usable age: the columns of `read_table` but the age, and `reason`.

    `attrs` keeps them as plain records: pandas cannot merge frames whose `attrs` hold a frame.
    """
    columns = [column for column in frame.columns if column not in ("age", "age_note")]
    return pd.DataFrame(frame.attrs.get("refused", []), columns=[*columns, "reason"], dtype=str)


def bare_session(label: str) -> str:
    """A session's label without `ses-`, and a whole number without decimals (`1.0` is `1`)."""
    return re.sub(r"^ses-?(?=.)", "", re.sub(r"^(\d+)\.0$", r"\1", label.strip()), flags=re.IGNORECASE)


def _read_rows(table: TextTable, age_unit: str) -> pd.DataFrame:
    """The rows of a table of text cells, each with its `Age`."""
    if age_unit not in ("auto", *PER_YEAR):
        raise TableError(f"age_unit = {age_unit!r}: it is one of auto, {', '.join(PER_YEAR)}.")
    subject = table.find("subject_id")
    if subject is None:
        raise table.error("no column of subject ids was found", "set subject_column to its name")
    for line in table.cells.attrs.get("above", []):
        table.note(f"A line above the header is passed over: {line}")
    if problem := table.sidecar.get(""):
        table.note(f"{problem}: nothing that it explains was used.")
    ages = read_named_ages(table) if "age" in table.named else find_age_columns(table.cells)
    set_labels_aside(table, subject, [column.name for column in ages])
    ages = ages if "age" in table.named else [find_age(table, subject, age_unit)]
    table.ages = [column.name for column in ages]
    if len(table.cells) > 2 and (table.cells[table.ages[0]] == table.cells[subject]).all():
        problem = f"'{table.ages[0]}' is the same as '{subject}' in every row: the columns seem shifted"
        raise table.error(problem, "name each column in the header, or set age_column to another one")
    people = _read_people(table, subject)
    visits = [_read_visit(table, people, column, age_unit) for column in ages]
    return pd.concat(visits, ignore_index=True)


def _open_table(path: Path | str, named: Mapping[str, str]) -> TextTable:
    """A table, of a workbook the first sheet that has a column of ids and one of ages."""
    sheets = read_cells(path)
    serving = [
        name
        for name, cells in sheets.items()
        if named.get("subject_id") in cells or find_role("subject_id", cells)
        if named.get("age") in cells or find_age_columns(cells)
    ]
    name = [*serving, *sheets][0]
    table = TextTable(sheets[name], str(path), read_sidecar(path), sheets[name].attrs["notes"], named)
    if len(sheets) > 1:
        table.where = f"{path}, sheet '{name}'"
        others = ", ".join(sheet for sheet in sheets if sheet != name)
        table.note(f"Sheet '{name}' was read; other sheets were not: {others}.")
    return table


def _read_people(table: TextTable, subject: str) -> pd.DataFrame:
    """All but the age of every row: ids, session, sex and what else is known."""
    written = _blank_missing(table.cells[subject])
    ids, sessions = _read_ids(table, written)
    if session := table.find("session_id"):
        told = _blank_missing(table.cells[session]).map(bare_session)
        sessions = told.where(told != "", sessions)
    sexes = _read_sexes(table, table.find("sex"))
    people = {"subject_id": ids, "session_id": sessions, "sex": sexes, "table_id": written}
    for role in ("site", "diagnosis", "cdr", "image_id"):
        if name := table.find(role, taken=subject):
            people[role] = _blank_missing(table.cells[name])
    return pd.DataFrame(people)


def _blank_missing(cells: pd.Series) -> pd.Series:
    return cells.where(~cells.map(is_missing), "").str.strip()


def _read_ids(table: TextTable, written: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Subject ids without `sub-`, and the sessions that ids carry (`OAS1_0001_MR2`)."""
    ids = written
    if written[written != ""].str.fullmatch(r"\d+\.0").all():
        table.note("Ids such as '12.0' are read as '12'.")
        ids = ids.str.removesuffix(".0")
    ids = ids.str.replace(r"^sub-", "", case=False, regex=True)
    carried = ids.str.extract(_SESSION_IN_ID).fillna("")
    sessions = carried[1].map(bare_session)
    if (found := sessions != "").any():
        first = found.idxmax()
        example = f"'{ids[first]}' is session '{sessions[first]}' of subject '{carried[0][first]}'"
        table.note(f"Ids that carry a session: {found.sum()}; {example}.")
    return carried[0].where(found, ids), sessions


def _read_sexes(table: TextTable, name: str | None) -> pd.Series:
    """'F', 'M' or '' for each row."""
    if name is None:
        return pd.Series("", index=table.cells.index, dtype=str)
    coding = read_sex_codes([name, *(text for _, text in table.described(name))])
    sexes = table.cells[name].map(lambda cell: read_sex(cell, coding))
    unread = [cell for cell in table.cells[name][sexes == ""] if not is_missing(cell)]
    if unread:
        shown = ", ".join(repr(cell) for cell in sorted(set(unread))[:5])
        told = "Rows whose sex is neither in words nor a code that the column's name or sidecar explains"
        table.note(f"{told}: {len(unread)} ({shown}); left blank.")
    return sexes


def _read_visit(table: TextTable, people: pd.DataFrame, column: AgeColumn, age_unit: str) -> pd.DataFrame:
    """The rows with the ages of one age column."""
    if len(table.ages) > 1 and (people["session_id"] != "").any():
        problem = "rows have sessions, and several age columns were named"
        raise table.error(problem, "set age_column to one column")
    units = find_units(table, column, age_unit)
    ages = pd.Series(map(parse_age, table.cells[column.name], units), index=people.index)
    # what holds for a column is noted once, with its first cell; a row keeps only rules of its own
    rules = pd.Series([age.rule for age in ages if age.rule], dtype=str)
    for _, alike in rules.groupby(rules.str.replace(r"[\d.,]+", "", regex=True)):
        table.note(f"Ages not written as plain years: {len(alike)} ({alike.iloc[0]}).")
    ages = ages.map(lambda age: replace(age, rule=""))
    sessions = people["session_id"].where(people["session_id"] != "", column.wave)
    if {"ptid", "viscode"} <= set(map(plain_name, table.cells)) and plain_name(column.name) == "age":
        late = ~sessions.str.lower().isin(["bl", "sc", "scmri"])
        ages = ages.mask(late, Age(reason="the AGE of ADNIMERGE is that at baseline, not at this visit"))
    return people.assign(session_id=sessions, age=ages)


def _collect(rows: pd.DataFrame, table: TextTable) -> pd.DataFrame:
    """Rows with a usable age, then those without, whose `age_note` says why."""
    nameless = rows["subject_id"] == ""
    if nameless.any():
        table.note(f"Rows without an id, left out: {nameless.sum()}.")
    rows = merge_repeats(rows[~nameless].reset_index(drop=True), table)
    ages = pd.DataFrame(rows["age"].tolist(), columns=["years", "reason", "rule", "blank"])
    usable = ages["years"].notna()
    reasons = ages["reason"][~usable]
    if not usable.any():
        shown = "; ".join(reasons.unique()[:3]) or "no rows with an id"
        problem = f"none of the {len(rows)} rows gives an age ('{', '.join(table.ages)}': {shown})"
        raise table.error(problem, "set age_column to another column, or table")
    kinds = reasons.str.replace(r"'[^']*'", "…", regex=True).str.replace(r"[\d.]+", "…", regex=True)
    for kind, count in kinds.value_counts().items():
        table.note(f"Rows without a usable age: {count} ({reasons[kinds == kind].iloc[0]}).")
    notes = ages["rule"].where(usable, ages["reason"])
    rows = rows.assign(age=ages["years"].astype(float), age_note=notes, site=rows.get("site", ""))
    _note_unchanged_ages(rows[usable], table)
    order = ["subject_id", "session_id", "age", "sex", "site", "diagnosis", "cdr", "image_id", "table_id"]
    rows = rows[[column for column in [*order, "age_note"] if column in rows]]
    rows = pd.concat([rows[usable], rows[~usable]], ignore_index=True)
    rows.attrs = {"notes": table.notes}
    return rows


def _note_unchanged_ages(rows: pd.DataFrame, table: TextTable) -> None:
    """Note tables that repeat the age of the first visit in later ones."""
    people = rows.groupby("subject_id")["age"]
    several = people.size() > 1
    if several.sum() > 1 and (people.nunique()[several] == 1).all():
        told = "subjects with several rows have one age in all of them: it may be that at their first visit"
        table.note(f"All {several.sum()} {told}.")


def read_participants(path: Path | str, data_dir: Path | None, columns: Mapping[str, str]) -> pd.DataFrame:
    """Read a table, and, where it belongs to a BIDS data set with ages in its sessions files, those ages.

    A subject whose sessions file gives an age takes all rows from there; all others stay as in the table.

    Parameters
    ----------
    path : path
        The participants table.
    data_dir : path or None
        The data set.
    columns : mapping
        Keywords of `read_table`. A named `age` column is that of `path`: sessions files are not read then.

    Returns
    -------
    DataFrame
        As `read_table`, then rows without a usable age: `age` is NaN, and `age_note` says why.
        `attrs["notes"]` lists what was resolved and by what rule.
    """
    named = {role: name for role, name in columns.items() if name}
    age_unit = named.pop("age_unit", "auto")
    sessions = [] if "age" in named or data_dir is None else _read_sessions(data_dir)
    parts, table = [_read_rows(part, age_unit) for part in sessions], _open_table(path, named)
    if not sessions:
        return _collect(_read_rows(table, age_unit), table)
    rows = _add_people(pd.concat(parts, ignore_index=True).fillna(""), table)
    table.notes = list(dict.fromkeys(note for one in [*sessions, table] for note in one.notes))
    try:
        others = _read_rows(table, age_unit)
        instead = _subjects_with_age(others) - _subjects_with_age(rows)
        own = set(rows["subject_id"]) - instead
        parts = [rows[rows["subject_id"].isin(own)], others[~others["subject_id"].isin(own)]]
        rows = pd.concat(parts, ignore_index=True).fillna("")
    except TableError as error:
        table.note(f"No age is read from the table itself: {error}")
    table.ages = [*sessions[0].ages, *table.ages]
    return _collect(rows, table)


def _subjects_with_age(rows: pd.DataFrame) -> set[str]:
    return set(rows["subject_id"][rows["age"].map(lambda age: age.years is not None)])


def _read_sessions(data_dir: Path) -> list[TextTable]:
    """The sessions files that hold ages; those with the same columns and sidecars as one table."""
    alike: dict[str, tuple[dict, list[pd.DataFrame]]] = {}
    shared, without = read_sidecar(data_dir / "sessions.tsv"), []
    for path in sorted(data_dir.glob("sub-*/sub-*_sessions.tsv")):
        try:
            cells = read_cells(path)[""]
        except TableError:
            cells = pd.DataFrame()  # a sessions file without rows is common
        if not find_age_columns(cells.columns):
            without.append(path.parent.name)
            continue
        sidecar = shared | read_sidecar(path)
        kind = json.dumps([list(cells.columns), sidecar])
        alike.setdefault(kind, (sidecar, []))[1].append(cells.assign(participant_id=path.parent.name))
    count = sum(len(tables) for _, tables in alike.values())
    notes = [f"Ages at sessions are read from {count} files sub-*_sessions.tsv."]
    if without:
        names = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
        told = f"Sessions files without an age: {len(without)} ({names})"
        notes.append(f"{told}; the table's age counts there.")
    where = f"{data_dir}/sub-*/sub-*_sessions.tsv"
    return [
        TextTable(pd.concat(tables, ignore_index=True), where, sidecar, list(notes))
        for sidecar, tables in alike.values()
    ]


def _add_people(rows: pd.DataFrame, table: TextTable) -> pd.DataFrame:
    """Rows of sessions with what the participants table knows of their people."""
    people = replace(table, named={role: name for role, name in table.named.items() if name in table.cells})
    subject = people.find("subject_id")
    if subject is None:
        return rows
    known = _read_people(people, subject).drop_duplicates("subject_id").set_index("subject_id")
    for column in known.columns.intersection(["sex", "site", "diagnosis", "cdr"]):
        own = rows.get(column, pd.Series("", index=rows.index))
        rows[column] = own.where(own != "", rows["subject_id"].map(known[column]).fillna(""))
    return rows
