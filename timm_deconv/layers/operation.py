"""A whitened convolution as one differentiable operation.

Written as separate operations, autograd would keep the unfolded input alive until the backward pass, and make a dense,
mostly zero gradient of the whole input for the few sampled windows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_deconv.kernels import (
    Blocks,
    add_moments_gradient_,
    apply_whitener,
    apply_whitener_backward,
    fold_whitening,
    fold_whitening_backward,
    inverse_root_backward,
    replayed,
    sampled_moments,
)
from timm_deconv.kernels.blocks import spread_over_window, sum_over_window
from timm_deconv.kernels.folding import fold, shift_bias, shift_bias_backward_
from timm_deconv.kernels.formats import is_channels_last, on_cpu
from timm_deconv.linalg import full_precision

from .config import DeconvCfg
from .convolution import computing_dtype, convolve, convolve_backward, sum_outputs
from .functional import Moments, Statistics, estimate, root_of
from .geometry import ConvGeometry
from .joint import JointBatch

__all__ = ["LiveWeight", "Setting", "fold_live", "whitened_conv", "whitens_input"]


class Setting(NamedTuple):
    """What a whitened convolution is given beside tensors.

    Attributes:
        geometry, cfg: the layer's. name: its own, for errors.
        joint: the processes that statistics are synchronised over, if they are.
    """

    geometry: ConvGeometry
    cfg: DeconvCfg
    name: str
    joint: JointBatch | None = None


class LiveWeight(NamedTuple):
    """Weight and bias that whiten a batch, and what the way back needs of its statistics.

    Attributes:
        nonfinite: bool (), whether the statistics are not finite.
        weight, bias: folded; None where `whitens_input`.
        frozen: see `Statistics`.
        mean: (S, F). whitener: (S, F, F).
        kept: see `Statistics`.
    """

    nonfinite: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    frozen: Tensor | None
    mean: Tensor
    whitener: Tensor
    kept: Sequence[Tensor]

    @property
    def tensors(self) -> list[Tensor | None]:
        """All of it in one list."""
        return [self.nonfinite, self.weight, self.bias, self.frozen, self.mean, self.whitener, *self.kept]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Any]) -> "LiveWeight":
        """Return what a list was made of."""
        nonfinite, weight, bias, frozen, mean, whitener, *kept = tensors
        return cls(nonfinite, weight, bias, frozen, mean, whitener, kept)


def fold_live(
    x: Tensor, weight: Tensor, bias: Tensor | None, statistics: Statistics, geometry: ConvGeometry
) -> LiveWeight:
    """Fold the statistics of x (N, C, H, W) into weight (O, C / groups, h, w) and bias (O,) of its convolution.

    On a CPU they are left for the input where that `whitens_input`.
    """
    live, folded, folded_bias = statistics, None, None
    if not whitens_input(x, weight, geometry):
        folded, folded_bias = _fold(x, weight, bias, live.mean, live.whitener, geometry.blocks)
    return LiveWeight(live.nonfinite, folded, folded_bias, live.frozen, live.mean, live.whitener, live.kept)


def whitened_conv(x: Tensor, weight: Tensor, bias: Tensor | None, live: LiveWeight, setting: Setting) -> Tensor:
    """Convolve whitened windows of x; gradients flow to x (through its statistics too), weight and bias.

    Args:
        x: (N, C, H, W).
        weight: (O, C / groups, h, w). bias: (O,); None counts as zeros.
        live: what `fold_live` made of them.
        setting: the layer's.

    Returns:
        (N, O, H', W'), of vectors (R, O); in the autocast dtype if there is one.

    Raises:
        RuntimeError: in a backward pass through gradients of synchronised statistics, or of a single row.
    """
    output: Tensor = _WhitenedConv.apply(x, weight, bias, setting, *live.tensors[1:])
    return output


class _WhitenedConv(torch.autograd.Function):
    """Whitening is folded into weight and bias; on a CPU it is applied to the input where that is fewer products.

    There D is applied again in the backward pass: neither a copy of the input nor the folded weight is kept. Other
    devices keep the folded weight, as it is small beside the input, and launching the work again would cost more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        setting: Setting,
        folded: Tensor | None,
        folded_bias: Tensor | None,
        frozen: Tensor | None,
        mean: Tensor,
        whitener: Tensor,
        *kept: Tensor,
    ) -> Tensor:
        geometry, dtype = setting.geometry, computing_dtype(x)
        with full_precision(x):
            input = x.to(dtype)
            if folded is None or folded_bias is None:
                folded, folded_bias = weight.to(dtype), _bias_of_whitened(bias, weight, mean, whitener, geometry)
                input, folded_bias = _whiten(x, mean, whitener, geometry, dtype)[1], folded_bias.to(dtype)
            output = convolve(input, folded, folded_bias, geometry)
        kept_weight = None if on_cpu(x) else folded
        ctx.save_for_backward(x, weight, kept_weight, frozen, mean, whitener, *kept)
        ctx.setting, ctx.has_bias, ctx.dtype = setting, bias is not None, dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        others = [None] * (len(ctx.needs_input_grad) - 3)
        # by create_graph=True, whether the incoming gradient requires one or not
        keeps_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        x, weight, folded, frozen, mean, whitener, *kept = ctx.saved_tensors
        batch = _Batch(x, weight, folded, frozen, mean, whitener, kept)
        if keeps_graph and _is_derivable(batch, ctx.setting):
            return *_gradients_to_derive(ctx, grad, batch), *others
        with torch.no_grad():
            grads = _gradients(ctx, grad, batch)
        if keeps_graph:
            grads = _OnlyOnce.apply(ctx.setting.name, *(g if g is None else g.requires_grad_() for g in grads))
        return *grads, *others


class _OnlyOnce(torch.autograd.Function):
    """Gradients as they are, which nothing can be derived from: autograd would take them for constants."""

    @staticmethod
    def forward(ctx: Any, name: str, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"a second derivative of {ctx.name} in training, with statistics of several processes or of a single row:"
            " its gradients are written by hand and cannot be derived again; take it in evaluation (model.eval()) or"
            " with frozen statistics (timm_deconv.freeze)"
        )


class _Batch(NamedTuple):
    """What was kept of a batch: x and weight as they were given, the folded weight if it was kept, and statistics.

    Attributes:
        frozen, mean, whitener, kept: see `LiveWeight`.
    """

    x: Tensor
    weight: Tensor
    folded: Tensor | None
    frozen: Tensor | None
    mean: Tensor
    whitener: Tensor
    kept: Sequence[Tensor]


def _is_derivable(batch: _Batch, setting: Setting) -> bool:
    """Tell whether `_gradients_to_derive` says all of what a layer does."""
    return setting.joint is None and setting.geometry.row_count > 1 and batch.frozen is None


def _gradients_to_derive(ctx: Any, grad: Tensor, batch: _Batch) -> list[Tensor | None]:
    """Compute the gradients of x, weight and bias from the batch anew, by operations that can be derived twice."""
    geometry, dtype, needed = ctx.setting.geometry, ctx.dtype, ctx.needs_input_grad[:3]
    # aliases, as hooks of the tensors themselves are called by whoever asked for these gradients
    x, weight = batch.x.view_as(batch.x), batch.weight.view_as(batch.weight)
    bias = weight.detach().new_zeros(len(weight)).requires_grad_()
    with full_precision(x):
        mean, cov = sampled_moments(geometry.sampled(x), geometry.sampling, geometry.blocks)
        live = estimate(Moments(mean, cov, geometry.row_count, geometry.padding), root_of(ctx.setting.cfg))
        folded, folded_bias = fold(weight, bias, live.mean, live.whitener, geometry.blocks)
        output = convolve(x.to(dtype), folded.to(dtype), folded_bias.to(dtype), geometry)
    inputs = [each for each, wanted in zip((x, weight, bias), needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(output, inputs, grad, create_graph=True))
    return [next(found) if wanted else None for wanted in needed]


def _gradients(ctx: Any, grad: Tensor, batch: _Batch) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, weight and bias, each None where it is not asked for."""
    x, weight, *_ = batch
    with full_precision(x):
        grad = grad.to(ctx.dtype)
        grad_bias = sum_outputs(grad, weight.dtype)
        backward = _input_gradients if whitens_input(x, weight, ctx.setting.geometry) else _weight_gradients
        grad_x, grad_weight = backward(grad, grad_bias, batch, ctx.setting, ctx.needs_input_grad[0])
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None


Gradients = tuple[Tensor | None, Tensor]
"""Those of x (None unless it is asked for) and weight."""


def _weight_gradients(grad: Tensor, grad_bias: Tensor, batch: _Batch, setting: Setting, with_x: bool) -> Gradients:
    """Compute gradients from those of output (N, O, H', W') and bias where whitening was folded into the weight."""
    x, weight, folded, frozen, mean, whitener, kept = batch
    geometry, input = setting.geometry, x.to(grad.dtype)
    if folded is None:
        folded = _fold(input, weight, None, mean, whitener, geometry.blocks)[0] if with_x else weight.to(grad.dtype)
    grad_x, grad_kernel = convolve_backward(grad, input, folded, geometry, with_x)
    grad_x = None if grad_x is None else grad_x.to(x.dtype)

    def derive() -> list[Tensor]:
        tensors = (grad_kernel, grad_bias, weight, mean, whitener)
        grad_weight, of_statistics = fold_whitening_backward(*tensors, geometry.blocks, with_x)
        if grad_x is not None:
            grad_mean, grad_whitener = of_statistics
            _add_statistics_gradient_(grad_x, grad_mean, grad_whitener, batch, setting)
        return [grad_weight]

    if setting.joint is not None:
        return grad_x, derive()[0]
    tensors = (x, weight, frozen, mean, whitener, *kept, grad_kernel, grad_bias, grad_x)
    return grad_x, replayed(derive, tensors, geometry, setting.cfg)[0]


def _input_gradients(grad: Tensor, grad_bias: Tensor, batch: _Batch, setting: Setting, with_x: bool) -> Gradients:
    """Compute gradients from those of output (N, O, H', W') and bias where whitening was applied to x."""
    x, weight, _, _, mean, whitener, _ = batch
    geometry, wide = setting.geometry, weight.to(whitener.dtype)
    given, whitened = _whiten(x, mean, whitener, geometry, grad.dtype)
    grad_x, grad_kernel = convolve_backward(grad, whitened, weight.to(grad.dtype), geometry, with_x)
    grad_weight, grad_shift = grad_kernel.to(wide.dtype), None
    if not geometry.linear:
        shift = _shift(mean, whitener)
        grad_shift = shift_bias_backward_(grad_weight, grad_bias.to(wide.dtype), wide, shift, geometry.blocks)
    grad_weight = grad_weight.to(weight.dtype)
    if grad_x is None:
        return None, grad_weight
    grad_x, grad_whitener = apply_whitener_backward(grad_x.to(given.dtype), given, whitener)
    if grad_shift is None:
        grad_mean = sum_over_window(grad_x.sum(0, keepdim=True), geometry.blocks).neg()
    else:
        grad_mean = torch.bmm(grad_shift.unsqueeze(1), whitener).squeeze(1)
        grad_whitener = torch.baddbmm(grad_whitener, grad_shift.unsqueeze(-1), mean.unsqueeze(1))
    grad_x = grad_x.to(x.dtype)
    _add_statistics_gradient_(grad_x, grad_mean, grad_whitener, batch, setting)
    return grad_x, grad_weight


def _whiten(
    x: Tensor, mean: Tensor, whitener: Tensor, geometry: ConvGeometry, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what D is applied to, and D times that in a dtype.

    It is x of a convolution, whose padding has no mean, so that D mu is left to the bias; vectors are centred, in the
    dtype of the statistics, as a large mean would leave few digits of a narrow one.
    """
    if not geometry.linear:
        given = x.to(dtype)
        return given, apply_whitener(given, whitener)
    given = x.to(whitener.dtype) - spread_over_window(mean, [1, *x.shape[1:]], geometry.blocks)
    return given, apply_whitener(given, whitener).to(dtype)


def _bias_of_whitened(
    bias: Tensor | None, weight: Tensor, mean: Tensor, whitener: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Return the bias that goes with the input of `_whiten`: of a convolution, less what the weight makes of D mu."""
    if geometry.linear:
        return weight.new_zeros(len(weight)) if bias is None else bias
    return shift_bias(bias, weight.to(whitener.dtype), _shift(mean, whitener), geometry.blocks)


def _shift(mean: Tensor, whitener: Tensor) -> Tensor:
    """Compute D mu, (S, F)."""
    return torch.bmm(mean.unsqueeze(1), whitener.mT).squeeze(1)


def _add_statistics_gradient_(
    grad_x: Tensor, grad_mean: Tensor, grad_whitener: Tensor, batch: _Batch, setting: Setting
) -> None:
    """Add to the gradient of x, in place, what reaches it through mean and whitener."""
    geometry, cfg, _, joint = setting
    x, _, _, frozen, mean, whitener, kept = batch
    if frozen is not None:
        grad_mean, grad_whitener = (g.masked_fill(frozen, 0) for g in (grad_mean, grad_whitener))
    own_mean, of_mean, of_cov = inverse_root_backward(
        grad_mean, grad_whitener, mean, whitener, kept, geometry.row_count, geometry.padding, root_of(cfg)
    )
    if joint is not None:
        of_mean, of_cov = joint.join_gradients(of_mean, of_cov, geometry.part)
    if geometry.own_rows:
        images = (geometry.sampled(grad_x), geometry.sampled(x))
        add_moments_gradient_(*images, own_mean, of_mean, of_cov, geometry.sampling, geometry.blocks)


def _fold(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, whitener: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Fold whitening into weight and bias of the convolution of x, in the dtype and format in which it takes them."""
    dtype, last = computing_dtype(x), is_channels_last(x) or is_channels_last(weight)
    folded: tuple[Tensor, Tensor] = fold_whitening(weight, bias, mean, whitener, blocks, dtype, last)
    return folded


def whitens_input(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Tell whether D is applied to x (N, C, H, W) and not to the weight (O, C, h, w): where that is fewer products.

    F products an element either way, 4 times: in the forward and the backward pass, and for the gradients of both.
    Elsewhere than on CPUs products cost less than beginning them does, and folding begins fewer.
    """
    return on_cpu(x) and geometry.blocks.pixels and geometry.groups == 1 and x.numel() < weight.numel()
