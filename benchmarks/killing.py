"""Runs that are killed at random moments (SIGKILL), resumed, and compared with one that never was.

A run is the recipe `digits` with a tiny network, in one process or two (gloo), each with one thread.
"""

import csv
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm_deconv.errors import one_line_errors
from timm_deconv.training.loop import train
from timm_deconv.training.recipe import Recipe, load_recipe
from timm_deconv.training.state_files import PARTIAL
from timm_deconv.training.tasks import Batch, Classification

from .rows import CONDITIONS, Row, conditions

__all__ = ["COLUMNS", "RESULT", "Kill", "is_same", "kill", "kill_loop", "kills", "launch", "passes", "start", "wait"]

RESULT = "killed processes victim moment seconds state repeated allowed end_seconds identical".split()
COLUMNS = [*RESULT, *CONDITIONS]

EVERY = 3
"""Updates between two states."""

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Kill:
    """What is killed, and when.

    Attributes:
        processes: of the run.
        victim: the process killed; None for all.
        writing: kill while a state is being written.
        share: of the whole run's passes that are made before.
    """

    processes: int
    victim: int | None
    writing: bool
    share: float


def killable_recipe() -> Recipe:
    """Return three epochs of ten updates on digits, of a whitened network and its average."""
    network = ["model=resnet18_cifar_deconv", "model_kwargs={width: 0.125}", "model_ema=true", "model_ema_decay=0.9"]
    images = ["batch_size=32", "train_images=320", "val_images=64", "epochs=3"]
    return load_recipe("digits", [*network, *images, f"checkpoint_every={EVERY}"])


def kills(number: int, seed: int) -> dict[int, Kill]:
    """Draw numbered kills: of one process, of both or of one of two, at any moment or while a state is written."""
    draw = random.Random(seed)
    kinds = [(1, None, False), (1, None, True), (2, None, False), (2, 0, True), (2, 1, False), (2, 0, False)]
    return {i: Kill(*kinds[i % len(kinds)], share=draw.uniform(0.02, 0.98)) for i in range(number)}


def kill_loop(planned: Mapping[int, Kill], folder: Path) -> Iterator[Row]:
    """Kill runs as planned, resume each to its end, and compare it with the run that was left alone.

    Args:
        planned: what to kill, and when, by number.
        folder: where the runs lie.

    Returns:
        a row of COLUMNS for each.
    """
    whole: dict[int, Path] = {}
    for number, plan in planned.items():
        if plan.processes not in whole:
            whole[plan.processes] = folder / f"whole-{plan.processes}"
            wait(launch(whole[plan.processes], plan.processes))
        reference, killed = whole[plan.processes], folder / f"killed-{number}"
        row = kill(plan, killed, passes(reference))
        wait(launch(killed, plan.processes))
        repeated = passes(killed) - passes(reference)
        yield {
            "killed": number,
            **row,
            "repeated": repeated,
            "allowed": EVERY + 1,  # and the pass that was under way
            "identical": is_same(reference, killed),
            **conditions("cpu"),
        }


def kill(plan: Kill, folder: Path, whole: int) -> Row:
    """Start a run and kill it; return when and how, and how long another process went on without the victim.

    Args:
        plan: what to kill, and when.
        folder: of the run.
        whole: passes of a run that is left alone.
    """
    started = time.monotonic()
    processes = launch(folder, plan.processes)
    while passes(folder) < plan.share * whole and processes[0].poll() is None:
        time.sleep(0.001)
    while plan.writing and not (folder / "state" / PARTIAL).exists() and processes[0].poll() is None:
        pass
    victims = processes if plan.victim is None else [processes[plan.victim]]
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for process in processes:
        process.communicate(timeout=120)
    states = sorted(path.name for path in (folder / "state").glob("epoch-*"))
    return {
        "processes": plan.processes,
        "victim": "all" if plan.victim is None else plan.victim,
        "moment": "writing" if (folder / "state" / PARTIAL).exists() else "between",
        "seconds": round(killed - started, 2),
        "state": states[-1] if states else "none",
        "end_seconds": round(time.monotonic() - killed, 2),
    }


def launch(folder: Path, processes: int) -> list[subprocess.Popen[str]]:
    """Start a run, or resume it, in so many processes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return start([sys.executable, "-m", "benchmarks.killing", str(folder)], processes)


def start(command: Sequence[str], processes: int, **environment: str) -> list[subprocess.Popen[str]]:
    """Start processes of one thread on this machine, which meet as torchrun's do.

    Args:
        command: of each.
        processes: how many.
        environment: variables in place of those that are set here.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if processes > 1:
        number = str(processes)
        shared |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env={**shared, **rank, **environment}, **pipes) for rank in ranks]


def wait(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Wait until a run has ended well; return what its processes said.

    Raises:
        RuntimeError: it ended otherwise.
    """
    said = [process.communicate(timeout=300)[1] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(said)[-3000:])
    return said


def passes(folder: Path) -> int:
    """Count the training passes that the main process of a run has made so far, repeated ones too."""
    count = folder.with_suffix(".passes")
    return count.stat().st_size if count.exists() else 0


def is_same(first: Path, second: Path) -> bool:
    """Tell whether two runs have ended with the same weights and curve, bit for bit."""
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    return weights[0] == weights[1] and _curve(first) == _curve(second)


def _curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "curve.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


class _Counting(Classification):
    """Classification that adds a byte to a file beside the run's folder for every training pass."""

    def loss(self, model, batch: Batch):  # type: ignore[no-untyped-def]
        if model.training and os.environ.get("RANK", "0") == "0":
            with open(COUNT, "ab", buffering=0) as file:
                file.write(b".")
        return super().loss(model, batch)


if __name__ == "__main__":
    COUNT = Path(sys.argv[1]).with_suffix(".passes")
    with one_line_errors():
        train(killable_recipe(), sys.argv[1], resume=True, cpu=True, task=_Counting)
