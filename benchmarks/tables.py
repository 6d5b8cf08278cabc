"""Tables of results: pure functions from the rows of `hub_configs/results` to Markdown."""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from timm_deconv.errors import InputError

__all__ = [
    "NOTHING",
    "Row",
    "Table",
    "conditions",
    "last_epochs",
    "markdown",
    "mean_and_deviation",
    "median_and_range",
    "numbers",
    "read_rows",
    "runs",
    "select",
    "significant",
]

Row = Mapping[str, str]

NOTHING = "-"
"""What a cell without rows shows."""


@dataclass(frozen=True)
class Table:
    """A table and the rows that its figures were made from.

    Attributes:
        head: titles of the columns.
        body: cells, one sequence a line.
        rows: what the figures are of; the line below the table is made from them.
        file: the rows' file in `hub_configs/results`.
        command: what measures such rows.
    """

    head: Sequence[str]
    body: Sequence[Sequence[str]]
    rows: Sequence[Row]
    file: str
    command: str

    def __post_init__(self) -> None:
        if not self.rows:
            raise InputError(f"a table of {self.file} has no rows: it asks for something that was not measured")


def read_rows(file: Path) -> list[Row]:
    """Read a CSV file of results, one mapping from column to text for each row."""
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def select(rows: Iterable[Row], **wanted: str | tuple[str, ...]) -> list[Row]:
    """Keep the rows whose columns have the wanted text, or one of several."""
    allowed = {column: (text,) if isinstance(text, str) else text for column, text in wanted.items()}
    return [row for row in rows if all(row[column] in texts for column, texts in allowed.items())]


def last_epochs(rows: Iterable[Row]) -> list[Row]:
    """Keep the rows of runs' last epochs."""
    return [row for row in rows if row["epoch"] == row["epochs"]]


def runs(rows: Iterable[Row], columns: Sequence[str]) -> list[list[Row]]:
    """Group rows that stand together and agree in some columns: those that one command has measured."""
    return [list(run) for _, run in groupby(rows, key=lambda row: tuple(row[column] for column in columns))]


def numbers(rows: Iterable[Row], column: str) -> list[float]:
    """Return a column's numbers, leaving out rows without one."""
    return [float(row[column]) for row in rows if row[column]]


def significant(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits and no exponent: 0.0842, 12.4, 303."""
    places = digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits}g}")))) if value else 0
    return f"{value:.{max(0, places)}f}"


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Write the mean over seeds, and from two seeds on the standard deviation and their number."""
    if not values:
        return NOTHING
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def median_and_range(values: Sequence[float], digits: int = 2) -> str:
    """Write the median of measurements, and from two on the least, the largest and their number."""
    if not values:
        return NOTHING
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f} in {len(values)})"


def conditions(rows: Iterable[Row]) -> str:
    """Say in one line on what rows were measured: each machine with its versions, and the dates."""
    rows = [row for row in rows if row.get("hardware")]
    parts = []
    for machine in _distinct(rows, "hardware"):
        own = [row for row in rows if row["hardware"] == machine]
        versions = [f"{name} {text.partition('+')[0]}" for name in ("torch", "timm") for text in _distinct(own, name)]
        parts.append(f"{machine.replace(' 1 threads', ' 1 thread')}, {', '.join(versions)}")
    if dates := sorted(_distinct(rows, "date")):
        parts.append(" to ".join(dict.fromkeys((dates[0], dates[-1]))))
    return "; ".join(parts)


def markdown(table: Table) -> str:
    """Write a table as Markdown, with the conditions, the rows' file and the command below it."""
    lines = [table.head, ["---"] * len(table.head), *table.body]
    measured = conditions(table.rows)
    source = f"Rows: `{table.file}`, by `{table.command}`."
    below = f"{measured}. {source}" if measured else source
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", f"<small>{below}</small>"])


def _distinct(rows: Iterable[Row], column: str) -> list[str]:
    """Return a column's texts in the order in which they first come, without empty ones."""
    return list(dict.fromkeys(row[column] for row in rows if row.get(column)))

