"""Whitening shares along an axis, and the exponent that is fitted to them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import scaling
from benchmarks.plots import share_picture
from benchmarks.scaling import (
    COLUMNS,
    ScalingSettings,
    exponent,
    forward_operations,
    scaling_rows,
    scaling_summary,
)
from benchmarks.step import StepSettings
from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2d
from timm_deconv.timing import Timings

SMALL = {"width": 0.125, "values": (4, 8, 16), "memory_formats": ("contiguous", "channels_last")}


def silent(message: str) -> None:
    """No progress on the screen."""


def timings(share: float) -> Timings:
    """Without norms a second in the faster format, whitened `share` seconds more."""
    return Timings(
        {
            "none contiguous": [1.0, 1.0, 1.0],
            "none channels_last": [2.0, 2.0, 2.0],
            "deconv contiguous": [9.0, 9.0, 9.0],
            "deconv channels_last": [1 + 0.5 * share, 1 + share, 1 + 1.5 * share],
        }
    )


def test_the_exponent_of_a_power_law_is_found_without_shares_that_are_not_positive() -> None:
    work = [1e6, 2e6, 5e6, 7e6, 9e6]
    shares = [3 * w**-0.4 for w in work]
    assert exponent(work, shares) == pytest.approx(-0.4)
    assert exponent(work, [*shares[:3], -0.01, 0.0]) == pytest.approx(-0.4)
    assert exponent(work, [0.1, -0.1, -0.1, 0.0, 0.0]) is None
    assert exponent([2.0, 2.0], [1.0, 3.0]) is None


def test_operations_are_two_for_each_product_of_convolutions_and_classifier() -> None:
    settings = StepSettings(width=0.125, batch=3, image_size=40)
    model, counted = settings.build("none"), 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.randn(3, 3, 40, 40))
    assert forward_operations(settings) == counted


def test_rows_hold_the_share_in_the_faster_formats_and_one_exponent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "time_training", lambda point, progress: timings(1.0 * point.batch**-0.5))
    rows = scaling_rows(ScalingSettings(**SMALL, rounds=3), silent)
    assert [set(row) for row in rows] == [set(COLUMNS)] * 3
    assert [row["batch"] for row in rows] == [4, 8, 16]
    assert (rows[0]["share_lower"], rows[0]["share"], rows[0]["share_upper"]) == pytest.approx((0.375, 0.5, 0.625))
    assert (rows[0]["none_seconds"], rows[0]["deconv_seconds"]) == (1.0, 1.5)
    assert rows[1]["operations"] == 2 * rows[0]["operations"]
    assert [row["exponent"] for row in rows] == pytest.approx([-0.5] * 3, rel=1e-3)
    assert scaling_summary(rows) == "the whitening share goes with the work to the power of -0.5"


def test_one_point_has_no_exponent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "time_training", lambda point, progress: timings(1.0))
    rows = scaling_rows(ScalingSettings(**SMALL, points=1), silent)
    assert [row["exponent"] for row in rows] == [""]
    assert "two positive shares" in scaling_summary(rows)


def test_both_forms_are_timed_along_every_axis() -> None:
    small = {"rounds": 1, "warmup": 0, "memory_formats": ("channels_last",), "preset": "fast"}
    said: list[str] = []
    (row,) = scaling_rows(ScalingSettings(axis="image_size", values=(16,), batch=4, width=0.125, **small), said.append)
    assert said == ["image_size 16: round 1 of 1"]
    assert row["image_size"] == 16 and row["none_seconds"] > 0 and row["deconv_seconds"] > 0
    points = ScalingSettings(axis="width", values=(1, 1.5)).all_settings()
    assert [(point.width, point.batch, tuple(point.forms)) for point in points] == [
        (1.0, 128, ("none", "deconv")),
        (1.5, 128, ("none", "deconv")),
    ]
    assert [point.batch for point in ScalingSettings(points=3).all_settings()] == [16, 32, 64]


def test_along_the_block_the_network_stays_and_the_exponent_is_that_of_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaling, "time_training", lambda point, progress: timings(0.01 * point.block**2))
    settings = ScalingSettings(axis="block", values=(2, 4, 8), width=0.125, preset="fast", rounds=3)
    rows = scaling_rows(settings, silent)
    assert [row["block"] for row in rows] == [2, 4, 8] and len({row["operations"] for row in rows}) == 1
    assert [row["exponent"] for row in rows] == pytest.approx([2.0] * 3)
    assert scaling_summary(rows) == "the whitening share goes with the block to the power of 2"
    model = settings.all_settings()[1].build("deconv")
    assert {layer.blocks.features for layer in model.layer1.modules() if isinstance(layer, Deconv2d)} == {4}


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="no axis 'batches'; nearest: batch"):
        ScalingSettings(axis="batches")
    with pytest.raises(InputError, match=r"batch=1\.5: must be a positive whole number"):
        ScalingSettings(values=(1.5,))
    with pytest.raises(InputError, match="width=-1: must be positive"):
        ScalingSettings(axis="width", values=(-1,))


def test_the_picture_shows_positive_shares_in_per_cent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: dict[str, object] = {}
    original = figure.Figure.savefig

    def look(self: object, path: Path) -> None:
        (container,) = self.axes[0].containers
        drawn["xy"] = container.lines[0].get_xydata().tolist()
        drawn["legend"] = self.axes[0].get_legend().get_texts()[0].get_text()
        original(self, path)

    monkeypatch.setattr(figure.Figure, "savefig", look)
    row = {"axis": "batch", "network": "n", "preset": "fast", "hardware": "h", "exponent": -0.5}
    shares = [(4, 0.5), (8, -0.1), (16, 0.25)]
    rows = [{**row, "batch": b, "share": s, "share_lower": s - 0.3, "share_upper": s + 0.1} for b, s in shares]
    share_picture(rows, tmp_path / "deep" / "share.png")
    assert drawn == {"xy": [[4.0, 50.0], [16.0, 25.0]], "legend": "(work)^-0.5"}
    assert (tmp_path / "deep" / "share.png").read_bytes().startswith(b"\x89PNG")
