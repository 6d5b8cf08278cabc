"""Layers of table 3: what is timed is all that a layer does, but its convolution."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks import layer as layers
from benchmarks.layer import TABLE_3, Geometry, LayerSettings, layer_rows, layer_summary, whitening
from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2d, DeconvCfg, preset
from timm_deconv.timing import Timings

TINY = Geometry(9, 9, 8, 6, 2, 3, 2)
SECONDS = {
    "convolution contiguous": [2.0, 2.0, 2.0],
    "convolution channels_last": [3.0, 3.0, 3.0],
    "fast contiguous": [1.0, 0.5, 1.0],
    "fast channels_last": [0.1, 0.1, 0.1],
    "paper contiguous": [3.0, 3.0, 3.0],
    "paper channels_last": [0.1, 0.1, 0.1],
    "published contiguous": [9.0, 9.0, 9.0],
    "published channels_last": [4.0, 6.0, 8.0],
}


def test_the_tables_groups_are_numbers_of_blocks() -> None:
    assert len(TABLE_3) == len(set(TABLE_3)) == 22
    blocks = [row.cfg.block for row in TABLE_3]
    assert blocks[:13] == [3, 64, 64, 64, 64, 1, 1, 1, 1, 2, 4, 8, 16]
    assert all(block == row.in_channels for block, row in zip(blocks[13:], TABLE_3[13:], strict=True))
    for row, block in zip(TABLE_3, blocks, strict=True):
        blocks = Deconv2d(row.in_channels, 1, row.kernel_size, cfg=row.cfg).blocks
        assert (blocks.number, blocks.features) == (row.blocks, block * row.kernel_size**2)


@pytest.mark.parametrize(
    ("cfg", "outputs", "batch"),
    [
        (preset("paper"), 6, 16),
        (DeconvCfg(block=4, sampling_stride=2), 6, 16),
        (preset("fast"), 6, 16),
        (preset("fast").override({"block": 4}), 600, 2),
    ],
    ids=["paper", "blocks", "fast", "on the input"],
)
def test_a_convolution_of_what_whitening_gives_is_the_layers_output(cfg: DeconvCfg, outputs: int, batch: int) -> None:
    layer = Deconv2d(8, outputs, 3, padding=1, cfg=cfg)
    x = torch.randn(batch, 8, 9, 9) @ torch.randn(9, 9) + 1
    whole = copy.deepcopy(layer)
    with torch.no_grad():
        given, weight, bias = whitening(layer, x)
        assert (given is x) == (outputs == 6)
        expected = whole(x)
        assert torch.allclose(F.conv2d(given, weight, bias, padding=1), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(F.conv2d(x, layer.weight, layer.bias, padding=1), expected, rtol=0.1, atol=0.1)
        for name, value in whole.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), name
        assert torch.equal(layer(x), whole(x))  # with its convolution again


def test_whitening_alone_runs_no_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Deconv2d(8, 6, 3, padding=1), torch.randn(16, 8, 9, 9)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a convolution")

    monkeypatch.setattr(torch, "conv2d", refuse)
    monkeypatch.setattr(F, "conv2d", refuse)
    with torch.no_grad():
        whitening(layer, x)
        layers.published_whitening(layers._published(layer), x)
        with pytest.raises(AssertionError, match="a convolution"):
            layer(x)


@pytest.mark.parametrize("wrong", ["whitening", "published_whitening"])
def test_whitening_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    original: Callable = getattr(layers, wrong)

    def half(*args: object) -> layers.Folded:
        x, weight, bias = original(*args)
        return x, 0.5 * weight, bias

    monkeypatch.setattr(layers, wrong, half)
    with pytest.raises(RuntimeError, match="published: " if wrong == "published_whitening" else "fast: "):
        layers.time_layer(TINY, LayerSettings(batch=8))


def test_everything_is_timed_in_both_memory_formats() -> None:
    timings = layers.time_layer(TINY, LayerSettings(batch=8, rounds=2, warmup=0))
    assert set(timings.seconds) == set(SECONDS)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in timings.seconds.values())


def test_rows_take_the_convolutions_faster_format_and_the_peers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "time_layer", lambda geometry, settings: Timings(SECONDS))
    said: list[str] = []
    first, second = layer_rows(LayerSettings(rows=(2, 16), rounds=3), said.append)
    assert said == ["row 2: 128 128 64 128 1 3 3", "row 16: 256 256 3 64 1 7 3"]
    assert set(first) == set(layers.COLUMNS)
    assert (first["row"], first["blocks"], second["kernel_size"]) == (2, 1, 7)
    assert first["memory_format"] == "contiguous"
    assert (first["convolution"], first["fast"], first["paper"], first["published"]) == (2.0, 1.0, 3.0, 6.0)
    assert first["fast_to_convolution"] == 0.5
    assert first["paper_to_published"] == 0.5
    first["fast_to_convolution"] = 0.1
    assert "fast_to_convolution: at most 0.5, median 0.3" in layer_summary([first, second])


def test_a_row_that_the_table_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="no row 23 in the paper's table 3; there are rows 1 to 22"):
        LayerSettings(rows=(1, 23))
    with pytest.raises(InputError, match="batch=0"):
        LayerSettings(batch=0)
