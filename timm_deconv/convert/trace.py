"""What a network computes: it is run once, on tensors without data or on the user's inputs, and every step is noted.

The run sees what Python does, so any control flow is allowed.
"""

import copy
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from timm_deconv.errors import InputError

from .module_types import is_any_norm, weighted_layers

__all__ = ["Inputs", "Run", "RunError", "Step", "trace_network"]

Inputs = tuple[Any, ...] | Mapping[str, Any]
"""What a network's forward takes: a tuple of positional or a dictionary of keyword arguments."""

USUAL_SIZES = (224, 32, 28, 64, 128, 256, 299)
READ_NO_VALUE = ("_like", "new_")
"""Parts of the names of operators that read no value of their argument."""
PRODUCTS = ("convolution", "addmm", "mm", "bmm", "baddbmm", "addmv", "mv", "linear", "matmul")


@dataclass(frozen=True)
class Step:
    """One value and how it is made.

    Attributes:
        kind: input; layer, a module with a weight matrix; norm, a module that normalises; op, an operator; product, an
            operator that multiplies by a parameter which belongs to no such layer.
        name: the module's name in the network, or the operator's.
        inputs: indices of the steps whose values it reads.
        shape: the value's.
        dim: the dimension of a concatenation, or the one that a layer's output has its channels along.
    """

    kind: Literal["input", "layer", "norm", "op", "product"]
    name: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    dim: int | None = None


@dataclass
class Run:
    """The steps of one forward in order, and which of their values it gives back.

    Where a forward failed, `complete` is False and `outputs` are the values that nothing has read yet.
    """

    steps: list[Step] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    complete: bool = True

    @cached_property
    def readers(self) -> list[list[int]]:
        """For every step the steps that read it."""
        readers: list[list[int]] = [[] for _ in self.steps]
        for index, step in enumerate(self.steps):
            for source in step.inputs:
                readers[source].append(index)
        return readers

    @cached_property
    def calls(self) -> Mapping[str, list[int]]:
        """Name of a layer or norm -> its steps, one a call."""
        found: dict[str, list[int]] = defaultdict(list)
        for index, step in enumerate(self.steps):
            if step.kind in ("layer", "norm"):
                found[step.name].append(index)
        return found


class RunError(InputError):
    """A network that does not run; `so_far` is what it computed until then."""

    def __init__(self, message: str, so_far: Run | None = None) -> None:
        super().__init__(message)
        self.so_far = so_far or Run(complete=False)


def trace_network(
    model: nn.Module, *, input_size: tuple[int, ...] | None = None, example_inputs: Inputs | None = None
) -> tuple[Run, ...]:
    """Run a copy of a network and note what it computes; neither it nor its buffers are changed.

    Args:
        model: any network, on any device.
        input_size: (C, H, W) of an image; by default what timm's configuration says, else channels of the first layer
            and the first of some usual sizes that the network takes.
        example_inputs: what its forward takes, in place of an image. The network is then run in earnest.

    Returns:
        A forward in evaluation and, where modules took no part in it, one in training: auxiliary heads speak only
        there.

    Raises:
        RunError: the network does not run so.
        InputError: `example_inputs` is neither a tuple nor a dictionary.
    """
    like = next((tensor for tensor in _tensors(model) if tensor.is_floating_point()), torch.empty(0))
    if example_inputs is not None:
        if not isinstance(example_inputs, tuple | Mapping):
            kind = type(example_inputs).__name__
            raise InputError(
                f"example_inputs of type {kind}: give a tuple of what forward takes, as in (images,), or a dictionary"
                " of its keyword arguments"
            )
        return _run_copy(model, _in_earnest(example_inputs, like))
    errors: list[RunError] = []
    for size in [tuple(input_size)] if input_size else _input_sizes(model):
        for way in (_without_data(size, like), _on_fake_tensors(size, like)):
            try:
                return _run_copy(model, way)
            except RunError as error:
                errors.append(error)
        if [str(e.__cause__) for e in errors[-4:-2]] == [str(e.__cause__) for e in errors[-2:]]:
            break  # it is not the size
    longest = max((error.so_far for error in errors), key=lambda run: len(run.steps))
    raise RunError(str(errors[0]), longest) from errors[0].__cause__


# Ways to run a copy


class _Way(NamedTuple):
    """How a copy of a network is run to see what it computes."""

    stand_in: Callable[[Tensor], Tensor]  # what the copy holds in place of a tensor
    inputs: Callable[[], Inputs]
    context: Callable[[], AbstractContextManager[object]]
    failure: str  # the error's message, {} for the reason


def _without_data(size: tuple[int, ...], like: Tensor) -> _Way:
    """Run on the meta device, which is the quickest."""

    def stand_in(tensor: Tensor) -> Tensor:
        empty = torch.empty_like(tensor, device="meta")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    failure = (
        f"does not run on an input of {size}, to show what it computes: {{}}; give the input_size (C, H, W) of its"
        " image, or example_inputs=(...), what its forward takes"
    )
    return _Way(stand_in, lambda: (torch.zeros(2, *size, device="meta", dtype=like.dtype),), nullcontext, failure)


def _on_fake_tensors(size: tuple[int, ...], like: Tensor) -> _Way:
    """Run on tensors that know their device, for networks that make tensors on a device of their own."""
    return _without_data(size, like)._replace(
        stand_in=lambda tensor: tensor,
        inputs=lambda: (torch.zeros(2, *size, device=like.device, dtype=like.dtype),),
        context=nullcontext if like.is_meta else _fake_tensors,
    )


def _in_earnest(inputs: Inputs, like: Tensor) -> _Way:
    """Run on inputs that the user gave, with the network's parameters and copies of its buffers."""
    moved: Inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs) if like.is_meta else inputs
    return _Way(
        stand_in=lambda tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone(),
        inputs=lambda: moved,
        context=lambda: torch.random.fork_rng([like.device] if like.is_cuda else []),
        failure="does not run on the example_inputs: {}; give what its forward takes in evaluation",
    )


@contextmanager
def _fake_tensors() -> Iterator[None]:
    """Make fake tensors, whose failures are expected here and not to be logged."""
    logger = logging.getLogger(fake_tensor.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        logger.disabled = before


def _run_copy(model: nn.Module, way: _Way) -> tuple[Run, ...]:
    """Run a copy in evaluation and, if that does not show all modules, in training."""
    kinds = _noted_modules(model)
    stand_ins = {id(tensor): way.stand_in(tensor) for tensor in _tensors(model)}
    try:
        network = copy.deepcopy(model, {**stand_ins, **_hooks(model)})
    except Exception as error:
        kind = type(model).__name__
        raise RunError(f"{kind} cannot be copied, to see what it computes: {_first_line(error)}") from error
    evaluation = _run(network.eval(), kinds, way)
    if evaluation.calls.keys() >= kinds.keys():
        return (evaluation,)
    try:
        return evaluation, _run(network.train(), kinds, way)
    except RunError:  # in training a detector wants targets
        return (evaluation,)


def _run(network: nn.Module, kinds: Mapping[str, Literal["layer", "norm"]], way: _Way) -> Run:
    recorder = None
    try:
        with torch.no_grad(), way.context():
            inputs = way.inputs()
            with _Recorder(network, kinds, inputs) as recorder:
                outputs = network(**inputs) if isinstance(inputs, Mapping) else network(*inputs)
    except Exception as error:
        so_far = recorder.finish(complete=False) if recorder else None
        raise RunError(f"{type(network).__name__} {way.failure.format(_first_line(error))}", so_far) from error
    return recorder.finish(outputs)


def _noted_modules(model: nn.Module) -> dict[str, Literal["layer", "norm"]]:
    """Return the modules whose calls are one step each; a layer that holds others is not."""
    layers = {layer for _, layer in weighted_layers(model)}
    kinds: dict[str, Literal["layer", "norm"]] = {}
    for name, module in model.named_modules():
        if module in layers and layers.isdisjoint(set(module.modules()) - {module}):
            kinds[name] = "layer"
        elif is_any_norm(module) and module not in layers:
            kinds[name] = "norm"
    return kinds


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield all tensors that the modules hold, those too that are no parameters or buffers."""
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            yield from (value for value in held.values() if isinstance(value, Tensor))


def _hooks(model: nn.Module) -> dict[int, Any]:
    """Return what a copy has in place of hooks: those that compute weights; the user's would see the run's tensors."""
    kept: dict[int, Any] = {}
    for module in model.modules():
        own = module._forward_pre_hooks.items()
        computing = [item for name in ("compute_weight", "apply_mask") for item in own if hasattr(item[1], name)]
        kept[id(module._forward_pre_hooks)] = OrderedDict(computing)  # weight norm first, then pruning
        kept[id(module._forward_hooks)] = OrderedDict()
        kept[id(module._backward_hooks)] = OrderedDict()
    return kept


def _input_sizes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield sizes of an input that a network may take, likely ones first."""
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


# Noting the steps


class _Recorder(TorchDispatchMode):
    """Notes the steps of a forward that is called inside; what a layer or norm does within is one step."""

    def __init__(self, network: nn.Module, kinds: Mapping[str, Literal["layer", "norm"]], inputs: Any) -> None:
        super().__init__()
        self._run = Run()
        self._known: dict[int, tuple[Tensor, int]] = {}  # holding the tensors keeps their ids unique
        self._weights: dict[int, Tensor] = {}  # computed from parameters only
        self._sharers: dict[int, list[Tensor]] = defaultdict(list)
        self._inside: list[tuple[int, ...]] = []
        self._hooks: list[Any] = []
        for name, kind in kinds.items():
            module = network.get_submodule(name)
            self._hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leave(name, kind, isinstance(module, nn.Linear))))
        for leaf in _tensors_in(inputs):
            self._add(Step("input", "", (), tuple(leaf.shape)), leaf)

    def finish(self, outputs: Any = None, *, complete: bool = True) -> Run:
        """Forget the network and return its steps; `outputs` are what a complete forward gave back."""
        run = self._run
        run.complete = complete
        unread = (index for index, readers in enumerate(run.readers) if not readers)
        run.outputs = list(self._indices(outputs) if complete else unread)
        for hook in self._hooks:
            hook.remove()
        for tensors in (self._known, self._weights, self._sharers):
            tensors.clear()
        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._inside and func.namespace != "prim":  # what asks for the device, not for values
            self._note(func.__name__.partition(".")[0], out, args, kwargs)
        return out

    def _note(self, name: str, out: Any, args: Any, kwargs: Any) -> None:
        read = list(_tensors_in((args, kwargs)))
        inputs = self._indices(read)
        weights = any(isinstance(tensor, nn.Parameter) or id(tensor) in self._weights for tensor in read)
        values = list(_tensors_in(out))
        if weights and not inputs:
            self._weights.update((id(value), value) for value in values)
        if not inputs or any(part in name for part in READ_NO_VALUE):
            return
        written = name.endswith("_") and isinstance(out, Tensor)
        name = name.strip("_")
        kind: Literal["product", "op"] = "product" if weights and name in PRODUCTS else "op"
        dim = (args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)) % out.ndim if name == "cat" else None
        whole = self._add(Step(kind, name, inputs, tuple(values[0].shape) if values else (), dim), *values[:1])
        if len(values) > 1:
            for value in values:
                self._add(Step("op", "part", (whole,), tuple(value.shape)), value)
        if written:
            self._note_write(out, whole)

    def _note_write(self, out: Tensor, index: int) -> None:
        """Note that what shares its storage with a tensor that was written to has changed as well."""
        for other in self._sharers[out.untyped_storage()._cdata]:
            if other is not out:
                before = self._known[id(other)][1]
                self._add(Step("op", "write", (before, index), tuple(other.shape)), other)

    def _enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append(self._indices((args, kwargs)))

    def _leave(self, name: str, kind: Literal["layer", "norm"], linear: bool) -> Any:
        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            inputs = self._inside.pop()
            for value in _tensors_in(output) if not self._inside else ():
                dim = value.ndim - 1 if linear else min(1, value.ndim - 1)
                self._add(Step(kind, name, inputs, tuple(value.shape), dim), value)

        return leave

    def _indices(self, values: Any) -> tuple[int, ...]:
        """Return the steps that made the tensors among the values, each once."""
        known = (self._known.get(id(leaf)) for leaf in _tensors_in(values))
        return tuple(dict.fromkeys(entry[1] for entry in known if entry))

    def _add(self, step: Step, *values: Tensor) -> int:
        index = len(self._run.steps)
        self._run.steps.append(step)
        for value in values:
            if id(value) not in self._known:
                self._sharers[_storage(value)].append(value)
            self._known[id(value)] = (value, index)
        return index


def _tensors_in(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata if value.layout is torch.strided else id(value)
