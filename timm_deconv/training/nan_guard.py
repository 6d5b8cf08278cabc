"""Raises at the first NaN or infinity, in all processes alike, and names the layer that saw it.

On the processor the loss is read at once, before the weights change. On a GPU it is read one step late, so that the
device never waits for the host; each step leaves a small record (loss and the layers' flags) of what that step saw.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from timm_deconv.errors import NonFiniteError

from .processes import Processes


@dataclass(frozen=True)
class Record:
    """What one step saw.

    Attributes:
        bad: (1 + layers,) booleans on the host, True where non-finite: the loss, then the whitening layers.
        copied: when `bad` has arrived from a GPU.
        repeat: runs the step's batch through the model again.
        place: where in training this was.
    """

    bad: Tensor
    copied: "torch.cuda.Event | None"
    repeat: Callable[[], object]
    place: str


class NanGuard:
    """Checks each step's loss.

    Args:
        model: the network, not wrapped. Layers with a boolean tensor `saw_nonfinite` are asked first; where none has,
            the batch is repeated and the first layer named whose input or output is non-finite.
        processes: all of the run; what one of them sees, each of them raises.
        at_once: read the loss before the weights change on a GPU too, which then waits.
    """

    def __init__(self, model: nn.Module, processes: Processes, at_once: bool = False):
        self.model, self.processes = model, processes
        self.layers = [(name, m) for name, m in model.named_modules() if hasattr(m, "saw_nonfinite")]
        self.lag = 1 if next(model.parameters()).is_cuda and not at_once else 0
        self.records: deque[Record] = deque()

    def step(self, loss: Tensor, repeat: Callable[[], object], place: str) -> None:
        """Leave a record of this step and check the one that is due.

        Args:
            loss: scalar.
            repeat: runs the same batch through the model again.
            place: where in training this is, for the message.

        Raises:
            NonFiniteError: the loss checked is NaN or infinite.
        """
        flags = [layer.saw_nonfinite.reshape(()) for _, layer in self.layers]
        bad = torch.stack([~torch.isfinite(loss.detach()), *flags])
        self.records.append(Record(*_to_host(bad), repeat, place))
        self._check_all_but(self.lag)

    def finish(self) -> None:
        """Check what is outstanding, and the weights: to be called before they are saved.

        Raises:
            NonFiniteError: see `step`; or a weight or buffer is NaN or infinite.
        """
        self._check_all_but(0)
        bad = first_nonfinite_value(self.model.state_dict())
        if seen := next(filter(None, self.processes.gather(bad)), None):
            raise NonFiniteError(f"{seen} is non-finite after an update with a finite loss; lower lr, or set clip_grad")

    def check_gradients(self, place: str) -> None:
        """Check the gradients that an update is about to use; a GPU is waited for.

        Raises:
            NonFiniteError: one is NaN or infinite; its parameter is named.
        """
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        bad = first_nonfinite_value(gradients)
        if seen := next(filter(None, self.processes.gather(bad)), None):
            raise NonFiniteError(f"non-finite gradient of {seen} at {place}; lower lr, or check the images")

    def _check_all_but(self, lag: int) -> None:
        while len(self.records) > lag:
            self._check(self.records.popleft())

    def _check(self, record: Record) -> None:
        if record.copied is not None:
            record.copied.synchronize()
        loss_is_bad, *flags = record.bad.tolist()
        if not self.processes.any(loss_is_bad):
            return
        named = zip(self.layers, flags, strict=True)
        flagged = [f"{name} ({type(layer).__name__}, its batch statistics)" for (name, layer), flag in named if flag]
        seen = self.processes.gather(flagged[0] if loss_is_bad and flagged else None)
        if not any(seen):  # all repeat their batches: layers may share statistics
            repeated = first_nonfinite(self.model, record.repeat)
            seen = self.processes.gather(repeated if loss_is_bad else None)
        where = next(filter(None, seen))
        raise NonFiniteError(f"non-finite loss at {record.place}, first seen by {where}; lower lr, or check the images")


def first_nonfinite_value(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity."""
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    if not floats:
        return None
    finite = torch.stack([torch.isfinite(value).all() for value in floats.values()]).tolist()
    return next((name for name, is_finite in zip(floats, finite, strict=True) if not is_finite), None)


def first_nonfinite(model: nn.Module, repeat: Callable[[], object]) -> str:
    """Repeat a batch; return the first layer, in the order of execution, whose input or output is non-finite."""
    found: list[str] = []

    def look(label: str, value: object) -> None:
        tensors = value if isinstance(value, tuple | list) else (value,)
        if not found and any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors):
            found.append(label)

    def watch(name: str, layer: nn.Module) -> list[RemovableHandle]:
        label = f"{name} ({type(layer).__name__}, its"
        return [
            layer.register_forward_pre_hook(lambda _, inputs: look(f"{label} input)", inputs)),
            layer.register_forward_hook(lambda _, inputs, output: look(f"{label} output)", output)),
        ]

    layers = [(name, module) for name, module in model.named_modules() if next(module.children(), None) is None]
    handles = [handle for name, layer in layers for handle in watch(name, layer)]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code passes hooks by
            repeat()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "no layer when the batch was repeated: the loss alone"


def _to_host(bad: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
    if not bad.is_cuda:
        return bad, None
    host = torch.empty(bad.shape, dtype=bad.dtype, pin_memory=True)
    host.copy_(bad, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied
