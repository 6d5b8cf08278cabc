"""What all kernels share: the one place where they are launched, and the tiles that matrices are cut into."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver

__all__ = ["ALIGNMENT", "PLANS", "TILE", "Launch", "Unfit", "check_dtypes", "listening", "padded", "parts_of", "tiles"]

TILE = 64
"""Features in a tile of a matrix; a program holds one or a few tiles."""

LEAST_TILE = 16
"""Least extent that `tl.dot` multiplies."""

ALIGNMENT = 16
"""Bytes whose multiples Triton compiles kernels for."""

PLANS = 4096
"""Plans of launches that an operation keeps: one for each layer and shape of its input."""


_listeners = threading.local()


class Unfit(Exception):
    """Arguments that are not for a kernel. A message says why; without one the plain form is what is meant to run."""


class Launch:
    """A kernel with its grid, numbers and constants, to be launched with other tensors step after step.

    A step of a network on a GPU is short beside the launches in it. Triton takes 6 to 10 microseconds to find what it
    compiled for all arguments, and asks the driver about every pointer. Here only types and alignment of tensors are
    looked at, which is all that can differ, and pointers are passed as numbers.

    Args:
        kernel: what `triton.jit` made; its arguments are tensors, then numbers, then `tl.constexpr`.
        grid: programs in up to three dimensions.
        numbers: of the kernel, in its order.
        warps: a program's, of 32 threads each.
        stages: of software pipelining; each may hold the operands of a product in shared memory.
        constants: the kernel's `tl.constexpr` arguments by name.
    """

    def __init__(
        self, kernel: Any, grid: Sequence[int], *numbers: float, warps: int = 4, stages: int = 2, **constants: Any
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, tuple(grid), numbers, constants
        self.options = {"num_warps": warps, "num_stages": stages}
        self._extents = (*grid, 1, 1)[:3]
        self._values = *numbers, *(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch the kernel with its tensors, all on the current device, the first of which is not None."""
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        kinds = [None if tensor is None else tensor.dtype for tensor in tensors]
        device: int = tensors[0].get_device()  # type: ignore[union-attr]
        key = (device, *kinds, *[pointer and pointer % ALIGNMENT for pointer in pointers])
        compiled = self._compiled.get(key)
        if compiled is None or knobs.runtime.launch_enter_hook.calls:  # by profilers
            compiled = self._compiled[key] = self._launch_by_triton(tensors)
        else:
            self.again(compiled, driver.active.get_current_stream(device), pointers)
        launches = getattr(_listeners, "launches", None)
        if launches is not None:
            launches.append((self, compiled, tensors))

    def again(self, compiled: Any, stream: int, pointers: Sequence[int | None]) -> None:
        """Launch what was compiled for tensors of the same dtypes and alignment as those that pointers lead to."""
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(*self._extents, stream, function, metadata, None, None, None, *pointers, *self._values)

    def _launch_by_triton(self, tensors: Sequence[Tensor | None]) -> Any:
        """Launch the kernel, compile it if need be, and return what was compiled; the interpreter compiles nothing."""
        options = self.options if isinstance(self.kernel, JITFunction) else {}
        return self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **options)


@contextmanager
def listening(launches: list[tuple[Launch, Any, tuple[Tensor | None, ...]]]) -> Iterator[None]:
    """List the launches of this thread, with what was compiled for each (None by the interpreter) and its tensors."""
    _listeners.launches = launches
    try:
        yield
    finally:
        _listeners.launches = None


def padded(features: int) -> int:
    """Return the extent of the tiles that features are cut into: a power of two, 16 to 64."""
    extent = LEAST_TILE
    while extent < min(features, TILE):
        extent *= 2
    return extent


def tiles(features: int) -> int:
    """Return the number of tiles that features are cut into."""
    return parts_of(features, TILE)


def parts_of(number: int, size: int) -> int:
    """Return in how many parts of a size a number comes; Triton's own function takes 2 to 4 microseconds."""
    return -(-number // size)


def check_dtypes(*tensors: Tensor | None) -> None:
    """Raise `Unfit` for float64, which the kernels do not compute in."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            raise Unfit("the kernels are for float32, float16 and bfloat16, and the tensors are float64")
