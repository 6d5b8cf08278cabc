"""What commands print: tables for people and JSON for programs, on stdout; progress of long work, on stderr."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

__all__ = ["print_json", "print_table", "progress", "status"]

Item = TypeVar("Item")


def print_json(value: Any) -> None:
    """Print a value of mappings, lists, texts and numbers as JSON; paths and other objects by their text."""
    with _reader_may_go():
        print(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def print_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Print rows as a table: with rules on a terminal, else as plain columns that other programs can cut.

    Args:
        rows: with the keys of the first, which head the columns; None is an empty cell. Nothing is printed of none.
        title: a line above.
    """
    if not rows:
        return
    columns = {key: [_text(row[key]) for row in rows] for key in rows[0]}
    numbers = {key for key in columns if all(isinstance(row[key], (int, float)) for row in rows)}
    console = Console()
    if console.is_terminal:
        console.print(_ruled(columns, numbers, title), markup=False)
    else:
        with _reader_may_go():
            print("\n".join(filter(None, [title, *_aligned(columns, numbers)])))


@contextmanager
def _reader_may_go() -> Iterator[None]:
    """End quietly where whoever reads the output has seen enough, as `head` has."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(0) from None


def _ruled(columns: Mapping[str, Sequence[str]], numbers: set[str], title: str) -> Table:
    table = Table(title=title or None, title_justify="left")
    for key in columns:
        table.add_column(key, justify="right" if key in numbers else "left", overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _aligned(columns: Mapping[str, Sequence[str]], numbers: set[str]) -> Iterator[str]:
    padded = []
    for key, cells in columns.items():
        width = max(map(len, (key, *cells)))
        padded.append([cell.rjust(width) if key in numbers else cell.ljust(width) for cell in (key, *cells)])
    for line in zip(*padded, strict=True):
        yield "  ".join(line).rstrip()


def _text(value: Any) -> str:
    """Write a cell; numbers that are no counts with four significant digits."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Pass items on, with a bar on stderr where that is a terminal.

    Args:
        items: the work.
        what: it is, before the bar.
        total: how many, where `items` does not say.
    """
    console = Console(stderr=True)
    yield from track(items, what, total, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr, where that is a terminal, that work is going on; gives a function that says how far it is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda message: None
        return
    with console.status(what) as shown:
        yield lambda message: shown.update(f"{what}: {message}")
