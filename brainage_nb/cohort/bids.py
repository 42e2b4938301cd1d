"""Ages at sessions, which BIDS keeps in `sub-…/sub-…_sessions.tsv`, before those of the table.

Reads tables only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from brainage_nb.cohort.cells import TableError, TextTable, read_cells
from brainage_nb.cohort.columns import age_columns, find_role
from brainage_nb.cohort.tables import interpret_cells, read_sidecar, read_table, refused_rows


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
    sessions = None if columns.get("age") else _session_cells(data_dir)
    if sessions is None:
        return read_table(path, **columns)
    at_session = interpret_cells(_with_people(sessions, path), {}, columns.get("age_unit", "auto"))
    try:
        table = read_table(path, **columns)
    except TableError:
        return at_session
    return _put_before(at_session, table)


def _session_cells(data_dir: Path) -> TextTable | None:
    """All sessions files of a data set as one table, or None where none of them holds an age."""
    tables, sidecar = [], {}
    for path in sorted(data_dir.glob("sub-*/sub-*_sessions.tsv")):
        try:
            cells = read_cells(path)[0][""]
        except TableError:
            continue  # a sessions file without rows is common, and says nothing
        tables.append(cells.assign(participant_id=path.parent.name))
        sidecar |= read_sidecar(path)
    if not tables or not age_columns(tables[0].columns):
        return None
    cells = pd.concat(tables, ignore_index=True).fillna("")
    sidecar |= read_sidecar(data_dir / "sessions.tsv")
    notes = [f"Ages at sessions are read from {len(tables)} files sub-*_sessions.tsv."]
    return TextTable(cells, f"{data_dir}/sub-*/sub-*_sessions.tsv", sidecar, notes)


def _with_people(sessions: TextTable, path: Path) -> TextTable:
    """The sessions with what the participants table knows of the people: all but ages and sessions."""
    people = next(iter(read_cells(path)[0].values()))
    subject = find_role("subject_id", people.columns)
    if subject is None:
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
