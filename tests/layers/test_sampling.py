"""Windows are sampled where the configuration says, gathered as `F.unfold` does, and given back by the adjoint."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_deconv.layers import Deconv2d, DeconvCfg, preset
from timm_deconv.layers.partition import Partition, partition_conv
from timm_deconv.layers.sampling import (
    FEWEST,
    PIXEL,
    Sampling,
    Window,
    add_window_columns_,
    choose_sampling,
    window_columns,
)

FORMATS = [torch.contiguous_format, torch.channels_last]
WINDOWS = {
    "3x3": Window((3, 3), (1, 1), (1, 1), (1, 1)),
    "valid": Window((3, 3), (1, 1), (1, 1), (0, 0)),
    "strided": Window((3, 3), (2, 2), (1, 1), (1, 1)),
    "unequal strides": Window((3, 3), (1, 3), (1, 1), (1, 1)),
    "dilated": Window((3, 3), (1, 1), (2, 3), (2, 3)),
    "dilated to the image": Window((3, 3), (1, 1), (4, 4), (0, 0)),
    "wide": Window((1, 3), (1, 1), (1, 1), (0, 1)),
    "tall": Window((5, 2), (2, 1), (1, 2), (2, 1)),
    "even": Window((4, 4), (2, 2), (1, 1), (1, 1)),
    "padded beyond the kernel": Window((2, 3), (2, 2), (1, 1), (4, 3)),
    "larger than the image": Window((11, 13), (1, 1), (1, 1), (5, 6)),
}
STEPS = [(1, 1), (2, 2), (3, 2), (5, 7), (40, 40)]
SIZES = [(9, 10), (9, 13)]
PIXELS = [
    Sampling(1, (1, 1), (0, 0), False),
    Sampling(2, (2, 3), (0, 0), False),
    Sampling(3, (4, 4), (1, 2), False),
    Sampling(1, (40, 40), (8, 9), False),
    Sampling(4, (1, 2), (3, 0), False),
    Sampling(1, (1, 1), (0, 0), True),
    Sampling(1, (2, 2), (0, 0), True),
    Sampling(1, (3, 5), (0, 0), True),
    Sampling(1, (40, 40), (0, 0), True),
]


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance() -> Iterator[None]:
    """Memory that nobody wrote to holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def images(memory_format: torch.memory_format, size: tuple[int, int] = (9, 10)) -> Tensor:
    return torch.randn(5, 3, *size, dtype=torch.float64).contiguous(memory_format=memory_format)


def geometries() -> Iterator[tuple[Window, Sampling, tuple[int, int]]]:
    """Every sampling of every window, with all images or every second or third."""
    for size in SIZES:
        for window, step in itertools.product(WINDOWS.values(), STEPS):
            for thinned in (1, 2, 3):
                yield window, Sampling(thinned, step, (0, 0), False), size
        for sampling in PIXELS:
            yield PIXEL, sampling, size


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_columns_are_those_of_unfold_at_the_sampled_spacing(window: Window, memory_format: torch.memory_format) -> None:
    for size, step, thinned in itertools.product(SIZES, STEPS, (1, 2)):
        x = images(memory_format, size)
        unfolded = F.unfold(x[::thinned], window.kernel_size, window.dilation, window.padding, step).mT
        columns = window_columns(x, window, Sampling(thinned, step, (0, 0), False))
        assert unfolded.shape[1] == window.windows(size, step)
        assert torch.equal(columns, unfolded), (size, step, thinned)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_wider_spacing_takes_a_part_of_the_windows_of_the_convolution(window: Window) -> None:
    x = images(torch.contiguous_format)
    rows, cols = window.grid((9, 10), window.stride)
    everything = window_columns(x, window, Sampling(1, window.stride, (0, 0), False)).unflatten(1, (rows, cols))
    for spacing in (2, 3, 7):
        step = (spacing * window.stride[0], spacing * window.stride[1])
        columns = window_columns(x, window, Sampling(1, step, (0, 0), False))
        assert torch.equal(columns, everything[:, ::spacing, ::spacing].flatten(1, 2))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_samples_last_is_a_layout_of_the_same_columns(window: Window, memory_format: torch.memory_format) -> None:
    for size, step in itertools.product(SIZES, STEPS):
        x, sampling = images(memory_format, size), Sampling(1, step, (0, 0), False)
        columns = window_columns(x, window, sampling, samples_last=True)
        assert torch.equal(columns, window_columns(x, window, sampling))
        assert columns.numel() == 0 or columns.permute(2, 0, 1).is_contiguous()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("sampling", PIXELS, ids=str)
def test_pixels_are_on_a_grid_from_the_offset_or_every_nth_of_the_batch(
    sampling: Sampling, memory_format: torch.memory_format
) -> None:
    x = images(memory_format)
    images_, (down, right), (top, left), flat = sampling
    if flat:
        expected = x.permute(0, 2, 3, 1).reshape(-1, 3)[:: down * right]
    else:
        places = itertools.product(range(0, 5, images_), range(top, 9, down), range(left, 10, right))
        expected = torch.stack([x[n, :, i, j] for n, i, j in places])
    assert torch.equal(window_columns(x, PIXEL, sampling).reshape(-1, 3), expected)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_giving_back_is_the_adjoint_of_gathering(memory_format: torch.memory_format) -> None:
    for window, sampling, size in geometries():
        x, before = images(memory_format, size), images(memory_format, size)
        columns = window_columns(x, window, sampling)
        cotangent = torch.randn_like(columns)
        grad = before.clone()
        add_window_columns_(grad, cotangent, window, sampling)
        assert grad.stride() == before.stride()
        inner = (columns * cotangent).sum()
        tolerance = 1e-12 * columns.norm() * cotangent.norm()
        assert abs((x * (grad - before)).sum() - inner) <= tolerance, (window, sampling, size)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_giving_back_is_what_autograd_makes_of_unfold(memory_format: torch.memory_format) -> None:
    for window, step in itertools.product(WINDOWS.values(), STEPS):
        x = images(memory_format).requires_grad_()
        unfolded = F.unfold(x[::2], window.kernel_size, window.dilation, window.padding, step).mT
        cotangent = torch.randn_like(unfolded)
        (expected,) = torch.autograd.grad(unfolded, x, cotangent)
        grad = torch.zeros_like(x)
        add_window_columns_(grad, cotangent, window, Sampling(2, step, (0, 0), False))
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


SOME_WINDOWS = [
    PIXEL,
    PIXEL._replace(stride=(2, 2)),
    WINDOWS["3x3"],
    WINDOWS["strided"],
    WINDOWS["wide"],
    Window((3, 3), (1, 1), (2, 2), (2, 2)),
]
CAPS = [1, 16, 30, 100, 4096]


def one_block(features: int) -> Partition:
    return Partition(1, features, False, True, 1, True)


def capped_samplings() -> Iterator[tuple[Tensor, Window, DeconvCfg, Sampling, Sampling]]:
    """Shapes and caps with the sampling that they get, and the one that they get without the cap."""
    for window, size, batch in itertools.product(SOME_WINDOWS, [(1, 1), (7, 7), (5, 23), (32, 32)], [1, 3, 5, 128]):
        x = torch.empty(batch, 1, *size, device="meta")
        for most, spacing in itertools.product(CAPS, (1, 2)):
            cfg = DeconvCfg(layout="channels", sampling_stride=spacing, max_rows=most)
            free = choose_sampling(x, window, one_block(1), DeconvCfg(layout="channels", sampling_stride=spacing))
            yield x, window, cfg, choose_sampling(x, window, one_block(1), cfg), free


def sampled_images(x: Tensor, sampling: Sampling) -> int:
    return len(range(0, x.shape[0], sampling.images))


def of_an_image(x: Tensor, window: Window, sampling: Sampling) -> int:
    return window.windows((x.shape[2], x.shape[3]), sampling.step)


def test_without_need_the_spacing_is_the_configured_one_times_the_stride() -> None:
    x = torch.empty(4, 1, 32, 32, device="meta")
    for window, spacing, layout in itertools.product(SOME_WINDOWS, (1, 2, 3), ("channels", "window")):
        cfg = DeconvCfg(layout=layout, sampling_stride=spacing, max_rows=10**6)
        flat = window.pointwise and layout == "window"
        expected = Sampling(1, (spacing * window.stride[0], spacing * window.stride[1]), (0, 0), flat)
        assert choose_sampling(x, window, one_block(1), cfg) == expected


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
        if sampling.step != free.step:
            denser = (sampling.step[0] - 1, sampling.step[1] - 1)
            assert x.shape[0] * window.windows(size, denser) > most
        if sampling.images > 1:
            wider = (sampling.step[0] + 1, sampling.step[1] + 1)
            assert window.windows(size, wider) < FEWEST
            more_images = len(range(0, x.shape[0], sampling.images - 1))
            assert more_images * window.windows(size, sampling.step) > most


def test_sampled_pixels_lie_in_the_middle_of_the_image() -> None:
    for x, window, cfg, sampling, free in capped_samplings():
        if window.pointwise and x.shape[0] * of_an_image(x, window, free) > cfg.max_rows:
            for size, step, offset in zip(x.shape[2:], sampling.step, sampling.offset, strict=True):
                places = range(offset, size, step)
                assert abs((size - 1 - places[-1]) - places[0]) <= 1
        else:
            assert sampling.offset == (0, 0)


def test_gathered_are_as_many_as_were_counted() -> None:
    for x, window, _, sampling, _ in capped_samplings():
        if x.shape[0] <= 5:
            rows = window_columns(torch.empty(x.shape), window, sampling).flatten(0, -2)
            assert len(rows) == sampled_images(x, sampling) * of_an_image(x, window, sampling)


def test_padded_1x1_convolutions_are_sampled_inside_the_image() -> None:
    layer = Deconv2d(8, 8, 1, padding=1, cfg=DeconvCfg(layout="channels", sampling_stride=1, max_rows=100))
    x = torch.randn(9, 8, 5, 5)
    sampling = choose_sampling(x, layer.conv_map.sampled, layer.partition, layer.cfg)
    assert min(sampling.offset) >= 0
    assert 50 <= layer.rows(x).shape[1] <= 100


@pytest.mark.parametrize("layout", ["interleaved", "window", "flat"])
def test_the_flat_list_of_pixels_is_capped_too(layout: str) -> None:
    layer = Deconv2d(8, 8, 1, cfg=DeconvCfg(layout=layout, sampling_stride=1, max_rows=100))
    assert layer.rows(torch.randn(9, 8, 9, 9)).shape[1] <= 100


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
    sampling = choose_sampling(x, window, one_block(features), cfg)
    assert sampling == Sampling(1, (spacing * stride, spacing * stride), (0, 0), False)


def test_blocks_that_share_statistics_count_as_rows_and_others_do_not() -> None:
    x, cfg = torch.empty(1, 64, 6, 6, device="meta"), DeconvCfg(layout="channels", block=16, min_rows=1.0)
    shared, apart = (partition_conv(64, 9, 1, cfg.override({"per_block": each})) for each in (False, True))
    assert (shared.blocks, shared.sets, apart.sets) == (4, 1, 4)
    assert choose_sampling(x, PIXEL, shared, cfg).step == (3, 3)  # 2 x 2 pixels of 4 blocks
    assert choose_sampling(x, PIXEL, apart, cfg).step == (1, 1)  # 3 x 3 pixels at a spacing of 2


def test_the_cap_counts_the_rows_of_all_blocks_that_share_a_covariance() -> None:
    x = torch.empty(32, 64, 8, 8, device="meta")
    cfg = DeconvCfg(layout="channels", block=16, sampling_stride=1, max_rows=1024)
    rows = {}
    for each in (False, True):
        partition = partition_conv(64, 9, 1, cfg.override({"per_block": each}))
        sampling = choose_sampling(x, PIXEL, partition, cfg)
        positions = sampled_images(x, sampling) * of_an_image(x, PIXEL, sampling)
        rows[each] = positions * partition.blocks // partition.sets
    assert rows == {False: 1024, True: 512}  # 16 pixels of 16 or of all 32 images


@pytest.mark.parametrize(("min_rows", "rows"), [(1.0, 256), (8.0, 512), (100.0, 1024)])
def test_blocks_larger_than_the_wide_one_are_estimated_from_fewer_rows(min_rows: float, rows: int) -> None:
    x = torch.empty(64, 64, 4, 4, device="meta")
    cfg = DeconvCfg(layout="channels", block=64, wide_block=16, sampling_stride=1, max_rows=1024, min_rows=min_rows)
    for width, wanted in ((16, 1024), (64, rows)):
        sampling = choose_sampling(x[:, :width], PIXEL, partition_conv(width, 9, 1, cfg), cfg)
        assert sampled_images(x, sampling) * of_an_image(x, PIXEL, sampling) == wanted


def test_windows_and_blocks_without_a_wide_one_are_estimated_from_all_the_rows_allowed() -> None:
    assert DeconvCfg(max_rows=4096).most_rows(576) == 4096
    assert DeconvCfg(layout="channels", block=256, max_rows=4096).most_rows(256) == 4096
    assert preset("fast").override({"layout": "window"}).most_rows(147) == 4096  # of a 7x7 stem


def test_the_cap_wins_over_the_least_number_of_rows() -> None:
    x = torch.empty(64, 64, 8, 8, device="meta")
    cfg = DeconvCfg(sampling_stride=2, min_rows=50.0, max_rows=200, layout="channels")
    sampling = choose_sampling(x, PIXEL, one_block(64), cfg)
    assert sampled_images(x, sampling) * of_an_image(x, PIXEL, sampling) <= 200


def test_sampling_a_training_step_draws_no_random_numbers() -> None:
    layer = Deconv2d(16, 8, 3, padding=1, cfg=preset("fast").override({"max_rows": 40, "block": 8}))
    x = torch.randn(6, 16, 12, 12, requires_grad=True)
    state = torch.get_rng_state()
    rows = layer.rows(x.detach())
    grads = [torch.autograd.grad(layer(x).square().sum(), [x, layer.weight]) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(rows, layer.rows(x.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
