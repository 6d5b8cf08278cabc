"""Whitening as pure functions: covariance -> whitener, and its fold into weight and bias.

Ye et al., Network Deconvolution, ICLR 2020, sections 3 and 4 (algorithm 1): with the mean mu of the input windows and
the approximate inverse root D of their covariance, conv(D (x - mu)) = conv'(x) with weight w D and bias b - w D mu.
"""

import torch
from torch import Tensor

from timm_deconv.linalg import isqrt_newton_schulz, isqrt_quartic, shrink
from timm_deconv.products import POINTWISE, as_images, as_kernel, few_products, inner_products, rows_times

from .config import DeconvCfg
from .partition import Partition, split_rows, split_weight, sum_blocks, sum_shift, unsplit_rows, unsplit_weight

__all__ = [
    "LEAST_VARIANCE",
    "apply_whitener",
    "apply_whitener_backward",
    "count_padding",
    "count_padding_backward",
    "differ",
    "fold",
    "fold_bias",
    "fold_weight",
    "fold_weight_backward",
    "regularise",
    "regularise_backward",
    "subtract_shift_gradient_",
    "sum_weight",
    "varies",
    "whiten_vectors",
    "whitener",
]


LEAST_VARIANCE = 1e-5
"""Of eps: below it a set of features is taken not to vary at all."""


def varies(cov: Tensor, eps: float) -> Tensor:
    """Whether the features of covariances (S, F, F) vary: bool (S,).

    Where all rows are equal there is nothing to whiten, and only eps would be inverted: deviations stay zero, but each
    layer multiplies gradients by eps ** -0.5. Such a set's whitener counts as zero, which changes no output by more
    than LEAST_VARIANCE ** 0.5 of a deviation.
    """
    return cov.diagonal(dim1=-2, dim2=-1).mean(-1) > LEAST_VARIANCE * eps


def differ(x: Tensor, eps: float) -> Tensor:
    """Whether the pixels of images (N, C, H, W) differ, as `varies` means it: bool ()."""
    return (x - x[:1, :, :1, :1]).square().mean() > LEAST_VARIANCE * eps


def whitener(cov: Tensor, samples: int, cfg: DeconvCfg) -> Tensor:
    """Approximate inverse root of covariances (..., F, F) estimated from `samples` rows, regularised as configured."""
    root = isqrt_quartic if cfg.quartic else isqrt_newton_schulz
    return root(regularise(cov, samples, cfg), cfg.n_iter)


def count_padding(mean: Tensor, cov: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Mean (S, F) and covariance (S, F, F) of pixels of which a share is zero padding, from those of the image alone.

    Blocks of channels are sampled inside the image, but the convolution sees its padding too.
    """
    if not share:
        return mean, cov
    cov = torch.baddbmm(cov, mean.unsqueeze(-1), mean.unsqueeze(-2), beta=1 - share, alpha=share * (1 - share))
    return (1 - share) * mean, cov


def count_padding_backward(
    mean: Tensor, grad_mean: Tensor, grad_cov: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The image's own mean (S, 1, F), and its and the covariance's gradients, from the result of `count_padding`."""
    if not share:
        return mean, grad_mean, grad_cov
    grad_mean = torch.baddbmm(grad_mean, mean, grad_cov, beta=1 - share, alpha=2 * share)
    return mean / (1 - share), grad_mean, (1 - share) * grad_cov


def regularise(cov: Tensor, samples: int, cfg: DeconvCfg) -> Tensor:
    """Covariances (..., F, F) of `samples` rows, shrunk where these are too few, and eps on the diagonal."""
    wanted = cfg.min_rows * cov.shape[-1]
    if samples < wanted:
        cov = shrink(cov, 1 - samples / wanted)
    return torch.add(cov, torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device), alpha=cfg.eps)


def regularise_backward(grad: Tensor, samples: int, cfg: DeconvCfg) -> Tensor:
    """Gradient of `regularise` with respect to the covariances; shrinking is its own adjoint."""
    wanted = cfg.min_rows * grad.shape[-1]
    return shrink(grad, 1 - samples / wanted) if samples < wanted else grad


def fold(
    weight: Tensor, bias: Tensor | None, mean: Tensor, whitener: Tensor, partition: Partition
) -> tuple[Tensor, Tensor]:
    """Weight w D and bias b - w D mu of the plain layer that does the whitened layer's work (paper, algorithm 1).

    Args:
        weight: (O, ...), a convolution's or a linear layer's.
        bias: (O,) or None.
        mean: (S, F) or flattened. whitener: (S, F, F), or (F, F) if S = 1.

    Returns:
        weight and bias of the layer's shapes, in the layer's dtype; computed in the statistics' dtype or better.
    """
    features = partition.features
    dtype = torch.promote_types(weight.dtype, whitener.dtype)
    matrix = whitener.to(dtype).reshape(-1, features, features)
    rows = split_weight(weight.to(dtype), partition) @ matrix
    sums = sum_blocks(rows, weight.shape[0], partition)
    folded_bias = fold_bias(bias, sums, mean.to(dtype).reshape(-1, 1, features), partition)
    folded = _unsplit_like(rows, weight, partition)
    return folded.to(weight.dtype), folded_bias.to(weight.dtype)


def whiten_vectors(vectors: Tensor, mean: Tensor, whitener: Tensor, partition: Partition) -> Tensor:
    """D (x - mu) of vectors (R, P F), with mean (S, F) and whitener (S, F, F), in the statistics' dtype."""
    rows = split_rows(vectors.to(whitener.dtype), partition)
    return unsplit_rows((rows - mean.unsqueeze(-2)) @ whitener, list(vectors.shape), partition)


def fold_bias(bias: Tensor | None, sums: Tensor, shift: Tensor, partition: Partition) -> Tensor:
    """Bias (O,) minus the products of `sum_blocks` (S, O / groups, F) of a weight with what it meets, (S, 1, F)."""
    products = sum_shift(torch.bmm(sums, shift.transpose(1, 2)).squeeze(-1), partition)  # ONNX has no mT
    return -products if bias is None else bias - products


def fold_weight(weight: Tensor, whitener: Tensor, partition: Partition) -> Tensor:
    """w D in the weight's shape and memory format, which decides in which one a convolution runs.

    The weight in the whitener's dtype. Unlike `fold`, in the precision of convolutions (TF32 on GPUs, where these are)
    when D multiplies runs of channels, unless the products are few: a processor was seen to multiply up to 3 times as
    fast so as by matrix products.
    """
    if partition.one_whitener:
        return apply_whitener(weight, whitener)
    return _unsplit_like(rows_times(split_weight(weight, partition), whitener), weight, partition)


def fold_weight_backward(
    grad_folded: Tensor, grad_outputs: Tensor, shift: Tensor, weight: Tensor, whitener: Tensor, partition: Partition
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and D from that of w D (overwritten) and, (S, O / groups), of the bias with w D mu."""
    if partition.one_whitener:
        grad_folded = subtract_shift_gradient_(grad_folded, grad_outputs, shift, partition)
        return apply_whitener_backward(grad_folded, weight, whitener)
    grad_rows, rows = split_weight(grad_folded, partition), split_weight(weight, partition)
    of_outputs = grad_rows.unflatten(1, [grad_outputs.shape[1], -1])
    of_outputs.addcmul_(grad_outputs[..., None, None], shift.unsqueeze(2), value=-1)
    grad_weight = _unsplit_like(rows_times(grad_rows, whitener.mT), weight, partition)
    return grad_weight, inner_products(rows, grad_rows)


def _unsplit_like(rows: Tensor, weight: Tensor, partition: Partition) -> Tensor:
    """Rows in the shape and memory format of the weight."""
    values = unsplit_weight(rows, list(weight.shape), partition)
    if not weight.is_contiguous():
        return values
    return values.reshape(-1).view(weight.shape)  # contiguous() leaves 1x1 kernels strides that look like channels_last


def sum_weight(weight: Tensor, partition: Partition) -> Tensor:
    """`sum_blocks` of a convolution's weight: (S, O / groups, F)."""
    if partition.one_whitener:
        return weight.unflatten(1, [-1, partition.features]).sum((1, 3, 4)).unsqueeze(0)
    return sum_blocks(split_weight(weight, partition), weight.shape[0], partition)


def subtract_shift_gradient_(grad: Tensor, grad_outputs: Tensor, shift: Tensor, partition: Partition) -> Tensor:
    """Subtract from the gradient of a weight whose runs of channels meet one mean that of its part in the bias.

    That is (1, O) outputs times a shift (1, 1, F).
    """
    of_blocks = grad.unflatten(1, [-1, partition.features])
    of_blocks.addcmul_(grad_outputs.view(-1, 1, 1, 1, 1), shift.view(-1, 1, 1), value=-1)
    return grad


def apply_whitener(values: Tensor, whitener: Tensor) -> Tensor:
    """Every run of F channels of images or a weight (N, C, H, W) times D (1, F, F).

    As a 1x1 convolution, unless pixels are rows in memory and the products so few that it takes longer to begin than it
    saves.
    """
    features, last = whitener.shape[-1], values.is_contiguous(memory_format=torch.channels_last)
    if last and few_products(values, features):
        return _in_format(torch.bmm(_pixels(values, features), whitener.to(values.dtype)), values)
    whitened = torch.conv2d(_runs_apart(values, features, last), as_kernel(whitener).to(values.dtype))
    return _runs_together(whitened, values, last)


def apply_whitener_backward(grad: Tensor, values: Tensor, whitener: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of values and D from that of `apply_whitener`."""
    features, last = whitener.shape[-1], values.is_contiguous(memory_format=torch.channels_last)
    if last and few_products(values, features):
        pixels = _pixels(grad, features)
        grad_values = torch.bmm(pixels, whitener.mT.to(grad.dtype))
        grad_whitener = torch.bmm(_pixels(values, features).mT, pixels)
        return _in_format(grad_values, values), grad_whitener.to(whitener.dtype)
    grad_values, grad_kernel, _ = torch.ops.aten.convolution_backward(
        _runs_apart(grad, features, last),
        _runs_apart(values, features, last),
        as_kernel(whitener).to(values.dtype),
        [0],
        *POINTWISE,
        [True, True, False],
    )
    grad_whitener = grad_kernel.permute(2, 1, 0, 3).squeeze(-1)
    return _runs_together(grad_values, values, last), grad_whitener.to(whitener.dtype)


def _pixels(values: Tensor, features: int) -> Tensor:
    """Runs of F channels as rows (1, R, F), a view in channels_last."""
    return values.permute(0, 2, 3, 1).reshape(1, -1, features)


def _in_format(pixels: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_pixels` of values in channels_last, in the shape and memory format of `like`."""
    if like.is_contiguous():  # too: there is one pixel, or one channel
        return pixels.reshape(like.shape)
    count, channels, height, width = like.shape
    return pixels.reshape(count, height, width, channels).permute(0, 3, 1, 2)


def _runs_apart(values: Tensor, features: int, last: bool) -> Tensor:
    """Images of F channels, a view: every run of channels becomes a pixel in channels_last, else an image."""
    if not last:
        return values.reshape(-1, features, *values.shape[2:])
    return as_images(_pixels(values, features))


def _runs_together(images: Tensor, like: Tensor, last: bool) -> Tensor:
    """The inverse, in the shape and memory format of `like`."""
    return _in_format(images.permute(0, 2, 3, 1), like) if last else images.reshape(like.shape)
