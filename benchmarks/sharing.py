"""What synchronised statistics cost: images a second, and the bytes that a process hands over in a step."""

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from timm_deconv import convert_sync

from .equivalence import said_by
from .killing import start
from .rows import CONDITIONS, Row, conditions, rounded

__all__ = ["COLUMNS", "RESULT", "shared"]

RESULT = (
    "network statistics processes batch size images_per_second statistics_bytes gradient_bytes sync_batch_norm_bytes"
).split()
COLUMNS = [*RESULT, *CONDITIONS]

WAYS = ("one process", "local", "synchronised")
WARM, TIMED = 2, 6


def shared(network: str, batch: int, size: int, processes: int = 2) -> Iterator[Row]:
    """Measure training steps of `fast` on a CPU, in one process with so many threads and in so many processes with one.

    Args:
        network: a batch-norm name of timm, which has a deconvolution twin.
        batch: images a step, over all processes.
        size: height and width of the images.
        processes: how many.
    """
    for way in WAYS:
        number = 1 if way == "one process" else processes
        command = [sys.executable, "-m", "benchmarks.sharing", json.dumps([network, way, batch, size])]
        threads = {"OMP_NUM_THREADS": str(processes // number)}
        (line,) = said_by(start(command, number, **threads))
        yield {**json.loads(line), **conditions("cpu"), "threads": processes}


def measure(network: str, way: str, batch: int, size: int) -> Row:
    """Measure one way in this process, which may be one of several."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    net: nn.Module = timm.create_model(f"{network}_deconv", num_classes=10, deconv={"preset": "fast"})
    net = net.to(memory_format=torch.channels_last)
    if way == "synchronised":
        convert_sync(net)
    model = DistributedDataParallel(net, broadcast_buffers=False) if processes > 1 else net
    images = torch.randn(batch // processes, 3, size, size).contiguous(memory_format=torch.channels_last)
    optimizer, seconds, told = torch.optim.SGD(model.parameters(), 1e-3), [], [0]

    def count(message: Tensor, **_: Any) -> None:
        told[0] += message.nbytes
        all_reduce(message, **_)

    all_reduce = dist.all_reduce
    with patch.object(dist, "all_reduce", count):
        for _step in range(WARM + TIMED):
            begun = time.perf_counter()
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
            seconds.append(time.perf_counter() - begun)
    twin = timm.create_model(network, num_classes=10)
    norms = [norm.num_features for norm in twin.modules() if isinstance(norm, _BatchNorm)]
    return {
        "network": network,
        "statistics": way,
        "processes": processes,
        "batch": batch,
        "size": size,
        "images_per_second": rounded(batch / statistics.median(seconds[WARM:])),
        "statistics_bytes": told[0] // (WARM + TIMED),
        "gradient_bytes": sum(parameter.nbytes for parameter in net.parameters()) * (processes > 1),
        # mean, deviation and count of every process forward, two sums back, as torch's SyncBatchNorm sends them
        "sync_batch_norm_bytes": sum(4 * (processes * (2 * n + 1) + 2 * n) for n in norms) * (processes > 1),
    }


def main() -> None:
    """Measure what the command line says; the first process prints a row as JSON."""
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    network, way, batch, size = json.loads(sys.argv[1])
    if way != "one process":
        dist.init_process_group("gloo")
    row = measure(network, way, batch, size)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps(row))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
