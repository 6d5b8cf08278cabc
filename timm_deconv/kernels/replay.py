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

from .gpu.dispatch import why_not
from .operation import PLAIN_TENSORS, wants_plain_form

if TYPE_CHECKING:
    from .gpu.tape import Tape

__all__ = ["replayed"]

Tensors = Sequence[Tensor | None]

TAPES = 8192
"""Tapes that are kept at most: some for each kind of layer and shape of its input."""

_UNSEEN: Any = object()

_tapes: "dict[Hashable, Tape | None]" = {}
"""By key, the tape of a function; None if it cannot be replayed."""


def replayed(function: Callable[[], Sequence[Any]], tensors: Tensors, *settings: Hashable) -> Sequence[Any]:
    """Return what a function returns; on a GPU by the launches that it made before, if that is all it did.

    Args:
        function: takes nothing, and returns tensors that it allocated, or None. No gradient flows through it, and what
            else it does in Python, such as setting attributes, is not done again.
        tensors: all that it reads or writes, on one device; the first is not None.
        settings: all else that it depends on, what is done with the tensors included.

    A function that does more, such as a plain form, a copy or a sum over processes, runs as it is, always.
    """
    if not _may_replay(tensors):
        return function()
    formats = [None if each is None else (each.dtype, each.get_device(), each.shape, each.stride()) for each in tensors]
    key = (*settings, *formats)
    tape = _tapes.get(key, _UNSEEN)
    if tape is _UNSEEN:
        from .gpu.tape import are_usual, recorded

        if not are_usual(tensors):
            return function()
        if len(_tapes) >= TAPES:
            _tapes.clear()
        results, _tapes[key] = recorded(function, tensors)
        return results
    played = None if tape is None else tape.play(tensors)
    return function() if played is None else played


def _may_replay(tensors: Tensors) -> bool:
    """Tell whether nobody looks at single operations, and they may be launches of kernels."""
    first = tensors[0]
    return not (
        torch.compiler.is_compiling()
        or first is None
        or any(each is not None and type(each) not in PLAIN_TENSORS for each in tensors)
        or not _has_kernels(first)
        or is_in_torch_dispatch_mode()
        or wants_plain_form()
    )


def _has_kernels(tensor: Tensor) -> bool:
    """Tell whether a tensor is on the current GPU, and kernels run there."""
    device = tensor.get_device()
    return tensor.is_cuda and device == torch.cuda.current_device() and why_not(device) is None
