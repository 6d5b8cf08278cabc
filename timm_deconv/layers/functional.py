"""Whitening as pure functions: moments -> whitener -> weight and bias of a plain layer.

Ye et al., Network Deconvolution, ICLR 2020, sections 3 and 4 (algorithm 1). The operations have their adjoints in
`timm_deconv.kernels`.
"""

from typing import NamedTuple

from torch import Tensor

from timm_deconv.errors import InputError
from timm_deconv.kernels import PIXEL, Blocks, Root, Sampling, inverse_root, sampled_moments
from timm_deconv.kernels.folding import fold
from timm_deconv.linalg import promote

from .config import DeconvCfg

__all__ = [
    "Moments",
    "Statistics",
    "check_rows",
    "estimate",
    "fold",
    "moments_of_pixels",
    "no_moments",
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
        nonfinite: bool (), whether they are not finite; None until they are averaged in.
        frozen: bool (), or None: where it is true, mean and whitener are not the batch's and pass on no gradient.
    """

    row_count: int
    mean: Tensor
    whitener: Tensor
    varies: Tensor
    kept: list[Tensor]
    nonfinite: Tensor | None = None
    frozen: Tensor | None = None


def root_of(cfg: DeconvCfg, zeroes_constant: bool = True) -> Root:
    """Return what a configuration says of the inverse root."""
    return Root(cfg.n_iter, cfg.quartic, cfg.eps, cfg.min_rows, zeroes_constant)


def estimate(moments: Moments, root: Root) -> Statistics:
    """Estimate mean and whitener from moments; differentiable, and by hand by `inverse_root_backward`."""
    mean, cov, row_count, padding = moments
    return Statistics(row_count, *inverse_root(mean, cov, row_count, padding, root))


def no_moments(x: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Return zeros for mean (S, F) and covariance (S, F, F) of no rows of x (N, C, H, W)."""
    zeros = promote(x.new_zeros(blocks.sets, blocks.features, blocks.features + 1))
    return zeros[..., 0], zeros[..., 1:]


def moments_of_pixels(x: Tensor) -> Moments:
    """Compute mean (C, 1) and variance (C, 1, 1) of every channel of images x (N, C, H, W), from all pixels."""
    channels = x.shape[1]
    mean, cov = sampled_moments(x, Sampling(PIXEL), Blocks(channels, 1, groups=channels))
    return Moments(mean, cov, x.numel() // channels)


def check_rows(row_count: int, name: str, input: Tensor) -> None:
    """Raise InputError for one row of an input (N, ...): it is its own mean, and only the bias would learn."""
    if row_count == 1:
        raise InputError(
            f"{name} has one row to whiten in training, from an input of {tuple(input.shape)}: nothing would be"
            " learnt; give larger batches or images, or freeze the statistics (timm_deconv.freeze)"
        )
