"""Every choice of a whitening layer, in one frozen, JSON-serialisable object."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, Literal, get_args

from timm_deconv.errors import InputError, unknown_name

__all__ = ["PRESETS", "DeconvCfg", "Layout", "preset"]

Layout = Literal["interleaved", "window", "flat", "channels"]


@dataclass(frozen=True, kw_only=True)
class DeconvCfg:
    """How a layer whitens its input. The defaults are the published settings (Ye et al., ICLR 2020, section 4 and
    released code).

    Attributes:
        block: channels whitened together (features, in linear layers). A block that does not divide the channels
            falls back to their greatest common divisor (of 'channels' to the largest divisor of the channels that is
            not larger); a larger one to all channels. Grouped convolutions whiten each group as one block.
        layout: which features of a convolution stand in a block together.
            'interleaved': every Q-th column of the unfolded windows, Q = channels / block (published);
            'window': the whole windows of `block` neighbouring channels;
            'flat': runs of `block` features of the flattened window, as linear layers have them;
            'channels': `block` neighbouring channels at one pixel, whatever the kernel; or the whole window (of a
            group) where it has no more features than the smaller of `block` and `wide_block`. With a block of 1
            depthwise layers standardise every channel.
        wide_block: of 'channels', 'flat' and linear layers: the block of those with more channels (features) than
            `block`, if it is smaller; 0 for `block`.
        per_block: one mean and covariance for each block instead of one shared by all blocks of the layer.
        eps: added to the diagonal of the covariance.
        n_iter: coupled Newton-Schulz steps; fewer whiten less (see `timm_deconv.linalg`).
        quartic: the nearest polynomial of fourth degree in place of 2 or 3 steps, in a convolution's training step 5
            products instead of 7 or 14; of more steps, or one, nothing changes.
        momentum: weight of the newest batch in the running mean and whitener, in (0, 1].
        start_corrected: weigh the first batches so that running values do not lean towards the initial mean 0 and
            whitener I.
        sampling_stride: spacing of the sampled windows, multiplied by the convolution's own stride. Blocks of channels
            are sampled from pixels on a grid of that spacing, whatever the kernel and its stride.
        max_rows: most rows that a covariance is estimated from: sampled windows (or pixels), times the blocks that
            share it. With more, the spacing grows, down to 4 x 4 an image, then images are passed over. Of blocks
            of more channels than `wide_block` in proportion fewer rows, but `min_rows`. 0 is no limit.
        grid: sample 1x1 convolutions on a two-dimensional grid as larger kernels are, instead of every n-th pixel of
            the batch.
        min_rows: least number of sampled rows, in multiples of the features F. With fewer, windows are sampled more
            densely, and what is still missing is made up for by shrinking the covariance towards its mean variance.
            0 switches it off.
        freeze: use the running values, detached, after freeze_iter + 1 training forwards.
        freeze_iter: see `freeze`.
        thaw: a frozen layer is live again for freeze_iter + 1 forwards out of every 10 * freeze_iter (published);
            False freezes it for good.
        centred: `ChannelDeconv` only: centre the second moment (published: not centred).
        gain_corrected: scale the whitener of evaluation so that it passes on as much power as the live ones do,
            measured on each batch before it is averaged in; running averages of inverse roots alone amplify too much
            where rows are few or weights move fast.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    block: int = 64
    layout: Layout = "interleaved"
    wide_block: int = 0
    per_block: bool = False
    eps: float = 1e-5
    n_iter: int = 5
    quartic: bool = False
    momentum: float = 0.1
    start_corrected: bool = False
    sampling_stride: int = 3
    max_rows: int = 0
    grid: bool = False
    min_rows: float = 0.0
    freeze: bool = False
    freeze_iter: int = 100
    thaw: bool = True
    centred: bool = False
    gain_corrected: bool = False

    def __post_init__(self) -> None:
        for name in ("block", "n_iter", "sampling_stride", "freeze_iter"):
            _check(name, getattr(self, name), _is_positive_int, "a positive whole number")
        for name in ("wide_block", "max_rows"):
            _check(name, getattr(self, name), lambda value: value == 0 or _is_positive_int(value), "a whole number")
        for name in ("quartic", "per_block", "start_corrected", "grid", "freeze", "thaw", "centred", "gain_corrected"):
            _check(name, getattr(self, name), lambda value: isinstance(value, bool), "True or False")
        _check("layout", self.layout, get_args(Layout).__contains__, f"one of {', '.join(get_args(Layout))}")
        _check("eps", self.eps, lambda value: _is_real(value) and 0 < value < float("inf"), "a positive number")
        _check("momentum", self.momentum, lambda value: _is_real(value) and 0 < value <= 1, "a number in (0, 1]")
        _check("min_rows", self.min_rows, lambda value: _is_real(value) and 0 <= value < float("inf"), "zero or more")

    def override(self, changes: Mapping[str, Any]) -> "DeconvCfg":
        """A copy with some fields changed; an unknown field is an error that names the nearest ones."""
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise unknown_name("whitening option", name, known)
        return replace(self, **changes)

    @property
    def least_block(self) -> int:
        """The smaller of `block` and `wide_block`."""
        return min(self.block, self.wide_block or self.block)

    def block_of(self, features: int) -> int:
        """`block`, or the least where there are more features."""
        return self.block if features <= self.block else self.least_block

    def most_rows(self, features: int) -> int:
        """`max_rows` of a block of so many features."""
        if self.layout != "channels" or not 0 < self.wide_block < features:
            return self.max_rows
        fewer = self.max_rows * self.wide_block // features
        return max(fewer, min(self.max_rows, math.ceil(self.min_rows * features)))

    def changes(self) -> dict[str, Any]:
        """The fields that differ from the defaults, JSON-serialisable."""
        default = asdict(DeconvCfg())
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.changes().items())


def preset(name: str) -> DeconvCfg:
    """The configuration called `name`; an unknown name is an error that lists the known ones."""
    if not isinstance(name, str) or name not in PRESETS:
        raise unknown_name("preset", str(name), PRESETS)
    return PRESETS[name]


def _check(name: str, value: Any, valid: Any, wanted: str) -> None:
    if not valid(value):
        raise InputError(f"{name}={value!r}: must be {wanted}")


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


PRESETS: Mapping[str, DeconvCfg] = {
    "paper": DeconvCfg(),
    "fast": DeconvCfg(
        block=256,
        wide_block=64,
        layout="channels",
        n_iter=3,
        quartic=True,
        sampling_stride=2,
        max_rows=4096,
        min_rows=1.0,
        start_corrected=True,
        gain_corrected=True,
    ),
}
