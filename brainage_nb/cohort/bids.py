"""Ages at sessions, which BIDS keeps in `sub-…/sub-…_sessions.tsv`, before those of the table.

Reads tables only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from brainage_nb.cohort.age_column import find_age, units_of
from brainage_nb.cohort.cells import TableError, TextTable, read_cells, read_sidecar
from brainage_nb.cohort.columns import age_columns, find_role
from brainage_nb.cohort.tables import interpret_cells, read_table, refused_rows


def read_participants(path: Path, data_dir: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Read a table, and, where it belongs to a BIDS data set with ages in its sessions files, those ages.

    A subject whose sessions file gives an age takes all rows from there; all others stay as in the table.

    Parameters
    ----------
    path : path
        The participants table.
    data_dir : path
        The data set.
    columns : mapping
        Keywords of `read_table`. A named `age` column is that of `path`: sessions files are not read then.

    Returns
    -------
    DataFrame
        As `read_table`.
    """
    sessions = [] if columns.get("age") else _session_tables(data_dir)
    if not sessions:
        return read_table(path, **columns)
    unit = columns.get("age_unit") or "auto"
    people = next(iter(read_cells(path)[0].values()))
    named = {role: name for role, name in columns.items() if name in people}
    subject = named.pop("subject_id", find_role("subject_id", people.columns))
    named.pop("session_id", None)
    joined = _with_people(_as_one(sessions, unit), people, subject, path)
    at_session = interpret_cells(joined, named, unit)
    try:
        table = read_table(path, **columns)
    except TableError as error:
        at_session.attrs["notes"].append(f"No age is read from the table itself: {error}")
        return at_session
    return _put_before(at_session, table)


def _session_tables(data_dir: Path) -> list[TextTable]:
    """The sessions files that hold ages; those with the same columns and sidecars as one table."""
    alike: dict[str, tuple[dict, list[pd.DataFrame]]] = {}
    shared, without = read_sidecar(data_dir / "sessions.tsv"), []
    for path in sorted(data_dir.glob("sub-*/sub-*_sessions.tsv")):
        try:
            cells = read_cells(path)[0][""]
        except TableError:
            cells = pd.DataFrame()  # a sessions file without rows is common
        if not age_columns(cells.columns):
            without.append(path.parent.name)
            continue
        sidecar = shared | read_sidecar(path)
        kind = json.dumps([list(cells.columns), sidecar])
        alike.setdefault(kind, (sidecar, []))[1].append(cells.assign(participant_id=path.parent.name))
    count = sum(len(tables) for _, tables in alike.values())
    notes = [f"Ages at sessions are read from {count} files sub-*_sessions.tsv."]
    if without:
        names = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
        notes.append(
            f"Sessions files without an age: {len(without)} ({names}); the table's age counts there."
        )
    where = f"{data_dir}/sub-*/sub-*_sessions.tsv"
    return [
        TextTable(pd.concat(tables, ignore_index=True), where, sidecar, list(notes))
        for sidecar, tables in alike.values()
    ]


def _as_one(parts: list[TextTable], age_unit: str) -> TextTable:
    """Tables with other columns or sidecars as one, each age with the unit of its own table."""
    if len(parts) == 1:
        return parts[0]
    cells = []
    for part in parts:
        age = find_age(part, "participant_id", age_unit)
        units = units_of(part, age, age_unit)
        others = [column.name for column in age_columns(part.cells)]
        cells.append(part.cells.drop(columns=others).assign(age=part.cells[age.name], age_unit=units))
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    return TextTable(pd.concat(cells, ignore_index=True).fillna(""), parts[0].where, {}, notes)


def _with_people(sessions: TextTable, people: pd.DataFrame, subject: str | None, path: Path) -> TextTable:
    """The sessions with what the participants table knows of the people: all but ages and sessions."""
    if subject not in people:
        return sessions
    aside = {column.name for column in age_columns(people.columns)} | set(sessions.cells.columns)
    aside = (aside | {find_role("session_id", people.columns)}) - {subject}
    known = people.drop(columns=[name for name in people.columns if name in aside])
    known = known.assign(_id=_bare(known[subject])).drop(columns=subject).drop_duplicates("_id")
    cells = sessions.cells.assign(_id=_bare(sessions.cells["participant_id"]))
    cells = cells.merge(known, on="_id", how="left").drop(columns="_id").fillna("")
    return TextTable(cells, sessions.where, read_sidecar(path) | sessions.sidecar, sessions.notes)


def _bare(ids: pd.Series) -> pd.Series:
    return ids.str.strip().str.replace(r"^sub-", "", case=False, regex=True)


def _put_before(at_session: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """All rows of subjects with an age at a session, then the table's rows of all others."""
    told = set(at_session["subject_id"])
    others = table[~table["subject_id"].isin(told)]
    rows = pd.concat([at_session, others], ignore_index=True)
    refused = refused_rows(at_session).to_dict("records")
    refused = [row for row in refused if row["subject_id"] not in set(others["subject_id"])]
    known = told | {row["subject_id"] for row in refused}
    refused += [row for row in refused_rows(table).to_dict("records") if row["subject_id"] not in known]
    rows.attrs = {"notes": [*at_session.attrs["notes"], *table.attrs["notes"]], "refused": refused}
    return rows.fillna(dict.fromkeys(rows.columns.drop("age"), ""))
