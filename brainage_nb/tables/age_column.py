"""Which column of a table is the age at the scan, and in which unit; refuses where rules cannot tell."""

from __future__ import annotations

import re
from dataclasses import replace

import pandas as pd

from brainage_nb.tables.ages import (
    FROM_CONCEPTION,
    OLDEST,
    UNCLEAR,
    UNIT_OF,
    bare_number,
    fold,
    is_missing,
    parse_age,
    read_unit,
    words_of,
)
from brainage_nb.tables.columns import (
    AGE_WORDS,
    AgeColumn,
    find_age_columns,
    find_role,
    plain_name,
    read_age_name,
)
from brainage_nb.tables.files import TableError, TextTable, find_texts

SAME_AGE_YEARS = 1.0
"""Ages of one person that differ by no more than this are roundings or two dates of one visit."""

_AGE_IN_WORDS = re.compile(rf"\b(?:{'|'.join(AGE_WORDS)}|old)\b")
_UNIT_KEY = re.compile("unit|einheit|unidad")
_OF_ALL = re.compile("description|notes?|comments?|remarks?|readme|info", re.IGNORECASE)
_LONG_UNITS = {word for word in UNIT_OF if len(word) > 1}
_NOT_YEARS = {word for word in _LONG_UNITS if UNIT_OF[word] != "years"}
_TYPES = words_of("int integer float number numeric num real double decimal string text char continuous")


def find_age(table: TextTable, subject: str, age_unit: str) -> AgeColumn:
    """The column that is surely the age at the scan.

    Parameters
    ----------
    table : TextTable
    subject : str
        The column of subject ids, which is never the age.
    age_unit : str
        As in `read_table`.

    Raises
    ------
    TableError
        Where there is none, or several that differ.
    """
    found = [column for column in find_age_columns(table.cells.columns) if column.name != subject]
    at_scan = [column for column in found if column.kind in ("age", "wave")]
    at_scan = [column for column in at_scan if column.t1w] or at_scan
    if not at_scan:
        raise _refuse_none(table, found)
    if len(at_scan) == 1:
        chosen = at_scan[0]
    elif any(column.kind == "wave" for column in at_scan):
        raise _refuse_several(table, found, at_scan)
    else:
        chosen = _choose_agreeing(table, at_scan, age_unit)
    ignored = [column.name for column in found if column is not chosen]
    if plain_name(chosen.name) != "age" or ignored:
        rest = f"; not used: {', '.join(ignored)}" if ignored else ""
        table.note(f"Age is read from column '{chosen.name}'{rest}.")
    return chosen


def read_named_ages(table: TextTable) -> list[AgeColumn]:
    """The age columns that a person named: one, or one per visit with commas between."""
    wanted = table.named["age"]
    parts = [wanted] if wanted in table.cells else list(filter(None, map(str.strip, wanted.split(","))))
    names = [table.find_named("age", part) for part in parts]
    columns = [read_age_name(name) for name in names]
    if len(columns) == 1 and not find_age_columns(names):
        columns = [replace(columns[0], wave="")]
    waves = {column.wave for column in columns}
    if len(columns) > 1 and ("" in waves or len(waves) < len(columns)):
        problem = f"the columns {', '.join(names)} do not each name another visit"
        raise table.error(problem, "set age_column to one column, or to one column per visit")
    return columns


def find_units(table: TextTable, column: AgeColumn, age_unit: str) -> list[str]:
    """The unit of each row's bare numbers: what a column of units says there, else what `_find_unit` finds.

    "" or another word where the row's own unit is not said, or is none.
    """
    own = find_role("age_unit", table.cells.columns)
    cells = [] if own is None else [cell.strip() for cell in table.cells[own]]
    levels = dict(text.split(": ", 1) for _, text in table.described(own or "") if ": " in text)
    told = ["" if is_missing(cell) else levels.get(cell, cell) for cell in cells]
    units = [read_unit(text, is_unit=True) if text else "" for text in told]
    of_hospital = (
        "age" not in plain_name(own or "") and set(units) <= {"", UNCLEAR} and "m" not in map(fold, told)
    )
    if of_hospital or not any(units):
        unit = _find_unit(table, column, age_unit)
        if not unit:
            _check_years(table, column)
        return [unit or "years"] * len(table.cells)
    before = "" if age_unit == "auto" else f", before age_unit = {age_unit}"
    table.note(f"The unit of each age is read from column '{own}'{before}.")
    other = _find_unit(table, column, age_unit) if "" in units else ""
    return [text if unit == UNCLEAR else unit or other for text, unit in zip(told, units, strict=True)]


def _find_unit(table: TextTable, column: AgeColumn, age_unit: str) -> str:
    """Unit of a column's bare numbers: as set, else as its name, sidecar or line of labels says; else "".

    Raises
    ------
    TableError
        Where ages count from conception, or what is said of the unit is not clear or cannot be read.
    """
    said = _find_stated_units(table, column)
    units = set(said.values()) - {""}
    if age_unit != "auto":
        if set(said.values()) - {age_unit, UNCLEAR}:
            told = "; ".join(said)
            table.note(f"age_unit = {age_unit} goes before what is said of '{column.name}' ({told}).")
        return age_unit
    if "" in said.values():
        problem = f"'{column.name}' seems to count from conception, not from birth ({'; '.join(said)})"
        raise table.error(problem, "set age_column to the age since birth; if this is it, set age_unit")
    doubts = [] if units else _find_doubts(table, column)
    if doubts or len(units) > 1 or UNCLEAR in units:
        problem = f"the unit of '{column.name}' is not clear ({'; '.join([*said, *doubts])})"
        raise table.error(problem, "set age_unit to years, months, weeks or days")
    return units.pop() if units else ""


def _find_stated_units(table: TextTable, column: AgeColumn) -> dict[str, str]:
    """Every text that speaks of the unit of a column, with the unit; "" where it counts from conception."""
    found = [(column.name, column.unit, False)]
    for key, text in table.described(column.name):
        is_unit = bool(_UNIT_KEY.search(fold(key))) or (len(text) < 3 and text.isalpha())
        if not is_missing(text):
            found.append((f"{key}: {text}".lstrip(": "), read_unit(text, is_unit=is_unit), is_unit))
    told, in_passing = {}, {}  # what is said in passing counts where nothing else is said
    for text, unit, is_unit in found:
        if FROM_CONCEPTION.search(fold(text).replace("_", " ")):
            told[text] = ""
        elif unit:
            (told if is_unit or unit != UNCLEAR else in_passing)[text] = unit
    return told or in_passing


def _find_doubts(table: TextTable, column: AgeColumn) -> list[str]:
    """What may say a unit elsewhere: lines above or below, columns of units, other entries of the sidecar."""
    cells = table.cells
    alone = [row for row in cells.to_numpy() if sum(map(bool, row)) == 1 or row[0].startswith(("#", "%"))]
    lines = [*cells.attrs.get("above", []), *(" ".join(filter(None, row)) for row in alone)]
    below = {cell for cell in cells[column.name] if fold(cell).strip("([.:])") in _NOT_YEARS}
    told = {name: set(map(fold, cells[name])) - {""} for name in cells if name != column.name}
    units = [name for name, words in told.items() if words <= _LONG_UNITS and words & _NOT_YEARS]
    doubts = [
        *(f"a line without an age: {line}" for line in lines if read_unit(line) not in ("", "years")),
        *(f"'{cell}' among the ages" for cell in sorted(below)),
        *(f"column '{name}': {cells[name].iloc[0]}" for name in units),
        table.sidecar.get("", ""),
    ]
    entries = [entry for entry in table.sidecar.values() if isinstance(entry, dict)]
    own = {text for entry in entries for _, text in find_texts(entry)}
    for name, entry in table.sidecar.items():
        # of an age that is no column, or a word on the whole table; of another column it is that one's
        named = [one for one in find_age_columns([name]) if one.kind in ("age", "wave")]
        if plain_name(name) in map(plain_name, cells) or not (named or _OF_ALL.fullmatch(name)):
            continue
        for key, text in find_texts(entry):
            unit = read_unit(text, is_unit=bool(_UNIT_KEY.search(fold(key)))) or read_age_name(name).unit
            speaks = named or (text not in own and _AGE_IN_WORDS.search(fold(text)))
            if speaks and unit not in ("", "years"):
                doubts.append(f"'{name}' in the sidecar: {text}")
    return list(filter(None, doubts))


def set_labels_aside(table: TextTable, subject: str, ages: list[str]) -> None:
    """Take lines of labels or units below the header out of the cells, and heed them like a sidecar.

    Parameters
    ----------
    table : TextTable
        Changed in place.
    subject : str
        The column of ids.
    ages : list of str
        Columns that speak of age.
    """
    while len(table.cells) > 1 and (labels := _read_labels(table.cells, subject, ages)):
        row = table.cells.iloc[0]
        number = int(row.name) + 1
        shown = ", ".join(filter(None, row))[:80]
        table.note(f"Row {number} below the header is a line of labels, not a person: {shown}.")
        for name in row.index:
            asked = name in ages and row[name] not in labels and fold(row[name]) not in _TYPES
            entry = {f"unit in row {number}" if asked else f"row {number}": row[name]}
            table.sidecar = {**table.sidecar, name: [table.sidecar.get(name), entry]}
        table.cells = table.cells.iloc[1:]


def _read_labels(cells: pd.DataFrame, subject: str, ages: list[str]) -> list[str]:
    """What a line of labels says of ages, in words; [""] if it is one by its id alone, [] if it is none."""
    row, others = cells.iloc[0], cells.iloc[1:]
    read = {name: parse_age(row[name]) for name in ages}
    texts = [row[name] for name, age in read.items() if "cannot be read" in age.reason]
    texts = [text for text in texts if re.match(r"\W*[^\W\d_]", text)]
    if not texts or any(age.years for age in read.values()):
        return []
    told = [text for text in texts if read_unit(text) or len(text) < 3 or _AGE_IN_WORDS.search(fold(text))]
    if told:
        return told
    with_digits = others[subject].str.contains(r"\d").mean() > 0.5 and not re.search(r"\d", row[subject])
    like_others = any((others[name] == cell).any() for name, cell in row.items() if not is_missing(cell))
    return [""] if with_digits and not like_others else []


def _check_years(table: TextTable, column: AgeColumn) -> None:
    """Refuse numbers that cannot be years: most above 120, or (children in months) many above 100."""
    numbers = pd.Series([bare_number(cell) for cell in table.cells[column.name]], dtype=float).dropna()
    very_old = int((numbers > 100).sum())
    if (numbers > OLDEST).mean() > 0.5 or (very_old >= 3 and very_old > len(numbers) / 4):
        raise table.error(
            f"'{column.name}' holds numbers from {numbers.min():g} to {numbers.max():g}, {very_old} of "
            f"{len(numbers)} above 100, and its unit is not stated",
            "set age_unit to months, weeks, days or years (a year of birth is no age)",
        )


def _choose_agreeing(table: TextTable, columns: list[AgeColumn], age_unit: str) -> AgeColumn:
    """Of several columns with the age at the scan, the surest; refuses where they differ by over a year."""
    ranked = sorted(columns, key=lambda column: (not column.at_scan, column.unit not in ("", "years")))
    units = {c.name: find_units(table, c, age_unit if not c.unit else "auto") for c in ranked}
    read = {name: map(parse_age, table.cells[name], rows) for name, rows in units.items()}
    years = pd.DataFrame({name: [age.years for age in ages] for name, ages in read.items()}, dtype=float)
    if (years.max(axis=1) - years.min(axis=1)).max() > SAME_AGE_YEARS:
        raise _refuse_several(table, columns, columns)
    return ranked[0]


def _refuse_several(table: TextTable, found: list[AgeColumn], at_scan: list[AgeColumn]) -> TableError:
    waves = [column for column in at_scan if column.kind == "wave"]
    remedy = f"set age_column to one of them, such as age_column={at_scan[0].name!r}"
    if len(waves) > 1 and len({column.wave for column in waves}) == len(waves):
        each = ",".join(column.name for column in waves)
        remedy = f"set age_column={waves[0].name!r} for one visit, or age_column={each!r} for a row per visit"
    names = ", ".join(column.name for column in found)
    return table.error(f"there are several age columns ({names})", remedy)


def _refuse_none(table: TextTable, found: list[AgeColumn]) -> TableError:
    others = [column.name for column in found if column.kind == "other"]
    if others:
        problem = f"no column is surely the age at the scan ({', '.join(others)} speak of age)"
        remedy = f"if one is, set age_column={others[0]!r} and, where it is not in years, age_unit"
    elif found:
        problem = f"'{found[0].name}' holds age groups, and a group is not an age"
        remedy = "set age_column to a column with ages, or table"
    else:
        problem = "no column of ages was found"
        remedy = "set age_column to its name, or table to a table with ages"
    return table.error(problem, remedy)
