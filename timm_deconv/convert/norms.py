"""Which batch norms go: those in whose place whitening stands in what follows."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .flow import Flow
from .kinds import FROZEN_TYPES, is_batch_norm, weighted_layers
from .trace import Trace

__all__ = ["Layers", "reasons_to_stay"]


@dataclass(frozen=True)
class Layers:
    """What becomes of a network's layers.

    Attributes:
        whitened: names of those that are going to be whitened.
        classifiers: names of the classifier's.
        pooling: whether channels are whitened in front of the global pooling.
    """

    whitened: Collection[str]
    classifiers: Collection[str]
    pooling: bool


def reasons_to_stay(model: nn.Module, trace: Trace, layers: Layers, norms: Iterable[str]) -> dict[str, str]:
    """Name of a norm -> why it stays; of a norm that goes, nothing.

    A norm goes where each way on from its output comes to a whitened layer or to another norm, through whatever stands
    between. Ways through a squeeze-excite do not count: what they end in is bounded. A way that ends in the network's
    output, or in a classifier that stays plain, is as good where what the norm normalises comes out of whitened layers.

    Args:
        model: the network, as yet unchanged.
        trace: what it computes. Of a norm that was not run the layers beside it, in the order in which they were made,
            decide.
        layers: which layers are going to be whitened.
        norms: names of the norms in question.
    """
    modules = dict(model.named_modules())
    runs = [_Judged(Flow(run, modules), layers) for run in trace]
    beside = _Neighbours(modules, layers, [name for name, _ in weighted_layers(model)])
    reasons = {}
    for name in norms:
        judged = [run for run in runs if name in run.flow.run.calls]
        found = (run.reason(name) for run in judged) if judged else (beside.reason(name),)
        if reason := next((reason for reason in found if reason), None):
            reasons[name] = reason
    return reasons


class _Judged:
    """One forward: of every value, what plain layer reads it or made it, and whether it leaves the network."""

    def __init__(self, flow: Flow, layers: Layers) -> None:
        self.flow = flow
        self.layers = layers
        self.read_by: list[str | None] = [None] * len(flow.steps)
        self.leaves = [False] * len(flow.steps)
        self.made_by: list[str | None] = []
        for index in reversed(range(len(flow.steps))):
            self._judge_readers(index)
        for index in range(len(flow.steps)):
            self.made_by.append(self._maker(index))

    def reason(self, norm: str) -> str | None:
        """Why a norm stays, or None."""
        for index in self.flow.run.calls[norm]:
            if reader := self.read_by[index]:
                return f"{reader} reads it and stays plain"
            maker = next((m for m in (self.made_by[i] for i in self.flow.steps[index].inputs) if m), None)
            if maker and self.leaves[index] and not self.layers.pooling:
                return f"{maker} before it stays plain, and no whitened layer follows"
        return None

    def _judge_readers(self, index: int) -> None:
        self.leaves[index] = index in self.flow.run.outputs
        for reader in self.flow.run.readers[index]:
            if reader in self.flow.aside and index not in self.flow.aside:
                continue
            step = self.flow.steps[reader]
            if step.kind == "product":
                self.read_by[index] = self.read_by[index] or f"a product with weights ({step.name})"
            elif step.kind == "layer" and step.name not in self.layers.whitened:
                if step.name in self.layers.classifiers:
                    self.leaves[index] = True
                else:
                    self.read_by[index] = self.read_by[index] or step.name
            elif self._passes_on(reader):
                self.read_by[index] = self.read_by[index] or self.read_by[reader]
                self.leaves[index] |= self.leaves[reader]

    def _passes_on(self, index: int) -> bool:
        """Whether a step neither whitens nor normalises; a frozen norm does not."""
        step = self.flow.steps[index]
        if step.kind == "norm":
            return type(self.flow.modules[step.name]) in FROZEN_TYPES
        return step.kind == "op" and not step.name.startswith("native_")

    def _maker(self, index: int) -> str | None:
        """A plain layer that a value comes out of, with none between."""
        step = self.flow.steps[index]
        if step.kind == "layer":
            return None if step.name in self.layers.whitened else step.name
        if step.kind == "product":
            return f"a product with weights ({step.name})"
        if step.kind == "norm" and not is_batch_norm(self.flow.modules[step.name]):
            return None
        return next((m for m in (self.made_by[source] for source in self.flow.sources(index)) if m), None)


class _Neighbours:
    """The layers beside a norm in the order in which a network's modules were made."""

    def __init__(self, modules: Mapping[str, nn.Module], layers: Layers, weighted: Collection[str]) -> None:
        self.layers = layers
        self.order = [name for name, module in modules.items() if name in weighted or is_batch_norm(module)]
        self.weighted = set(weighted)

    def reason(self, norm: str) -> str | None:
        """Why a norm stays, or None."""
        place = self.order.index(norm)
        after = (name for name in self.order[place:] if name in self.weighted)
        before = (name for name in reversed(self.order[:place]) if name in self.weighted)
        following = next(after, None)
        if following in self.layers.classifiers and following not in self.layers.whitened:
            following = None
        neighbour = following or next(before, None)
        if neighbour is None or neighbour in self.layers.whitened:
            return None
        return f"{neighbour}, the layer {'after' if following else 'before'} it, stays plain"
