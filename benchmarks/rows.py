"""Measurements as rows of CSV files, with the conditions under which they were taken."""

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from timm_deconv.errors import InputError
from timm_deconv.resources import checkout_configs
from timm_deconv.training.results import append_rows, describe_machine

__all__ = ["CONDITIONS", "Row", "add_rows", "conditions", "print_table", "result_files", "rounded", "rows_done"]

Row = dict[str, Any]

CONDITIONS = "device threads hardware torch timm timm_deconv date".split()


def conditions(device: str) -> Row:
    """Describe the machine on which rows are measured, its software and the date, as the columns CONDITIONS."""
    return {"device": device, "threads": torch.get_num_threads(), **describe_machine(torch.device(device))}


def result_files(output: Path, record: bool, name: str) -> list[Path]:
    """List the files that rows go to: the user's, and with `record` the checkout's results of that name.

    Raises:
        InputError: there is no checkout to record in.
    """
    if not record:
        return [output]
    if (configs := checkout_configs()) is None:
        raise InputError("--record needs a checkout of the project: an installed package has no results to add to")
    return [output, configs / "results" / name]


def add_rows(files: Iterable[Path], columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Add rows to CSV files of these columns, which are made if they are missing.

    Raises:
        InputError: a file has other columns.
    """
    for file in files:
        append_rows(file, columns, rows)


def rows_done(files: Iterable[Path], columns: Sequence[str]) -> set[str]:
    """Return the values of the first column that every one of the CSV files has a row of.

    Raises:
        InputError: a file has other columns.
    """
    done = []
    for path in files:
        if not path.exists():
            return set()
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != list(columns):
                raise InputError(f"{path} has other columns; move it away or give another --output")
            done.append({row[columns[0]] for row in reader})
    return set.intersection(*done)


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Print some columns of the rows."""
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    width = None if sys.stdout.isatty() else 200  # a file has no width to keep to
    Console(width=width, markup=False, highlight=False).print(table)


def rounded(value: float) -> float:
    """Round to four digits: a measurement has no more."""
    return float(f"{value:.4g}")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
