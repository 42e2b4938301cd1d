"""Several rows of one person and visit become one, by stated rules. Reads no cells and no files."""

from __future__ import annotations

from typing import Any

import pandas as pd

from brainage_nb.cohort.age_column import SAME_AGE_YEARS
from brainage_nb.cohort.ages import Age
from brainage_nb.cohort.cells import TextTable


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
    merged = [_merged(group, key, table) for _, group in rows[repeated].groupby(key, sort=False)]
    if not merged:
        return rows.reset_index(drop=True)
    joined = pd.concat([rows[~repeated], pd.DataFrame(merged).set_index("_order")])
    return joined.sort_index().reset_index(drop=True)


def _merged(group: pd.DataFrame, key: list[str], table: TextTable) -> dict[str, Any]:
    name = " ".join(filter(None, group.iloc[0][["subject_id", "session_id"]]))
    age = _one_age(list(group["age"]))
    if age.rule:
        table.note(f"{name}: {age.rule}.")
    elif age.reason and any(other.years is not None for other in group["age"]):
        table.note(f"{name}: {age.reason}; refused.")
    row: dict[str, Any] = {"_order": group.index[0], "age": age}
    for column in group.columns.drop("age"):
        values = list(dict.fromkeys(value for value in group[column] if value))
        if len(values) > 1 and column not in (*key, "table_id"):
            table.note(f"{name}: its rows disagree on {column} ({', '.join(values)}): left blank.")
        row[column] = values[0] if len(values) == 1 or (values and column == "table_id") else ""
    return row


def _one_age(ages: list[Age]) -> Age:
    readable = [age for age in ages if age.years is not None]
    unusable = [age for age in ages if age.years is None and not age.blank]
    if not readable:
        return (unusable or ages)[0]
    if unusable:
        return Age(reason=f"its rows disagree on the age: {readable[0].years:g}, but {unusable[0].reason}")
    years = sorted({age.years for age in readable})
    shown = " and ".join(f"{year:.2f}" for year in years)
    if years[-1] - years[0] > SAME_AGE_YEARS:
        return Age(reason=f"its rows give ages over {SAME_AGE_YEARS:g} year apart: {shown}")
    if len(years) == 1:
        return readable[0]
    return Age(years=sum(years) / len(years), rule=f"mean of {shown}, ages of its rows within a year")
