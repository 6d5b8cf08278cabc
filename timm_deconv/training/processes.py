"""The processes of a run: how they meet, what they agree on, and how one of them learns that another is gone."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
)
from torch import nn

from timm_deconv.errors import InputError

from .compiling import compile_whole
from .recipe import Recipe
from .reporting import create_trackers

__all__ = ["Processes", "average_buffers", "create_accelerator", "lost_process_named"]

T = TypeVar("T")

LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed out|broken pipe|heartbeat", re.IGNORECASE)


def create_accelerator(recipe: Recipe, log_dir: Path | None = None, cpu: bool = False) -> Accelerator:
    """Set accelerate up for loaders of whole batches, of which every process takes its share.

    Args:
        recipe: precision, accumulation and seed.
        log_dir: the run's folder, for its trackers; None has none.
        cpu: stay on the processor where there is a GPU.

    Raises:
        InputError: the batch does not divide into the processes, they do not meet, or the precision is not to be had.
    """
    cpu = cpu or not torch.cuda.is_available()
    if cpu and recipe.amp and recipe.amp_dtype == "float16":
        raise InputError("amp_dtype='float16': a processor would train in float32; set amp_dtype=bfloat16 or amp=false")
    AcceleratorState._reset_state()  # a second run in one process may ask for another precision
    handlers = [
        # whitening matrices are large; processes have the same, or `average_buffers` brings them together once an epoch
        DistributedDataParallelKwargs(broadcast_buffers=False),
        InitProcessGroupKwargs(timeout=timedelta(minutes=recipe.process_timeout)),
    ]
    with _meeting():
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision={"bfloat16": "bf16", "float16": "fp16"}[recipe.amp_dtype] if recipe.amp else "no",
            gradient_accumulation_steps=recipe.grad_accum_steps,
            log_with=(create_trackers(recipe, log_dir) if log_dir else None) or None,
            dynamo_plugin=compile_whole(recipe),
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
            kwargs_handlers=handlers,
        )
    if recipe.batch_size % accelerator.num_processes:
        raise InputError(f"batch_size={recipe.batch_size} does not divide into {accelerator.num_processes} processes")
    return accelerator


class Processes:
    """All processes of a run; with one alone nothing is sent.

    They speak through the host, over a gloo group of their own, so that no process waits for its GPU.

    Args:
        number, index: how many there are, and which one this is; 0 is the main one.
        minutes: how long to wait for the others.
    """

    def __init__(self, number: int = 1, index: int = 0, minutes: float = 10.0) -> None:
        self.number, self.index = number, index
        timeout = timedelta(minutes=minutes)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if number > 1 else None

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set in any process."""
        if self.group is None:
            return flag
        told = torch.tensor(int(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        return bool(told)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in every one."""
        values: list[Any] = [value] * self.number
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_to_main(self, value: T) -> list[T] | None:
        """Return the values of all processes in the main one, None in the others."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * self.number if self.index == 0 else None
        dist.gather_object(value, values, group=self.group)
        return values

    def main_does(self, action: Callable[[], T]) -> T:
        """Act in the main process alone; return its result, or raise its error, in all of them."""
        outcome: list[Any] = [None, None]
        if self.index == 0:
            try:
                outcome[0] = action()
            except (InputError, OSError) as error:
                outcome[1] = error
        if self.group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def average_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Replace floating-point buffers (running means, whiteners) by their mean over processes.

    Where statistics are not synchronised each saw other images; else they are alike already.
    """
    if accelerator.num_processes == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer.clone(), "mean"))


@contextmanager
def _meeting() -> Iterator[None]:
    """Say in one line why the processes of a run could not find one another.

    Raises:
        InputError: one did not come in time, or the port is another program's.
    """
    try:
        yield
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the processes cannot meet at MASTER_ADDR:MASTER_PORT ({reason}); start all of them, on a free port"
        ) from error


@contextmanager
def lost_process_named() -> Iterator[None]:
    """Say in one line that another process is gone, which torch reports as whatever it was doing.

    Raises:
        ConnectionError: a process ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_initialized() and (isinstance(error, dist.DistError) or LOST.search(str(error)))):
            raise
        reason = str(error).splitlines()[0].rpartition("] ")[2]  # without the place in torch's source
        raise ConnectionError(
            f"process {dist.get_rank()}: another process has ended or no longer answers ({reason}); what it said itself"
            " is the cause; --resume goes on from the last checkpoint"
        ) from error
