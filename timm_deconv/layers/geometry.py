"""What a configuration makes of a layer's shape: which features share a block, and which windows are samples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from timm_deconv.kernels import PIXEL, Blocks, Sampling, Share, Window

from .config import DeconvCfg

__all__ = ["ConvGeometry", "conv_blocks", "conv_geometry", "largest_divisor", "linear_blocks", "linear_geometry"]

FEWEST = 16
"""Positions of an image below which images are passed over and the spacing grows no more."""

MOST_PADDING = 0.01
"""Most weight of padding in the statistics of blocks of pixels: enough to bound what leaves at the border of an image
without variance, where D mu is near weight ** -0.5. Counting all of it cost a point of accuracy."""


def conv_blocks(in_channels: int, positions: int, groups: int, cfg: DeconvCfg) -> Blocks:
    """Divide the features of a convolution into blocks (paper, section 4.3, and released code).

    Args:
        in_channels, groups: the convolution's.
        positions: of its kernel, height * width.
        cfg: layout and block.
    """
    width = in_channels // groups
    of_pixels = cfg.layout == "channels" and width * positions > cfg.least_block
    if groups > 1:
        return Blocks(groups, width if of_pixels else width * positions, groups=groups, pixels=of_pixels)
    if of_pixels:
        features = largest_divisor(width, cfg.block_of(width))
    elif cfg.layout == "channels":
        features = width * positions
    elif cfg.layout == "flat":
        features = published_block(width * positions, cfg.block_of(width * positions))
    else:
        features = positions * published_block(width, cfg.block)
    count = width * (1 if of_pixels else positions) // features
    interleaved = cfg.layout == "interleaved" and count > 1
    return Blocks(count, features, interleaved, pixels=of_pixels or (positions == 1 and not interleaved))


def linear_blocks(in_features: int, cfg: DeconvCfg) -> Blocks:
    """Divide the features of a linear layer into runs."""
    features = published_block(in_features, cfg.block_of(in_features))
    return Blocks(in_features // features, features)


def published_block(channels: int, block: int) -> int:
    """Return the block that is used: all channels if it is larger, their greatest common divisor if it does not divide
    them."""
    return channels if block > channels else math.gcd(block, channels)


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is not above `most`."""
    return next(divisor for divisor in range(min(most, number), 0, -1) if number % divisor == 0)


class ConvGeometry(NamedTuple):
    """A convolution of a batch of images, or a linear layer of one of vectors, and what is sampled of it.

    Attributes:
        window: the convolution's windows. groups: its groups.
        blocks: of features that are whitened together.
        seen: what samples are taken from: the convolution's windows, or single pixels of the image without padding.
        sampling: which of those, from the image `skipped` on.
        padding: the weight in the statistics of padding that the convolution sees but that is not among the samples.
        row_count: how many rows are sampled, in each set of statistics. most_rows: how many there are, sampled or not.
        share: which images these are of a batch that several processes hold together, whose rows are counted; None
            where they are all.
        own_rows: how many of the rows lie in them.
        skipped: images before the first that is sampled.
        linear: the layer is a linear one, of vectors that are taken for images of one pixel.
    """

    window: Window
    groups: int
    blocks: Blocks
    seen: Window
    sampling: Sampling
    padding: float
    row_count: int
    most_rows: int
    share: Share | None = None
    own_rows: int = 0
    skipped: int = 0
    linear: bool = False

    def sampled(self, images: Tensor) -> Tensor:
        """Return the images (N, C, H, W) without those before the first that is sampled."""
        return images[self.skipped :] if self.skipped else images

    @property
    def part(self) -> float:
        """The share of the rows that lies in this process' images."""
        return self.own_rows / self.row_count


def conv_geometry(
    shape: Sequence[int],
    window: Window,
    groups: int,
    blocks: Blocks,
    cfg: DeconvCfg,
    share: Share | None = None,
) -> ConvGeometry:
    """Return what a convolution does with a batch of shape (N, C, H, W).

    Args:
        shape: of the batch.
        window, groups: the convolution's.
        blocks: by `conv_blocks`.
        cfg: how to sample.
        share: which images of a batch of several processes these are.
    """
    seen, padding = window, 0.0
    if window.pointwise:
        seen = window._replace(padding=(0, 0))
    elif blocks.pixels:
        seen = PIXEL
    if blocks.pixels and cfg.layout == "channels":
        padding = min(window.padding_share((shape[2], shape[3])), MOST_PADDING)
    whole = shape if share is None else (share.whole, *shape[1:])
    sampling, shared = choose_sampling(whole, seen, blocks, cfg), blocks.number // blocks.sets
    row_count, most_rows = sampling.positions(whole) * shared, whole[0] * seen.positions((shape[2], shape[3])) * shared
    geometry = ConvGeometry(window, groups, blocks, seen, sampling, padding, row_count, most_rows, share, row_count)
    if share is None:
        return geometry
    sampling, skipped = _sampling_of_share(sampling, shape, share)
    own_rows = sampling.positions((max(shape[0] - skipped, 0), *shape[1:])) * shared
    return geometry._replace(sampling=sampling, own_rows=own_rows, skipped=skipped)


def linear_geometry(vectors: int, blocks: Blocks, share: Share | None = None) -> ConvGeometry:
    """Return what a linear layer does with so many vectors, of which each is a sample; see `conv_geometry`."""
    own = vectors * blocks.number
    rows = own if share is None else share.whole * blocks.number
    return ConvGeometry(PIXEL, 1, blocks, PIXEL, Sampling(PIXEL), 0.0, rows, rows, share, own, linear=True)


def _sampling_of_share(sampling: Sampling, shape: Sequence[int], share: Share) -> tuple[Sampling, int]:
    """Return where a sampling of the whole batch goes on in a share (N, C, H, W) of it, and images to skip before."""
    if not sampling.flat:
        return sampling, -share.first % sampling.images
    rows, cols = sampling.window.stride
    return sampling._replace(offset=(0, -share.first * shape[2] * shape[3] % (rows * cols))), 0


def choose_sampling(shape: Sequence[int], window: Window, blocks: Blocks, cfg: DeconvCfg) -> Sampling:
    """Choose samples of a batch of shape (N, C, H, W) among windows.

    The spacing is the configured one times the stride of the windows. It is reduced, at most to that stride, until
    there are `cfg.min_rows` * F rows; or increased, down to FEWEST windows an image, and then images are passed over,
    until there are no more than `cfg.max_rows`.

    Args:
        shape: (N, C, H, W).
        window: what samples are taken from, at its stride or wider.
        blocks: the features of a row.
        cfg: how many samples.
    """
    flat = window.pointwise and cfg.layout != "channels"
    per_position = blocks.number // blocks.sets
    for spacing in range(cfg.sampling_stride, 0, -1):
        sampling = Sampling(_spaced(window, spacing * window.stride[0], spacing * window.stride[1]), flat=flat)
        if sampling.positions(shape) * per_position >= cfg.min_rows * blocks.features:
            break
    most = max(cfg.most_rows(blocks.features) // per_position, 1)
    if not cfg.max_rows or sampling.positions(shape) <= most:
        return sampling
    return _sparser(shape, sampling.window, most)


def _sparser(shape: Sequence[int], window: Window, most: int) -> Sampling:
    images, size = shape[0], (shape[2], shape[3])
    wider = _spaced(window, window.stride[0] + 1, window.stride[1] + 1)
    while images * window.positions(size) > most and wider.positions(size) >= FEWEST:
        window, wider = wider, _spaced(wider, wider.stride[0] + 1, wider.stride[1] + 1)
    rows, cols = window.grid(size)
    offset = (0, 0)
    if window.pointwise:  # in the middle of the image
        spare = (size[0] - 1 - (rows - 1) * window.stride[0], size[1] - 1 - (cols - 1) * window.stride[1])
        offset = (spare[0] // 2, spare[1] // 2)
    wanted = max(most // (rows * cols), 1)
    return Sampling(window, math.ceil(images / wanted), offset)


def _spaced(window: Window, rows: int, cols: int) -> Window:
    return window._replace(stride=(rows, cols))
