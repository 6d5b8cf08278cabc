"""Which convolution a batch norm can be folded into, found by running the network once on tensors without data.

A batch norm follows a convolution when its input is that convolution's output, or a concatenation of such outputs, and
nothing else reads them. The run sees what Python does, so any control flow is allowed; nothing is computed.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import timm.layers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_deconv.errors import InputError

from .surgery import NORM_ACT_TYPES, NORM_TYPES

__all__ = ["Pairing", "batch_norms", "pair_norms"]

_PRODUCERS: set[Any] = {cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, timm.layers.Conv2dSame)}
_PRODUCERS.add(timm.layers.Linear.forward)


@dataclass(frozen=True)
class Pairing:
    """What can be folded where.

    Attributes:
        folds: name of a norm -> (name of a convolution or linear layer, which of the norm's channels it makes).
        refused: name of a norm -> why it cannot be folded.
    """

    folds: dict[str, list[tuple[str, slice]]]
    refused: dict[str, str]


@dataclass
class _Value:
    """A tensor made of layers' outputs: (layer or None, channels) along `dim`, and who reads it."""

    parts: list[tuple[str | None, int]]
    dim: int
    readers: list["str | _Value | None"] = field(default_factory=list)
    """A norm's name, a concatenation, or None for anything else."""

    def ends(self) -> set[str | None]:
        """Where the channels end up: names of norms, None for elsewhere."""
        ends: set[str | None] = set()
        for reader in self.readers:
            ends |= reader.ends() if isinstance(reader, _Value) else {reader}
        return ends


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that conversion takes out, by name; one that is used twice is named once."""
    return {name: module for name, module in model.named_modules() if _is_batch_norm(module)}


def _is_batch_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return type(module) in NORM_TYPES + NORM_ACT_TYPES


def pair_norms(model: nn.Module, input_size: tuple[int, ...] | None = None) -> Pairing:
    """Find for every batch norm the convolutions or linear layers that it can be folded into.

    Args:
        model: any network, on any device; neither it nor its buffers are changed.
        input_size: (C, H, W) of an input; by default what timm's configuration says, else C of the first convolution
            and 224x224.

    Raises:
        InputError: the network does not run on such an input.
    """
    trace = _Trace(model, input_size)
    trace.run(training=False)
    if trace.unreached():
        trace.run(training=True)  # auxiliary heads speak in training only
    outputs: dict[str, list[_Value]] = defaultdict(list)
    for value in trace.made:
        outputs[value.parts[0][0] or ""].append(value)
    pairing = Pairing({}, {})
    for name, norm in batch_norms(model).items():
        try:
            pairing.folds[name] = list(_producers(name, norm, trace.inputs[name], outputs))
        except _CannotFoldError as reason:
            pairing.refused[name] = str(reason)
    _refuse_ties(model, pairing)
    return pairing


class _CannotFoldError(Exception):
    """Why a norm cannot be folded."""


def _producers(
    name: str, norm: _BatchNorm, inputs: list[_Value | None], outputs: dict[str, list[_Value]]
) -> Iterator[tuple[str, slice]]:
    if norm.running_mean is None:
        raise _CannotFoldError("keeps no running statistics")
    if not inputs:
        raise _CannotFoldError("is not reached by the network's forward")
    found: dict[str, slice] = {}
    for value in inputs:
        start = 0
        for layer, channels in value.parts if value else [(None, 0)]:
            if layer is None:
                raise _CannotFoldError("normalises what is not the output of convolutions alone")
            ends = {end for output in outputs[layer] for end in output.ends()}
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


class _Trace(TorchDispatchMode):
    """Runs a copy of the network that shares its tensors, and notes who makes and who reads what."""

    def __init__(self, model: nn.Module, input_size: tuple[int, ...] | None) -> None:
        super().__init__()
        tensors = [*model.parameters(), *model.buffers()]
        self.network = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        self.size = tuple(input_size or _input_size(model))
        self.like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
        self.made: list[_Value] = []
        self.inputs: dict[str, list[_Value | None]] = {name: [] for name in batch_norms(model)}
        self._values: dict[int, tuple[Tensor, _Value]] = {}  # holding the tensors keeps their ids unique
        self._norm_input: Tensor | None = None
        for name, module in self.network.named_modules():
            if _is_batch_norm(module):
                module.register_forward_pre_hook(self._reads(name))
                module.register_forward_hook(self._leaves)
            elif type(module).forward in _PRODUCERS and "weight" in module._parameters:
                module.register_forward_hook(self._makes(name))

    def run(self, training: bool) -> None:
        self.network.train(training)
        device = self.like.device
        fake: AbstractContextManager[object] = nullcontext()
        if device.type != "meta":
            fake = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with torch.no_grad(), fake, self:
                image = torch.zeros(2, *self.size, device=device, dtype=self.like.dtype)
                outputs = self.network(image)
        except Exception as error:
            name, line = type(self.network).__name__, (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{name} does not run on an input of {self.size}, to show what each batch norm follows: {line};"
                " give the input_size that it takes"
            ) from error
        for leaf in tree_leaves(outputs):
            if value := self._value(leaf):
                value.readers.append(None)

    def unreached(self) -> bool:
        """Whether some norm was not called."""
        return not all(self.inputs.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self._concatenate(out, *args)
        elif func in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            self._reshape(out, args[0])
        elif func.namespace != "prim":  # what asks for the device, not for values
            self._read(tree_leaves((args, kwargs)), None)
        return out

    def _read(self, tensors: list[Any], reader: _Value | None) -> None:
        for tensor in tensors:
            value = self._value(tensor)
            if value and tensor is not self._norm_input:
                value.readers.append(reader)

    def _concatenate(self, out: Tensor, tensors: list[Tensor], dim: int = 0) -> None:
        parts: list[tuple[str | None, int]] = []
        dim %= out.ndim
        for tensor in tensors:
            value = self._value(tensor)
            parts += value.parts if value and value.dim == dim else [(None, tensor.shape[dim])]
        if any(self._value(tensor) for tensor in tensors):
            self._read(tensors, self._keep(out, _Value(parts, dim)))

    def _reshape(self, out: Tensor, source: Tensor) -> None:
        """Rows of a linear layer stay its rows when only the leading dimensions change."""
        value = self._value(source)
        if value and value.dim == source.ndim - 1 and out.shape[-1:] == source.shape[-1:]:
            self._read([source], self._keep(out, _Value(value.parts, out.ndim - 1)))
        else:
            self._read([source], None)

    def _makes(self, name: str) -> Any:
        def note(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            dim = output.ndim - 1 if isinstance(module, nn.Linear) else 1
            self.made.append(self._keep(output, _Value([(name, output.shape[dim])], dim)))

        return note

    def _reads(self, name: str) -> Any:
        def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            value = self._value(inputs[0])
            self._norm_input = inputs[0]
            if value:
                value.readers.append(name)
            self.inputs[name].append(value if value and value.dim == 1 else None)

        return note

    def _leaves(self, *_: Any) -> None:
        self._norm_input = None

    def _keep(self, tensor: Tensor, value: _Value) -> _Value:
        self._values[id(tensor)] = (tensor, value)
        return value

    def _value(self, tensor: Any) -> _Value | None:
        return self._values.get(id(tensor), (None, None))[1]


def _input_size(model: nn.Module) -> tuple[int, ...]:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    size = cfg.get("input_size") or (first.in_channels if first else 3, 224, 224)
    return (getattr(model, "in_chans", None) or size[0], *size[1:])
