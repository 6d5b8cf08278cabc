"""Errors in what the user gave, each one line: what is wrong with the value, and what to do."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A value from outside (recipe, command line, data) that cannot be used; the message is one line."""


class NonFiniteError(FloatingPointError):
    """Training met NaN or infinity; the message names where it was first seen."""


class Stopped(Exception):
    """A run was told to end by a signal and has saved itself, to be resumed."""


EXIT_STOPPED = 75
"""Exit code of a script whose run has `Stopped`: that which BSD calls a temporary failure, to be tried again."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Make the error for a name that is not known, with the nearest known ones.

    Args:
        kind: what the name is of, as in "no KIND 'name'".
        name: what was asked for.
        known: all names there are.
    """
    known = sorted(set(known))
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if nearest:
        return InputError(f"no {kind} {name!r}; nearest: {', '.join(sorted(nearest))}")
    shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    return InputError(f"no {kind} {name!r}; there are: {shown}")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a script with one line where the input, the disk or the numbers are at fault.

    Raises:
        SystemExit: the line, which goes to stderr, and status 1; EXIT_STOPPED where a run stopped and said so.
    """
    try:
        yield
    except Stopped:
        raise SystemExit(EXIT_STOPPED) from None
    except (InputError, NonFiniteError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {last_line(error)}") from None


def last_line(error: BaseException) -> str:
    """Return an error's message as one line; of one that a loader's worker raised the message alone, without its trace.

    torch raises it again with the trace of the worker as its text.
    """
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Say which extra of the package installs an import that is missing; optional imports stand in this context.

    Raises:
        InputError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "timm_deconv", "benchmarks"):
            raise
        raise InputError(f"{package} is not installed; pip install 'timm-deconv[{extra}]'") from None
