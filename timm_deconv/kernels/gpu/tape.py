"""Launches that were recorded, and what it takes to do them again: where each finds what in which tensor."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

from .launch import ALIGNMENT, Launch, listening

__all__ = ["Tape", "are_usual", "recorded"]

Tensors = Sequence[Tensor | None]

ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"}

APART = 128
"""Bytes whose multiples memory of an own begins at, in what launches share."""


class Allocated(NamedTuple):
    """How a tensor that is returned is made: what `torch.empty_strided` is given."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Place(NamedTuple):
    """Where a pointer of a launch points to: so many bytes behind the beginning of a tensor."""

    tensor: int
    offset: int


NOWHERE = Place(-1, 0)


class TapedLaunch(NamedTuple):
    """A launch: the kernel that was compiled for it, and places of its tensors; None for one that is None."""

    launch: Launch
    compiled: Any
    places: tuple[Place | None, ...]


class Tape(NamedTuple):
    """Launches of a function, to be done again with other tensors of the same shapes, strides and dtypes.

    Places are counted through the function's tensors, those that it returns, and the memory that is needed between.

    Attributes:
        launches: what it launched.
        results: what is returned.
        scratch: bytes that launches hand on among themselves.
        written: which of the function's tensors are written to.
    """

    launches: Sequence[TapedLaunch]
    results: Sequence[Allocated | None]
    scratch: int
    written: Sequence[int]

    def play(self, tensors: Tensors) -> list[Tensor | None] | None:
        """Launch what the function launched, and return what it would return.

        None if tensors do not lie where the kernels were compiled for, or if a profiler wants to see launches.
        """
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if any(address % ALIGNMENT for address in addresses) or knobs.runtime.launch_enter_hook.calls:
            return None
        first = tensors[0]
        assert first is not None
        device = first.device
        results: list[Tensor | None] = [
            None if made is None else torch.empty_strided(made[0], made[1], dtype=made[2], device=device)
            for made in self.results
        ]
        scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device)
        addresses += [0 if tensor is None else tensor.data_ptr() for tensor in (*results, scratch)]
        stream = driver.active.get_current_stream(first.get_device())
        for launch, compiled, places in self.launches:
            launch.again(compiled, stream, [place and addresses[place[0]] + place[1] for place in places])
        if self.written:
            torch.autograd.graph.increment_version([tensors[index] for index in self.written])  # type: ignore[misc]
        return results


def are_usual(tensors: Tensors) -> bool:
    """Tell whether tensors are aligned as those that are allocated, and have versions, which inference tensors lack."""
    return not any(each is not None and (each.data_ptr() % ALIGNMENT or each.is_inference()) for each in tensors)


def recorded(function: Callable[[], Tensors], tensors: Tensors) -> tuple[Tensors, Tape | None]:
    """Return what a function returns, and its tape; None for that if the function does more than launch kernels.

    Args:
        function, tensors: see `replay.replayed`.
    """
    versions = [None if tensor is None else tensor._version for tensor in tensors]
    with _Watch() as watch, listening(watch.launches):
        results = function()
    written = [
        index for index, tensor in enumerate(tensors) if tensor is not None and tensor._version != versions[index]
    ]
    return results, watch.tape(tensors, results, written)


class _Watch(TorchDispatchMode):
    """Sees what torch does, and keeps what is allocated, so that no memory is given twice.

    Attributes:
        launches: that were made, with what was compiled for them and their tensors.
        did_more: torch did something else than to allocate and to view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Launch, Any, tuple[Tensor | None, ...]]] = []
        self.did_more = False
        self._allocated: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ALLOCATIONS:
            self._allocated.append(result)
        elif not _is_view(func):
            self.did_more = True
        return result

    def tape(self, tensors: Tensors, results: Tensors, written: Sequence[int]) -> Tape | None:
        """Return the tape of what was seen; None if there was more, or if memory is nobody's.

        Args:
            tensors, results: those of the function.
            written: which of its tensors it wrote to.
        """
        own = {_range(each): each for each in self._allocated}
        made = [None if each is None else own.pop(_range(each), None) for each in results]
        if self.did_more or _overlap(tensors) or [each is None for each in made] != [each is None for each in results]:
            return None
        whole = [*tensors, *results]
        places = {_range(each): Place(index, 0) for index, each in enumerate(whole) if each is not None}
        scratch = 0
        for begin, end in own:
            places[begin, end] = Place(len(whole), scratch)
            scratch += -(-(end - begin) // APART) * APART
        launches = [
            TapedLaunch(launch, compiled, tuple(_place(each, places) for each in given))
            for launch, compiled, given in self.launches
        ]
        if any(each.compiled is None or NOWHERE in each.places for each in launches):
            return None
        allocated = [None if each is None else Allocated(each.shape, each.stride(), each.dtype) for each in results]
        return Tape(launches, allocated, scratch, written)


def _is_view(func: Any) -> bool:
    """Tell whether an operator only views what it is given."""
    infos = [each.alias_info for each in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _range(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor begins and ends in memory."""
    begin = tensor.data_ptr()
    length = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (length * tensor.element_size() if tensor.numel() else 0)


def _overlap(tensors: Tensors) -> bool:
    """Tell whether any two tensors share memory."""
    ranges = sorted(_range(tensor) for tensor in tensors if tensor is not None)
    return any(end > begin for (_, end), (begin, _) in itertools.pairwise(ranges))


def _place(tensor: Tensor | None, places: dict[tuple[int, int], Place]) -> Place | None:
    """Return where a tensor lies; None if it is None, NOWHERE if it is in none of these places."""
    if tensor is None:
        return None
    begin, end = _range(tensor)
    for (first, last), (index, offset) in places.items():
        if first <= begin and end <= last:
            return Place(index, offset + begin - first)
    return NOWHERE
