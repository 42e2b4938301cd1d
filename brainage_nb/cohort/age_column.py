"""Which column of a table is the age at the scan, and in which unit; refuses where rules cannot tell.

Reads cells only to see whether columns agree and whether numbers can be years.
"""

from __future__ import annotations

import re

import pandas as pd

from brainage_nb.cohort.ages import OLDEST, UNIT_OF, bare_number, parse_age
from brainage_nb.cohort.cells import TableError, TextTable
from brainage_nb.cohort.columns import AgeColumn, age_columns, existing_column, plain_name

SAME_AGE_YEARS = 1.0
"""Ages of one person that differ by no more than this are roundings or two dates of one visit."""


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
    found = [column for column in age_columns(table.cells.columns) if column.name != subject]
    plain = [column for column in found if column.kind == "age"]
    waves = [column for column in found if column.kind == "wave"]
    if waves and len(plain) + len(waves) > 1:
        raise _several(table, found, waves)
    if not plain and not waves:
        raise _none(table, found)
    chosen = _agreeing(table, plain, age_unit) if len(plain) > 1 else (plain or waves)[0]
    ignored = [column.name for column in found if column is not chosen]
    if plain_name(chosen.name) != "age" or ignored:
        rest = f"; not used: {', '.join(ignored)}" if ignored else ""
        table.note(f"Age is read from column '{chosen.name}'{rest}.")
    return chosen


def named_ages(table: TextTable, wanted: str) -> list[AgeColumn]:
    """The age columns a person named: one, or one a visit, parted by commas."""
    single = wanted in table.cells or "," not in wanted
    parts = [wanted] if single else [part.strip() for part in wanted.split(",") if part.strip()]
    names = [existing_column(table, part, "age") for part in parts]
    known = {column.name: column for column in age_columns(names)}
    columns = [known.get(name, AgeColumn(name, "age")) for name in names]
    waves = {column.wave for column in columns}
    if len(columns) > 1 and ("" in waves or len(waves) < len(columns)):
        raise table.error(
            f"the columns {', '.join(names)} do not each name another visit",
            "set age to one column, or to one column a visit",
        )
    return columns


def unit_of(table: TextTable, column: AgeColumn, age_unit: str) -> str:
    """Unit of a column's bare numbers: as set, else as its name or its sidecar says, else years.

    Raises
    ------
    TableError
        Where ages count from conception, or where the unit is not stated and the numbers cannot be years.
    """
    if age_unit != "auto":
        return age_unit
    unit = column.unit or _unit_in_sidecar(table, column.name)
    if not unit:
        _check_years(table, column)
    return unit or "years"


def _unit_in_sidecar(table: TextTable, name: str) -> str:
    entry = table.sidecar.get(name, {})
    units, description = (str(entry.get(key, "")).strip().lower() for key in ("Units", "Description"))
    if re.search(r"gestation|menstrual|conception", f"{units} {description}"):
        raise table.error(
            f"the sidecar says that '{name}' counts from conception, not from birth",
            "set age to a column with the age since birth",
        )
    in_words = re.search(r"\bin (years|months|weeks|days)\b", description)
    return UNIT_OF.get(units, "") or (in_words[1] if in_words else "")


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


def _agreeing(table: TextTable, columns: list[AgeColumn], age_unit: str) -> AgeColumn:
    """Of several columns with the age at the scan, the surest; refuses where they differ by over a year."""
    ranked = sorted(columns, key=lambda column: (not column.at_scan, column.unit not in ("", "years")))
    units = {c.name: unit_of(table, c, age_unit if not c.unit else "auto") for c in ranked}
    years = pd.DataFrame(
        {name: [parse_age(cell, unit).years for cell in table.cells[name]] for name, unit in units.items()},
        dtype=float,
    )
    if (years.max(axis=1) - years.min(axis=1)).max() > SAME_AGE_YEARS:
        raise _several(table, columns, [])
    return ranked[0]


def _several(table: TextTable, found: list[AgeColumn], waves: list[AgeColumn]) -> TableError:
    names = [column.name for column in found]
    remedy = f"set age to one of them, such as age={names[0]!r}"
    if len(waves) > 1 and len({column.wave for column in waves}) == len(waves):
        each = ",".join(column.name for column in waves)
        remedy = f"set age={waves[0].name!r} for one visit, or age={each!r} for a row a visit"
    return table.error(f"there are several age columns ({', '.join(names)})", remedy)


def _none(table: TextTable, found: list[AgeColumn]) -> TableError:
    groups = [column.name for column in found if column.kind == "group"]
    others = [column.name for column in found if column.kind == "other"]
    if others:
        return table.error(
            f"no column is surely the age at the scan ({', '.join(others)} speak of age)",
            f"if one is, set age={others[0]!r} and, where it is not in years, age_unit",
        )
    if groups:
        return table.error(
            f"'{groups[0]}' holds age groups, and a group is not an age",
            "set age to a column with ages, or table",
        )
    return table.error("no column of ages was found", "set age to its name, or table to a table with ages")
