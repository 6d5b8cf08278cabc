"""What whitening layers with a weight have in common: running averages of their statistics, modes, freezing."""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.kernels import Blocks
from timm_deconv.linalg import full_precision, promote

from .config import DeconvCfg
from .functional import Moments, Statistics, fold
from .gain import LARGEST, first_power, gain, passed_power
from .notices import LIVE_STATISTICS, UNCALIBRATED, Notices

__all__ = ["MANY_BATCHES", "Step", "WhiteningMixin", "be_leaf", "check_dtype", "in_recomputation"]

MANY_BATCHES = 10_000
"""Batches assumed when a state dict has no counter. Layers that freeze assume so many freezing cycles, so that they
go on live, as published ones do."""

RECENT = 4
"""With `gain_corrected` an early batch weighs about RECENT times what it would in a plain mean of all batches."""

CYCLE = 10
"""A layer that freezes is live again at the start of every `CYCLE * freeze_iter` forwards, as published."""


class Step(NamedTuple):
    """What a training forward does with the statistics.

    Attributes:
        frozen: use the running values: a bool in eager mode, a bool () decided on the device when compiled.
        recomputing: the forward runs a second time for its gradient and changes nothing.
    """

    frozen: bool | Tensor
    recomputing: bool


class WhiteningMixin(nn.Module):
    """State of a layer that whitens its input before a linear map. Mixed into `nn.Conv2d` and `nn.Linear`.

    Buffers, in the state dict:
        running_mean: (S F,), zeros at first.
        running_deconv: the whitener of evaluation, (F, F) if S = 1, else (S, F, F); identity at first. It is the
            running average of the live ones times `running_gain`, if there is one.
        num_batches_tracked: int64 (); training forwards so far. Decides freezing. A state dict without it counts as
            one of many batches.
        running_gain, running_power: (S,) and (2, S), with `cfg.gain_corrected` only; see `gain`.

    Attributes:
        cumulative: average all batches alike, as batch norm does without momentum.
        statistics_frozen: use the running values in training too, as they are, and count no forwards; see
            `timm_deconv.freeze`. `requires_grad` changes no statistics, as in batch norm.
        saw_nonfinite: bool (), whether the latest batch's statistics were not finite. Such a batch leaves the running
            values as they were.
        notices, label: what the network's layers tell the user, and the layer's name in it; see `share_notices`.

    In evaluation every forward folds the weight anew, so that no output comes from stale weights, whoever wrote the new
    ones; `fuse` makes the plain layer for speed.
    """

    weight: Tensor
    bias: Tensor | None
    running_mean: Tensor
    running_deconv: Tensor
    num_batches_tracked: Tensor
    blocks: Blocks
    statistics_frozen: bool
    cumulative: bool

    if TYPE_CHECKING:  # at run time TorchScript would look for what only some layers have
        running_gain: Tensor
        running_power: Tensor
        notices: Notices
        _counted: tuple[Tensor, int, int] | None

    @abstractmethod
    def moments(self, input: Tensor) -> Moments:
        """Compute mean (S, F) and covariance (S, F, F) of the samples that the layer takes of its input (N, ...)."""

    @abstractmethod
    def fuse(self) -> nn.Module:
        """Return the plain layer that does in evaluation what this one does."""

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the plain layer, from the running values."""
        with full_precision(self.weight):
            return fold(self.weight, self.bias, self.running_mean, self.running_deconv, self.blocks)

    def reset_running_stats(self) -> None:
        """Forget all batches: mean zero, whitener identity, no batch counted."""
        self.running_mean.zero_()
        eye = torch.eye(self.blocks.features, device=self.running_deconv.device, dtype=self.running_deconv.dtype)
        self.running_deconv.copy_(eye.expand_as(self.running_deconv))
        self.num_batches_tracked.zero_()
        self.forget_power()
        counter = self.num_batches_tracked
        self._counted = None if counter.is_inference() else (counter, counter._version, 0)

    def forget_power(self) -> None:
        """Take the running whitener as it is; where the gain is corrected, the batches to come are measured anew."""
        if self.cfg.gain_corrected:
            self.running_gain.fill_(1)
            self.running_power.zero_()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew and forget all batches, as batch norm does."""
        super().reset_parameters()  # type: ignore[misc]
        if "running_mean" in self._buffers:
            self.reset_running_stats()

    def train(self, mode: bool = True) -> "WhiteningMixin":
        """Set the mode, as torch does, and read the counter again: collectives and writes through .data leave no trace
        in its version."""
        self._counted = None
        return super().train(mode)

    def extra_repr(self) -> str:
        features = f"blocks={self.blocks.number}x{self.blocks.features}"
        frozen = "statistics frozen" if self.statistics_frozen else ""
        return ", ".join(part for part in (super().extra_repr(), features, str(self.cfg), frozen) if part)

    def _init_statistics(self, cfg: DeconvCfg, blocks: Blocks, device: Any) -> None:
        self.cfg: DeconvCfg = cfg
        self.blocks = blocks
        be_leaf(self)
        self.statistics_frozen = False
        self.cumulative = False
        self.notices = Notices()
        self.label = ""
        factory: dict[str, Any] = {"device": device, "dtype": self.weight.dtype}
        sets, features = blocks.sets, blocks.features
        self.register_buffer("running_mean", torch.empty(sets * features, **factory))
        matrices = (features, features) if blocks.groups == 1 else (sets, features, features)
        self.register_buffer("running_deconv", torch.empty(matrices, **factory))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.int64, device=device))
        if cfg.gain_corrected:
            self.register_buffer("running_gain", torch.empty(sets, **factory))
            self.register_buffer("running_power", torch.empty(2, sets, **factory))
        self.saw_nonfinite = torch.zeros((), dtype=torch.bool, device="cpu")
        self.reset_running_stats()

    def _adopt(self, source: "nn.Conv2d | nn.Linear") -> None:
        """Take over a plain layer's parameters and mode; a missing bias becomes zeros, the statistics start anew."""
        weight, bias = source.weight, source.bias
        if bias is None:
            bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)
        self.weight, self.bias = weight, bias
        self._init_statistics(self.cfg, self.blocks, weight.device)
        self.training = source.training

    # A training forward: _begin_step, then _frozen_fold or, with live statistics, _average_in; at last _end_step.

    def _begin_step(self) -> Step:
        recomputing = in_recomputation()
        return Step(self.statistics_frozen or self._freezes(recomputing), recomputing)

    def _average_in(self, live: Statistics, step: Step) -> Statistics:
        """Average a batch's statistics in, and return what to whiten it with: they, or the running ones if frozen."""
        if not step.recomputing:
            self._speak()
        self._track(live, step)
        if not isinstance(step.frozen, Tensor):
            return live
        mean, whitener = self._running_values()
        return live._replace(
            mean=torch.where(step.frozen, mean, live.mean),
            whitener=torch.where(step.frozen, whitener, live.whitener),
            frozen=step.frozen,
        )

    def _frozen_fold(self) -> tuple[Tensor, Tensor]:
        """Fold the running values as they are: the backward pass may come after they went on."""
        mean, whitener = (value.detach().clone() for value in self._running_values())
        with full_precision(self.weight):
            return fold(self.weight, self.bias, mean, whitener, self.blocks)

    def _end_step(self, step: Step) -> None:
        if step.recomputing or self.statistics_frozen:
            return
        forwards = None if torch.compiler.is_compiling() or self._counted is None else self._forwards()
        self.num_batches_tracked.add_(1)
        if forwards is not None and not self.num_batches_tracked.is_inference():
            self._counted = (self.num_batches_tracked, self.num_batches_tracked._version, forwards + 1)

    def _speak(self) -> None:
        """Say what a user who trains the layer would want to know."""
        if torch.compiler.is_compiling():
            return
        if self.notices.uncalibrated and self._forwards() == 0:
            self.notices.say(UNCALIBRATED)
        if not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            self.notices.say(LIVE_STATISTICS)

    # Running averages

    def _running_values(self) -> tuple[Tensor, Tensor]:
        """Return views of the running mean (S, F) and whitener (S, F, F)."""
        sets, features = self.blocks.sets, self.blocks.features
        return self.running_mean.reshape(sets, features), self.running_deconv.reshape(sets, features, features)

    @torch.no_grad()
    def _track(self, live: Statistics, step: Step) -> None:
        """Average in a batch's mean and, of the sets that vary, its whitener; neither if they are not finite.

        Recomputation changes nothing but does the same operations, as selective checkpointing counts them.
        """
        finite = live.whitener.sum().abs() < math.inf  # false of NaN; the whitener is not finite if the mean is not
        self.saw_nonfinite = ~finite
        moving = finite & (not step.recomputing)
        moving = moving & ~step.frozen if isinstance(step.frozen, Tensor) else moving
        varying = moving & live.varies
        momentum = self._momentum(step.recomputing)
        mean, whitener = self._running_values()
        value = live.whitener.to(whitener.dtype)
        if self.cfg.gain_corrected:
            with full_precision(whitener):
                before, after = self._track_gain(live, varying, momentum, step.recomputing)
            whitener.mul_((after / before)[:, None, None])
            value = value * after[:, None, None]
        whitener.lerp_(torch.where(varying[:, None, None], value, whitener), momentum)
        mean.lerp_(torch.where(moving, live.mean.to(mean.dtype), mean), momentum)

    def _track_gain(
        self, live: Statistics, moving: Tensor, momentum: float | Tensor, recomputing: bool
    ) -> tuple[Tensor, Tensor]:
        """Measure how much power of this batch the average of the earlier ones passes, and how much its own whitener.

        Args:
            live: the batch's statistics.
            moving: bool (S,), the sets whose averages move.
            momentum: weight of the batch.
            recomputing: see `Step`.

        Returns:
            the gain (S,) before and after.
        """
        assert live.deviations is not None
        mean, whitener = self._running_values()
        average = (whitener / self.running_gain[:, None, None]).to(live.whitener.dtype)
        deviations = torch.cat([live.deviations + (live.mean - mean).unsqueeze(1), live.deviations])
        latest = passed_power(deviations, torch.cat([average, live.whitener])).view(2, -1)
        updates = self._live_forwards(recomputing)
        if isinstance(updates, Tensor) or updates == 0:
            first = torch.stack([first_power(live.deviations, live.whitener, live.row_count), latest[1]])
            latest = torch.where(updates == 0, first, latest) if isinstance(updates, Tensor) else first
        before, limits = self.running_gain.clone(), torch.finfo(self.running_gain.dtype)
        latest = latest.clamp(max=min(LARGEST, limits.max)).to(before.dtype)
        latest = torch.where(moving, latest, self.running_power)
        self.running_power.lerp_(latest, momentum)
        after = gain(promote(self.running_power), promote(latest), updates + 1)
        after = after.clamp(min=max(LARGEST**-0.5, limits.tiny)).to(before.dtype)
        self.running_gain.copy_(torch.where(moving, after, before))
        return before, self.running_gain

    def _momentum(self, recomputing: bool = False) -> float | Tensor:
        """Return the weight of the newest batch: m, or more among the first ones, so that nothing is left of the start.

        It is m / (1 - (1 - m)^t) at the t-th update: then all batches so far weigh alike at first. When the gain is
        corrected it is the larger of m and RECENT / (t - 1 + RECENT), as weights move fastest at the start.
        """
        momentum = self.cfg.momentum
        if not self.cumulative and (momentum == 1 or not (self.cfg.start_corrected or self.cfg.gain_corrected)):
            return momentum
        updates = self._live_forwards(recomputing)
        if isinstance(updates, Tensor):
            updates = updates.to(self.running_mean.dtype)
        if self.cumulative:
            return 1 / (updates + 1)
        if self.cfg.gain_corrected:
            recent = RECENT / (updates + RECENT)
            return recent.clamp(min=momentum) if isinstance(recent, Tensor) else max(momentum, recent)
        if isinstance(updates, Tensor):
            return momentum / (1 - torch.full_like(updates, 1 - momentum) ** (updates + 1))
        return momentum / (1 - (1 - momentum) ** (updates + 1))

    # The counter: a Python integer in eager mode, a tensor when compiled

    def _freezes(self, recomputing: bool) -> bool | Tensor:
        """Tell whether the configuration freezes this forward."""
        if not self.cfg.freeze:
            return False
        return self._forwards_before(recomputing) % (CYCLE * self.cfg.freeze_iter) > self.cfg.freeze_iter

    def _live_forwards(self, recomputing: bool) -> Any:
        """Return how many forwards before this one were live: all, or freeze_iter + 1 in every freezing cycle."""
        forwards = self._forwards_before(recomputing)
        if not self.cfg.freeze:
            return forwards
        cycle = CYCLE * self.cfg.freeze_iter
        live = min(self.cfg.freeze_iter + 1, cycle)
        begun = forwards % cycle
        return forwards // cycle * live + (begun.clamp(max=live) if isinstance(begun, Tensor) else min(begun, live))

    def _forwards_before(self, recomputing: bool) -> Any:
        if torch.compiler.is_compiling():
            return self.num_batches_tracked
        return self._forwards() - recomputing

    def _forwards(self) -> int:
        """Return num_batches_tracked, read from the device after `train()` or when somebody wrote it."""
        counter = self.num_batches_tracked
        if counter.is_meta:
            return 0
        if counter.is_inference():  # it has no version
            return int(counter)
        if self._counted is None or self._counted[0] is not counter or self._counted[1] != counter._version:
            self._counted = (counter, counter._version, int(counter))
        return self._counted[2]

    # Files and copies

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._counted = None
        if prefix + "running_deconv" in state_dict:
            missing = {"num_batches_tracked": MANY_BATCHES * (CYCLE * self.cfg.freeze_iter if self.cfg.freeze else 1)}
            if self.cfg.gain_corrected:
                missing |= {"running_gain": 1, "running_power": 0}
            device = state_dict[prefix + "running_deconv"].device
            for name, value in missing.items():
                if prefix + name not in state_dict:
                    state_dict[prefix + name] = torch.full_like(getattr(self, name), value, device=device)
            if not self.cfg.gain_corrected:
                for name in ("running_gain", "running_power"):
                    state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_counted": None}


def be_leaf(layer: nn.Module) -> None:
    """Let symbolic traces take a layer as one module in training and evaluation, as they take torch's own layers.

    `torch.fx`, and torchvision's feature extraction with it, asks the module itself where it comes from.
    """
    layer.__dict__["__module__"] = nn.Conv2d.__module__


def check_dtype(input: Tensor, weight: Tensor) -> None:
    """Raise InputError for an input (N, ...) of a dtype that the plain layer would not take with its weight (O, ...).

    Under autocast floating-point numbers are converted, but for float64, as torch does it.
    """
    if input.dtype == weight.dtype:
        return
    autocast = not input.is_meta and torch.is_autocast_enabled(input.device.type)
    fits = input.is_floating_point() and input.dtype != torch.float64 and weight.dtype != torch.float64
    if not (autocast and fits):
        way_out = "convert the input" + (", or train under autocast" if fits else "")
        raise InputError(f"input of {input.dtype}: the layer's weight is {weight.dtype}; {way_out}")


def in_recomputation() -> bool:
    """Tell whether autograd's backward pass is calling, as activation checkpointing does to run a forward again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
