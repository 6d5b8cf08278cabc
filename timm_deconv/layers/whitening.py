"""Whitening as pure functions: covariance -> whitener, and its fold into weight and bias.

Ye et al., Network Deconvolution, ICLR 2020, sections 3 and 4 (algorithm 1): with the mean mu of the input windows and
the approximate inverse root D of their covariance, conv(D (x - mu)) = conv'(x) with weight w D and bias b - w D mu.
"""

import torch
from torch import Tensor

from timm_deconv.linalg import isqrt_newton_schulz, shrink

from .config import DeconvCfg
from .partition import Partition, split_weight, sum_blocks, sum_shift, unsplit_weight

__all__ = [
    "count_padding",
    "count_padding_backward",
    "fold",
    "fold_bias",
    "regularise",
    "regularise_backward",
    "whitener",
]


def whitener(cov: Tensor, samples: int, cfg: DeconvCfg) -> Tensor:
    """Approximate inverse root of covariances (..., F, F) estimated from `samples` rows, regularised as configured."""
    return isqrt_newton_schulz(regularise(cov, samples, cfg), cfg.n_iter)


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
    rows = split_weight(weight.to(dtype), partition)
    matrix = whitener.to(dtype).reshape(-1, features, features)
    sums = sum_blocks(rows, weight.shape[0], partition)
    folded_bias = fold_bias(bias, sums, mean.to(dtype).reshape(-1, features), matrix, partition)
    folded = unsplit_weight(rows @ matrix, list(weight.shape), partition)
    if weight.is_contiguous():
        folded = folded.contiguous()
    return folded.to(weight.dtype), folded_bias.to(weight.dtype)


def fold_bias(bias: Tensor | None, sums: Tensor, mean: Tensor, whitener: Tensor, partition: Partition) -> Tensor:
    """Bias b - w D mu (O,) from the weight's `sum_blocks` (S, O / groups, F), mean (S, F) and whitener (S, F, F)."""
    shift = sum_shift((sums @ (whitener @ mean.unsqueeze(-1))).squeeze(-1), partition)
    return -shift if bias is None else bias - shift
