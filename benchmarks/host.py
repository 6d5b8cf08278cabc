"""How long the host is busy with a training step of one layer: Python, dispatch and launches.

On a GPU the host launches while kernels run, and a small layer costs what its launches cost. On a CPU a layer's step on
a tiny input is nearly all such work, and by the GPU's path (see `gpu_path`) the host does what that of a GPU does. The
time is the thread's own, so that a busy machine changes little.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_deconv.convert.policy import DEFAULT_PRESET
from timm_deconv.errors import unknown_name
from timm_deconv.kernels import plain_form
from timm_deconv.layers import Deconv2d, DeconvLinear
from timm_deconv.timing import interleave

from .gpu_path import driver_without_gpu, on_gpu_path
from .rows import CONDITIONS, Row, conditions, rounded

__all__ = ["COLUMNS", "LAYERS", "SHOWN", "HostSettings", "host_rows"]

COLUMNS = [
    *"layer form launches microseconds microseconds_lower microseconds_upper forward over_twin rounds".split(),
    *CONDITIONS,
]

SHOWN = COLUMNS[:8]

LAYERS: dict[str, dict[str, Any]] = {
    "spatial": {"kernel_size": 3, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 16},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "linear": {},
}
"""Arguments of layers from 16 to 16 channels: their arithmetic takes next to no time."""

SHAPE = (16, 16, 8, 8)
"""Of the input: it has as many rows as need no shrinking. A linear layer is given its first two dimensions."""


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """What is timed: `layers`, names of LAYERS (all if empty), in each of four forms.

    none: the convolution alone; twin: with batch norm; plain: whitened by `fast` in its plain form; triton: by the
    kernels for GPUs, up to where the driver would launch them, which takes some 3 microseconds more each.
    `rounds`, `warmup`: see `timing.interleave`; kernels are compiled before.

    Raises:
        InputError: a layer that is not known.
    """

    layers: Sequence[str] = ()
    rounds: int = 200
    warmup: int = 20

    def __post_init__(self) -> None:
        for name in self.layers:
            if name not in LAYERS:
                raise unknown_name("layer", name, LAYERS)


def host_rows(settings: HostSettings, progress: Callable[[str], object] = print) -> Iterator[Row]:
    """Measure a row for each layer and form: microseconds of a forward and a backward pass, and of a forward alone.

    `over_twin` is how much longer both take than the twin's.

    Raises:
        InputError: Triton is not installed.
    """
    with driver_without_gpu(), on_gpu_path(launches=True) as launched:
        for name in settings.layers or LAYERS:
            progress(name)
            yield from _rows_of(name, settings, launched)


def _rows_of(name: str, settings: HostSettings, launched: list[str]) -> Iterator[Row]:
    torch.manual_seed(0)
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    x = (x[:, :, 0, 0].clone() if name == "linear" else x).requires_grad_()
    cotangent, forms = torch.randn_like(x), _forms(name)
    actions, launches = {}, {}
    for form, (layer, path) in forms.items():
        actions[form] = _step(layer, path, x, cotangent)
        actions[f"{form} forward"] = _forward(layer, path, x)
        before = len(launched)
        actions[form]()
        launches[form] = len(launched) - before
    timings = interleave(actions, rounds=settings.rounds, warmup=settings.warmup, clock=time.thread_time)
    for form in forms:
        spread, twin = timings.spread(form), timings.spread("twin").median
        yield {
            "layer": name,
            "form": form,
            "launches": launches[form],
            "microseconds": rounded(1e6 * spread.median),
            "microseconds_lower": rounded(1e6 * spread.lower),
            "microseconds_upper": rounded(1e6 * spread.upper),
            "forward": rounded(1e6 * timings.spread(f"{form} forward").median),
            "over_twin": rounded(1e6 * (spread.median - twin)),
            "rounds": settings.rounds,
            **conditions("cpu"),
        }


CONVOLUTIONS: Any = nn.Conv2d, nn.BatchNorm2d, Deconv2d
LINEAR: Any = nn.Linear, nn.BatchNorm1d, DeconvLinear

Path = Callable[[], contextlib.AbstractContextManager[object]]


def _forms(name: str) -> dict[str, tuple[nn.Module, Path]]:
    plain, norm, deconv = LINEAR if name == "linear" else CONVOLUTIONS
    build = partial(plain, SHAPE[1], SHAPE[1], **LAYERS[name])
    whitened = partial(deconv, SHAPE[1], SHAPE[1], **LAYERS[name], cfg=DEFAULT_PRESET)
    return {
        "none": (build(), contextlib.nullcontext),
        "twin": (nn.Sequential(build(bias=False), norm(SHAPE[1])), contextlib.nullcontext),
        "plain": (whitened(), plain_form),
        "triton": (whitened(), contextlib.nullcontext),
    }


def _step(layer: nn.Module, path: Path, x: Tensor, cotangent: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad()
        x.grad = None
        with path():
            layer(x).backward(cotangent)

    return step


def _forward(layer: nn.Module, path: Path, x: Tensor) -> Callable[[], None]:
    def forward() -> None:
        with path():
            layer(x)

    return forward
