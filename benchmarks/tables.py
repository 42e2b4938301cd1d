"""Does every real participants table give ages in years, or a refusal that says what to set?

Prints a line a table. An age counts as found where its own row holds that number, in whatever unit.

    python benchmarks/tables.py [--folder ../shared/data/tables]
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from brainage_nb.tables.ages import OLDEST, PER_YEAR
from brainage_nb.tables.files import TableError, read_cells
from brainage_nb.tables.participants import read_table

DEFAULT = Path(__file__).parents[2] / "shared" / "data" / "tables"


def examine(path: Path) -> dict[str, object]:
    """Read one table: how many ages, rows without, and ages that its rows do not hold; what was said."""
    try:
        frame = read_table(path)
    except TableError as error:
        return {
            "table": path.name,
            "outcome": "refused",
            "said": str(error).removeprefix(f"{path}").lstrip(": "),
        }
    except Exception as error:
        return {"table": path.name, "outcome": "crashed", "said": f"{type(error).__name__}: {error}"}
    said = "; ".join(frame.attrs["notes"])
    return {
        "table": path.name,
        "outcome": "ages",
        "ages": len(frame),
        "without": len(frame.attrs["refused"]),
        "youngest": frame["age"].min(),
        "oldest": frame["age"].max(),
        "invented": invented(frame, path),
        "said": said,
    }


def invented(frame: pd.DataFrame, path: Path) -> int:
    """Ages that no number of their own row gives, in any unit, but for rows that a rule combined."""
    written: dict[str, set[float]] = {}
    for cells in read_cells(path).values():
        for row in cells.itertuples(index=False):
            for cell in set(row):
                written.setdefault(cell, set()).update(ages_in(row))
    plain = frame[frame["age_note"] == ""]
    wrong = [
        not any(math.isclose(age, number, rel_tol=1e-9) for number in written[one])
        for one, age in zip(plain["table_id"], plain["age"], strict=True)
    ]
    return sum(wrong) + int((~frame["age"].between(0, OLDEST)).sum())


def ages_in(row: Iterable[str]) -> Iterator[float]:
    """Every number of a row, taken for years, months, weeks or days; years."""
    for number in re.findall(r"\d+(?:[.,]\d+)?", " ".join(row)):
        value = float(number.replace(",", "."))
        yield from (value / per_year for per_year in PER_YEAR.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=DEFAULT, help="folder of tables")
    folder = parser.parse_args().folder
    # SOURCES.tsv says where the tables come from; it is none of them
    paths = [path for path in sorted(folder.glob("*")) if path.is_file() and path.name != "SOURCES.tsv"]
    if not paths:
        raise SystemExit(f"No tables in {folder}; give their folder as --folder.")
    results = [examine(path) for path in paths]
    for result in results:
        print(line(result))
    outcomes = pd.Series([result["outcome"] for result in results]).value_counts()
    bad = int(outcomes.get("crashed", 0)) + sum(result.get("invented", 0) for result in results)
    summary = {
        "name": "tables: crashes and ages not in the table",
        "value": bad,
        "bar": 0,
        "holds": bad == 0,
        "tables": len(results),
        "with_ages": int(outcomes.get("ages", 0)),
        "refused": int(outcomes.get("refused", 0)),
        "ages": sum(result.get("ages", 0) for result in results),
    }
    print(json.dumps(summary))


def line(result: dict[str, object]) -> str:
    """One table's outcome in words."""
    if result["outcome"] != "ages":
        return f"{result['table']:40s} {result['outcome'].upper()}: {str(result['said'])[:220]}"
    span = f"{result['youngest']:.4g} to {result['oldest']:.4g} years"
    without = f", {result['without']} rows without" if result["without"] else ""
    said = f" | {result['said'][:160]}" if result["said"] else ""
    return f"{result['table']:40s} {result['ages']:5d} ages, {span}{without}{said}"


if __name__ == "__main__":
    main()
