"""The steps of a forward: what is computed from what, noted by a dispatch mode and hooks while the network runs."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Recorder", "Run", "Step"]

CONSTANTS = ("_like", "new_")
"""In the names of operators that read no value of their argument."""
PRODUCTS = ("convolution", "addmm", "mm", "bmm", "baddbmm", "addmv", "mv", "linear", "matmul")


@dataclass(frozen=True)
class Step:
    """One value and how it is made.

    Attributes:
        kind: input; layer, a module with a weight matrix; norm, a module that normalises; op, an operator; product, an
            operator that multiplies by a parameter which belongs to no such layer.
        name: of the module in the network, or of the operator.
        inputs: indices of the steps whose values it reads.
        shape: of the value.
        dim: of a concatenation, the dimension; of a layer's output, the one that its channels have.
    """

    kind: Literal["input", "layer", "norm", "op", "product"]
    name: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    dim: int | None = None


@dataclass
class Run:
    """The steps of one forward in order, and which of their values it gives back.

    Of a forward that failed, `complete` is False and `outputs` are the values that nothing has read yet.
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


class Recorder(TorchDispatchMode):
    """Notes the steps of a forward that is called inside; what a layer or norm does within is one step."""

    def __init__(self, network: nn.Module, names: Mapping[str, Literal["layer", "norm"]], inputs: Any) -> None:
        super().__init__()
        self.result = Run()
        self._known: dict[int, tuple[Tensor, int]] = {}  # holding the tensors keeps their ids unique
        self._weights: dict[int, Tensor] = {}  # made of parameters alone
        self._sharers: dict[int, list[Tensor]] = defaultdict(list)
        self._inside: list[tuple[int, ...]] = []
        self._hooks = [
            hook
            for name, kind in names.items()
            for module in (network.get_submodule(name),)
            for hook in (
                module.register_forward_pre_hook(self._enters, with_kwargs=True),
                module.register_forward_hook(self._leaves(name, kind, isinstance(module, nn.Linear))),
            )
        ]
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                self._add(Step("input", "", (), tuple(leaf.shape)), leaf)

    def finish(self, outputs: Any) -> Run:
        """The steps so far, of a forward that gave back `outputs`."""
        self.result.outputs = list(self._indices(outputs))
        self._forget()
        return self.result

    def give_up(self) -> Run:
        """The steps so far, of a forward that failed."""
        self.result.complete = False
        self.result.outputs = [index for index, readers in enumerate(self.result.readers) if not readers]
        self._forget()
        return self.result

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._known.clear()
        self._weights.clear()
        self._sharers.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._inside and func.namespace != "prim":  # what asks for the device, not for values
            self._note(func.__name__.partition(".")[0], out, args, kwargs)
        return out

    def _note(self, name: str, out: Any, args: Any, kwargs: Any) -> None:
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = self._indices(read)
        weights = any(isinstance(tensor, nn.Parameter) or id(tensor) in self._weights for tensor in read)
        values = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if weights and not inputs:
            self._weights.update((id(value), value) for value in values)
        if not inputs or any(part in name for part in CONSTANTS):
            return
        written = name.endswith("_") and isinstance(out, Tensor)
        name = name.strip("_")
        product = weights and name in PRODUCTS
        dim = (args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)) % out.ndim if name == "cat" else None
        shape = tuple(values[0].shape) if values else ()
        whole = self._add(Step("product" if product else "op", name, inputs, shape, dim), *values[:1])
        if len(values) > 1:
            for value in values:
                self._add(Step("op", "part", (whole,), tuple(value.shape)), value)
        if written:
            self._write(out, whole)

    def _write(self, out: Tensor, index: int) -> None:
        """What shares its storage with a tensor that was written to has changed as well."""
        for other in self._sharers[out.untyped_storage()._cdata]:
            if other is not out:
                before = self._known[id(other)][1]
                self._add(Step("op", "write", (before, index), tuple(other.shape)), other)

    def _enters(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append(self._indices((args, kwargs)))

    def _leaves(self, name: str, kind: Literal["layer", "norm"], linear: bool) -> Any:
        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            inputs = self._inside.pop()
            for value in tree_leaves(output):
                if isinstance(value, Tensor) and not self._inside:
                    dim = value.ndim - 1 if linear else min(1, value.ndim - 1)
                    self._add(Step(kind, name, inputs, tuple(value.shape), dim), value)

        return leave

    def _indices(self, values: Any) -> tuple[int, ...]:
        """The steps that made the tensors among the values, each once."""
        known = (self._known.get(id(leaf)) for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
        return tuple(dict.fromkeys(entry[1] for entry in known if entry))

    def _add(self, step: Step, *values: Tensor) -> int:
        index = len(self.result.steps)
        self.result.steps.append(step)
        for value in values:
            if id(value) not in self._known:
                self._sharers[_storage(value)].append(value)
            self._known[id(value)] = (value, index)
        return index


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata if value.layout is torch.strided else id(value)
