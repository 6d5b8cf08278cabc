"""Do N processes learn with synchronised statistics what one process learns with the same batch?

Small networks train on the digits, five SGD steps, the last of them on a batch that is divided unevenly. The largest
difference of a weight or running value stands beside that of one process whose weights are rounded otherwise.
"""

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_deconv import convert_sync
from timm_deconv.layers import ChannelDeconv, Deconv2d, DeconvLinear

from .killing import start
from .rows import CONDITIONS, Row, conditions, rounded

__all__ = [
    *("CASES", "COLUMNS", "OPTIONS", "RESULT", "compare", "compared", "digits", "distance", "layers", "pooled"),
    *("said_by", "train"),
]

RESULT = "case processes dtype difference rounding moved".split()
COLUMNS = [*RESULT, *CONDITIONS]

Options = dict[str, Any]
Batches = list[tuple[Tensor, Tensor]]

STEPS, IMAGES = 5, 4
LAST = (4, 1, 3, 2)
"""Images of each process in the last batch; IMAGES of each in those before."""

RATE, RATES = 0.02, {"resnext29_32x4d_cifar": 1e-3, "mobilenetv2_cifar": 1e-4}
"""Learning rate, and that of deep narrow networks: with a larger one rounding alone grows to visible differences."""


def layers(options: Options) -> nn.Module:
    """Make a network of layers of every kind: spatial, 1x1, strided, grouped, depthwise, linear."""
    cfg = {name: value for name, value in options.items() if name != "max_rows"}
    return nn.Sequential(
        Deconv2d(1, 8, 3, padding=1, cfg=options),
        nn.ReLU(),
        Deconv2d(8, 16, 1, cfg=options),
        nn.ReLU(),
        Deconv2d(16, 16, 3, stride=2, padding=1, cfg=options),
        nn.ReLU(),
        Deconv2d(16, 32, 3, padding=1, groups=4, cfg=options),
        nn.ReLU(),
        Deconv2d(32, 32, 3, padding=1, groups=32, cfg=options),
        nn.ReLU(),
        Deconv2d(32, 24, 1, stride=2, cfg=options),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        DeconvLinear(24, 10, cfg=cfg),
    )


def pooled(options: Options) -> nn.Module:
    """Make a network with 1x1 convolutions of few pixels, of which single ones are sampled, one in all at last."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(2),
        Deconv2d(1, 6, 1, cfg=options),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        Deconv2d(6, 10, 1, cfg={**options, "sampling_stride": 5}),
        nn.Flatten(),
    )


def channels(options: Options) -> nn.Module:
    """Make a network that whitens activations."""
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), ChannelDeconv(20, cfg={"block": 8}), nn.Linear(20, 10)]
    return nn.Sequential(nn.Conv2d(1, 20, 3), ChannelDeconv(20, cfg={"block": 8}), *head)


def of_timm(name: str, width: float) -> Callable[[Options], nn.Module]:
    """Return what makes a registered network, so many times as wide."""
    return lambda options: timm.create_model(name, num_classes=10, in_chans=1, width=width, deconv=options)


NETWORKS: dict[str, Callable[[Options], nn.Module]] = {
    "layers": layers,
    "pooled": pooled,
    "channels": channels,
    "resnet18_cifar": of_timm("resnet18_cifar_deconv", 0.125),
    "resnext29_32x4d_cifar": of_timm("resnext29_32x4d_cifar_deconv", 0.25),
    "mobilenetv2_cifar": of_timm("mobilenetv2_cifar_deconv", 0.25),
}

OPTIONS: dict[str, Options] = {
    "fast": {"preset": "fast"},
    "paper": {"preset": "paper"},
    "capped": {"preset": "fast", "max_rows": 40},  # so few that images are passed over
    "freezing": {"preset": "paper", "freeze": True, "freeze_iter": 1},  # from the third step on
}

CASES = [
    *("layers fast", "layers paper", "layers capped", "layers freezing", "pooled paper", "channels paper"),
    *("resnet18_cifar fast", "resnet18_cifar paper", "resnext29_32x4d_cifar fast", "mobilenetv2_cifar fast"),
]
"""Network and options."""


def compared(cases: Sequence[str], processes: int, dtypes: Sequence[str] = ("float64",)) -> Iterator[Row]:
    """Train networks in so many gloo processes and in one; return how far they end apart, as rows of COLUMNS.

    Raises:
        RuntimeError: a process failed.
    """
    command = [sys.executable, "-m", "benchmarks.equivalence", json.dumps([list(cases), list(dtypes)])]
    for line in said_by(start(command, processes)):
        yield {**json.loads(line), **conditions("cpu")}


def said_by(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Return the lines that the first of some processes has printed when all have ended.

    Raises:
        RuntimeError: one ended otherwise.
    """
    ended = [(*process.communicate(timeout=900), process.returncode) for process in processes]
    if any(code for *_, code in ended):
        raise RuntimeError("\n".join(errors for _, errors, _ in ended)[-3000:])
    return ended[0][0].splitlines()


def shares(process: int, processes: int) -> list[slice]:
    """Return which images of each batch a process has."""
    sizes = [[IMAGES] * processes] * (STEPS - 1) + [list(LAST[:processes])]
    return [slice(sum(of_batch[:process]), sum(of_batch[: process + 1])) for of_batch in sizes]


def digits(processes: int, dtype: torch.dtype) -> Batches:
    """Return the batches of all processes: images of 16 x 16 pixels and their classes."""
    data, sizes = load_digits(), [of_last.stop for of_last in shares(processes - 1, processes)]
    images = torch.tensor(data.images[: sum(sizes)], dtype=dtype)[:, None] / 8 - 1
    images, classes = F.interpolate(images, 16, mode="bilinear"), torch.tensor(data.target[: sum(sizes)])
    return list(zip(images.split(sizes), classes.split(sizes), strict=True))


def train(model: nn.Module, batches: Batches, parts: Sequence[float], rate: float = RATE) -> None:
    """Train by SGD on batches, whose mean losses are weighted."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for (images, classes), part in zip(batches, parts, strict=True):
        optimizer.zero_grad()
        (part * F.cross_entropy(model(images), classes)).backward()
        optimizer.step()


def compare(case: str, dtype: str, group: dist.ProcessGroup | None = None) -> Row:
    """Train a case in all processes (of a group) and in the first alone; return a row but for the conditions."""
    (network, options), processes, own = case.split(), dist.get_world_size(group), dist.get_rank(group)
    rate = RATES.get(network, RATE)
    torch.manual_seed(0)
    start_model = NETWORKS[network](OPTIONS[options]).to(getattr(torch, dtype))
    one, other, model = (copy.deepcopy(start_model) for _ in range(3))
    batches = digits(processes, getattr(torch, dtype))
    if own == 0:
        with torch.no_grad():
            for value in other.parameters():
                value *= 1 + torch.finfo(value.dtype).eps
        for each in (one, other):
            train(each, batches, [1.0] * STEPS, rate)
    here = shares(own, processes)
    mine = [(images[part], classes[part]) for (images, classes), part in zip(batches, here, strict=True)]
    weights = [processes * len(some[0]) / len(all_[0]) for some, all_ in zip(mine, batches, strict=True)]
    parallel = DistributedDataParallel(convert_sync(model, group), process_group=group, broadcast_buffers=False)
    train(parallel, mine, weights, rate)
    apart = {"difference": distance(one, model), "rounding": distance(one, other), "moved": distance(one, start_model)}
    return {"case": case, "processes": processes, "dtype": dtype, **{k: rounded(v) for k, v in apart.items()}}


def distance(first: nn.Module, second: nn.Module) -> float:
    """Return the largest difference of two networks' weights and buffers."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def main() -> None:
    """Compare what the command line names, in one of the processes; the first of them prints rows as JSON."""
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    dist.init_process_group("gloo")
    cases, dtypes = json.loads(sys.argv[1])
    for case in cases:
        for dtype in dtypes:
            row = compare(case, dtype)
            if dist.get_rank() == 0:
                print(json.dumps(row), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
