"""From any participants table to ages in years, a row a subject and session. Knows no images.

What can be decided by a rule is decided and noted; what cannot is refused with a word on what to set. Every
age in the result can be found in the table.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd

from brainage_nb.cohort.age_column import (
    existing_column,
    find_age,
    named_ages,
    set_labels_aside,
    units_of,
)
from brainage_nb.cohort.ages import PER_YEAR, Age, is_missing, parse_age
from brainage_nb.cohort.cells import TableError, TextTable, read_cells, read_sidecar
from brainage_nb.cohort.columns import (
    ROLE_NAMES,
    AgeColumn,
    age_columns,
    find_role,
    plain_name,
    read_sex,
    sex_coding,
)
from brainage_nb.cohort.repeats import merge_repeats

__all__ = ["TableError", "bare_session", "interpret_cells", "read_table", "refused_rows"]

_KNOWN_TEXT = ("site", "diagnosis", "cdr", "image_id")
_SESSION_IN_ID = re.compile(
    r"(.+?)[-_](ses-?[a-z0-9]+|MR\d+|MR_d\d+|baseline(?:_\d+)?|retest(?:_\d+)?|visit_?\d+)", re.IGNORECASE
)


def read_table(
    path: Path | str,
    *,
    subject_id: str | None = None,
    age: str | None = None,
    sex: str | None = None,
    site: str | None = None,
    session_id: str | None = None,
    diagnosis: str | None = None,
    image_id: str | None = None,
    age_unit: str = "auto",
) -> pd.DataFrame:
    """Read a participants table of any common kind.

    Parameters
    ----------
    path : path
        CSV, TSV, XLS or XLSX.
    subject_id, age, sex, site, session_id, diagnosis, image_id : str, optional
        Names of columns; what is not named is found by its name. `age` may list one column a visit, parted by
        commas (`"AgeMRI_W1,AgeMRI_W2"`): each gives a row, and the visit becomes the session.
    age_unit : {"auto", "years", "months", "weeks", "days"}
        Unit of bare numbers. "auto": what the column's name, the sidecar (`participants.json`), a line of
        labels below the header or a column `age_unit` says, else years.

    Returns
    -------
    DataFrame
        One row a subject and session (and image, where the table lists images) with a usable age:
        `subject_id, session_id, age` [years], `sex` ("F", "M" or ""), `site`; `diagnosis`, `cdr`, `image_id`
        where the table knows them; `table_id` (the id as written) and `age_note` (how an age came from
        several rows, mostly ""). Ids are text as written, without `sub-`. `attrs["notes"]` lists what was
        resolved and by what rule, `attrs["refused"]` the rows without usable age (see `refused_rows`). Read
        both at once: some pandas operations drop `attrs`.

    Raises
    ------
    TableError
        Where no age can be read safely; the message says what to set.
    """
    named = {
        "subject_id": subject_id,
        "age": age,
        "sex": sex,
        "site": site,
        "session_id": session_id,
        "diagnosis": diagnosis,
        "image_id": image_id,
    }
    named = {role: name for role, name in named.items() if name}
    sheets, notes = read_cells(path)
    table = TextTable(next(iter(sheets.values())), str(path), read_sidecar(path), notes)
    if len(sheets) > 1:
        table = _sheet_with_ages(sheets, table, named)
    return interpret_cells(table, named, age_unit)


def refused_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the table that gave no usable age: the columns of `read_table` but the age, and `reason`.

    `attrs` keeps them as plain records: pandas cannot merge frames whose `attrs` hold a frame.
    """
    columns = [column for column in frame.columns if column not in ("age", "age_note")]
    return pd.DataFrame(frame.attrs.get("refused", []), columns=[*columns, "reason"], dtype=str)


def bare_session(label: str) -> str:
    """A session's label without `ses-`, and a whole number without decimals (`1.0` is `1`)."""
    return re.sub(r"^ses-?(?=.)", "", re.sub(r"^(\d+)\.0$", r"\1", label.strip()), flags=re.IGNORECASE)


def interpret_cells(table: TextTable, named: dict[str, str], age_unit: str = "auto") -> pd.DataFrame:
    """Find the columns of a table of text cells and read them.

    Parameters
    ----------
    table : TextTable
        The cells as written.
    named : dict
        Role (a parameter of `read_table`) -> column.
    age_unit : str
        As in `read_table`.

    Returns
    -------
    DataFrame
        As `read_table`.
    """
    if age_unit not in ("auto", *PER_YEAR):
        raise TableError(f"age_unit = {age_unit!r}: it is one of auto, {', '.join(PER_YEAR)}.")
    subject = _column(table, named, "subject_id")
    if subject is None:
        raise table.error("no column of subject ids was found", "set subject_column to its name")
    for line in table.cells.attrs.get("above", []):
        table.note(f"A line above the header is passed over: {line}")
    if problem := table.sidecar.get(""):
        table.note(f"{problem}: nothing that it explains was used.")
    ages = named_ages(table, named["age"]) if "age" in named else age_columns(table.cells)
    set_labels_aside(table, subject, [column.name for column in ages])
    ages = ages if "age" in named else [find_age(table, subject, age_unit)]
    if len(table.cells) > 2 and (table.cells[ages[0].name] == table.cells[subject]).all():
        raise table.error(
            f"'{ages[0].name}' is the same as '{subject}' in every row: the columns seem shifted",
            "name each column in the header, or set age_column to another one",
        )
    people = _people(table, named, subject)
    visits = [_visit(table, people, column, age_unit, several=len(ages) > 1) for column in ages]
    rows = pd.concat(visits, ignore_index=True)
    nameless = rows["subject_id"] == ""
    if nameless.any():
        table.note(f"Rows without an id, left out: {nameless.sum()}.")
    rows = merge_repeats(rows[~nameless].reset_index(drop=True), table)
    return _result(rows, table, ages)


def _sheet_with_ages(sheets: dict[str, pd.DataFrame], first: TextTable, named: dict[str, str]) -> TextTable:
    """The first sheet of a workbook that has a column of ids and one of ages."""
    for name, cells in sheets.items():
        has_id = named.get("subject_id") in cells or find_role("subject_id", cells.columns)
        has_age = named.get("age") in cells or age_columns(cells.columns)
        if has_id and has_age:
            others = ", ".join(sheet for sheet in sheets if sheet != name)
            note = f"Sheet '{name}' was read; other sheets were not: {others}."
            return TextTable(cells, f"{first.where}, sheet '{name}'", first.sidecar, [*first.notes, note])
    return first


def _column(table: TextTable, named: dict[str, str], role: str) -> str | None:
    """The column of a role: the one named, else the one found, else None."""
    if role in named:
        return existing_column(table, named[role], role)
    name = find_role(role, table.cells.columns)
    if name is not None and plain_name(name) != ROLE_NAMES[role][0]:
        table.note(f"{role} is read from column '{name}'.")
    return name


def _people(table: TextTable, named: dict[str, str], subject: str) -> pd.DataFrame:
    """All but the age of every row: ids, session, sex and what else is known."""
    cells = table.cells
    written = _filled(cells[subject])
    ids, in_id = _ids(table, written)
    session = _column(table, named, "session_id")
    sessions = _filled(cells[session]).map(bare_session) if session else in_id
    people = {
        "subject_id": ids,
        "session_id": sessions.where(sessions != "", in_id),
        "sex": _sexes(table, _column(table, named, "sex")),
        "table_id": written,
    }
    for role in _KNOWN_TEXT:
        if named.get(role, find_role(role, cells.columns)) not in (None, subject):
            people[role] = _filled(cells[_column(table, named, role)])
    return pd.DataFrame(people)


def _filled(cells: pd.Series) -> pd.Series:
    return cells.where(~cells.map(is_missing), "").str.strip()


def _ids(table: TextTable, written: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Subject ids without `sub-`, and the sessions that ids carry (`OAS1_0001_MR2`)."""
    ids = written
    if written[written != ""].str.fullmatch(r"\d+\.0").all():
        table.note("Ids such as '12.0' are read as '12'.")
        ids = ids.str.removesuffix(".0")
    ids = ids.str.replace(r"^sub-", "", case=False, regex=True)
    carried = ids.map(_SESSION_IN_ID.fullmatch)
    if carried.notna().any():
        first = carried.dropna().iloc[0]
        table.note(
            f"Ids that carry a session: {carried.notna().sum()}; '{first[0]}' is session "
            f"'{bare_session(first[2])}' of subject '{first[1]}'."
        )
    subjects = [match[1] if match else whole for match, whole in zip(carried, ids, strict=True)]
    sessions = [bare_session(match[2]) if match else "" for match in carried]
    return pd.Series(subjects, index=ids.index, dtype=str), pd.Series(sessions, index=ids.index, dtype=str)


def _sexes(table: TextTable, name: str | None) -> pd.Series:
    """'F', 'M' or '' a row."""
    if name is None:
        return pd.Series("", index=table.cells.index, dtype=str)
    coding = sex_coding([name, *(text for _, text in table.described(name))])
    sexes = table.cells[name].map(lambda cell: read_sex(cell, coding))
    unread = [cell for cell in table.cells[name][sexes == ""] if not is_missing(cell)]
    if unread:
        shown = ", ".join(repr(cell) for cell in sorted(set(unread))[:5])
        table.note(
            f"Rows whose sex is neither in words nor a code that the column's name or sidecar explains: "
            f"{len(unread)} ({shown}); left blank."
        )
    return sexes


def _visit(
    table: TextTable, people: pd.DataFrame, column: AgeColumn, age_unit: str, *, several: bool
) -> pd.DataFrame:
    """The rows with the ages of one age column."""
    if several and (people["session_id"] != "").any():
        raise table.error(
            "rows have sessions, and several age columns were named", "set age_column to one column"
        )
    units = units_of(table, column, age_unit)
    cells = zip(table.cells[column.name], units, strict=True)
    ages = pd.Series([parse_age(cell, unit) for cell, unit in cells], index=people.index)
    _note_cell_rules(ages, table)
    # what holds for a column is noted once; a row keeps only rules of its own
    ages = ages.map(lambda age: replace(age, rule=""))
    sessions = people["session_id"].where(people["session_id"] != "", column.wave)
    if {"ptid", "viscode"} <= set(map(plain_name, table.cells)) and plain_name(column.name) == "age":
        late = ~sessions.str.lower().isin(["bl", "sc", "scmri"])
        reason = "the AGE of ADNIMERGE is that at baseline, not at this visit"
        ages = ages.where(~late, Age(reason=reason))
    return people.assign(session_id=sessions, age=ages)


def _note_cell_rules(ages: pd.Series, table: TextTable) -> None:
    """Note how many cells were not plain years, one note a kind, with its first cell as the example."""
    rules = ages.map(lambda age: age.rule)
    rules = rules[rules != ""]
    for _, alike in rules.groupby(rules.str.replace(r"[\d.,]+", "", regex=True)):
        table.note(f"Ages not written as plain years: {len(alike)} ({alike.iloc[0]}).")


def _result(rows: pd.DataFrame, table: TextTable, ages: list[AgeColumn]) -> pd.DataFrame:
    """The table of usable ages, with notes and refused rows in `attrs`."""
    usable = rows["age"].map(lambda age: age.years is not None).astype(bool)
    reasons = rows["age"].map(lambda age: age.reason)
    if not usable.any():
        shown = "; ".join(reasons.unique()[:3]) or "no rows with an id"
        names = ", ".join(column.name for column in ages)
        raise table.error(
            f"none of the {len(rows)} rows gives an age ('{names}': {shown})",
            "set age_column to another column, or table",
        )
    kinds = reasons[~usable].str.replace(r"'[^']*'", "…", regex=True).str.replace(r"[\d.]+", "…", regex=True)
    for kind, count in kinds.value_counts().items():
        table.note(f"Rows without a usable age: {count} ({reasons[kinds.index[kinds == kind][0]]}).")
    rules = rows["age"].map(lambda age: age.rule)
    _note_unchanged_ages(rows[usable], table)
    order = ["subject_id", "session_id", "age", "sex", "site", "diagnosis", "cdr", "image_id", "table_id"]
    frame = rows.assign(
        age=[age.years for age in rows["age"]], age_note=rules, site=rows.get("site", ""), reason=reasons
    )
    order = [column for column in order if column in frame]
    result = frame.loc[usable, [*order, "age_note"]].astype({"age": float}).reset_index(drop=True)
    refused = frame.loc[~usable, [column for column in order if column != "age"] + ["reason"]]
    result.attrs = {"notes": table.notes, "refused": refused.to_dict("records")}
    return result


def _note_unchanged_ages(rows: pd.DataFrame, table: TextTable) -> None:
    """Note tables that repeat the age of the first visit in later ones."""
    years = pd.to_numeric(rows["age"].map(lambda age: age.years))
    people = years.groupby(rows["subject_id"])
    several = people.size() > 1
    if several.sum() > 1 and (people.nunique()[several] == 1).all():
        table.note(
            f"All {several.sum()} subjects with several rows have one age in all of them: it may be the age "
            "at their first visit."
        )
