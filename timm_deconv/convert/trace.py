"""A network run once, to see what it computes: on tensors without data, or on inputs that the user gives.

The run sees what Python does, so any control flow is allowed.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from timm_deconv.errors import InputError

from .kinds import is_any_norm, weighted_layers
from .record import Recorder, Run

__all__ = ["Inputs", "RunError", "Trace", "trace_network"]

Inputs = tuple[Any, ...] | Mapping[str, Any]
"""What a network's forward takes: a tuple of positional or a dictionary of keyword arguments."""

Trace = tuple[Run, ...]
"""A forward in evaluation and, where modules took no part in it, one in training: auxiliary heads speak only there."""


class RunError(InputError):
    """A network that does not run; `so_far` is what it computed until then."""

    def __init__(self, message: str, so_far: Run | None = None) -> None:
        super().__init__(message)
        self.so_far = so_far or Run(complete=False)


USUAL_SIZES = (224, 32, 28, 64, 128, 256, 299)


def trace_network(
    model: nn.Module, *, input_size: tuple[int, ...] | None = None, example_inputs: Inputs | None = None
) -> Trace:
    """Run a copy of a network and note what it computes; neither it nor its buffers are changed.

    Args:
        model: any network, on any device.
        input_size: (C, H, W) of an image; by default what timm's configuration says, else channels of the first layer
            and the first of some usual sizes that the network takes.
        example_inputs: what its forward takes, in place of an image. The network is then run in earnest.

    Raises:
        RunError: the network does not run so.
    """
    if example_inputs is not None:
        if not isinstance(example_inputs, tuple | Mapping):
            kind = type(example_inputs).__name__
            raise InputError(
                f"example_inputs of type {kind}: give a tuple of what forward takes, as in (images,), or a dictionary"
                " of its keyword arguments"
            )
        return _InEarnest(model, example_inputs).trace()
    errors: list[RunError] = []
    for size in [tuple(input_size)] if input_size else _input_sizes(model):
        for stage in (_OnMeta, _OnFakes):
            try:
                return stage(model, size).trace()
            except RunError as error:
                errors.append(error)
        if [str(e.__cause__) for e in errors[-4:-2]] == [str(e.__cause__) for e in errors[-2:]]:
            break  # it is not the size
    longest = max((error.so_far for error in errors), key=lambda run: len(run.steps))
    raise RunError(str(errors[0]), longest) from errors[0].__cause__


class _OnMeta:
    """A copy of a network without data, and an image without data for it: the quickest run."""

    def __init__(self, model: nn.Module, size: tuple[int, ...]) -> None:
        self.kind = type(model).__name__
        self.names = _recorded(model)
        self.size = size
        tensors = list(_tensors(model))
        self.like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
        try:
            self.network = copy.deepcopy(model, {**self._stand_ins(tensors), **_hooks(model)})
        except Exception as error:
            raise RunError(f"{self.kind} cannot be copied, to see what it computes: {_first_line(error)}") from error

    def trace(self) -> Trace:
        """The forwards that show all modules."""
        evaluation = self._run(training=False)
        if evaluation.calls.keys() >= self.names.keys():
            return (evaluation,)
        try:
            return evaluation, self._run(training=True)
        except InputError:  # in training a detector wants targets
            return (evaluation,)

    def _run(self, training: bool) -> Run:
        self.network.train(training)
        recorder = None
        try:
            with torch.no_grad(), self._context():
                inputs = self._inputs()
                with Recorder(self.network, self.names, inputs) as recorder:
                    outputs = self.network(**inputs) if isinstance(inputs, Mapping) else self.network(*inputs)
        except Exception as error:
            so_far = recorder.give_up() if recorder else Run()
            raise RunError(self._failure(_first_line(error)), so_far) from error
        return recorder.finish(outputs)

    def _stand_ins(self, tensors: list[Tensor]) -> dict[int, Any]:
        """id of a tensor of the network -> what the copy has in its place."""
        return {id(tensor): _without_data(tensor) for tensor in tensors}

    def _context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _inputs(self) -> Inputs:
        return (torch.zeros(2, *self.size, device="meta", dtype=self.like.dtype),)

    def _failure(self, reason: str) -> str:
        return (
            f"{self.kind} does not run on an input of {self.size}, to show what it computes: {reason}; give the"
            " input_size (C, H, W) of its image, or example_inputs=(...), what its forward takes"
        )


class _OnFakes(_OnMeta):
    """The same with tensors that know their device: for networks that make tensors on a device of their own."""

    def _stand_ins(self, tensors: list[Tensor]) -> dict[int, Any]:
        return {id(tensor): tensor for tensor in tensors}

    def _context(self) -> AbstractContextManager[object]:
        return nullcontext() if self.like.is_meta else FakeTensorMode(allow_non_fake_inputs=True)

    def _inputs(self) -> Inputs:
        return (torch.zeros(2, *self.size, device=self.like.device, dtype=self.like.dtype),)


class _InEarnest(_OnFakes):
    """A copy that shares the network's parameters and has its own buffers, and the inputs that the user gave."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.given = inputs
        super().__init__(model, ())

    def _stand_ins(self, tensors: list[Tensor]) -> dict[int, Any]:
        return {id(t): t if isinstance(t, nn.Parameter) else t.detach().clone() for t in tensors}

    def _context(self) -> AbstractContextManager[object]:
        device = self.like.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def _inputs(self) -> Inputs:
        if not self.like.is_meta:
            return self.given
        moved: Inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), self.given)
        return moved

    def _failure(self, reason: str) -> str:
        return f"{self.kind} does not run on the example_inputs: {reason}; give what its forward takes in evaluation"


def _recorded(model: nn.Module) -> dict[str, Literal["layer", "norm"]]:
    """The modules whose calls are one step each; a layer that holds others is not."""
    layers = dict(weighted_layers(model))
    kinds: dict[str, Literal["layer", "norm"]] = {}
    for name, module in model.named_modules():
        if name in layers and not any(_is_inside(other, name) for other in layers):
            kinds[name] = "layer"
        elif is_any_norm(module) and name not in layers:
            kinds[name] = "norm"
    return kinds


def _is_inside(name: str, prefix: str) -> bool:
    return name != prefix and (not prefix or name.startswith(f"{prefix}."))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """All tensors that the modules hold, those too that are no parameters or buffers."""
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            yield from (value for value in held.values() if isinstance(value, Tensor))


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _hooks(model: nn.Module) -> dict[int, Any]:
    """In place of the hooks those that compute weights: others are the user's, who would see the tensors of the run."""
    kept: dict[int, Any] = {}
    for module in model.modules():
        own = ((key, hook) for key, hook in module._forward_pre_hooks.items() if hasattr(hook, "compute_weight"))
        pruning = ((key, hook) for key, hook in module._forward_pre_hooks.items() if hasattr(hook, "apply_mask"))
        kept[id(module._forward_pre_hooks)] = OrderedDict((*own, *pruning))
        kept[id(module._forward_hooks)] = OrderedDict()
        kept[id(module._backward_hooks)] = OrderedDict()
    return kept


def _input_sizes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Sizes of an input that a network may take, likely ones first."""
    cfg = getattr(model, "pretrained_cfg", None)
    said = cfg.get("input_size") if isinstance(cfg, dict) else None
    if said:
        yield (getattr(model, "in_chans", None) or said[0], *said[1:])
        return
    first = next((layer for _, layer in weighted_layers(model)), None)
    if isinstance(first, nn.Linear):
        yield from ((first.in_features,), (16, first.in_features))
        return
    for channels in dict.fromkeys((getattr(first, "in_channels", 3), 3, 1)):
        if isinstance(first, nn.Conv1d):
            yield from ((channels, size) for size in (1024, *USUAL_SIZES))
        elif isinstance(first, nn.Conv3d):
            yield from ((channels, 16, size, size) for size in (112, 32))
        else:
            yield from ((channels, size, size) for size in USUAL_SIZES)


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else f"{line[:157]}..."
