"""Whitening as pure functions: moments -> whitener -> weight and bias of a plain layer.

Ye et al., Network Deconvolution, ICLR 2020, sections 3 and 4 (algorithm 1). Every function that the backward pass needs
has its adjoint beside it.
"""

from typing import NamedTuple

from torch import Tensor

from timm_deconv.errors import InputError
from timm_deconv.kernels import Root, inverse_root
from timm_deconv.kernels.folding import fold
from timm_deconv.kernels.roots import LEAST_VARIANCE

from .config import DeconvCfg

__all__ = [
    "Moments",
    "Statistics",
    "check_rows",
    "estimate",
    "estimate_live",
    "fold",
    "root_of",
]


class Moments(NamedTuple):
    """Mean and covariance of rows.

    Attributes:
        mean: (S, F). cov: (S, F, F), divided by the number of rows.
        row_count: R, how many rows they were taken from.
        padding: the weight of zero padding that is not among the rows.
    """

    mean: Tensor
    cov: Tensor
    row_count: int
    padding: float = 0.0


class Statistics(NamedTuple):
    """Mean and whitener of a batch, and what running averages and the way back need.

    Attributes:
        row_count: R.
        mean: (S, F). whitener: (S, F, F).
        varies: bool (S,), whether a set's features vary at all.
        kept: what the way back through the root needs beside the whitener.
        frozen: bool (), or None: where it is true, mean and whitener are not the batch's and pass on no gradient.
    """

    row_count: int
    mean: Tensor
    whitener: Tensor
    varies: Tensor
    kept: list[Tensor]
    frozen: Tensor | None = None


def root_of(cfg: DeconvCfg, zeroes_constant: bool = True) -> Root:
    """Return what a configuration says of the inverse root."""
    return Root(cfg.n_iter, cfg.quartic, cfg.eps, cfg.min_rows, zeroes_constant)


def estimate(moments: Moments, root: Root) -> Statistics:
    """Estimate mean and whitener from moments; differentiable, and by hand by `inverse_root_backward`."""
    mean, cov, row_count, padding = moments
    return Statistics(row_count, *inverse_root(mean, cov, row_count, padding, root))


def estimate_live(moments: Moments, x: Tensor, cfg: DeconvCfg) -> Statistics:
    """Estimate what a batch is whitened with, the whiteners of sets whose rows are all equal being zero.

    Args:
        moments: of the batch.
        x: the batch (N, C, ...); one row has no deviation, but others may differ from it.
        cfg: the layer's.
    """
    statistics = estimate(moments, root_of(cfg))
    if moments.row_count > 1:
        return statistics
    pixel = x.detach()[(slice(1), slice(None), *[slice(1)] * (x.ndim - 2))]
    varies = ((x.detach() - pixel).square().mean() > LEAST_VARIANCE * cfg.eps).expand_as(statistics.varies)
    return statistics._replace(whitener=statistics.whitener * varies[:, None, None], varies=varies)


def check_rows(row_count: int, name: str, input: Tensor) -> None:
    """Raise InputError for one row of an input (N, ...): it is its own mean, and only the bias would learn."""
    if row_count == 1:
        raise InputError(
            f"{name} has one row to whiten in training, from an input of {tuple(input.shape)}: nothing would be"
            " learnt; give larger batches or images, or freeze the statistics (timm_deconv.freeze)"
        )
