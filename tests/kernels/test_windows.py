"""Windows are gathered as `F.unfold` does, and their gradient is given back by the adjoint."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import _Counting
from timm_deconv.kernels import windows
from timm_deconv.kernels.windows import PIXEL, Sampling, Window, gather, scatter_add_, spread_windows

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
    Sampling(PIXEL),
    Sampling(PIXEL._replace(stride=(2, 3)), 2),
    Sampling(PIXEL._replace(stride=(4, 4)), 3, (1, 2)),
    Sampling(PIXEL._replace(stride=(40, 40)), 1, (8, 9)),
    Sampling(PIXEL._replace(stride=(1, 2)), 4, (3, 0)),
    Sampling(PIXEL, flat=True),
    Sampling(PIXEL._replace(stride=(2, 2)), flat=True),
    Sampling(PIXEL._replace(stride=(3, 5)), flat=True),
    Sampling(PIXEL._replace(stride=(40, 40)), flat=True),
]


def spaced(window: Window, step: tuple[int, int], images: int = 1) -> Sampling:
    """Windows at a spacing of `step`, of every so many images."""
    return Sampling(window._replace(stride=step), images)


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance() -> Iterator[None]:
    """Memory that nobody wrote to holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def images(memory_format: torch.memory_format, size: tuple[int, int] = (9, 10)) -> Tensor:
    return torch.randn(5, 3, *size, dtype=torch.float64).contiguous(memory_format=memory_format)


def samplings() -> Iterator[tuple[Sampling, tuple[int, int]]]:
    """Every sampling of every window, with all images or every second or third."""
    for size in SIZES:
        for window, step in itertools.product(WINDOWS.values(), STEPS):
            for thinned in (1, 2, 3):
                yield spaced(window, step, thinned), size
        for sampling in PIXELS:
            yield sampling, size


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_columns_are_those_of_unfold_at_the_sampled_spacing(window: Window, memory_format: torch.memory_format) -> None:
    for size, step, thinned in itertools.product(SIZES, STEPS, (1, 2)):
        x = images(memory_format, size)
        unfolded = F.unfold(x[::thinned], window.kernel_size, window.dilation, window.padding, step).mT
        sampling = spaced(window, step, thinned)
        columns = gather(x, sampling)
        assert unfolded.shape[1] == sampling.window.positions(size)
        assert sampling.positions(x.shape) == columns.shape[0] * columns.shape[1]
        assert torch.equal(columns, unfolded), (size, step, thinned)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_wider_spacing_takes_a_part_of_the_windows_of_the_convolution(window: Window) -> None:
    x = images(torch.contiguous_format)
    everything = gather(x, Sampling(window)).unflatten(1, window.grid((9, 10)))
    for spacing in (2, 3, 7):
        step = (spacing * window.stride[0], spacing * window.stride[1])
        columns = gather(x, spaced(window, step))
        assert torch.equal(columns, everything[:, ::spacing, ::spacing].flatten(1, 2))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_what_gpus_gather_at_once_a_cpu_gathers_by_position(
    window: Window, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, step, last in itertools.product(SIZES, STEPS, (False, True)):
        x, sampling = images(memory_format, size), spaced(window, step, 2)
        expected = gather(x, sampling, samples_last=last)
        with monkeypatch.context() as patch, _Counting() as counting:
            patch.setattr(windows, "on_cpu", lambda x: False)
            found = gather(x, sampling, samples_last=last)
        assert torch.equal(found, expected) and counting.kernels <= 3
        assert found.numel() == 0 or found.stride() == expected.stride()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((2, 3, 4, 4), (4, 4)), ((1, 3, 4, 4), (4, 4)), ((2, 1, 4, 5), (2, 5)), ((1, 1, 1, 8), (1, 3))],
)
def test_gathered_windows_are_copies(
    shape: tuple[int, ...], kernel: tuple[int, int], by_position: bool, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "on_cpu", lambda x: by_position)
    x = torch.randn(shape)
    before = x.clone()
    gather(x, Sampling(Window(kernel, (1, 1), (1, 1), (0, 0))), samples_last=last).sub_(1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_samples_last_is_a_layout_of_the_same_columns(window: Window, memory_format: torch.memory_format) -> None:
    for size, step in itertools.product(SIZES, STEPS):
        x, sampling = images(memory_format, size), spaced(window, step)
        columns = gather(x, sampling, samples_last=True)
        assert torch.equal(columns, gather(x, sampling))
        assert columns.numel() == 0 or columns.permute(2, 0, 1).is_contiguous()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("sampling", PIXELS, ids=str)
def test_pixels_are_on_a_grid_from_the_offset_or_every_nth_of_the_batch(
    sampling: Sampling, memory_format: torch.memory_format
) -> None:
    x = images(memory_format)
    window, images_, (top, left), flat = sampling
    down, right = window.stride
    if flat:
        expected = x.permute(0, 2, 3, 1).reshape(-1, 3)[:: down * right]
    else:
        places = itertools.product(range(0, 5, images_), range(top, 9, down), range(left, 10, right))
        expected = torch.stack([x[n, :, i, j] for n, i, j in places])
    assert torch.equal(gather(x, sampling).reshape(-1, 3), expected)
    assert sampling.positions(x.shape) == len(expected)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_giving_back_is_the_adjoint_of_gathering(memory_format: torch.memory_format) -> None:
    for sampling, size in samplings():
        x, before = images(memory_format, size), images(memory_format, size)
        columns = gather(x, sampling)
        cotangent = torch.randn_like(columns)
        grad = before.clone()
        scatter_add_(grad, cotangent, sampling)
        assert grad.stride() == before.stride()
        inner = (columns * cotangent).sum()
        tolerance = 1e-12 * columns.norm() * cotangent.norm()
        assert abs((x * (grad - before)).sum() - inner) <= tolerance, (sampling, size)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_giving_back_is_what_autograd_makes_of_unfold(memory_format: torch.memory_format) -> None:
    for window, step in itertools.product(WINDOWS.values(), STEPS):
        x = images(memory_format).requires_grad_()
        unfolded = F.unfold(x[::2], window.kernel_size, window.dilation, window.padding, step).mT
        cotangent = torch.randn_like(unfolded)
        (expected,) = torch.autograd.grad(unfolded, x, cotangent)
        grad = torch.zeros_like(x)
        scatter_add_(grad, cotangent, spaced(window, step, 2))
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_a_sampling_is_the_one_that_its_numbers_say() -> None:
    for sampling, _ in samplings():
        assert Sampling.of_numbers(sampling.numbers) == sampling


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("most", [1, 7, 40, 10**6])
def test_spread_windows_are_evenly_spread_windows_of_the_convolution(
    most: int, memory_format: torch.memory_format
) -> None:
    for window, size in itertools.product([PIXEL, PIXEL._replace(stride=(2, 3)), *WINDOWS.values()], SIZES):
        x = images(memory_format, size)
        everything = gather(x, Sampling(window)).flatten(0, -2)
        spread = spread_windows(x, window, most)
        total = len(everything)
        assert len(spread) == min(most, total)
        places = [(i * total + total // 2) // len(spread) for i in range(len(spread))]
        assert torch.equal(spread, everything[places]), (window, size)
