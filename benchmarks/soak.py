"""A long run, watched: memory of its processes and images a second over time."""

import os
import signal
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from timm_deconv.errors import Stopped
from timm_deconv.training import Recipe
from timm_deconv.training.loop import train
from timm_deconv.training.tasks import Batch, Classification

from .rows import CONDITIONS, Row, add_rows, conditions, rounded

__all__ = ["COLUMNS", "soak", "soak_summary"]

COLUMNS = [*"minutes images images_per_second memory_mib recipe model batch workers".split(), *CONDITIONS]

PRIVATE = ("Pss_Anon", "Pss_Shmem")
"""What Linux says of a process' own pages, those shared by fork divided among the processes; libraries, whose share
changes with other programs that use them, are not in it."""


class Counted(Classification):
    """Classification that counts the images it has trained on."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.images = 0

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Classification.loss`."""
        self.images += len(batch[0])
        return super().loss(model, batch)


def soak(
    recipe: Recipe, folder: Path, minutes: float, every: float, files: Iterable[Path], cpu: bool = False
) -> list[Row]:
    """Train for some time, and add a row of COLUMNS to files every so often; return the rows.

    Memory is that of all processes of the run, without libraries; pages that they share are counted once (on Linux).
    Rows are added as they come, so that what a crash leaves is there.

    Args:
        recipe: of classes, with epochs for so long a time.
        folder: of the run; where time ends first it ends as by SIGTERM, and saves itself.
        minutes: how long.
        every: seconds between rows.
        files: CSV files.
        cpu: stay on the processor where there is a GPU.
    """
    tasks: list[Counted] = []
    rows: list[Row] = []
    ended = threading.Event()

    def counted(recipe: Recipe, device: torch.device) -> Counted:
        tasks.append(Counted(recipe, device))
        return tasks[-1]

    def watch() -> None:
        started, before, images = time.monotonic(), time.monotonic(), 0
        while not ended.wait(every):
            now, count = time.monotonic(), tasks[-1].images if tasks else 0
            rows.append(_row(recipe, (now - started) / 60, count, (count - images) / (now - before), cpu))
            add_rows(files, COLUMNS, rows[-1:])
            before, images = now, count
            if count and now - started >= 60 * minutes:  # before the first image nothing heeds the signal
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        train(recipe, folder, cpu=cpu, task=counted)
    except Stopped:
        pass
    finally:
        ended.set()
        watcher.join()
    return rows


def soak_summary(rows: Sequence[Row]) -> str:
    """Say how memory and speed of the last quarter compare with those of the second; the first warms up."""
    quarter = len(rows) // 4
    if not quarter:
        return "too few rows to compare quarters"
    told = []
    for key, unit in (("memory_mib", "MiB"), ("images_per_second", "images/s")):
        second, last = (
            statistics.median(row[key] for row in part) for part in (rows[quarter : 2 * quarter], rows[-quarter:])
        )
        told.append(f"{second:.4g} and {last:.4g} {unit}")
    return f"second and last quarter of {rows[-1]['minutes']:.0f} minutes: {', '.join(told)}"


def _row(recipe: Recipe, minutes: float, images: int, speed: float, cpu: bool) -> Row:
    described: dict[str, Any] = {"recipe": recipe.name, "model": recipe.model, "batch": recipe.batch_size}
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    return {
        "minutes": rounded(minutes),
        "images": images,
        "images_per_second": rounded(speed),
        "memory_mib": round(_memory() / 2**20, 1),
        **described,
        "workers": recipe.workers,
        **conditions(device),
    }


def _memory() -> int:
    """Return the bytes of this process and those below it."""
    own = psutil.Process()
    return sum(map(_private_memory, [own, *own.children(recursive=True)]))


def _private_memory(process: psutil.Process) -> int:
    """Return the bytes that are a process' own; 0 where it is a worker of an epoch that has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # another system, or a process that is no more
        return _unshared_memory(process)
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(PRIVATE))


def _unshared_memory(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except psutil.NoSuchProcess:
        return 0
