"""How the whitening share of a training step changes with batch, image size, width of the network or block."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_deconv.errors import InputError, unknown_name
from timm_deconv.timing import Timings

from .rows import CONDITIONS, Row, rounded
from .step import StepSettings, random_batch, time_training

__all__ = [
    "AXES",
    "COLUMNS",
    "SHOWN",
    "ScalingSettings",
    "exponent",
    "fitted_to",
    "forward_operations",
    "scaling_rows",
    "scaling_summary",
]

AXES: dict[str, tuple[float, ...]] = {
    "batch": (16, 32, 64, 128, 256, 512, 1024),
    "image_size": (32, 64, 96, 128, 160, 192, 224),
    "width": (0.5, 0.75, 1.0, 1.5, 2.0),
    "block": (2, 4, 8, 16, 32, 64, 128),
}
"""What may change, and its values where none are asked for."""

COLUMNS = [
    *"axis network preset width batch image_size block amp compile operations none_seconds deconv_seconds".split(),
    *"share share_lower share_upper exponent rounds".split(),
    *CONDITIONS,
]

SHOWN = "width batch image_size block operations none_seconds deconv_seconds share share_lower share_upper".split()


@dataclass(frozen=True, kw_only=True)
class ScalingSettings(StepSettings):
    """What is timed: `StepSettings`, of which one changes.

    Attributes:
        axis: the setting that changes, one of AXES.
        values: what it takes one after the other; empty takes those of AXES.
        points: take only the first so many of the values; 0 takes all.
        block: channels whitened together in every layer, in place of the preset's own. The layout decides how many
            features they are: 9 a channel in the 3x3 windows of 'paper'.

    Raises:
        InputError: an axis or a value that makes no sense.
    """

    axis: str = "batch"
    values: Sequence[float] = ()
    points: int = 0
    block: int | None = None
    forms: Sequence[str] = ("none", "deconv")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis not in AXES:
            raise unknown_name("axis", self.axis, AXES)
        for value in self.values:
            if not 0 < value < math.inf or (self.axis != "width" and value != int(value)):
                wanted = "positive" if self.axis == "width" else "a positive whole number"
                raise InputError(f"{self.axis}={value:g}: must be {wanted}")

    def deconv(self, preset: str) -> str | dict[str, Any]:
        """Return the preset, in blocks of `block` channels."""
        return preset if self.block is None else {"preset": preset, "block": self.block, "wide_block": 0}

    def all_settings(self) -> list["ScalingSettings"]:
        """List the settings of each point."""
        values = list(self.values or AXES[self.axis])[: self.points or None]
        kind = type(AXES[self.axis][0])
        return [replace(self, **{self.axis: kind(value)}) for value in values]


def scaling_rows(settings: ScalingSettings, progress: Callable[[str], object] = print) -> list[Row]:
    """Measure a row for each value of the axis.

    `share` is the median over rounds of (deconv - none) / none, seconds of a training step, each form in its faster
    memory format; `_lower` and `_upper` are quartiles. `operations` is the work of the network without norms, see
    `forward_operations`; `exponent`, the same in all rows, is that of the share against it (or the block), see
    `exponent`.

    Raises:
        RuntimeError, NonFiniteError: a network does not compute what it should.
    """
    rows = []
    for point in settings.all_settings():
        title = f"{settings.axis} {getattr(point, settings.axis)}"
        timings = time_training(point, lambda message, title=title: progress(f"{title}: {message}"))
        rows.append(_measured(point, timings))
    work = [row["block" if settings.axis == "block" else "operations"] for row in rows]
    slope = exponent(work, [row["share"] for row in rows])
    return [{**row, "exponent": "" if slope is None else rounded(slope)} for row in rows]


def scaling_summary(rows: Sequence[Row]) -> str:
    """Say in words what the exponent is."""
    slope = rows[0]["exponent"]
    if slope == "":
        return "no exponent: it takes two positive shares at different work"
    return f"the whitening share goes with the {fitted_to(rows[0]['axis'])} to the power of {slope:.3g}"


def fitted_to(axis: str) -> str:
    """Name what the exponent of an axis is of: the work of the network, unless that stays the same."""
    return "block" if axis == "block" else "work"


def exponent(work: Sequence[float], shares: Sequence[float]) -> float | None:
    """Fit the p of share = c work^p to the positive shares, by least squares in logarithms.

    Returns None where fewer than two of them, at different work, are left.
    """
    logs = [(math.log(w), math.log(share)) for w, share in zip(work, shares, strict=True) if share > 0]
    if len({w for w, _ in logs}) < 2:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def forward_operations(settings: StepSettings) -> int:
    """Count the floating-point operations of convolutions and products in a forward pass of a batch without norms.

    torch counts two for a multiplication and an addition.
    """
    on_meta = replace(settings, device="meta")
    model = on_meta.build("none")
    images, _ = random_batch(on_meta, model, "contiguous")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def _measured(point: ScalingSettings, timings: Timings) -> Row:
    none, deconv = (timings.fastest(point.labels(form)) for form in ("none", "deconv"))
    ratio = timings.ratio(deconv, none)
    return point.described() | {
        "axis": point.axis,
        "preset": point.preset,
        "block": point.block or "",
        "compile": point.compile,
        "operations": forward_operations(point),
        "none_seconds": rounded(timings.spread(none).median),
        "deconv_seconds": rounded(timings.spread(deconv).median),
        "share": rounded(ratio.median - 1),
        "share_lower": rounded(ratio.lower - 1),
        "share_upper": rounded(ratio.upper - 1),
        "rounds": point.rounds,
    }
