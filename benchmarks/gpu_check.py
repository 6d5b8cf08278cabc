"""What is to be known of whitening on a GPU, in minutes: goals, parts that measure against them, and rows of each.

Parts run one after another in a process beside this one, each within its limit of time: one that hangs or breaks the
GPU's context costs no more than itself. Its rows are written as soon as it ends, so that a run that was stopped goes on
where it was.
"""

import contextlib
import csv
import hashlib
import importlib.metadata
import multiprocessing
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from timm_deconv.errors import InputError, unknown_name
from timm_deconv.kernels.gpu import dispatch

from . import gpu_parts as parts
from .gpu_parts import Found, Network
from .rows import Row, add_rows, conditions, print_table, rounded
from .step import CAPTURED

__all__ = ["COLUMNS", "PARTS", "SHOWN", "Goal", "Part", "check", "describe_card", "judged"]

MACHINE = "hardware capability driver torch triton timm commit date".split()

COLUMNS = [
    *"part size form measure value lower upper ratio_to_twin goal least verdict note part_seconds".split(),
    *MACHINE,
]

SHOWN = "part form measure value ratio_to_twin goal least verdict note".split()

SAME = ["size", *MACHINE[:-1]]
"""Columns in which rows of this card, these versions and this commit agree."""

FAILED = "failed"


class Goal(NamedTuple):
    """Most that a part may find of the form 'deconv': the goal, and the least that counts as done.

    `relative`: of the ratio to the twin, else of the value.
    """

    goal: float
    least: float
    relative: bool = True


@dataclass(frozen=True)
class Part:
    """What is measured: a function that yields what it finds, told whether to be tiny; its limit in seconds; its goal.

    `on_cpu`: a CPU can do it, when tiny.
    """

    measure: Callable[[bool], Iterator[Found]]
    limit: int
    goal: Goal | None = None
    on_cpu: bool = True


RESNET50 = Network("resnet50", 128, "bfloat16")
RESNET50_FLOAT32 = Network("resnet50", 128)
RESNET18 = Network("resnet18", 256)
MOBILENET = Network("mobilenetv2_100", 128, "bfloat16")
EFFICIENTNET = Network("efficientnet_b0", 128, "bfloat16")
DENSENET = Network("densenet121", 64, "bfloat16")
SMALL = Network("resnet18_cifar", 128)
COMPILED = SMALL._replace(compile="reduce-overhead")

on_gpu = partial(Part, on_cpu=False)

PARTS: dict[str, Part] = {
    "kernels compiled": on_gpu(
        parts.compile_kernels(COMPILED, RESNET50, DENSENET, EFFICIENTNET, MOBILENET, RESNET50_FLOAT32, RESNET18, SMALL),
        110,
    ),
    "tests": Part(parts.run_tests, 90, Goal(0, 0, relative=False)),
    "resnet50, bfloat16": Part(parts.step_times(RESNET50), 45, Goal(1.00, 1.20)),
    "resnet50": Part(parts.step_times(RESNET50_FLOAT32), 45, Goal(1.05, 1.20)),
    "resnet18": Part(parts.step_times(RESNET18), 45, Goal(1.03, 1.12)),
    "mobilenetv2_100, bfloat16": Part(parts.step_times(MOBILENET), 45, Goal(0.95, 1.25)),
    "efficientnet_b0, bfloat16": Part(parts.step_times(EFFICIENTNET), 45, Goal(0.95, 1.25)),
    "densenet121, bfloat16": Part(parts.step_times(DENSENET), 45, Goal(0.95, 1.25)),
    "resnet18_cifar": Part(parts.step_times(SMALL), 30, Goal(1.6, 2.5)),
    "resnet18_cifar, captured": on_gpu(parts.step_times(SMALL._replace(compile=CAPTURED)), 30, Goal(1.10, 1.25)),
    "kernels of a 3x3 layer": on_gpu(parts.kernels_of_a_layer, 20, Goal(16, 24, relative=False)),
    "kernel time, resnet18": on_gpu(parts.kernel_times(RESNET18), 30, Goal(1.02, 1.05)),
    "kernel time by kind, resnet50, bfloat16": on_gpu(parts.kernel_times(RESNET50, kinds=True), 30),
    "memory, resnet50, bfloat16": Part(parts.peak_memory(RESNET50), 30, Goal(1.00, 1.00)),
    "waiting, resnet18_cifar": on_gpu(parts.waits(SMALL), 20, Goal(0, 0, relative=False)),
    "waiting, mobilenetv2_100, bfloat16": on_gpu(parts.waits(MOBILENET), 20, Goal(0, 0, relative=False)),
    "losses of a captured step": on_gpu(parts.differences_of_losses(SMALL), 30, Goal(1e-4, 1e-3, relative=False)),
    "resnet18_cifar, compiled, CUDA graphs": on_gpu(parts.step_times(COMPILED), 110, Goal(1.10, 1.25)),
}
"""Goals of training on a GPU, and what measures them; the quick and the most wanted first."""


def check(output: Path, *, tiny: bool = False, names: Sequence[str] = (), seconds: float = 290) -> None:
    """Measure the parts that the file has no rows of, of this card, these versions and this commit; print all rows.

    Args:
        output: CSV file to add rows to.
        tiny: take seconds, on a CPU too, where parts that need a GPU only say so: a trial of all this.
        names: of PARTS; empty for all.
        seconds: no part goes on for longer after the start. Those that are left are for the next run.

    Raises:
        InputError: there is no GPU, or no such part.
    """
    if not tiny and not torch.cuda.is_available():
        raise InputError("there is no GPU; --tiny tries the parts on a processor")
    for name in names:
        if name not in PARTS:
            raise unknown_name("part", name, PARTS)
    card, stops = describe_card(), time.monotonic() + seconds
    print(", ".join(f"{key} {value}" for key, value in card.items()))
    shared = {"size": "tiny" if tiny else "full", **{column: card[column] for column in MACHINE}}
    done = {row["part"] for row in _rows_like(shared, output) if row["verdict"] != FAILED}
    worker = _Worker()
    for name in names or PARTS:
        left = stops - time.monotonic()
        if name in done:
            continue
        if left < 5:
            print(f"{name}: no time is left; run it again")
            continue
        started = time.monotonic()
        rows = _rows_of(name, worker, tiny, min(left, PARTS[name].limit))
        spent = rounded(time.monotonic() - started)
        add_rows([output], COLUMNS, [row | shared | {"part": name, "part_seconds": spent} for row in rows])
        print(f"{name}: {spent:.0f} s")
    worker.stop()
    print_table([_shown(row) for row in _rows_like(shared, output)], SHOWN)


def describe_card() -> Row:
    """Describe the GPU, or the CPU where there is none, its driver, versions and the state of the sources."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"capability": "", "memory": "", "driver": "", "cuda": torch.version.cuda or ""}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return conditions(device) | found | {"triton": triton, "commit": _state_of_sources()}


def judged(found: Found, goal: Goal | None) -> Row:
    """Return goal, least and verdict of what a part found: 'met', 'done' if the least is, or 'missed'."""
    value = found.ratio if goal and goal.relative else found.value
    if goal is None or found.form != "deconv" or value == "":
        return {"goal": "", "least": "", "verdict": ""}
    verdict = "met" if value <= goal.goal else "done" if value <= goal.least else "missed"
    return {"goal": goal.goal, "least": goal.least, "verdict": verdict}


def _rows_of(name: str, worker: "_Worker", tiny: bool, limit: float) -> list[Row]:
    part, nothing = PARTS[name], dict.fromkeys(COLUMNS, "")
    if not part.on_cpu and not torch.cuda.is_available():
        return [nothing | {"note": "needs a GPU"}]
    found, note = worker.run(name, tiny, limit)
    if not found:
        return [nothing | {"verdict": FAILED, "note": note}]
    return [
        {
            "form": one.form,
            "measure": one.measure,
            **{key: _number(getattr(one, key)) for key in ("value", "lower", "upper")},
            "ratio_to_twin": _number(one.ratio),
            **judged(one, None if tiny else part.goal),
            "note": note,
        }
        for one in found
    ]


def _number(value: float | str) -> float | str:
    return value if isinstance(value, str) else rounded(value)


def _rows_like(shared: Row, output: Path) -> list[dict[str, str]]:
    """Return the rows of the file that agree in the columns SAME."""
    if not output.exists():
        return []
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and list(rows[0]) != COLUMNS:
        raise InputError(f"{output} has other columns; move it away or give another --output")
    return [row for row in rows if all(row[column] == str(shared[column]) for column in SAME)]


def _shown(row: dict[str, str]) -> Row:
    return row | {"note": row["note"][:60]}


class _Worker:
    """A process that measures parts; a new one after a part that failed."""

    def __init__(self) -> None:
        self.process: Any = None

    def run(self, name: str, tiny: bool, limit: float) -> tuple[list[Found], str]:
        """Return what a part finds and a note; nothing and the reason if it fails or takes longer than the limit."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs,))
            self.process.start()
            theirs.close()
        self.connection.send((name, tiny))
        try:
            found, note = self.connection.recv() if self.connection.poll(limit) else ([], f"more than {limit:.0f} s")
        except EOFError:
            found, note = [], "the process ended"
        if not found:
            self.stop()
        return found, note

    def stop(self) -> None:
        """End the process, and those that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _work(connection: Connection) -> None:
    os.setpgrp()
    while True:
        name, tiny = connection.recv()
        dispatch._say.cache_clear()
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = list(PARTS[name].measure(tiny))
        except Exception as error:
            connection.send(([], f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
            raise
        notes = {str(warning.message) for warning in said if "plain form" in str(warning.message)}
        connection.send((found, "; ".join(sorted(notes))))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _state_of_sources() -> str:
    """Return the commit, with a digest of the sources behind '+' where they are not those of the commit."""
    root = parts.ROOT
    digest = hashlib.sha256()
    for file in sorted([*root.glob("timm_deconv/**/*.py"), *root.glob("benchmarks/*.py")]):
        digest.update(file.read_bytes())
    commit = _said("git", "-C", str(root), "rev-parse", "--short=10", "HEAD")
    changed = not commit or _said("git", "-C", str(root), "status", "--porcelain", "timm_deconv", "benchmarks")
    return f"{commit}+{digest.hexdigest()[:10]}" if changed else commit


def _said(*command: str) -> str:
    """Return what a command prints, '' where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
