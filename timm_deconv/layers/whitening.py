"""Whitening as pure functions: covariance -> whitener, and its fold into weight and bias.

Ye et al., Network Deconvolution, ICLR 2020, sections 3 and 4 (algorithm 1): with the mean mu of the input windows and
the approximate inverse root D of their covariance, conv(D (x - mu)) = conv'(x) with weight w D and bias b - w D mu.
"""

import torch
from torch import Tensor

from timm_deconv.linalg import isqrt_newton_schulz, shrink

from .config import DeconvCfg
from .partition import Partition, split_weight, sum_shift, unsplit_weight

__all__ = ["fold", "regularise", "regularise_backward", "whitener"]


def whitener(cov: Tensor, samples: int, cfg: DeconvCfg) -> Tensor:
    """Approximate inverse root of covariances (..., F, F) estimated from `samples` rows, regularised as configured."""
    return isqrt_newton_schulz(regularise(cov, samples, cfg), cfg.n_iter)


def regularise(cov: Tensor, samples: int, cfg: DeconvCfg) -> Tensor:
    """Covariances (..., F, F) of `samples` rows, shrunk where these are too few, and eps on the diagonal."""
    wanted = cfg.min_rows * cov.shape[-1]
    if samples < wanted:
        cov = shrink(cov, 1 - samples / wanted)
    return cov + cfg.eps * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)


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
    rows = split_weight(weight.to(dtype), partition) @ whitener.to(dtype).reshape(-1, features, features)
    shift = sum_shift((rows @ mean.to(dtype).reshape(-1, features, 1)).squeeze(-1), partition)
    folded = unsplit_weight(rows, list(weight.shape), partition).to(weight.dtype)
    return folded, (-shift if bias is None else bias - shift).to(weight.dtype)
