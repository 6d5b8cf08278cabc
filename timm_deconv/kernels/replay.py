"""Functions of a layer that end in a few launches of kernels, replayed by these alone.

On a GPU a small layer costs what its host takes to launch it, and most of that Python spends on finding out what it
found out at the step before: shapes, plans, which memory holds what. So a function is watched once (see `gpu.tape`). If
all it did was to allocate, to view and to launch, it is done again by launching the same kernels on other addresses.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .operation import wants_plain_form

if TYPE_CHECKING:
    from .gpu.tape import Tape

__all__ = ["replayed"]

Tensors = Sequence[Tensor | None]

TAPES = 8192
"""Tapes that are kept at most: two for each kind of layer and shape of its input."""

_tapes: "dict[Hashable, Tape | None]" = {}


def replayed(function: Callable[[], Sequence[Any]], tensors: Tensors, *settings: Hashable) -> Sequence[Any]:
    """Return what a function returns; on a GPU by the launches that it made before, if that is all it did.

    Args:
        function: takes nothing, and returns tensors that it allocated, or None. No gradient flows through it.
        tensors: all that it reads or writes, on one device; the first is not None.
        settings: all else that it depends on, what is done with the tensors included.

    A function that does more, such as a plain form, a copy or a sum over processes, runs as it is, always.
    """
    if not _may_replay(tensors):
        return function()
    formats = [None if each is None else (each.dtype, each.get_device(), each.shape, each.stride()) for each in tensors]
    key = (*settings, *formats)
    if key not in _tapes:
        from .gpu.tape import watched

        if len(_tapes) >= TAPES:
            _tapes.clear()
        result, _tapes[key] = watched(function, tensors)
        return result
    tape = _tapes[key]
    results = None if tape is None else tape.play(tensors)
    return function() if results is None else results


def _may_replay(tensors: Tensors) -> bool:
    """Tell whether nobody looks at single operations, and they are a GPU's, the current one."""
    return not (
        torch.compiler.is_compiling()
        or type(tensors[0]) is not Tensor
        or not _on_current_gpu(tensors[0])
        or is_in_torch_dispatch_mode()
        or wants_plain_form()
    )


def _on_current_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.get_device() == torch.cuda.current_device()
