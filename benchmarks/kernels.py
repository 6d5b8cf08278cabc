"""How many kernels a training step of one whitened layer launches, beside the plain layer: eager and compiled.

On a GPU small layers cost what their launches cost, so the number says more than a CPU's seconds.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_deconv import kernels
from timm_deconv.convert import DeconvPolicy
from timm_deconv.convert.policy import Role
from timm_deconv.errors import unknown_name
from timm_deconv.kernels import plain_form
from timm_deconv.layers import Deconv2d, DeconvLinear, preset

from .gpu_path import on_gpu_path
from .rows import CONDITIONS, Row, conditions

__all__ = ["COLUMNS", "LAYERS", "SHOWN", "KernelSettings", "compiled_kernels", "eager_kernels", "kernel_rows"]

COLUMNS = ["layer", "preset", "path", "eager", "eager_plain", "compiled", "compiled_plain", *CONDITIONS]

SHOWN = COLUMNS[:7]

PATHS = ("plain", "triton")
"""What runs our operations: their plain forms, or the kernels for GPUs, which need none to be counted."""

NO_KERNEL = (
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "promote_types",
)

OPERATIONS = {
    operation.overload: operation
    for name in kernels.__all__
    if isinstance(operation := getattr(kernels, name), kernels.Operation)
}
"""Ours by what a dispatch mode sees of them: it is to look into them."""

LAUNCH = re.compile(
    r"^\s+(?:\w+ = )?(?:cpp_fused\w*\(|triton\w*\.run\(|extern_kernels\.\w+\(|torch\.ops\.\w+\.)", re.MULTILINE
)
"""A line of the compiler's output that launches a kernel."""


@dataclass(frozen=True)
class Example:
    """A layer of a role, and an input for it."""

    role: Role
    build: Callable[..., nn.Module]
    plain: Callable[..., nn.Module]
    arguments: dict[str, Any]
    shape: tuple[int, ...]


def _conv(role: Role, *sizes: int, shape: tuple[int, ...], **arguments: Any) -> Example:
    named = dict(zip(("in_channels", "out_channels", "kernel_size"), sizes, strict=True))
    return Example(role, Deconv2d, nn.Conv2d, named | arguments, shape)


LAYERS = {
    "stem": _conv("stem", 3, 64, 3, padding=1, shape=(8, 3, 32, 32)),
    "spatial": _conv("spatial", 64, 64, 3, padding=1, shape=(8, 64, 32, 32)),
    "spatial, small image": _conv("spatial", 256, 256, 3, padding=1, shape=(8, 256, 4, 4)),
    "block end": _conv("block_end", 64, 64, 3, padding=1, shape=(8, 64, 32, 32)),
    "pointwise": _conv("pointwise", 128, 64, 1, shape=(8, 128, 16, 16)),
    "depthwise": _conv("depthwise", 64, 64, 3, padding=1, groups=64, shape=(8, 64, 16, 16)),
    "grouped": _conv("grouped", 64, 64, 3, padding=1, groups=4, shape=(8, 64, 16, 16)),
    "classifier": Example("classifier", DeconvLinear, nn.Linear, {"in_features": 512, "out_features": 10}, (64, 512)),
}


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """What is counted: `layers`, names of LAYERS (all if empty), each under every one of `presets`.

    On a CPU they are counted by each of PATHS, else by the plain forms; those of a GPU itself tells its profiler.
    `compiled`: compile them too, which takes a compiler of the machine and about a minute a layer.

    Raises:
        InputError: a layer or preset that is not known.
    """

    layers: Sequence[str] = ()
    presets: Sequence[str] = ("fast", "paper")
    device: str = "cpu"
    compiled: bool = True

    def __post_init__(self) -> None:
        for name in self.layers:
            if name not in LAYERS:
                raise unknown_name("layer", name, LAYERS)
        for name in self.presets:
            preset(name)


def kernel_rows(settings: KernelSettings, progress: Callable[[str], object] = print) -> list[Row]:
    """Count a row for each layer, preset and path: kernels of a forward and a backward pass, see `eager_kernels`.

    Compiled code is counted with the plain forms alone: an operation of ours is one call there.
    """
    rows = []
    for name in settings.layers or LAYERS:
        example = LAYERS[name]
        x = torch.randn(example.shape, device=settings.device, requires_grad=True)
        plain = example.plain(**example.arguments).to(settings.device)
        of_plain = {f"{how}_plain": count for how, count in _counts(plain, x, settings).items()}
        for chosen in settings.presets:
            progress(f"{name}, {chosen}")
            cfg = DeconvPolicy(preset=chosen).over_published(DeconvPolicy()).cfg(name, example.role)
            layer = example.build(**example.arguments, cfg=cfg).to(settings.device)
            shared = {"layer": name, "preset": chosen, **of_plain, **conditions(settings.device)}
            rows.append(shared | {"path": "plain", **_counts(layer, x, settings)})
            if settings.device == "cpu":
                rows.append(shared | {"path": "triton", "eager": eager_kernels(layer, x, "triton"), "compiled": ""})
    return rows


def eager_kernels(layer: nn.Module, x: Tensor, path: str = "plain") -> int:
    """Count the operators of a training forward and backward that are neither views nor allocations.

    Args:
        layer: called with x.
        x: of a shape that the layer takes, with `requires_grad`.
        path: of PATHS. 'triton' counts the kernels that are launched for GPUs too, and is for a CPU.
    """
    with on_gpu_path() if path == "triton" else plain_form() as launched:
        cotangent = torch.randn_like(layer(x))
        before = len(launched or ())
        layer.zero_grad()
        x.grad = None
        with _Counting() as counting:
            layer(x).backward(cotangent)
        return counting.kernels + len(launched or ()) - before


def compiled_kernels(layer: nn.Module, x: Tensor) -> int:
    """Count the kernels that compiled code of a training forward and backward launches, fused and of libraries.

    An operation of `timm_deconv.kernels` counts as one, whatever it launches: compiled code does not look into it.

    Args:
        layer: called with x.
        x: of a shape that the layer takes, with `requires_grad`.
    """
    from torch._inductor.utils import run_fw_bw_and_get_code  # not at the top: it loads the compiler

    torch._dynamo.reset()
    network = torch.compile(layer, fullgraph=True)
    _, sources = run_fw_bw_and_get_code(lambda: network(x))
    return sum(len(LAUNCH.findall(source)) for source in sources)


def _counts(layer: nn.Module, x: Tensor, settings: KernelSettings) -> Row:
    return {"eager": eager_kernels(layer, x), "compiled": compiled_kernels(layer, x) if settings.compiled else ""}


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in OPERATIONS:
            operation = OPERATIONS[func]
            with self, torch.no_grad():
                return operation(*operation._decoded(args))
        if not func.is_view and func.overloadpacket.__name__ not in NO_KERNEL:
            self.kernels += 1
        return func(*args, **(kwargs or {}))
