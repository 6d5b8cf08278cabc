"""Measurements as CSV rows, with the conditions under which they were taken."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from timm_deconv.errors import InputError
from timm_deconv.resources import checkout_configs
from timm_deconv.training.results import describe_machine

from .step import StepSettings, price
from .timing import Timings

__all__ = ["COLUMNS", "append_rows", "result_files", "step_rows", "table"]

Row = dict[str, object]

COLUMNS = (
    "task network width form preset memory_format batch image_size amp compile seconds seconds_lower "
    "seconds_upper ratio_to_twin price rounds device threads hardware torch timm timm_deconv date"
).split()


def step_rows(task: str, timings: Timings, settings: StepSettings) -> list[Row]:
    """A row for each form and memory format.

    `seconds` is the median, `_lower` and `_upper` are quartiles; `ratio_to_twin` is the median over rounds, in the same
    memory format; `price` is in batch norms, see `step.price`; it is in the row of a whitened form's faster format.
    """
    conditions = {
        "task": task,
        "network": settings.network,
        "width": settings.width,
        "batch": settings.batch,
        "image_size": settings.image_size or "",
        "amp": settings.amp or "",
        "compile": settings.compile,
        "rounds": settings.rounds,
        "device": settings.device,
        "threads": torch.get_num_threads(),
        **describe_machine(torch.device(settings.device)),
    }
    return [
        conditions | _measured(form, memory_format, timings, settings)
        for form in settings.forms
        for memory_format in settings.memory_formats
    ]


def result_files(output: Path, record: bool) -> list[Path]:
    """Where rows go: the user's file, and the checkout's results if they are to be recorded.

    Raises:
        InputError: there is no checkout to record in.
    """
    if not record:
        return [output]
    if (configs := checkout_configs()) is None:
        raise InputError("--record needs a checkout of the project: an installed package has no results to add to")
    return [output, configs / "results" / "benchmark.csv"]


def append_rows(files: Iterable[Path], rows: Sequence[Row]) -> None:
    """Add rows to CSV files of COLUMNS, which are made if they are missing.

    Raises:
        InputError: a file has other columns.
    """
    for file in files:
        _append(file, rows)


def _append(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        file.seek(0)
        header = file.readline().rstrip("\n").split(",")
        if header not in ([""], COLUMNS):
            raise InputError(f"{path} has other columns; move it away or give another --output")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if header == [""]:
            writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Row]) -> str:
    """What a person wants to see of the rows, in aligned columns."""
    shown = ["form", "memory_format", "seconds", "seconds_lower", "seconds_upper", "ratio_to_twin", "price"]
    cells = [shown, *([_cell(row[column]) for column in shown] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _measured(form: str, memory_format: str, timings: Timings, settings: StepSettings) -> Row:
    label, twin = f"{form} {memory_format}", f"twin {memory_format}"
    spread = timings.spread(label)
    whitened = form in ("deconv", "published")
    priced = whitened and {"none", "twin"} <= set(settings.forms) and label == timings.fastest(settings.labels(form))
    return {
        "form": form,
        "memory_format": memory_format,
        "preset": {"deconv": settings.preset, "published": "paper"}.get(form, ""),
        "seconds": _rounded(spread.median),
        "seconds_lower": _rounded(spread.lower),
        "seconds_upper": _rounded(spread.upper),
        "ratio_to_twin": _rounded(timings.ratio(label, twin).median) if twin in timings.seconds else "",
        "price": _rounded(price(timings, settings, form)) if priced else "",
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
