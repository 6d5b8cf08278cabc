"""Which convolution a batch norm can be folded into, from what the network computes.

A batch norm follows a convolution when its input is that convolution's output, or a concatenation of such outputs, and
nothing else reads them.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm.layers
from torch import nn

from .kinds import BatchNorm
from .record import Run
from .trace import Trace

__all__ = ["Pairing", "pair_norms"]

_PRODUCERS: set[Any] = {cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, timm.layers.Conv2dSame)}
_PRODUCERS.add(timm.layers.Linear.forward)

Parts = list[tuple[str | None, int]]
"""What a value is put together from: (layer or None, channels)."""


@dataclass(frozen=True)
class Pairing:
    """What can be folded where.

    Attributes:
        folds: name of a norm -> (name of a convolution or linear layer, which of the norm's channels it makes).
        refused: name of a norm -> why it cannot be folded.
    """

    folds: dict[str, list[tuple[str, slice]]]
    refused: dict[str, str]


def pair_norms(model: nn.Module, trace: Trace, norms: Mapping[str, BatchNorm]) -> Pairing:
    """Find for every norm the convolutions or linear layers that it can be folded into."""
    modules = dict(model.named_modules())
    runs = [_Values(run, modules) for run in trace]
    pairing = Pairing({}, {})
    for name, norm in norms.items():
        try:
            pairing.folds[name] = list(_producers(name, norm, runs))
        except _CannotFoldError as reason:
            pairing.refused[name] = str(reason)
    _refuse_ties(model, pairing)
    return pairing


class _CannotFoldError(Exception):
    """Why a norm cannot be folded."""


class _Values:
    """What the values of one forward are put together from, and where they end up."""

    def __init__(self, run: Run, modules: Mapping[str, nn.Module]) -> None:
        self.run = run
        self.modules = modules

    def of_norm(self, name: str) -> list[Parts]:
        """What a norm's inputs are put together from, channel by channel."""
        sources = (self.run.steps[call].inputs for call in self.run.calls.get(name, ()))
        found = [self._parts(inputs[0]) if len(inputs) == 1 else None for inputs in sources]
        return [parts[0] if parts and parts[1] == 1 else [(None, 0)] for parts in found]

    def ends_of_layer(self, name: str) -> set[str | None]:
        """Where a layer's channels end up: names of norms, None for elsewhere."""
        return set().union(*(self._ends(call) for call in self.run.calls.get(name, ())))

    def _parts(self, index: int) -> tuple[Parts, int] | None:
        """The parts of a value, and the dimension that they stand along."""
        step = self.run.steps[index]
        if step.kind == "layer" and step.dim is not None and _is_producer(self.modules[step.name]):
            return [(step.name, step.shape[step.dim])], step.dim
        if step.kind == "op" and step.dim is not None:
            return self._concatenated(index, step.dim)
        if self._keeps_rows(index):
            parts = self._parts(step.inputs[0])
            return parts and (parts[0], len(step.shape) - 1)
        return None

    def _concatenated(self, index: int, dim: int) -> tuple[Parts, int] | None:
        step = self.run.steps[index]
        together: Parts = []
        for source in step.inputs:
            parts = self._parts(source)
            together += parts[0] if parts and parts[1] == dim else [(None, self.run.steps[source].shape[dim])]
        complete = sum(channels for _, channels in together) == step.shape[dim]  # no constant, nothing twice
        return (together, dim) if complete else None

    def _keeps_rows(self, index: int) -> bool:
        """Whether a step is a reshape that leaves the rows of a linear layer its rows."""
        step = self.run.steps[index]
        if step.kind != "op" or step.name not in ("view", "unsafe_view"):
            return False
        before = self.run.steps[step.inputs[0]].shape
        parts = self._parts(step.inputs[0])
        return bool(parts) and parts[1] == len(before) - 1 and step.shape[-1:] == before[-1:]  # type: ignore[index]

    def _ends(self, index: int) -> set[str | None]:
        ends: set[str | None] = {None} if index in self.run.outputs else set()
        for reader in self.run.readers[index]:
            step = self.run.steps[reader]
            if step.kind == "norm":
                ends.add(step.name)
            elif (step.kind == "op" and step.dim is not None) or self._keeps_rows(reader):
                ends |= self._ends(reader)
            else:
                ends.add(None)
        return ends


def _is_producer(layer: nn.Module) -> bool:
    own = {"weight", "bias"} <= layer._parameters.keys() and "forward" not in vars(layer)
    return own and type(layer).forward in _PRODUCERS


def _producers(name: str, norm: BatchNorm, runs: list[_Values]) -> Iterator[tuple[str, slice]]:
    if norm.running_mean is None:
        raise _CannotFoldError("keeps no running statistics")
    inputs = next((values for values in (run.of_norm(name) for run in runs) if values), [])
    if not inputs:
        raise _CannotFoldError("is not reached by the network's forward")
    found: dict[str, slice] = {}
    for parts in inputs:
        start = 0
        for layer, channels in parts:
            if layer is None:
                raise _CannotFoldError("normalises what is not the output of convolutions alone")
            ends = {end for run in runs for end in run.ends_of_layer(layer)}
            if ends != {name}:
                others = " and ".join(sorted(end or "another layer" for end in ends - {name}))
                raise _CannotFoldError(f"shares the output of {layer} with {others}")
            span = slice(start, start + channels)
            if found.setdefault(layer, span) != span:
                raise _CannotFoldError(f"normalises the output of {layer} in two ways")
            start += channels
    yield from found.items()


def _refuse_ties(model: nn.Module, pairing: Pairing) -> None:
    """A weight that two layers share cannot take two norms."""
    users: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)].add(id(module))
    for name, folds in list(pairing.folds.items()):
        for layer, _ in folds:
            if len(users[id(model.get_submodule(layer).weight)]) > 1:
                pairing.refused[name] = f"follows {layer}, which shares its weight with another layer"
                pairing.folds.pop(name, None)
