"""From a table file of any common kind, and its sidecar, to rows of text. No cell gets a meaning here.

Names of columns are looked at only to find the header below lines of another kind.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from brainage_nb.tables.ages import parse_age
from brainage_nb.tables.columns import (
    COLUMN_PARAMETERS,
    ROLE_NAMES,
    find_age_columns,
    find_role,
    is_header,
    plain_name,
)

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".xls", ".xlsx", ".xlsm", ".ods")
_DELIMITERS = {"\t": "tab", ";": "semicolon", ",": "comma", "|": "bar", " ": "space"}
_EXCEL_MAGIC = (b"\xd0\xcf\x11\xe0", b"PK\x03\x04")
_LINES_ABOVE = 40  # so many lines above the header are passed over at most
# How content begins that is no table, and what to do.
_NO_TABLE = {
    # a pointer is one short line; a real table may well mention such words in a cell
    r"(?s)(?=.{1,999}\Z).*(?:version https://git-lfs|/annex/objects/|\.git/annex)": (
        "is a pointer to a table (git-annex, git-lfs). Run `datalad get {name}` or `git lfs pull` beside it."
    ),
    r"(?i)\s*<(?:!doctype|html|\?xml)": "is a web page. Download it again; the site may ask for a login.",
    r"\s*\Z": "is empty. Set `table` to a table with one row per subject.",
    r"(?s)(?!\xff\xfe|\xfe\xff|PK\x03\x04|\xd0\xcf\x11\xe0).*\x00": (
        "is binary, not a table. Set `table` to a CSV, TSV, XLS or XLSX file."
    ),
}


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
        Column -> its description in a BIDS sidecar (`Units`, `Levels`, …) or in a line of labels below the
        header. Under "" stands why a sidecar could not be read.
    notes : list of str
        What was assumed or resolved so far, and by what rule.
    named : mapping
        Role -> the column that a person named for it.
    ages : list of str
        The columns that ages were read from.
    """

    cells: pd.DataFrame
    where: str
    sidecar: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    named: Mapping[str, str] = field(default_factory=dict)
    ages: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Note a thing once."""
        if text not in self.notes:
            self.notes.append(text)

    def find(self, role: str, taken: str = "") -> str | None:
        """The column of a role: the one a person named, else one of a known name that is not `taken`."""
        if role in self.named:
            return self.find_named(role, self.named[role])
        name = find_role(role, self.cells)
        if name in (None, taken):
            return None
        if plain_name(name) != ROLE_NAMES[role][0]:
            self.note(f"{role} is read from column '{name}'.")
        return name

    def find_named(self, role: str, wanted: str) -> str:
        """The column that a person means; case and punctuation may differ where that leaves one."""
        alike = [name for name in self.cells if plain_name(name) == plain_name(wanted)]
        alike = [wanted] if wanted in self.cells else alike
        if len(alike) != 1:
            name = COLUMN_PARAMETERS[role]
            raise self.error(f"{name} = {wanted!r} is not a column", f"set {name} to one of the columns")
        return alike[0]

    def described(self, column: str) -> list[tuple[str, str]]:
        """What sidecar and labels say of a column, as (key, text); names may differ in case."""
        plain = plain_name(column)
        named = [entry for name, entry in self.sidecar.items() if name and plain_name(name) == plain]
        return [said for entry in named for said in find_texts(entry)]

    def error(self, problem: str, remedy: str) -> TableError:
        """A refusal: what is wrong, what to set, and which columns there are."""
        names = list(self.cells.columns)
        shown = ", ".join(names[:40]) + (f", … ({len(names)} in all)" if len(names) > 40 else "")
        return TableError(f"{self.where}: {problem}. To go on, {remedy}. Columns: {shown}.")


def find_texts(entry: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts in an entry of a sidecar, each after the key it stands under; `Levels` as `0: Men`."""
    if isinstance(entry, str) and ("unit" in key.lower() or not entry.startswith("http")):
        yield key, entry
    elif isinstance(entry, list):
        for item in entry:
            yield from find_texts(item, key)
    elif isinstance(entry, dict):
        for inner, value in entry.items():
            if key == "Levels" and isinstance(value, dict):
                value = value.get("Description", "")
            level = key and isinstance(value, str)
            yield from find_texts(f"{inner}: {value}", key) if level else find_texts(value, inner)


def read_sidecar(path: Path | str) -> dict[str, Any]:
    """The BIDS sidecar (`participants.json`) beside a table.

    Returns
    -------
    dict
        Column -> what is said of it, at whatever depth it stands; {} where there is no sidecar. One that
        cannot be read gives "" -> why.
    """
    path = Path(path)
    beside = [other for other in path.parent.glob("*.[jJ][sS][oO][nN]") if other.stem == path.stem]
    if not beside:
        return {}
    try:
        text = _decode(beside[0].read_bytes())[0]
        # a comma before a closing bracket is what people leave behind
        level = [json.loads(re.sub(r",(?=\s*[]}])", "", text), strict=False)] if text.strip() else []
    except (OSError, ValueError) as error:
        return {"": f"{beside[0].name} beside the table cannot be read ({error})"}
    found: dict[str, Any] = {}
    while level:
        for item in [item for item in level if isinstance(item, dict)]:
            lower = {key.lower(): value for key, value in item.items()}
            names = [lower[key] for key in ("name", "column", "field", "variable") if key in lower]
            found = {name: item for name in names[:1] if isinstance(name, str)} | found
            found = item | found
        level = [inner for item in level for inner in _list_members(item)]
    return {name: entry for name, entry in found.items() if name}


def _list_members(item: Any) -> list[Any]:
    return list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else []


def read_cells(path: Path | str) -> dict[str, pd.DataFrame]:
    """Read a table file without interpreting a cell.

    Parameters
    ----------
    path : path
        CSV, TSV or other delimited text in any common encoding, or an Excel or OpenDocument workbook. The
        content decides which it is, not the file's ending.

    Returns
    -------
    dict of str to DataFrame
        Cells as text, blank cells as "", by sheet (one, named "", for text files). `attrs` of each hold
        `above`, the lines above its header, and `notes`: what was assumed of encoding, delimiter and shape.

    Raises
    ------
    TableError
        Where the file is absent, a pointer to a file, not a table, or its rows do not fit its header.
    """
    path = Path(path)
    content = _read_content(path)
    if content.startswith(_EXCEL_MAGIC):
        return _read_workbook(path, content)
    return {"": _read_text(path, *_decode(content))}


def _read_content(path: Path) -> bytes:
    if path.is_symlink() and not path.exists():
        raise TableError(f"{path} is a link to a file not fetched. Run `datalad get {path.name}` beside it.")
    if not path.is_file():
        raise TableError(f"There is no table at {path}. Set `table` to a CSV, TSV, XLS or XLSX file.")
    content = path.read_bytes()
    for beginning, what in _NO_TABLE.items():
        if re.match(beginning.encode("latin-1"), content):
            raise TableError(f"{path} {what.format(name=path.name)}")
    return content


def _decode(content: bytes) -> tuple[str, list[str]]:
    """The text of a file; charset-normalizer, which guesses by statistics, turns `Köln` into Chinese."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16"), ["Encoding: UTF-16."]
    try:
        return content.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        # cp1252 differs from latin-1 in 32 characters that European Excel writes; five bytes have no meaning.
        return content.decode("cp1252", errors="replace"), ["Encoding: not UTF-8, read as Windows-1252."]


def _read_text(path: Path, text: str, notes: list[str]) -> pd.DataFrame:
    text, above = _cut_above_header(text.replace("\r\n", "\n").replace("\r", "\n"))
    tables = {mark: _split_rows(text, mark) for mark in _DELIMITERS}
    mark = max(_DELIMITERS, key=lambda mark: _rate_fit(tables[mark], mark))
    _refuse_title(tables, path)
    expected = {".tsv": "\t", ".csv": ","}.get(path.suffix.lower(), mark)
    if mark != expected and len(tables[mark][0]) > 1:
        notes = [*notes, f"The delimiter is a {_DELIMITERS[mark]}."]
    return _make_frame(tables[mark], path, above, notes)


def _cut_above_header(text: str) -> tuple[str, list[str]]:
    """A text from its header on, where that stands below other lines, and these lines."""
    filled = [line for line in text.split("\n") if line.strip()][:_LINES_ABOVE]
    starts = {mark: [next(_split(line[:9999], mark)) for line in filled] for mark in _DELIMITERS}
    found = [number for rows in starts.values() if (number := _find_header(rows)) is not None]
    number = found[0] if found else _count_comments(filled)
    if not number:
        return text, []
    return text[text.index(f"\n{filled[number]}") + 1 :], [line.strip() for line in filled[:number]]


def _count_comments(lines: list[str]) -> int:
    """How many of the first lines are comments, the header (`#id,age`) being none."""
    number = next((n for n, line in enumerate(lines[:-1]) if not re.match(r"\s*(?:[#%]|//)", line)), 0)
    is_header = number and any(0 < lines[number - 1].count(m) == lines[number].count(m) for m in "\t;,|")
    return number - 1 if is_header else number


def _find_header(rows: list[list[str]]) -> int | None:
    """Which of the first rows names ids and ages and is as wide as the next one, as only a header is."""
    for number, (row, following) in enumerate(pairwise(rows)):
        if is_header([cell.strip("'\" ") for cell in row]) and abs(len(following) - len(row)) <= 1:
            return number
    return None


def _refuse_title(tables: dict[str, list[list[str]]], path: Path) -> None:
    """Refuse lines above the header (a title, comments): one cell first, several columns below."""
    if any(len(rows[0]) > 1 for mark, rows in tables.items() if mark != " "):
        return
    for mark, rows in tables.items():
        wide = [len(row) for row in rows[1:] if len(row) > 1]
        if mark != " " and wide and len(set(wide)) == 1 and len(wide) > len(rows) / 3:
            problem = f"the first row, {rows[0][0]!r}, is not a header of the {wide[0]} columns below it"
            raise TableError(f"{path}: {problem}. Remove the lines above the header.")


def _split(text: str, delimiter: str, **how: Any) -> Iterator[list[str]]:
    stream = io.StringIO(text, newline="")
    return csv.reader(stream, delimiter=delimiter, skipinitialspace=delimiter != "\t", **how)


def _split_rows(text: str, delimiter: str) -> list[list[str]]:
    try:
        rows = list(_split(text, delimiter, strict=True))
        # A quote that is opened by accident swallows whole rows; the cell then holds their delimiters.
        if any("\n" in cell and delimiter in cell for row in rows for cell in row):
            raise csv.Error
    except csv.Error:
        rows = list(_split(text, delimiter, quoting=csv.QUOTE_NONE))
    rows = [[cell.strip() for cell in row] for row in rows]
    return [row for row in rows if any(row)]


def _rate_fit(rows: list[list[str]], delimiter: str) -> tuple[float, int]:
    """How well a delimiter explains a table: share of rows as wide as the header, then columns."""
    width = len(rows[0])
    share = sum(len(row) == width for row in rows) / len(rows) if width > 1 else 0.0
    # Blanks inside cells often part a table evenly by accident: a space counts only where nothing else does.
    return (share / 2 if delimiter == " " else share), width


def _make_frame(
    rows: list[list[str]], where: Path | str, above: list[str], notes: Sequence[str] = ()
) -> pd.DataFrame:
    """Rows of text, the first being the header, as a frame with distinct column names."""
    header, body = rows[0], rows[1:]
    if all(_is_number(cell) for cell in header if cell):
        problem = f"{where} has no header: its first row is {header[:4]}"
        raise TableError(f"{problem}. Add a first row that names the columns, at least an id and an age.")
    if not body:
        raise TableError(f"{where} holds a header ({', '.join(header[:8])}) but no rows.")
    numbered = [row[0] for row in body] == [str(number) for number in range(1, len(body) + 1)]
    # as Excel saves what R wrote: row names stand under the first name
    shifted = not header[-1] and all(row[-1] for row in body) and (numbered or _is_shifted(header, body))
    longer = all(len(row) == len(header) + 1 for row in body) and not _ends_blank(header, body)
    wide = next((n for n, row in enumerate(body, start=2) if any(row[len(header) :])), 0)
    if shifted or longer or wide:
        first = rows[(wide or 2) - 1]
        raise TableError(
            f"{where}: row {wide or 2} has {len(first)} cells, the header {len(header)}: {first[:6]}. "
            "Where R wrote row names, write the table with row.names = FALSE; where rows end in a delimiter, "
            "cut it. Quote cells that hold the delimiter; with decimal commas, write ';' or tabs between "
            "columns; remove lines above the header."
        )
    cells = [(row + [""] * len(header))[: len(header)] for row in body]
    frame = pd.DataFrame(cells, columns=_make_distinct(header), dtype=str)
    if short := sum(len(row) < len(header) for row in body):
        notes = [*notes, f"Rows shorter than the header: {short}; their missing cells are blank."]
    frame.attrs = {"above": above, "notes": list(notes)}
    return frame


def _ends_blank(header: list[str], body: list[list[str]]) -> bool:
    """Whether rows a cell longer than the header just end with a delimiter.

    Sure where they give no age when read from the second cell on, as if the first were a row name.
    """
    ages = bool(find_age_columns(header))
    return ages and not _is_shifted(header, body) and not any(row[-1] for row in body)


def _is_shifted(header: list[str], body: list[list[str]]) -> bool:
    """Whether ages stand one cell to the right of their name, as below R's row names."""
    ages = [number for number, name in enumerate(header) if find_age_columns([name])]
    return any(parse_age(cell).years for n in ages for row in body for cell in row[n + 1 : n + 2])


def _make_distinct(header: list[str]) -> list[str]:
    names = [" ".join(cell.strip("'\" ").split()) or f"(column {n})" for n, cell in enumerate(header, 1)]
    before = [names[:n].count(name) for n, name in enumerate(names)]
    return [f"{name} ({n + 1})" if n else name for name, n in zip(names, before, strict=True)]


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"[+-]?(?:\d+[.,]?\d*|[.,]\d+)(?:e[+-]?\d+)?|nan|[+-]?inf", cell.lower()))


def _read_workbook(path: Path, content: bytes) -> dict[str, pd.DataFrame]:
    try:
        options = {"sheet_name": None, "header": None, "engine": "calamine", "keep_default_na": False}
        raw = pd.read_excel(io.BytesIO(content), dtype=object, **options)
    except Exception as error:  # calamine raises its own kinds; a password or a broken zip both end here
        problem = f"{path} cannot be opened as a workbook ({error})"
        raise TableError(f"{problem}. Save it as CSV, without a password.") from error
    sheets, problems = {}, []
    for name, cells in raw.items():
        rows = [[_cell_text(cell) for cell in row] for row in cells.itertuples(index=False)]
        rows = [row for row in rows if any(row)]
        number = _find_header(rows[:_LINES_ABOVE]) or 0
        above = [" ".join(filter(None, row)) for row in rows[:number]]
        try:
            if rows:
                sheets[str(name)] = _make_frame(rows[number:], f"{path}, sheet {name}", above)
        except TableError as error:
            problems.append(str(error))
    if not sheets:
        raise TableError(" ".join(problems) or f"{path} holds no filled sheet.")
    return sheets


def _cell_text(cell: object) -> str:
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 1e15:
        return str(int(cell))
    if isinstance(cell, date | time):  # pandas with dtype=str would write the time of day behind a date
        return cell.isoformat()
    return "" if cell is None or cell != cell else str(cell).strip()
