"""What whitening costs beside one convolution, forward: the layers of the paper's table 3, interleaved.

Ye et al., Network Deconvolution, ICLR 2020, table 3. Whitening is everything that a layer does in a training forward
besides its convolution: samples, mean and covariance, inverse root, fold into weight and bias, running values.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2d, DeconvCfg, operation, preset
from timm_deconv.timing import Timings, interleave, synchroniser

from .baselines import PublishedConv2d
from .networks import published_conv
from .rows import CONDITIONS, Row, conditions, rounded
from .step import MEMORY_FORMATS

__all__ = ["COLUMNS", "SHOWN", "TABLE_3", "Geometry", "LayerSettings", "layer_rows", "layer_summary"]

COLUMNS = [
    *"row height width in_channels out_channels blocks kernel_size sampling_stride batch memory_format".split(),
    *"convolution fast paper published fast_to_convolution paper_to_published rounds".split(),
    *CONDITIONS,
]

SHOWN = COLUMNS[:8] + COLUMNS[9:16]

FEW = 4
"""Images whose output is checked."""

Folded = tuple[Tensor, Tensor, Tensor]
"""What a convolution is given: input, weight, bias."""


class Geometry(NamedTuple):
    """A row of table 3: a convolution with stride 1 and `kernel_size` // 2 zeros around the image.

    `blocks` is the table's column 'groups': not the convolution's, which is not grouped, but the number of blocks into
    which its input channels are divided. The first five rows have blocks of 64 channels (all 3 in the first), the later
    ones of one channel (blocks = in_channels), or of in_channels / 32.
    """

    height: int
    width: int
    in_channels: int
    out_channels: int
    blocks: int
    kernel_size: int
    sampling_stride: int

    @property
    def cfg(self) -> DeconvCfg:
        """Return the published settings with the row's own block and sampling stride."""
        return preset("paper").override(
            {"block": self.in_channels // self.blocks, "sampling_stride": self.sampling_stride}
        )


TABLE_3 = tuple(
    Geometry(*map(int, row.split()))
    for row in (
        "256 256   3  64   1  3  3",
        "128 128  64 128   1  3  3",
        " 64  64 128 256   2  3  3",
        " 32  32 256 512   4  3  3",
        " 16  16 512 512   8  3  3",
        "128 128  64 128  64  3  3",
        " 64  64 128 256 128  3  3",
        " 32  32 256 512 256  3  3",
        " 16  16 512 512 512  3  3",
        "128 128  64 128  32  3  3",
        " 64  64 128 256  32  3  3",
        " 32  32 256 512  32  3  3",
        " 16  16 512 512  32  3  3",
        "256 256   3  64   1  3  5",
        "128 128  64 128   1  3  5",
        "256 256   3  64   1  7  3",
        "256 256   3  64   1  7  5",
        "256 256   3  64   1  7  7",
        "256 256   3  64   1 11  3",
        "256 256   3  64   1 11  5",
        "256 256   3  64   1 11  7",
        "256 256   3  64   1 11 11",
    )
)


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What is timed.

    Attributes:
        rows: numbers of rows of table 3, the first being 1; empty takes all.
        batch: images.
        device: 'cpu', 'cuda'.
        rounds, warmup: see `timing.interleave`.

    Raises:
        InputError: there is no such row, or there are no images.
    """

    rows: Sequence[int] = ()
    batch: int = 128
    device: str = "cpu"
    rounds: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if not 1 <= row <= len(TABLE_3):
                raise InputError(f"no row {row} in the paper's table 3; there are rows 1 to {len(TABLE_3)}")
        if self.batch < 1:
            raise InputError(f"batch={self.batch}: must be positive")


def layer_rows(settings: LayerSettings, progress: Callable[[str], object] = print) -> list[Row]:
    """Measure a row for each layer: medians of seconds, and medians over rounds of ratios.

    `memory_format` is the one in which the plain convolution is faster; `convolution`, `fast` and `paper` are timed in
    it, `published` in its own faster one. `fast` whitens by the preset with its own blocks and sampling, `paper` and
    `published` with those of the table.

    Raises:
        RuntimeError: what is timed does not compute what the layer does.
    """
    rows = []
    for number in settings.rows or range(1, len(TABLE_3) + 1):
        geometry = TABLE_3[number - 1]
        progress(f"row {number}: {' '.join(map(str, geometry))}")
        timings = time_layer(geometry, settings)
        rows.append({"row": number, **_measured(geometry, timings, settings)})
    return rows


def layer_summary(rows: Sequence[Row]) -> str:
    """Say the largest and median ratio of all rows, a line for each kind of ratio."""
    return "\n".join(
        f"{column}: at most {max(ratios):.4g}, median {statistics.median(ratios):.4g}"
        for column in ("fast_to_convolution", "paper_to_published")
        if (ratios := [row[column] for row in rows])
    )


@torch.no_grad()
def time_layer(geometry: Geometry, settings: LayerSettings) -> Timings:
    """Time the convolution alone, and the whitening alone of fast, paper and published, in both memory formats.

    Seconds are labelled 'WHAT MEMORY_FORMAT', such as 'fast channels_last'.

    Raises:
        RuntimeError: what is timed does not compute what the layer does.
    """
    torch.manual_seed(0)
    x = torch.randn(settings.batch, geometry.in_channels, geometry.height, geometry.width, device=settings.device)
    ours = {"fast": _layer(geometry, preset("fast"), x), "paper": _layer(geometry, geometry.cfg, x)}
    check_whitening(ours, x)
    actions: dict[str, Callable[[], object]] = {}
    for name, memory_format in MEMORY_FORMATS.items():
        images = x.contiguous(memory_format=memory_format)
        for label, layer in ours.items():
            ready = copy.deepcopy(layer).to(memory_format=memory_format)
            actions[f"{label} {name}"] = partial(whitening, ready, images)
        peer = _published(ours["paper"]).to(memory_format=memory_format)
        actions[f"published {name}"] = partial(published_whitening, peer, images)
        plain = partial(F.conv2d, images, peer.weight, peer.bias, padding=peer.padding)
        actions[f"convolution {name}"] = plain
    return interleave(
        actions, rounds=settings.rounds, warmup=settings.warmup, synchronise=synchroniser(settings.device)
    )


@torch.no_grad()
def check_whitening(ours: dict[str, Deconv2d], x: Tensor) -> None:
    """Check that a convolution of what whitening alone gives is the layer's output, within 1e-4 of the largest value.

    The published sequence has 1e-3 and the settings 'paper', on FEW images: its product of 15 million rows of 9
    features was seen to be wrong by 2.5 % (a BLAS adding up in float32). The layers are left as they were.

    Args:
        ours: the layers, by their labels.
        x: (N, C, H, W).

    Raises:
        RuntimeError: it is not.
    """
    for label, layer in ours.items():
        expected = copy.deepcopy(layer)(x)[:FEW]
        _check(label, whitening(copy.deepcopy(layer), x), layer, expected, 1e-4)
        if label == "paper":
            peer = _published(layer)
            _check("published", published_whitening(peer, x[:FEW]), peer, copy.deepcopy(layer)(x[:FEW]), 1e-3)


def whitening(layer: Deconv2d, x: Tensor) -> Folded:
    """Do everything that a training forward does but its convolution (running values too).

    Args:
        layer: a whitened convolution in training mode.
        x: (N, C, H, W).

    Returns:
        Input (N, C, H, W), weight (Cout, C, k, k) and bias (Cout) that the convolution would have been given.
    """
    given: list[Folded] = []

    def leave_out(x: Tensor, weight: Tensor, bias: Tensor, _geometry: object) -> Tensor:
        given.append((x, weight, bias))
        return bias

    with mock.patch.object(operation, "convolve", leave_out):
        layer(x)
    return given[0]


def published_whitening(layer: PublishedConv2d, x: Tensor) -> Folded:
    """Do the same by the published sequence, for a layer that is not grouped."""
    mean, whitener = layer._statistics(x)
    weight, shift = layer._fold_blocks(mean, whitener)
    return x, weight, layer.bias - shift


def _layer(geometry: Geometry, cfg: DeconvCfg, x: Tensor) -> Deconv2d:
    padding = geometry.kernel_size // 2
    torch.manual_seed(0)  # the same weight, whatever the settings
    layer = Deconv2d(geometry.in_channels, geometry.out_channels, geometry.kernel_size, padding=padding, cfg=cfg)
    return layer.to(x.device).train()


def _published(layer: Deconv2d) -> PublishedConv2d:
    peer = published_conv(layer).to(layer.weight.device)
    peer.load_state_dict({"weight": layer.weight, "bias": layer.bias}, strict=False)
    return peer.train()


def _check(label: str, folded: Folded, layer: Deconv2d | PublishedConv2d, expected: Tensor, tolerance: float) -> None:
    x, weight, bias = folded
    found = F.conv2d(x[:FEW], weight, bias, padding=layer.padding)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise RuntimeError(f"{label}: whitening alone differs from that of the layer by {difference:.1e}: {layer}")


def _measured(geometry: Geometry, timings: Timings, settings: LayerSettings) -> Row:
    faster = timings.fastest([f"convolution {name}" for name in MEMORY_FORMATS]).removeprefix("convolution ")
    labels = {label: f"{label} {faster}" for label in ("convolution", "fast", "paper")}
    labels["published"] = timings.fastest([f"published {name}" for name in MEMORY_FORMATS])
    return {
        **geometry._asdict(),
        "batch": settings.batch,
        "memory_format": faster,
        **{what: rounded(timings.spread(label).median) for what, label in labels.items()},
        "fast_to_convolution": rounded(timings.ratio(labels["fast"], labels["convolution"]).median),
        "paper_to_published": rounded(timings.ratio(labels["paper"], labels["published"]).median),
        "rounds": settings.rounds,
        **conditions(settings.device),
    }
