"""Every choice of a whitening layer, in one frozen, JSON-serialisable object."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, Literal, get_args

from timm_deconv.errors import InputError, unknown_name

__all__ = ["DeconvCfg", "Kind", "Layout", "conv_kind", "layered"]

Layout = Literal["interleaved", "window", "flat", "channels"]
Kind = Literal["spatial", "pointwise", "depthwise", "grouped", "linear", "channel"]
"""Kind of a layer that stands alone: of a `Deconv2d` by its kernel and groups, `DeconvLinear`, `ChannelDeconv`."""

QUARTIC_STEPS = (2, 3)
LINEAR = "linear layers whiten runs of features, from every sample"
NOT_IN_CHANNELS = "layout wide_block start_corrected max_rows freeze freeze_iter".split()
IDLE: Mapping[Kind, Mapping[str, str]] = {
    "linear": dict.fromkeys(("layout", "sampling_stride", "max_rows"), LINEAR),
    "channel": dict.fromkeys(NOT_IN_CHANNELS, "ChannelDeconv has no such thing"),
}
"""Fields that do nothing in layers of a kind, whatever the others are."""


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
        eps: added to the diagonal of the covariance.
        n_iter: coupled Newton-Schulz steps; fewer whiten less (see `timm_deconv.linalg`).
        quartic: the nearest polynomial of fourth degree in place of 2 or 3 steps, in a convolution's training step 5
            products instead of 7 or 14. There is none for another `n_iter`.
        momentum: weight of the newest batch in the running mean and whitener, in (0, 1].
        start_corrected: weigh the first batches so that running values do not lean towards the initial mean 0 and
            whitener I.
        sampling_stride: spacing of the sampled windows, multiplied by the convolution's own stride. Blocks of channels
            are sampled from pixels on a grid of that spacing, whatever the kernel and its stride.
        max_rows: most rows that a covariance is estimated from: sampled windows (or pixels), times the blocks that
            share it. With more, the spacing grows, down to 4 x 4 an image, then images are passed over. Blocks of more
            channels than `wide_block` get proportionally fewer rows, never below `min_rows`. 0 is no limit.
        min_rows: least number of sampled rows, in multiples of the features F. With fewer, windows are sampled more
            densely, and what is still missing is made up for by shrinking the covariance towards its mean variance.
            0 switches it off.
        freeze: use the running values, detached, after freeze_iter + 1 training forwards; the layer is live again for
            as many out of every 10 * freeze_iter (published).
        freeze_iter: see `freeze`.
        gain_corrected: scale the whitener of evaluation so that it passes on as much power as the live ones do,
            measured on each batch before it is averaged in; running averages of inverse roots alone amplify too much
            where rows are few or weights move fast.

    Raises:
        InputError: a value of the wrong type or out of range, or `quartic` of another number of steps than it is for.
    """

    block: int = 64
    layout: Layout = "interleaved"
    wide_block: int = 0
    eps: float = 1e-5
    n_iter: int = 5
    quartic: bool = False
    momentum: float = 0.1
    start_corrected: bool = False
    sampling_stride: int = 3
    max_rows: int = 0
    min_rows: float = 0.0
    freeze: bool = False
    freeze_iter: int = 100
    gain_corrected: bool = False

    def __post_init__(self) -> None:
        for name in ("block", "n_iter", "sampling_stride", "freeze_iter"):
            _check(name, getattr(self, name), _is_positive_int, "a positive whole number")
        for name in ("wide_block", "max_rows"):
            _check(name, getattr(self, name), lambda value: value == 0 or _is_positive_int(value), "a whole number")
        for name in ("quartic", "start_corrected", "freeze", "gain_corrected"):
            _check(name, getattr(self, name), lambda value: isinstance(value, bool), "True or False")
        _check("layout", self.layout, get_args(Layout).__contains__, f"one of {', '.join(get_args(Layout))}")
        _check("eps", self.eps, lambda value: _is_real(value) and 0 < value < float("inf"), "a positive number")
        _check("momentum", self.momentum, lambda value: _is_real(value) and 0 < value <= 1, "a number in (0, 1]")
        _check("min_rows", self.min_rows, lambda value: _is_real(value) and 0 <= value < float("inf"), "zero or more")
        if self.quartic and self.n_iter not in QUARTIC_STEPS:
            raise InputError(f"quartic=True: does nothing with n_iter={self.n_iter}; it is for 2 or 3 steps")

    def override(self, changes: Mapping[str, Any]) -> "DeconvCfg":
        """Return a copy with some fields changed; an unknown field is an error that names the nearest ones.

        `quartic` is off in the copy where its `n_iter` has none, unless the changes ask for it themselves.
        """
        merged = {**asdict(self), **_known(changes)}
        return DeconvCfg(**merged) if changes.get("quartic") is True else layered(merged)

    def idle(self, kind: Kind) -> dict[str, str]:
        """Return the names of the fields that do nothing in a layer of a kind, whatever its size, and why."""
        found = dict(IDLE.get(kind, {}))
        if kind not in ("linear", "channel") and self.layout in ("interleaved", "window"):
            found["wide_block"] = f"layout is {self.layout!r}; it is of 'channels' and 'flat'"
        if self.wide_block >= self.block:
            found["wide_block"] = f"it is not smaller than block={self.block}"
        if kind in ("depthwise", "grouped") and self.layout != "channels":
            found["block"] = "grouped convolutions whiten each group as one block; layout 'channels' has smaller ones"
        if not self.freeze:
            found["freeze_iter"] = "freeze is False"
        return found

    @property
    def least_block(self) -> int:
        """The smaller of `block` and `wide_block`."""
        return min(self.block, self.wide_block or self.block)

    def block_of(self, features: int) -> int:
        """Return `block`, or the least one where there are more features."""
        return self.block if features <= self.block else self.least_block

    def most_rows(self, features: int) -> int:
        """Return `max_rows` of a block of so many features."""
        if self.layout != "channels" or not 0 < self.wide_block < features:
            return self.max_rows
        fewer = self.max_rows * self.wide_block // features
        return max(fewer, min(self.max_rows, math.ceil(self.min_rows * features)))

    def changes(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults, JSON-serialisable."""
        default = asdict(DeconvCfg())
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.changes().items())


def layered(*levels: Mapping[str, Any]) -> DeconvCfg:
    """Return the configuration of fields from several places, the later the stronger.

    `quartic` from one place is off where another asks for a number of steps that has none.
    """
    merged: dict[str, Any] = {}
    for level in levels:
        merged |= _known(level)
    if merged.get("quartic") is True and merged.get("n_iter", DeconvCfg.n_iter) not in QUARTIC_STEPS:
        merged["quartic"] = False
    return DeconvCfg(**merged)


def conv_kind(in_channels: int, kernel_size: tuple[int, int], groups: int) -> Kind:
    """Return the kind of a convolution."""
    if groups > 1:
        return "depthwise" if groups == in_channels else "grouped"
    return "pointwise" if tuple(kernel_size) == (1, 1) else "spatial"


def _known(options: Mapping[str, Any]) -> Mapping[str, Any]:
    known = [field.name for field in fields(DeconvCfg)]
    for name in options:
        if name not in known:
            raise unknown_name("whitening option", str(name), known)
    return options


def _check(name: str, value: Any, valid: Any, wanted: str) -> None:
    if not valid(value):
        raise InputError(f"{name}={value!r}: must be {wanted}")


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
