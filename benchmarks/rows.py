"""Measurements as CSV rows, with the conditions under which they were taken."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from timm_deconv.errors import InputError
from timm_deconv.resources import checkout_configs
from timm_deconv.training.results import append_rows, describe_machine

from .step import StepSettings, price
from .timing import Timings

__all__ = [
    "COLUMNS",
    "CONDITIONS",
    "SHOWN",
    "Row",
    "add_rows",
    "conditions",
    "result_files",
    "rounded",
    "rows_done",
    "step_rows",
    "table",
]

Row = dict[str, Any]

CONDITIONS = "device threads hardware torch timm timm_deconv date".split()

COLUMNS = [
    *"task network width form preset memory_format batch image_size amp compile seconds seconds_lower".split(),
    *"seconds_upper ratio_to_none ratio_to_twin price rounds".split(),
    *CONDITIONS,
]

SHOWN = "form memory_format seconds seconds_lower seconds_upper ratio_to_none ratio_to_twin price".split()


def step_rows(task: str, timings: Timings, settings: StepSettings) -> list[Row]:
    """A row for each form and memory format.

    `seconds` is the median, `_lower` and `_upper` are quartiles; `ratio_to_*` are medians over rounds, in the same
    memory format; `price` is in batch norms, see `step.price`; it is in the row of a whitened form's faster format.
    """
    shared: Row = {
        "task": task,
        "network": settings.network,
        "width": settings.width,
        "batch": settings.batch,
        "image_size": settings.image_size or "",
        "amp": settings.amp or "",
        "compile": settings.compile,
        "rounds": settings.rounds,
        **conditions(settings.device),
    }
    return [
        shared | _measured(form, memory_format, timings, settings)
        for form in settings.forms
        for memory_format in settings.memory_formats
    ]


def conditions(device: str) -> Row:
    """CONDITIONS: the machine on which rows were measured, its software and the date."""
    return {"device": device, "threads": torch.get_num_threads(), **describe_machine(torch.device(device))}


def result_files(output: Path, record: bool, name: str = "benchmark.csv") -> list[Path]:
    """Where rows go: the user's file, and the checkout's results of that name if they are to be recorded.

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


def table(rows: Sequence[Row], shown: Sequence[str] = SHOWN) -> str:
    """What a person wants to see of the rows, in aligned columns."""
    cells = [list(shown), *([_cell(row[column]) for column in shown] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def rounded(value: float) -> float:
    """Four digits are more than a measurement has."""
    return float(f"{value:.4g}")


def _measured(form: str, memory_format: str, timings: Timings, settings: StepSettings) -> Row:
    label = f"{form} {memory_format}"
    spread = timings.spread(label)
    priced = (
        form in ("deconv", "published")
        and {"none", "twin"} <= set(settings.forms)
        and label == timings.fastest(settings.labels(form))
    )
    return {
        "form": form,
        "memory_format": memory_format,
        "preset": {"deconv": settings.preset, "fused": settings.preset, "published": "paper"}.get(form, ""),
        "seconds": rounded(spread.median),
        "seconds_lower": rounded(spread.lower),
        "seconds_upper": rounded(spread.upper),
        "ratio_to_none": _ratio(timings, label, f"none {memory_format}"),
        "ratio_to_twin": _ratio(timings, label, f"twin {memory_format}"),
        "price": rounded(price(timings, settings, form)) if priced else "",
    }


def _ratio(timings: Timings, label: str, reference: str) -> float | str:
    return rounded(timings.ratio(label, reference).median) if reference in timings.seconds else ""


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
