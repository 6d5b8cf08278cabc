"""What the computation says of layers: squeeze-excites, ends of residual branches and dense layers, classifiers."""

import heapq
import math
from collections.abc import Iterator, Mapping
from functools import cached_property

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from .module_types import is_batch_norm
from .trace import Inputs, Run, RunError, Step, trace_network

__all__ = ["Flow", "observe", "observe_what_runs"]

POOLS = ("mean", "sum", "amax", "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "bmm")
"""Operators that may pool over all positions; `bmm` with weights of attention."""
LINEAR_OPS = (
    *("add", "mul", "div", "cat", "part", "slice", "split", "split_with_sizes", "chunk", "narrow", "select"),
    *("view", "reshape", "permute", "transpose", "clone", "contiguous", "expand", "pad", "constant_pad_nd", "dropout"),
    *("avg_pool2d", "avg_pool1d", "mean", "adaptive_avg_pool2d", "to_copy", "unsafe_view", "write", "index", "roll"),
)
"""Operators that pass a value on, scaled or shifted at most; `mul` and `div` where the other factor is no value."""


def observe(
    model: nn.Module, *, input_size: tuple[int, ...] | None = None, example_inputs: Inputs | None = None
) -> tuple["Flow", ...]:
    """Run a copy of a network and return how values flow through it; arguments and errors are `trace_network`'s."""
    runs = trace_network(model, input_size=input_size, example_inputs=example_inputs)
    return tuple(Flow(run, dict(model.named_modules())) for run in runs)


def observe_what_runs(model: nn.Module, example_inputs: Inputs | None = None) -> tuple[tuple["Flow", ...], str | None]:
    """Return the flows of a network as far as it runs and, if that is not to its end, why.

    Raises:
        InputError: it does not run on the `example_inputs`.
    """
    try:
        return observe(model, example_inputs=example_inputs), None
    except RunError as error:
        if example_inputs is not None:
            raise
        return (Flow(error.so_far, dict(model.named_modules())),), str(error)


class Flow:
    """How values flow through one forward.

    Squeeze-excites are left out of it: what multiplies a map, computed from pooled values, and what is added so.
    """

    def __init__(self, run: Run, modules: Mapping[str, nn.Module]) -> None:
        self.run = run
        self.steps = run.steps
        self.modules = modules
        self._projections: set[int] = set()

    def sources(self, index: int) -> tuple[int, ...]:
        """Return the steps that a step reads, but for what a squeeze-excite multiplies it by."""
        inputs = self.steps[index].inputs
        gate = self.gates.get(index)
        return inputs if gate is None else tuple(source for source in inputs if source != gate)

    # Squeeze-excites

    @cached_property
    def gates(self) -> dict[int, int]:
        """Step that multiplies or adds to a map something computed from pooled values -> the step of that something."""
        found = {}
        for index, step in enumerate(self.steps):
            if step.name in ("mul", "add") and len(step.inputs) == 2:
                first, second = (self._pooled[source] for source in step.inputs)
                if first != second:
                    found[index] = step.inputs[0] if first else step.inputs[1]
        return found

    @cached_property
    def excites(self) -> list[set[int]]:
        """The steps of each squeeze-excite, from the pooling to what multiplies."""
        return [self._back_to_pool(gate) for index, gate in self.gates.items() if self.steps[index].name == "mul"]

    @cached_property
    def side_steps(self) -> set[int]:
        """The steps of all squeeze-excites, and of what is added to maps instead."""
        return set().union(*(self._back_to_pool(gate) for gate in self.gates.values()))

    @cached_property
    def _pooled(self) -> list[bool]:
        """Whether all that a step reads was pooled over all positions."""
        pooled: list[bool] = []
        for step in self.steps:
            through = bool(step.inputs) and all(pooled[source] for source in step.inputs)
            pooled.append(through or self._is_pool(step))
        return pooled

    def _is_pool(self, step: Step) -> bool:
        if step.kind != "op" or step.name not in POOLS:
            return False
        before = self.steps[step.inputs[0]].shape
        return len(before) > 2 and math.prod(step.shape) == math.prod(before[:2])

    def _back_to_pool(self, gate: int) -> set[int]:
        found, todo = set(), [gate]
        while todo:
            index = todo.pop()
            if index in found or not self._pooled[index]:
                continue
            found.add(index)
            if not self._is_pool(self.steps[index]):
                todo += self.steps[index].inputs
        return found

    # Block ends

    def block_ends(self) -> set[str]:
        """Find the layers that residual branches and dense layers end with, and bottlenecks without activation.

        A residual branch is an operand of a sum that comes, over two layers or more, from a value that another operand
        is, or is a projection of. A dense layer is an operand of a concatenation that comes, over two layers or more,
        from all the operands before it. Neither holds another such block, nor goes to a lower resolution and back,
        unless it is added to the very value that it comes from.
        """
        ends: set[str] = set()
        for index, step in enumerate(self.steps):
            if step.kind == "op" and step.name in ("add", "cat") and len(step.inputs) > 1:
                for branch in self._branches(index) if step.name == "add" else self._dense_layers(index):
                    if not ends & {self.steps[i].name for i in branch if self.steps[i].kind == "layer"}:
                        ends |= self._last_layers(branch)
        return ends | self._bottlenecks()

    def _branches(self, index: int) -> Iterator[set[int]]:
        """Yield the steps of every operand of a sum that is a residual branch."""
        operands = self._operands(index)
        fork = self._fork(operands)
        if fork is None:
            return
        regions = {operand: self._between([fork], operand) for operand in operands}
        inputs = [o for o in operands if self._depth(regions[o]) < 2 and self._is_projection(regions[o])]
        self._projections |= set().union(*(regions[operand] for operand in inputs))
        for operand in operands:
            branch = regions[operand]
            up = self._upsamples(branch) and fork not in inputs
            if inputs and not up and self._depth(branch) > 1 and self._reads_whole(fork, branch):
                yield branch

    def _reads_whole(self, fork: int, branch: set[int]) -> bool:
        """Return whether a branch reads a value as a whole, not other channels than are added to it."""
        return any(self.steps[i].name not in ("part", "slice") for i in self.run.readers[fork] if i in branch)

    def _operands(self, index: int) -> list[int]:
        """Return what a sum adds up, through sums that nothing else reads."""
        found = []
        for source in self.steps[index].inputs:
            step = self.steps[source]
            inner = step.kind == "op" and step.name == "add" and len(step.inputs) > 1
            found += self._operands(source) if inner and len(self.run.readers[source]) == 1 else [source]
        return list(dict.fromkeys(found))

    def _fork(self, operands: list[int]) -> int | None:
        """Find the latest step that all operands come from."""
        marks = {operand: 1 << i for i, operand in enumerate(operands)}
        heap = [-operand for operand in operands]
        heapq.heapify(heap)
        while heap:
            index = -heapq.heappop(heap)
            mark = marks[index]
            if mark == (1 << len(operands)) - 1:
                return index
            for source in self.sources(index):
                if source not in marks:
                    marks[source] = 0
                    heapq.heappush(heap, -source)
                marks[source] |= mark
        return None

    def _dense_layers(self, index: int) -> Iterator[set[int]]:
        """Yield the steps of every operand of a concatenation that is a dense layer, if all but the first are."""
        operands = sorted(self.steps[index].inputs)
        regions = []
        for k, operand in enumerate(operands[1:], 1):
            region = self._between(operands[:k], operand)
            reads = {source for i in region for source in self.sources(i)}
            if not reads >= set(operands[:k]) or self._depth(region) < 2 or self._upsamples(region):
                return
            regions.append(region)
        yield from regions

    def _between(self, starts: list[int], end: int) -> set[int]:
        """Return the steps on the ways from `starts`, without these, to `end`, with it."""
        back, todo = set(), [end]
        while todo:
            index = todo.pop()
            if index not in back and index not in starts and index > min(starts):
                back.add(index)
                todo += self.sources(index)
        reached = set(starts)
        for index in sorted(back):
            if any(source in reached for source in self.sources(index)):
                reached.add(index)
        return reached - set(starts)

    def _depth(self, region: set[int]) -> int:
        """Return the most layers in a row."""
        depths: dict[int, int] = {}
        for index in sorted(region):
            before = max((depths.get(source, 0) for source in self.sources(index)), default=0)
            depths[index] = before + (self.steps[index].kind == "layer")
        return max(depths.values(), default=0)

    def _last_layers(self, region: set[int]) -> set[str]:
        """Return the names of the layers that no other layer follows."""
        followed: set[int] = set()
        for index in sorted(region, reverse=True):
            if index in followed or self.steps[index].kind == "layer":
                followed.update(self.sources(index))
        return {self.steps[i].name for i in region - followed if self.steps[i].kind == "layer"}

    def _upsamples(self, region: set[int]) -> bool:
        steps = [self.steps[index] for index in region]
        transposed = (s.kind == "layer" and isinstance(self.modules[s.name], _ConvTransposeNd) for s in steps)
        return any(s.kind == "op" and "upsample" in s.name for s in steps) or any(transposed)

    def _is_projection(self, region: set[int]) -> bool:
        """Return whether a value is scaled or projected at most; an activation may stand before the projection."""
        projection = max((index for index in region if self.steps[index].kind == "layer"), default=-1)
        return all(self._is_linear(i) or (i < projection and self._is_activation(i)) for i in region)

    def _is_activation(self, index: int) -> bool:
        """Return whether a step is an activation, as far as its name and shape say."""
        step = self.steps[index]
        same = all(self.steps[source].shape == step.shape for source in step.inputs)
        return step.kind in ("norm", "op") and same and "pool" not in step.name

    def _is_linear(self, index: int) -> bool:
        step = self.steps[index]
        if step.kind == "norm":
            return isinstance(getattr(self.modules[step.name], "act", None), nn.Identity | None)
        if step.kind == "layer":
            return True
        if step.kind != "op" or step.name not in LINEAR_OPS:
            return False
        return step.name not in ("mul", "div") or len(self.sources(index)) == 1

    def _bottlenecks(self) -> set[str]:
        """Find the pointwise layers to fewer channels whose output meets other layers before an activation.

        Such is the projection of an inverted residual block, be there a sum behind it or none.
        """
        found = set()
        for index, step in enumerate(self.steps):
            candidate = step.kind == "layer" and index not in self._projections and _narrows(self.modules[step.name])
            if candidate and self._next_layers[index] == "layer":
                found.add(step.name)
        return found

    @cached_property
    def _next_layers(self) -> list[str | None]:
        """What all ways on from a value end in before an activation: a layer, or depthwise ones only; None if not."""
        found: list[str | None] = [None] * len(self.steps)
        for index in reversed(range(len(self.steps))):
            readers = [reader for reader in self.run.readers[index] if reader not in self.side_steps]
            if readers and index not in self.run.outputs and self._is_linear(index):
                ways = {self._next_layer(reader, found) for reader in readers}
                found[index] = None if None in ways else "layer" if "layer" in ways else "depthwise"
        return found

    def _next_layer(self, reader: int, found: list[str | None]) -> str | None:
        step = self.steps[reader]
        if step.kind == "layer":
            return "depthwise" if _is_depthwise(self.modules[step.name]) else "layer"
        other_norm = step.kind == "norm" and not is_batch_norm(self.modules[step.name])
        return None if other_norm else found[reader]

    # Classifiers

    def heads(self) -> list[str]:
        """Find the layers that outputs of one value a class come from, with no norm between.

        A convolution is one if each of its channels is a class, behind a pooling or before it.
        """
        outputs = self.run.outputs if self.run.complete else ()
        classes = (output for output in outputs if len(self.steps[output].shape) <= 2)
        return list(dict.fromkeys(name for output in classes for name in self._heads_of(output)))

    def _heads_of(self, output: int) -> Iterator[str]:
        todo, seen = [output], set[int]()
        while todo:
            index = todo.pop()
            step = self.steps[index]
            if step.kind == "layer" and self._classifies(step, self.steps[output].shape):
                yield step.name
            if step.kind == "op" and index not in seen:
                seen.add(index)
                todo += self.sources(index)

    def _classifies(self, step: Step, shape: tuple[int, ...]) -> bool:
        layer = self.modules[step.name]
        if isinstance(layer, nn.Linear):
            return True
        return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and step.shape[1] == shape[-1]


def _narrows(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.out_channels < layer.in_channels


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
