"""What whitening layers with a weight have in common: statistics, freezing, the folded weight kept in evaluation."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from timm_deconv.linalg import full_precision

from .config import DeconvCfg
from .partition import Partition
from .statistics import Statistics
from .whitening import fold

__all__ = ["WhiteningMixin", "in_recomputation"]

Folded = tuple[Tensor, Tensor]
Source = list[tuple[Tensor, int, int]]
"""Tensors with their version and address: equal while nothing was written to or moved."""


class WhiteningMixin(nn.Module):
    """State of a layer that whitens its input before a linear map. Mixed into `nn.Conv2d` and `nn.Linear`.

    Buffers, all in the state dict unless said otherwise:
        running_mean: (S F,), zeros at first.
        running_deconv: the running average of the whitener, (F, F) if S = 1, else (S, F, F); identity at first.
        num_batches_tracked: int64 (); training forwards so far. Decides freezing.
        saw_nonfinite: bool (), not in the state dict; set once a batch's statistics were not finite. Such a batch
            leaves the running values as they were.

    In evaluation the folded weight is kept while no parameter or buffer changes. Writes through `.data` are not seen.

    A layer of which neither weight nor bias requires gradients is frozen whole, in training too: it uses the running
    values as they are and counts no forwards, so that `timm.utils.freeze` means for whitening what it means for batch
    norm.
    """

    weight: Tensor
    bias: Tensor | None
    running_mean: Tensor
    running_deconv: Tensor
    num_batches_tracked: Tensor
    saw_nonfinite: Tensor
    partition: Partition
    _kept: tuple[Source, Folded] | None
    _counted: tuple[Tensor, int, int] | None

    @abstractmethod
    def rows(self, input: Tensor) -> Tensor:
        """Samples of the input that the statistics are taken from, (S, R, F)."""

    @abstractmethod
    def padding_share(self, input: Tensor) -> float:
        """The weight in the statistics of padding that the linear map sees but that is not among the rows."""

    @abstractmethod
    def _plain(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The plain layer with another weight and bias; input a batch, padded."""

    @abstractmethod
    def _statistics(self, input: Tensor) -> Statistics:
        """Of the batch."""

    @abstractmethod
    def _whitened(self, input: Tensor, statistics: Statistics, frozen: Tensor | None) -> Tensor:
        """The plain layer of the input whitened; `frozen`, a boolean scalar: the statistics are not the batch's."""

    @abstractmethod
    def fuse(self) -> nn.Module:
        """The plain layer that does in evaluation what this one does."""

    def folded(self) -> Folded:
        """Weight and bias of the plain layer, from the running values."""
        with full_precision(self.weight):
            return fold(self.weight, self.bias, self.running_mean, self.running_deconv, self.partition)

    def train(self, mode: bool = True) -> "WhiteningMixin":
        self._forget()
        return super().train(mode)

    def extra_repr(self) -> str:
        changes = str(self.cfg)
        features = f"blocks={self.partition.blocks}x{self.partition.features}"
        return ", ".join(part for part in (super().extra_repr(), features, changes) if part)

    def _init_statistics(self, cfg: DeconvCfg, partition: Partition) -> None:
        self.cfg: DeconvCfg = cfg
        self.partition = partition
        factory: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        eye = torch.eye(partition.features, **factory)
        sets, features = partition.sets, partition.features
        self.register_buffer("running_mean", torch.zeros(sets * features, **factory))
        self.register_buffer("running_deconv", eye if partition.groups == sets == 1 else eye.repeat(sets, 1, 1))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=self.weight.device))
        nothing_seen = torch.zeros((), dtype=torch.bool, device=self.weight.device)
        self.register_buffer("saw_nonfinite", nothing_seen, persistent=False)
        counter = self.num_batches_tracked
        self._counted = None if counter.is_inference() else (counter, counter._version, 0)
        self._forget()

    def _adopt(self, source: "nn.Conv2d | nn.Linear") -> None:
        """Take over a plain layer's parameters and mode; a missing bias becomes zeros, the statistics start anew."""
        weight, bias = source.weight, source.bias
        if bias is None:
            bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)
        self.weight, self.bias = weight, bias
        self._init_statistics(self.cfg, self.partition)
        self.train(source.training)

    # Training

    def _train_forward(self, input: Tensor) -> Tensor:
        """The whitened layer with live statistics unless frozen; input a batch, padded."""
        if not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return self._plain(input, *self._kept_fold())
        recomputing = in_recomputation()
        frozen = self._frozen(recomputing)
        if frozen is True:
            output = self._plain(input, *self._frozen_fold())
        else:
            statistics = self._statistics(input)
            if not recomputing:
                self._track(statistics.mean, statistics.whitener, frozen)
            on_device = frozen if isinstance(frozen, Tensor) else None
            if on_device is not None:
                statistics = self._running_where(on_device, statistics)
            output = self._whitened(input, statistics, on_device)
        if not recomputing:
            self._count_forward()
        return output

    def _running_where(self, frozen: Tensor, live: Statistics) -> Statistics:
        mean, whitener = self._running_values()
        return Statistics(
            torch.where(frozen, mean, live.mean), torch.where(frozen, whitener, live.whitener), live.iterates
        )

    def _frozen_fold(self) -> Folded:
        mean, whitener = (value.detach().clone() for value in self._running_values())
        with full_precision(self.weight):
            return fold(self.weight, self.bias, mean, whitener, self.partition)

    def _running_values(self) -> tuple[Tensor, Tensor]:
        sets, features = self.partition.sets, self.partition.features
        return self.running_mean.reshape(sets, features), self.running_deconv.reshape(sets, features, features)

    @torch.no_grad()
    def _track(self, mean: Tensor, whitener: Tensor, frozen: bool | Tensor) -> None:
        finite = whitener.sum().abs() < math.inf  # false of NaN; the whitener is not finite if the mean is not
        moving = finite & ~frozen if isinstance(frozen, Tensor) else finite
        momentum = self._momentum()
        for running, value in ((self.running_mean, mean), (self.running_deconv, whitener)):
            value = value.reshape(running.shape).to(running.dtype)
            running.lerp_(torch.where(moving, value, running), momentum)
        self.saw_nonfinite.logical_or_(~finite)

    def _momentum(self) -> float | Tensor:
        """m, or m / (1 - (1 - m)^t) at the t-th update: then the weights of all batches so far add up to 1."""
        momentum = self.cfg.momentum
        if not self.cfg.start_corrected or momentum == 1:
            return momentum
        if torch.compiler.is_compiling():
            decay = torch.full((), 1 - momentum, device=self.running_mean.device, dtype=self.running_mean.dtype)
            return momentum / (1 - decay ** (self._updates(self.num_batches_tracked) + 1))
        return momentum / (1 - (1 - momentum) ** (self._updates(self._forwards()) + 1))

    def _updates(self, forwards: Any) -> Any:
        """Live training forwards among `forwards`: all of them, or freeze_iter + 1 in every freezing cycle."""
        if not self.cfg.freeze:
            return forwards
        live = self.cfg.freeze_iter + 1
        if not self.cfg.thaw:
            return _at_most(forwards, live)
        cycle = 10 * self.cfg.freeze_iter
        return forwards // cycle * min(live, cycle) + _at_most(forwards % cycle, live)

    def _frozen(self, recomputing: bool) -> bool | Tensor:
        """Whether this forward uses the running values: a bool in eager mode, decided on the device when compiled."""
        if not self.cfg.freeze:
            return False
        forwards = self.num_batches_tracked if torch.compiler.is_compiling() else self._forwards()
        forwards = forwards - 1 if recomputing else forwards
        return (forwards % (10 * self.cfg.freeze_iter) if self.cfg.thaw else forwards) > self.cfg.freeze_iter

    def _count_forward(self) -> None:
        if torch.compiler.is_compiling() or not (self.cfg.freeze or self.cfg.start_corrected):
            self.num_batches_tracked.add_(1)
            return
        forwards = self._forwards()
        self.num_batches_tracked.add_(1)
        if not self.num_batches_tracked.is_inference():
            self._counted = (self.num_batches_tracked, self.num_batches_tracked._version, forwards + 1)

    def _forwards(self) -> int:
        """num_batches_tracked as a Python integer, read from the device only after somebody else wrote it."""
        counter = self.num_batches_tracked
        if counter.is_meta:
            return 0
        if counter.is_inference():  # it has no version
            return int(counter)
        if self._counted is None or self._counted[0] is not counter or self._counted[1] != counter._version:
            self._counted = (counter, counter._version, int(counter))
        return self._counted[2]

    # Evaluation

    def _kept_fold(self) -> Folded:
        source = self._fold_source()
        if source is None:
            return self.folded()
        if self._kept is None or not _same(self._kept[0], source):
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (source, self.folded())
        return self._kept[1]

    def _fold_source(self) -> Source | None:
        """What the kept fold depends on; None where keeping it is wrong: gradients, tracing, no version."""
        sources = (self.weight, self.bias, self.running_mean, self.running_deconv)
        tensors = [tensor for tensor in sources if tensor is not None]
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if needs_grad or torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
            return None
        try:
            return [(t, t._version, t.data_ptr()) for t in tensors]
        except RuntimeError:  # tensors without storage, as under functional transforms
            return None

    def _forget(self) -> None:
        self._kept = None

    def _apply(self, *args: Any, **kwargs: Any) -> "WhiteningMixin":
        self._forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._forget()
        counter = prefix + "num_batches_tracked"
        if counter not in state_dict and prefix + "running_deconv" in state_dict:
            state_dict[counter] = torch.zeros_like(self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_counted": None}


def in_recomputation() -> bool:
    """Whether autograd's backward pass is calling, as activation checkpointing does to run a forward a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _at_most(number: Any, most: int) -> Any:
    return number.clamp(max=most) if isinstance(number, Tensor) else min(number, most)


def _same(kept: Source, source: Source) -> bool:
    return all(a is b and va == vb and pa == pb for (a, va, pa), (b, vb, pb) in zip(kept, source, strict=True))
