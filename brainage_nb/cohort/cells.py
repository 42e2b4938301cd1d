"""From a table file of any common kind to rows of text. Gives cells no meaning: `tables` does that."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pandas as pd

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".xls", ".xlsx", ".xlsm", ".ods")
_DELIMITERS = ("\t", ";", ",", "|", " ")
_EXCEL_MAGIC = (b"\xd0\xcf\x11\xe0", b"PK\x03\x04")
_POINTERS = (b"version https://git-lfs", b"/annex/objects/", b"../.git/annex", b".git/annex/objects")


class TableError(ValueError):
    """A table that cannot be read safely; the message says what to set or to change."""


@dataclass
class TextTable:
    """A table as written, before any cell has a meaning.

    Attributes
    ----------
    cells : DataFrame of str
        Blank cells are "".
    where : str
        What errors call the table.
    sidecar : dict
        Column -> its description in a BIDS sidecar (`Units`, `Levels`, …).
    notes : list of str
        What was assumed or resolved so far, and by what rule.
    """

    cells: pd.DataFrame
    where: str
    sidecar: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Note a thing once."""
        if text not in self.notes:
            self.notes.append(text)

    def error(self, problem: str, remedy: str) -> TableError:
        """A refusal: what is wrong, what to set, and which columns there are."""
        names = list(self.cells.columns)
        shown = ", ".join(names[:40]) + (f", … ({len(names)} in all)" if len(names) > 40 else "")
        return TableError(f"{self.where}: {problem}. To go on, {remedy}. Columns: {shown}.")


def read_cells(path: Path | str) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Read a table file without interpreting a cell.

    Parameters
    ----------
    path : path
        CSV, TSV or other delimited text in any common encoding, or an Excel or OpenDocument workbook. The
        content decides which it is, not the file's ending.

    Returns
    -------
    sheets : dict of str to DataFrame
        Cells as text, blank cells as "", by sheet (one, named "", for text files).
    notes : list of str
        What was assumed about encoding, delimiter and shape.

    Raises
    ------
    TableError
        Where the file is absent, a pointer to a file, not a table, or its rows do not fit its header.
    """
    path = Path(path)
    content = _content(path)
    if content.startswith(_EXCEL_MAGIC):
        return _workbook(path, content)
    text, notes = _decoded(content, path)
    frame, more = _parsed(text, path)
    return {"": frame}, notes + more


def _content(path: Path) -> bytes:
    if path.is_symlink() and not path.exists():
        raise TableError(
            f"{path} is a link whose file was not fetched. Run `datalad get {path.name}` beside it."
        )
    if not path.is_file():
        raise TableError(f"There is no table at {path}. Set `table` to a CSV, TSV, XLS or XLSX file.")
    content = path.read_bytes()
    if not content.strip():
        raise TableError(f"{path} is empty. Set `table` to a table with a row a subject.")
    # A pointer is one short line; a real table may well mention such words in a cell.
    if len(content) < 1000 and any(mark in content for mark in _POINTERS):
        raise TableError(
            f"{path} is not the table but a pointer to it (git-annex or git-lfs). "
            f"Run `datalad get {path.name}` or `git lfs pull` beside it, then read it again."
        )
    if content.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise TableError(
            f"{path} is a web page, not a table. Download it again; the site may ask for a login."
        )
    return content


def _decoded(content: bytes, path: Path) -> tuple[str, list[str]]:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16"), ["Encoding: UTF-16."]
    if b"\x00" in content:
        raise TableError(f"{path} is binary, not a table. Set `table` to a CSV, TSV, XLS or XLSX file.")
    try:
        return content.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        # cp1252 differs from latin-1 in 32 characters that European Excel writes; five bytes have no meaning.
        return content.decode("cp1252", errors="replace"), ["Encoding: not UTF-8, read as Windows-1252."]


def _parsed(text: str, path: Path) -> tuple[pd.DataFrame, list[str]]:
    tables = {mark: _rows(text, mark) for mark in _DELIMITERS}
    mark = max(_DELIMITERS, key=lambda mark: _fit(tables[mark], mark))
    _refuse_title(tables, path)
    names = {"\t": "tab", ";": "semicolon", ",": "comma", "|": "bar", " ": "space"}
    expected = {".tsv": "\t", ".csv": ","}.get(path.suffix.lower(), mark)
    wide = len(tables[mark][0]) > 1
    notes = [f"Columns are parted by a {names[mark]}."] if mark != expected and wide else []
    frame, more = _framed(tables[mark], path)
    return frame, notes + more


def _refuse_title(tables: dict[str, list[list[str]]], path: Path) -> None:
    """Refuse lines above the header (a title, comments): one cell first, several columns below."""
    if any(len(rows[0]) > 1 for mark, rows in tables.items() if mark != " "):
        return
    for mark, rows in tables.items():
        wide = [len(row) for row in rows[1:] if len(row) > 1]
        if mark != " " and wide and len(set(wide)) == 1 and len(wide) > len(rows) / 3:
            raise TableError(
                f"{path}: the first row, {rows[0][0]!r}, is not a header of the {wide[0]} columns below it. "
                "Remove the lines above the header."
            )


def _rows(text: str, delimiter: str) -> list[list[str]]:
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    options = {"delimiter": delimiter, "skipinitialspace": delimiter != "\t"}
    try:
        rows = list(csv.reader(io.StringIO(lines, newline=""), strict=True, **options))
        # A quote that is opened by accident swallows whole rows; the cell then holds their delimiters.
        if any("\n" in cell and delimiter in cell for row in rows for cell in row):
            raise csv.Error
    except csv.Error:
        rows = list(csv.reader(lines.splitlines(), quoting=csv.QUOTE_NONE, **options))
    rows = [[cell.strip() for cell in row] for row in rows]
    return [row for row in rows if any(row)]


def _fit(rows: list[list[str]], delimiter: str) -> tuple[float, int, int]:
    """How well a delimiter explains a table: share of rows as wide as the header, columns, then habit."""
    width = len(rows[0])
    if width == 1:
        return 0.0, 1, 0
    share = sum(len(row) == width for row in rows) / len(rows)
    # Blanks inside cells often part a table evenly by accident: a space counts only where nothing else does.
    return (share / 2 if delimiter == " " else share), width, -_DELIMITERS.index(delimiter)


def _framed(rows: list[list[str]], where: Path | str) -> tuple[pd.DataFrame, list[str]]:
    """Rows of text, the first being the header, as a frame with distinct column names."""
    header, body = rows[0], rows[1:]
    if all(_is_number(cell) for cell in header if cell):
        raise TableError(
            f"{where} has no header: its first row is {header[:4]}. Add a first row that names the columns, "
            "at least an id and an age."
        )
    if not body:
        raise TableError(f"{where} holds a header ({', '.join(header[:8])}) but no rows.")
    for number, row in enumerate(body, start=2):
        if any(row[len(header) :]):
            raise TableError(
                f"{where}: row {number} has {len(row)} cells, the header {len(header)}: {row[:6]}. Quote "
                "cells that hold the delimiter; with decimal commas, part the columns by ';' or tabs."
            )
    short = sum(len(row) < len(header) for row in body)
    cells = [(row + [""] * len(header))[: len(header)] for row in body]
    notes = [f"Rows shorter than the header: {short}; their missing cells are blank."] if short else []
    return pd.DataFrame(cells, columns=_distinct(header), dtype=str), notes


def _distinct(header: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    names = []
    for column, cell in enumerate(header, start=1):
        name = " ".join(cell.strip("'\" ").split()) or f"(column {column})"
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return True


def _workbook(path: Path, content: bytes) -> tuple[dict[str, pd.DataFrame], list[str]]:
    try:
        raw = pd.read_excel(
            io.BytesIO(content),
            sheet_name=None,
            header=None,
            dtype=object,
            engine="calamine",
            keep_default_na=False,
        )
    except Exception as error:  # calamine raises its own kinds; a password or a broken zip both end here
        raise TableError(
            f"{path} cannot be opened as a workbook ({error}). Save it as CSV, without a password."
        ) from error
    sheets, problems = {}, []
    for name, cells in raw.items():
        rows = [[_cell_text(cell) for cell in row] for row in cells.itertuples(index=False)]
        rows = [row for row in rows if any(row)]
        try:
            if rows:
                sheets[str(name)] = _framed(rows, f"{path}, sheet {name}")[0]
        except TableError as error:
            problems.append(str(error))
    if not sheets:
        raise TableError(" ".join(problems) or f"{path} holds no filled sheet.")
    return sheets, []


def _cell_text(cell: object) -> str:
    if isinstance(cell, bool):
        return str(cell)
    if isinstance(cell, float):
        if cell != cell:
            return ""
        return str(int(cell)) if cell.is_integer() and abs(cell) < 1e15 else repr(cell)
    if isinstance(cell, datetime | date | time):
        return cell.isoformat()
    return "" if cell is None else str(cell).strip()
