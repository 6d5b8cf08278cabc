"""Batch norms are folded into the convolutions before them.

In evaluation batch norm is a fixed scale and shift of each channel, which the weight and bias of a convolution or
linear layer take in. A batch norm follows a convolution when its input is that convolution's output, or a concatenation
of such outputs, and nothing else reads them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

from timm_deconv.linalg import to_double

from .flow import Flow, observe
from .module_replace import remove_norms
from .module_types import BatchNorm, batch_norms, frozen_norms

__all__ = [
    "ChannelAffine",
    "Folding",
    "find_folding",
    "fold_norms",
    "fold_norms_in_place",
    "scale_and_shift",
    "set_parameters",
]

_PRODUCERS: set[Any] = {cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, timm.layers.Conv2dSame)}
_PRODUCERS.add(timm.layers.Linear.forward)

Parts = list[tuple[str | None, int]]
"""What a value is put together from: (layer or None, channels)."""


class ChannelAffine(nn.Module):
    """A learned scale and shift of each channel, what evaluation leaves of a batch norm that cannot be folded.

    (N, C, ...) -> the same, weight[c] * x + bias[c].

    Args:
        weight, bias: (C,), where the two start.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift (N, C, ...), to the same shape."""
        shape = [1, -1] + [1] * (x.ndim - 2)
        return x * self.weight.reshape(shape) + self.bias.reshape(shape)

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return f"{self.weight.shape[0]}"


def scale_and_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return what a norm of C channels does to each in evaluation: scale and shift, (C,) each, in float64."""
    mean, var, weight, bias = (getattr(norm, key) for key in ("running_mean", "running_var", "weight", "bias"))
    scale: Tensor = (to_double(var) + norm.eps).rsqrt()
    if weight is not None:
        scale = scale * to_double(weight)
    shift = -to_double(mean) * scale
    return scale, shift if bias is None else shift + to_double(bias)


@dataclass(frozen=True)
class Folding:
    """What can be folded where.

    Attributes:
        layers: name of a norm -> (name of a convolution or linear layer, which of the norm's channels it makes).
        refused: name of a norm -> why it cannot be folded.
    """

    layers: dict[str, list[tuple[str, slice]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def find_folding(model: nn.Module, flows: Sequence[Flow], norms: Mapping[str, BatchNorm]) -> Folding:
    """Find for every norm the convolutions or linear layers that it can be folded into."""
    values = [_Values(flow) for flow in flows]
    users = Counter(id(p) for module in model.modules() for p in set(module._parameters.values()))
    shared = {name for name, m in model.named_modules() if users[id(m._parameters.get("weight"))] > 1}
    folding = Folding()
    for name, norm in norms.items():
        try:
            folding.layers[name] = list(_producers(name, norm, values, shared))
        except _CannotFoldError as reason:
            folding.refused[name] = str(reason)
    return folding


def fold_norms(model: nn.Module, norms: Mapping[str, BatchNorm], folding: Folding) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute weight and bias, in float64, of every layer that takes a norm in, by its name.

    A convolution's are (O, C / groups, ...) and (O,), as those of the layer.
    """
    folded = {}
    for norm, layers in folding.layers.items():
        scale, shift = scale_and_shift(norms[norm])
        for name, channels in layers:
            layer: Any = model.get_submodule(name)
            weight = to_double(layer.weight) * scale[channels].reshape(-1, *[1] * (layer.weight.ndim - 1))
            bias = shift[channels]
            folded[name] = weight, bias if layer.bias is None else bias + to_double(layer.bias) * scale[channels]
    return folded


def set_parameters(layer: Any, weight: Tensor, bias: Tensor) -> None:
    """Give a layer, in place, a weight of its number of elements and a bias, which it need not have had."""
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)


@torch.no_grad()
def fold_norms_in_place(model: nn.Module) -> list[str]:
    """Fold every batch norm that can be into the layer before it; the network evaluates as before.

    Returns:
        Names of the norms that stay, as they follow no convolution.

    Raises:
        InputError: the network does not run on images of its configuration, by which is seen what each norm follows.
    """
    norms: dict[str, BatchNorm] = {**batch_norms(model), **frozen_norms(model)}
    if not norms:
        return []
    folding = find_folding(model, observe(model), norms)
    for name, parameters in fold_norms(model, norms, folding).items():
        set_parameters(model.get_submodule(name), *parameters)
    remove_norms(model, folding.layers)
    return list(folding.refused)


class _CannotFoldError(Exception):
    """Why a norm cannot be folded."""


def _producers(name: str, norm: BatchNorm, forwards: list["_Values"], shared: set[str]) -> Iterator[tuple[str, slice]]:
    """Yield the layers whose outputs a norm normalises, and their channels among the norm's, or raise why it cannot be
    folded. A weight that two layers share cannot take two norms."""
    if norm.running_mean is None:
        raise _CannotFoldError("keeps no running statistics")
    inputs = next((found for found in (values.of_norm(name) for values in forwards) if found), [])
    if not inputs:
        raise _CannotFoldError("is not reached by the network's forward")
    found: dict[str, slice] = {}
    for parts in inputs:
        start = 0
        for layer, channels in parts:
            if layer is None:
                raise _CannotFoldError("normalises what is not the output of convolutions alone")
            ends = {end for values in forwards for end in values.ends_of_layer(layer)}
            if ends != {name}:
                others = " and ".join(sorted(end or "another layer" for end in ends - {name}))
                raise _CannotFoldError(f"shares the output of {layer} with {others}")
            span = slice(start, start + channels)
            if found.setdefault(layer, span) != span:
                raise _CannotFoldError(f"normalises the output of {layer} in two ways")
            start += channels
    for layer, span in found.items():
        if layer in shared:
            raise _CannotFoldError(f"follows {layer}, which shares its weight with another layer")
        yield layer, span


class _Values:
    """Knows what the values of one forward are put together from, and where they end up."""

    def __init__(self, flow: Flow) -> None:
        self.run = flow.run
        self.modules = flow.modules

    def of_norm(self, name: str) -> list[Parts]:
        """Return what a norm's inputs are put together from, channel by channel."""
        sources = (self.run.steps[call].inputs for call in self.run.calls.get(name, ()))
        found = [self._parts(inputs[0]) if len(inputs) == 1 else None for inputs in sources]
        return [parts[0] if parts and parts[1] == 1 else [(None, 0)] for parts in found]

    def ends_of_layer(self, name: str) -> set[str | None]:
        """Return where a layer's channels end up: names of norms, None for elsewhere."""
        return set().union(*(self._ends(call) for call in self.run.calls.get(name, ())))

    def _parts(self, index: int) -> tuple[Parts, int] | None:
        """Return the parts of a value, and the dimension that they stand along."""
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
        """Return whether a step is a reshape that leaves the rows of a linear layer its rows."""
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
