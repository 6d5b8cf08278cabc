"""Windows are sampled where the configuration says: as densely as needed, and no more of them than allowed."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.layers.sampled import sampled_rows
from timm_deconv.kernels.windows import PIXEL, Sampling, Window, gather
from timm_deconv.layers import Deconv2d, DeconvCfg, preset
from timm_deconv.layers.geometry import FEWEST, Blocks, choose_sampling, conv_blocks

SOME_WINDOWS = [
    PIXEL,
    PIXEL._replace(stride=(2, 2)),
    Window((3, 3), (1, 1), (1, 1), (1, 1)),
    Window((3, 3), (2, 2), (1, 1), (1, 1)),
    Window((1, 3), (1, 1), (1, 1), (0, 1)),
    Window((3, 3), (1, 1), (2, 2), (2, 2)),
]
CAPS = [1, 16, 30, 100, 4096]


def one_block(features: int) -> Blocks:
    return Blocks(1, features)


def spaced(window: Window, rows: int, cols: int) -> Window:
    return window._replace(stride=(rows, cols))


def capped_samplings() -> Iterator[tuple[Tensor, Window, DeconvCfg, Sampling, Sampling]]:
    """Shapes and caps with the sampling that they get, and the one that they get without the cap."""
    for window, size, batch in itertools.product(SOME_WINDOWS, [(1, 1), (7, 7), (5, 23), (32, 32)], [1, 3, 5, 128]):
        x = torch.empty(batch, 1, *size, device="meta")
        for most, spacing in itertools.product(CAPS, (1, 2)):
            cfg = DeconvCfg(layout="channels", sampling_stride=spacing, max_rows=most)
            free = choose_sampling(x.shape, window, one_block(1), DeconvCfg(layout="channels", sampling_stride=spacing))
            yield x, window, cfg, choose_sampling(x.shape, window, one_block(1), cfg), free


def sampled_images(x: Tensor, sampling: Sampling) -> int:
    return len(range(0, x.shape[0], sampling.images))


def of_an_image(x: Tensor, window: Window, sampling: Sampling) -> int:
    return sampling.window.positions((x.shape[2], x.shape[3]))


def test_without_need_the_spacing_is_the_configured_one_times_the_stride() -> None:
    x = torch.empty(4, 1, 32, 32, device="meta")
    for window, spacing, layout in itertools.product(SOME_WINDOWS, (1, 2, 3), ("channels", "window")):
        cfg = DeconvCfg(layout=layout, sampling_stride=spacing, max_rows=10**6)
        flat = window.pointwise and layout == "window"
        expected = Sampling(spaced(window, spacing * window.stride[0], spacing * window.stride[1]), flat=flat)
        assert choose_sampling(x.shape, window, one_block(1), cfg) == expected


def test_no_more_positions_are_sampled_than_allowed_or_one_image_has() -> None:
    for x, window, cfg, sampling, _ in capped_samplings():
        each = of_an_image(x, window, sampling)
        assert sampled_images(x, sampling) * each <= max(cfg.max_rows, each), (x.shape, window, cfg, sampling)


def test_a_cap_leaves_16_positions_an_image_or_all_there_were() -> None:
    capped = 0
    for x, window, cfg, sampling, free in capped_samplings():
        before, each = of_an_image(x, window, free), of_an_image(x, window, sampling)
        assert min(FEWEST, before) <= each <= before
        if x.shape[0] * before <= cfg.max_rows:
            assert sampling == free
        else:
            capped += 1
    assert capped > 100


def test_a_cap_thins_no_more_than_it_must() -> None:
    for x, window, cfg, sampling, free in capped_samplings():
        size, most = (x.shape[2], x.shape[3]), cfg.max_rows
        rows, cols = sampling.window.stride
        if sampling.window != free.window:
            assert x.shape[0] * spaced(window, rows - 1, cols - 1).positions(size) > most
        if sampling.images > 1:
            assert spaced(window, rows + 1, cols + 1).positions(size) < FEWEST
            more_images = len(range(0, x.shape[0], sampling.images - 1))
            assert more_images * sampling.window.positions(size) > most


def test_sampled_pixels_lie_in_the_middle_of_the_image() -> None:
    for x, window, cfg, sampling, free in capped_samplings():
        if window.pointwise and x.shape[0] * of_an_image(x, window, free) > cfg.max_rows:
            for size, step, offset in zip(x.shape[2:], sampling.window.stride, sampling.offset, strict=True):
                places = range(offset, size, step)
                assert abs((size - 1 - places[-1]) - places[0]) <= 1
        else:
            assert sampling.offset == (0, 0)


def test_gathered_are_as_many_as_were_counted() -> None:
    for x, window, _, sampling, _ in capped_samplings():
        if x.shape[0] <= 5:
            rows = gather(torch.empty(x.shape), sampling).flatten(0, -2)
            assert len(rows) == sampled_images(x, sampling) * of_an_image(x, window, sampling)


def test_padded_1x1_convolutions_are_sampled_inside_the_image() -> None:
    layer = Deconv2d(8, 8, 1, padding=1, cfg=DeconvCfg(layout="channels", sampling_stride=1, max_rows=100))
    x = torch.randn(9, 8, 5, 5)
    assert min(layer._geometry(x).sampling.offset) >= 0
    assert 50 <= sampled_rows(layer, x).shape[1] <= 100


@pytest.mark.parametrize("layout", ["interleaved", "window", "flat"])
def test_the_flat_list_of_pixels_is_capped_too(layout: str) -> None:
    layer = Deconv2d(8, 8, 1, cfg=DeconvCfg(layout=layout, sampling_stride=1, max_rows=100))
    assert sampled_rows(layer, torch.randn(9, 8, 9, 9)).shape[1] <= 100


@pytest.mark.parametrize(
    ("size", "batch", "features", "min_rows", "spacing"),
    [
        (12, 2, 36, 0.0, 3),
        (12, 2, 32, 1.0, 3),  # 32 rows
        (12, 2, 36, 1.0, 2),  # 72 rows
        (12, 2, 36, 2.0, 2),
        (12, 2, 36, 2.1, 1),  # 288 rows
        (12, 2, 36, 100.0, 1),  # too few whatever is done
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_too_few_rows_lower_the_spacing_at_most_to_the_stride(
    size: int, batch: int, features: int, min_rows: float, spacing: int, stride: int
) -> None:
    window = Window((3, 3), (stride, stride), (1, 1), (1, 1))
    x = torch.empty(batch, 4, size * stride, size * stride, device="meta")
    cfg = DeconvCfg(sampling_stride=3, min_rows=min_rows)
    sampling = choose_sampling(x.shape, window, one_block(features), cfg)
    assert sampling == Sampling(spaced(window, spacing * stride, spacing * stride))


def test_blocks_that_share_statistics_count_as_rows_and_groups_do_not() -> None:
    x, cfg = torch.empty(1, 64, 6, 6, device="meta"), DeconvCfg(layout="channels", block=16, min_rows=1.0)
    shared, apart = (conv_blocks(64, 9, groups, cfg) for groups in (1, 4))
    assert (shared.number, shared.sets, apart.sets) == (4, 1, 4)
    assert choose_sampling(x.shape, PIXEL, shared, cfg).window.stride == (3, 3)  # 2 x 2 pixels of 4 blocks
    assert choose_sampling(x.shape, PIXEL, apart, cfg).window.stride == (1, 1)  # 3 x 3 pixels at a spacing of 2


def test_the_cap_counts_the_rows_of_all_blocks_that_share_a_covariance() -> None:
    x = torch.empty(32, 64, 8, 8, device="meta")
    cfg = DeconvCfg(layout="channels", block=16, sampling_stride=1, max_rows=1024)
    rows = {}
    for groups in (1, 4):
        blocks = conv_blocks(64, 9, groups, cfg)
        sampling = choose_sampling(x.shape, PIXEL, blocks, cfg)
        positions = sampled_images(x, sampling) * of_an_image(x, PIXEL, sampling)
        rows[groups] = positions * blocks.number // blocks.sets
    assert rows == {1: 1024, 4: 512}  # 16 pixels of 16 or of all 32 images


@pytest.mark.parametrize(("min_rows", "rows"), [(1.0, 256), (8.0, 512), (100.0, 1024)])
def test_blocks_larger_than_the_wide_one_are_estimated_from_fewer_rows(min_rows: float, rows: int) -> None:
    x = torch.empty(64, 64, 4, 4, device="meta")
    cfg = DeconvCfg(layout="channels", block=64, wide_block=16, sampling_stride=1, max_rows=1024, min_rows=min_rows)
    for width, wanted in ((16, 1024), (64, rows)):
        sampling = choose_sampling(x[:, :width].shape, PIXEL, conv_blocks(width, 9, 1, cfg), cfg)
        assert sampled_images(x, sampling) * of_an_image(x, PIXEL, sampling) == wanted


def test_windows_and_blocks_without_a_wide_one_are_estimated_from_all_the_rows_allowed() -> None:
    assert DeconvCfg(max_rows=4096).most_rows(576) == 4096
    assert DeconvCfg(layout="channels", block=256, max_rows=4096).most_rows(256) == 4096
    assert preset("fast").override({"layout": "window"}).most_rows(147) == 4096  # of a 7x7 stem


def test_the_cap_wins_over_the_least_number_of_rows() -> None:
    x = torch.empty(64, 64, 8, 8, device="meta")
    cfg = DeconvCfg(sampling_stride=2, min_rows=50.0, max_rows=200, layout="channels")
    sampling = choose_sampling(x.shape, PIXEL, one_block(64), cfg)
    assert sampled_images(x, sampling) * of_an_image(x, PIXEL, sampling) <= 200


def test_sampling_a_training_step_draws_no_random_numbers() -> None:
    layer = Deconv2d(16, 8, 3, padding=1, cfg=preset("fast").override({"max_rows": 40, "block": 8}))
    x = torch.randn(6, 16, 12, 12, requires_grad=True)
    state = torch.get_rng_state()
    rows = sampled_rows(layer, x.detach())
    grads = [torch.autograd.grad(layer(x).square().sum(), [x, layer.weight]) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(rows, sampled_rows(layer, x.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
