"""What all kernels share: the one place where they are launched, and the tiles that matrices are cut into."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction, driver

__all__ = ["TILE", "Unfit", "launch", "padded", "tiles"]

TILE = 64
"""Features in a tile of a matrix; a program holds one or a few tiles."""

LEAST_TILE = 16
"""Least extent that `tl.dot` multiplies."""


ALIGNMENT = 16
"""Bytes, and numbers, whose multiples Triton compiles kernels for."""


class Unfit(Exception):
    """Arguments that are not for a kernel. A message says why; without one the plain form is what is meant to run."""


def launch(kernel: Any, grid: Sequence[int], *args: Any, warps: int = 4, stages: int = 2, **constants: Any) -> None:
    """Launch a kernel on a grid of programs.

    Triton takes 6 to 10 microseconds to find what it compiled for such arguments, which is half of a launch. It is
    found here in 2 to 3; what Triton tells kernels apart by, `_kind` tells too.

    Args:
        kernel: what `triton.jit` made.
        grid: programs in up to three dimensions.
        args: tensors and numbers, in the kernel's order.
        warps: a program's, of 32 threads each.
        stages: of software pipelining; each may hold the operands of a product in shared memory.
        constants: the kernel's `tl.constexpr` arguments by name.
    """
    if not isinstance(kernel, JITFunction):  # but the interpreter's
        kernel[tuple(grid)](*args, **constants)
        return
    key = (id(kernel), driver.active.get_current_device(), warps, stages, *constants.items(), *map(_kind, args))
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[tuple(grid)](*args, **constants, num_warps=warps, num_stages=stages)
        _compiled[key] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]]
        return
    compiled, values = found
    compiled[(*grid, 1, 1)[:3]](*args, *values)


_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def _kind(arg: Any) -> Any:
    """Return all of an argument that Triton compiles a kernel for."""
    if type(arg) is int:
        return 1 if arg == 1 else (arg % ALIGNMENT == 0, -(2**31) <= arg < 2**31)
    return (arg.dtype, arg.data_ptr() % ALIGNMENT == 0) if isinstance(arg, Tensor) else type(arg)


def padded(features: int) -> int:
    """Return the extent of the tiles that features are cut into: a power of two, 16 to 64."""
    extent = LEAST_TILE
    while extent < min(features, TILE):
        extent *= 2
    return extent


def tiles(features: int) -> int:
    """Return the number of tiles that features are cut into."""
    return -(-features // TILE)


def check_dtypes(*tensors: Tensor | None) -> None:
    """Raise `Unfit` for float64, which the kernels do not compute in."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            raise Unfit("the kernels are for float32, float16 and bfloat16, and the tensors are float64")
