"""What whitening layers with a weight have in common: running averages of their statistics, modes, freezing."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.kernels import Averaging, Blocks, Share, average_in_, replayed, sampled_moments
from timm_deconv.kernels.roots import LEAST_VARIANCE
from timm_deconv.kernels.tracking import CYCLE
from timm_deconv.linalg import full_precision

from .config import DeconvCfg
from .convolution import computing_dtype
from .functional import Moments, Statistics, check_rows, estimate, fold, moments_of_pixels, no_moments, root_of
from .geometry import ConvGeometry
from .joint import JointBatch, Seen
from .notices import LIVE_STATISTICS, UNCALIBRATED, Notices
from .operation import LiveWeight, Setting, fold_live, whitened_conv

__all__ = ["MANY_BATCHES", "Step", "WhiteningMixin", "be_leaf", "check_dtype", "in_recomputation"]

MANY_BATCHES = 10_000
"""Batches assumed when a state dict has no counter. Layers that freeze assume so many freezing cycles, so that they
go on live, as published ones do."""


class Step(NamedTuple):
    """What a training forward does with the statistics.

    Attributes:
        frozen: use the running values; None if the device decides it, as in compiled forwards of layers that freeze.
        recomputing: the forward runs a second time for its gradient and changes nothing.
        forwards: the counter before, where it is to be known after.
    """

    frozen: bool | None
    recomputing: bool
    forwards: int | None


class WhiteningMixin(nn.Module):
    """State of a layer that whitens its input before a linear map. Mixed into `nn.Conv2d` and `nn.Linear`.

    Buffers, in the state dict:
        running_mean: (S F,), zeros at first.
        running_deconv: the whitener of evaluation, (F, F) if S = 1, else (S, F, F); identity at first. It is the
            running average of the live ones times `running_gain`, if there is one.
        num_batches_tracked: int64 (); training forwards so far. Decides freezing. A state dict without it counts as
            one of many batches.
        running_gain, running_power: (S,) and (2, S), with `cfg.gain_corrected` only; see `timm_deconv.kernels.gain`.

    Attributes:
        cumulative: average all batches alike, as batch norm does without momentum.
        statistics_frozen: use the running values in training too, as they are, and count no forwards; see
            `timm_deconv.freeze`. `requires_grad` changes no statistics, as in batch norm.
        saw_nonfinite: bool (), whether the latest batch's statistics were not finite. Such a batch leaves the running
            values as they were.
        joint: the processes over which statistics are synchronised; None for this one's own. See
            `timm_deconv.convert_sync`.
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
        joint: JointBatch | None
        notices: Notices
        _counted: tuple[Tensor, int, int] | None

    @abstractmethod
    def moments(self, input: Tensor) -> Moments:
        """Compute mean (S, F) and covariance (S, F, F) of the samples that the layer takes of its input (N, ...)."""

    @property
    @abstractmethod
    def _name(self) -> str:
        """What errors call the layer."""

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
        self.joint = None
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

    # A training forward: _begin_step, then _frozen_fold or, with live statistics, _convolve_live; either counts it.

    def _begin_step(self) -> Step:
        recomputing = in_recomputation()
        frozen = self.statistics_frozen or self._freezes(recomputing)
        needed = self.cfg.freeze or self.notices.uncalibrated
        if needed and not torch.compiler.is_compiling():
            self._forwards()  # is known from here on
        return Step(frozen, recomputing, self._known_forwards() if needed else None)

    def _end_step(self, step: Step, nonfinite: Tensor | None) -> None:
        """Keep whether a batch's statistics were not finite, and the counter, if it was known."""
        self.__dict__["saw_nonfinite"] = nonfinite  # as nn.Module sets it, but for searching parameters and buffers
        if step.forwards is not None:
            counter = self.num_batches_tracked
            self._counted = (counter, counter._version, step.forwards + (not step.recomputing))

    def _convolve_live(self, x: Tensor, weight: Tensor, setting: Setting, step: Step) -> Tensor:
        """Convolve x (N, C, H, W), padded and whitened by its own statistics, with a weight (O, C / groups, h, w).

        Raises:
            InputError: x has one row.
        """
        check_rows(setting.geometry.most_rows, setting.name, x)
        if not step.recomputing:
            self._speak()
        bias = self.bias  # which a parametrisation may compute
        with torch.no_grad():  # `whitened_conv` derives through the statistics by hand
            live = self._live_weight(x, weight, bias, setting.geometry, step)
        self._end_step(step, live.nonfinite)
        return whitened_conv(x, weight, bias, live, setting)

    def _live_weight(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, step: Step
    ) -> LiveWeight:
        """Estimate the statistics of x, average them in, and fold them."""

        def fold_in() -> list[Tensor | None]:
            statistics = self._estimate(x, geometry, step)
            return fold_live(x, weight, bias, statistics, geometry).tensors

        if self.joint is not None:
            return LiveWeight.of_tensors(fold_in())
        tensors = (x, weight, bias, *self._buffers.values())
        settings = (geometry, self.cfg, self.cumulative, step.recomputing, computing_dtype(x))
        return LiveWeight.of_tensors(replayed(fold_in, tensors, *settings))

    def _moments(self, x: Tensor, geometry: ConvGeometry) -> Moments:
        if geometry.own_rows:
            mean, cov = sampled_moments(geometry.sampled(x), geometry.sampling, self.blocks)
        else:
            mean, cov = no_moments(x, self.blocks)  # all rows of the joined batch are other processes'
        return Moments(mean, cov, geometry.row_count, geometry.padding)

    def _share(self, images: int) -> Share | None:
        """Return which images of the processes' joined batch a batch of so many is; None where nothing is joined."""
        return None if self.joint is None else self.joint.share(images, self._name)

    def _estimate(self, x: Tensor, geometry: ConvGeometry, step: Step) -> Statistics:
        """Estimate a batch's statistics, average them in, and return what to whiten it with: they, or the running ones
        if frozen.

        Args:
            x: the batch (N, C, H, W).
            geometry: what the layer does with it; with a share, statistics are those of the joined batch.
            step: of `_begin_step`.
        """
        own, seen, share = self._moments(x, geometry), Seen(x, geometry.seen, self.blocks), geometry.share
        found, probed = own, seen
        if self.joint is not None and share is not None:
            if self.cfg.gain_corrected:
                found, probed = self.joint.join_seen(own, geometry.own_rows, seen, share)
            else:
                found = self.joint.join(own, geometry.own_rows)
        live = estimate(found, root_of(self.cfg))
        if found.row_count == 1:
            live = self._unless_constant(live, x.detach(), share)
        return self._average_in(live, found.mean, probed, step)

    @torch.no_grad()
    def _unless_constant(self, live: Statistics, x: Tensor, share: Share | None) -> Statistics:
        """Zero the whiteners where x (N, C, H, W) is constant: one row has no deviation, but others may differ."""
        pixels = moments_of_pixels(x)
        if self.joint is not None and share is not None:
            pixels = self.joint.join(pixels._replace(row_count=share.whole), len(x))
        varies = (pixels.cov.mean() > LEAST_VARIANCE * self.cfg.eps).expand_as(live.varies)
        return live._replace(whitener=live.whitener * varies[:, None, None], varies=varies)

    def _average_in(self, live: Statistics, own_mean: Tensor, seen: Seen, step: Step) -> Statistics:
        """Average statistics in, and return them, or the running ones if frozen.

        Args:
            live: the batch's. own_mean: (S, F), the mean of its samples, without a share of padding.
            seen: what whiteners are measured on.
            step: of `_begin_step`.
        """
        cfg, buffers = self.cfg, self._buffers  # attributes of modules are slow
        gained = [buffers["running_gain"], buffers["running_power"]] if cfg.gain_corrected else []
        freeze_iter = cfg.freeze_iter if cfg.freeze else 0
        averaging = Averaging(cfg.momentum, cfg.start_corrected, self.cumulative, freeze_iter, step.recomputing)
        with torch.no_grad():
            nonfinite = average_in_(
                buffers["running_mean"],
                buffers["running_deconv"],
                gained,
                buffers["num_batches_tracked"],
                seen.x,
                own_mean,
                live.mean,
                live.whitener,
                live.varies,
                live.row_count,
                seen.window,
                seen.blocks,
                averaging,
            )
        live = live._replace(nonfinite=nonfinite)
        return self._unless_frozen(live) if step.frozen is None else live

    def _unless_frozen(self, live: Statistics) -> Statistics:
        """Return a batch's statistics or, if the forward that was counted last is a frozen one, the running ones."""
        # Buffers are read after they are written: torch's compiler was seen to put off what was to be read before.
        frozen = self._is_frozen(self.num_batches_tracked - 1)
        mean, whitener = self._running_values()
        return live._replace(
            mean=torch.where(frozen, mean, live.mean),
            whitener=torch.where(frozen, whitener, live.whitener),
            frozen=frozen,
        )

    def _frozen_fold(self, step: Step) -> tuple[Tensor, Tensor]:
        """Fold the running values as they are: the backward pass may come after they went on."""
        mean, whitener = (value.detach().clone() for value in self._running_values())
        if not (step.recomputing or self.statistics_frozen):
            self.num_batches_tracked.add_(1)
            self._end_step(step, self.saw_nonfinite)
        with full_precision(self.weight):
            return fold(self.weight, self.bias, mean, whitener, self.blocks)

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

    # The counter: a Python integer in eager mode where it is needed, a tensor when compiled

    def _freezes(self, recomputing: bool) -> bool | None:
        """Tell whether the configuration freezes this forward; None if the device decides."""
        if not self.cfg.freeze:
            return False
        return None if torch.compiler.is_compiling() else self._is_frozen(self._forwards() - recomputing)

    def _is_frozen(self, forwards: Any) -> Any:
        """Tell whether the forward after so many, an int or a tensor, is a frozen one."""
        return forwards % (CYCLE * self.cfg.freeze_iter) > self.cfg.freeze_iter

    def _forwards(self) -> int:
        """Return num_batches_tracked, read from the device after `train()` or when somebody wrote it."""
        counter = self.num_batches_tracked
        if counter.is_meta:
            return 0
        known = self._known_forwards()
        if known is None:
            known = int(counter)
            if not counter.is_inference():
                self._counted = (counter, counter._version, known)
        return known

    def _known_forwards(self) -> int | None:
        """Return num_batches_tracked if it is known without reading the device."""
        counter, counted = self.num_batches_tracked, self._counted
        if torch.compiler.is_compiling() or counted is None or counter.is_inference():  # that has no version
            return None
        return counted[2] if counted[0] is counter and counted[1] == counter._version else None

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
