"""Kernels of moments and of the gradient through them, against the plain form in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu.poison import poisoned_memory
from timm_deconv.kernels import PIXEL, Blocks, Sampling, Window, moments
from timm_deconv.kernels.gpu import moments as kernels
from timm_deconv.kernels.gpu.launch import Unfit

PLAIN_GRADIENT = moments.add_moments_gradient_.function


def pixels(*stride: int, images: int = 1, offset: tuple[int, int] = (0, 0)) -> Sampling:
    return Sampling(PIXEL._replace(stride=stride), images, offset)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


CASES = {
    "a block": ((3, 24, 5, 6), pixels(1, 1), Blocks(1, 24)),
    "blocks of five": ((3, 15, 5, 6), pixels(2, 1), Blocks(3, 5)),
    "blocks of one": ((2, 7, 3, 4), pixels(1, 1), Blocks(7, 1)),
    "one offset pixel an image": ((5, 8, 5, 6), pixels(7, 7, offset=(2, 3)), Blocks(2, 4)),
    "every third image": ((7, 36, 5, 6), pixels(2, 3, images=3, offset=(1, 0)), Blocks(1, 36)),
    "two tiles": ((2, 96, 5, 4), pixels(1, 1), Blocks(1, 96)),
    "three tiles and fewer rows than features": ((1, 147, 5, 4), pixels(1, 1), Blocks(1, 147)),
    "two rows": ((2, 16, 1, 1), pixels(1, 1), Blocks(1, 16)),
    "one row": ((1, 5, 1, 1), pixels(1, 1), Blocks(1, 5)),
    "groups": ((3, 24, 5, 6), pixels(2, 2), Blocks(3, 8, groups=3)),
    "groups of two tiles": ((2, 140, 3, 4), pixels(1, 1), Blocks(2, 70, groups=2)),
    "depthwise": ((3, 70, 5, 6), pixels(1, 2), Blocks(70, 1, groups=70)),
    "depthwise, one row": ((1, 4, 1, 1), pixels(1, 1), Blocks(4, 1, groups=4)),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": channels_last,
    "spaced": lambda x: _placed(x.new_empty([3 * extent + 2 for extent in x.shape])[2::3, 1:-1:3, 2::3, :-2:3], x),
    "images innermost": lambda x: _placed(x.new_empty(x.shape[::-1]).permute(3, 2, 1, 0), x),
}


def _placed(memory: Tensor, values: Tensor) -> Tensor:
    return memory[tuple(slice(extent) for extent in values.shape)].copy_(values)


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance() -> Iterator[None]:
    with poisoned_memory():
        yield


def check_moments(x: Tensor, sampling: Sampling, blocks: Blocks) -> None:
    mean, cov = kernels.sampled_moments(x, sampling, blocks)
    expected = moments.plain_moments(x.double(), sampling, blocks)
    assert mean.dtype == cov.dtype == torch.float32
    assert torch.equal(cov, cov.mT)
    torch.testing.assert_close((mean.double(), cov.double()), expected, rtol=1e-5, atol=1e-6)


def check_gradient(grad_x: Tensor, x: Tensor, sampling: Sampling, blocks: Blocks) -> None:
    mean = torch.randn(blocks.sets, blocks.features)
    grad_mean, grad_cov = torch.randn_like(mean), torch.randn(*mean.shape, blocks.features)
    given = x, mean, grad_mean, grad_cov + grad_cov.mT
    expected = grad_x.double()
    PLAIN_GRADIENT(expected, *(tensor.double() for tensor in given), sampling, blocks)
    kernels.add_moments_gradient_(grad_x, *given, sampling, blocks)
    rounding = torch.finfo(grad_x.dtype).eps
    torch.testing.assert_close(grad_x.double(), expected, rtol=max(rounding, 1e-5), atol=1e-5)


@pytest.mark.parametrize(("shape", "sampling", "blocks"), CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_those_of_the_plain_form(
    shape: tuple[int, ...], sampling: Sampling, blocks: Blocks
) -> None:
    x = channels_last(torch.randn(shape) + 1)
    check_moments(x, sampling, blocks)
    check_gradient(channels_last(torch.randn(shape)), x, sampling, blocks)


@pytest.mark.parametrize("name", ["blocks of five", "two tiles", "groups", "depthwise"])
def test_half_precision_is_computed_in_float32_and_rounded_once(name: str) -> None:
    shape, sampling, blocks = CASES[name]
    x = torch.randn(shape).half()
    check_moments(x, sampling, blocks)
    check_gradient(torch.randn(shape).half(), x, sampling, blocks)


@pytest.mark.parametrize("of_grad", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("of_x", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", ["blocks of five", "every third image", "groups", "depthwise"])
def test_any_strides_will_do(
    name: str, of_x: Callable[[Tensor], Tensor], of_grad: Callable[[Tensor], Tensor]
) -> None:
    shape, sampling, blocks = CASES[name]
    x = of_x(torch.randn(shape))
    check_moments(x, sampling, blocks)
    check_gradient(of_grad(torch.randn(shape)), x, sampling, blocks)


@pytest.mark.parametrize("name", ["blocks of five", "groups", "depthwise"])
def test_inputs_may_overlap_themselves(name: str) -> None:
    shape, sampling, blocks = CASES[name]
    for x in (
        torch.randn(1, *shape[1:]).expand(shape),
        torch.randn(*shape[:2], 1, shape[3]).expand(shape),
        torch.randn(400).as_strided(shape, (20, 3, 2, 1)),
    ):
        check_moments(x, sampling, blocks)
        check_gradient(torch.randn(shape), x, sampling, blocks)


@pytest.mark.parametrize("name", ["two tiles", "groups", "depthwise"])
def test_gradients_of_moments_may_have_any_strides(name: str) -> None:
    shape, sampling, blocks = CASES[name]
    x, grad_x, mean = torch.randn(shape), torch.randn(shape), torch.randn(blocks.sets, blocks.features)
    grad_mean = torch.randn(1, 1).expand_as(mean)
    grad_cov = torch.randn(1, 2 * blocks.features, blocks.features)[:, ::2].expand(blocks.sets, -1, -1)
    grad_cov = grad_cov + grad_cov.mT if blocks.features > 1 else grad_cov
    expected = grad_x.double()
    given = x, mean, grad_mean, grad_cov.mT
    PLAIN_GRADIENT(expected, *(tensor.double() for tensor in given), sampling, blocks)
    kernels.add_moments_gradient_(grad_x, *given, sampling, blocks)
    torch.testing.assert_close(grad_x.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("deviation", [0.01, 1.0])
@pytest.mark.parametrize("name", ["a block", "every third image", "depthwise"])
def test_a_mean_far_larger_than_the_deviations_costs_no_digits(name: str, deviation: float) -> None:
    shape, sampling, blocks = CASES[name]
    of_images = torch.randn(*shape[:2], 1, 1)
    x = 100 + deviation * (torch.randn(shape) + of_images)
    mean, cov = kernels.sampled_moments(x, sampling, blocks)
    expected_mean, expected_cov = moments.plain_moments(x.double(), sampling, blocks)
    assert (cov - expected_cov).norm() <= 1e-6 * expected_cov.norm()
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-7, atol=0)


def test_a_first_row_far_from_all_others_costs_few_digits() -> None:
    x = torch.randn(8, 24, 6, 6)
    x[0, :, 0, 0] = 1e3
    for blocks in (Blocks(1, 24), Blocks(24, 1, groups=24)):
        _, cov = kernels.sampled_moments(x, pixels(1, 1), blocks)
        _, expected = moments.plain_moments(x.double(), pixels(1, 1), blocks)
        assert (cov - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("programs", [1, 3, 100])
@pytest.mark.parametrize("name", ["blocks of five", "two tiles", "groups", "depthwise"])
def test_rows_may_come_in_any_number_of_chunks(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, sampling, blocks = CASES[name]
    small = {"ROWS": 16, "TURNS": 1, "JOINED": 2, "PROGRAMS": programs}
    for constant, value in small.items():
        monkeypatch.setattr(kernels, constant, value)
    check_moments(torch.randn(shape) + 3 * torch.randn(*shape[:2], 1, 1), sampling, blocks)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("name", ["one offset pixel an image", "every third image", "groups"])
def test_what_is_not_sampled_is_neither_read_nor_written(name: str, layout: str) -> None:
    shape, sampling, blocks = CASES[name]
    sampled = torch.zeros(shape)
    (top, left), (down, right) = sampling.offset, sampling.window.stride
    sampled[:: sampling.images, :, top::down, left::right] = 1
    x = LAYOUTS[layout](torch.randn(shape).where(sampled == 1, torch.nan))
    mean, cov = kernels.sampled_moments(x, sampling, blocks)
    assert mean.isfinite().all() and cov.isfinite().all()
    grad = x.clone()
    kernels.add_moments_gradient_(grad, x, mean, mean, cov, sampling, blocks)
    assert torch.equal(grad.isfinite(), sampled == 1)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of inf - inf
@pytest.mark.parametrize("name", ["blocks of five", "groups", "depthwise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_features(name: str, value: float) -> None:
    shape, sampling, blocks = CASES[name]
    for image in (0, 1):
        x = torch.randn(shape)
        x[image, 3, 0, 0] = value
        mean, cov = kernels.sampled_moments(x, sampling, blocks)
        found, expected = cov.isfinite(), moments.plain_moments(x.double(), sampling, blocks)[1].isfinite()
        assert torch.equal(found, expected)
        assert int((~mean.isfinite()).sum()) == 1


@pytest.mark.parametrize("name", ["one offset pixel an image", "depthwise"])
def test_images_may_lie_farther_apart_than_32_bits_count(name: str) -> None:
    shape, sampling, blocks = CASES[name]
    steps = (2**30, *torch.empty(shape[1:]).stride())
    x = torch.empty(0, dtype=torch.float16).set_(torch.UntypedStorage(2**31 * 2 + 2**20), 0, (3, *shape[1:]), steps)
    x.copy_(torch.randn(x.shape))  # the memory between them is never there
    check_moments(x, sampling, blocks)
    check_gradient(x, x.contiguous(), sampling, blocks)


SILENT = {
    "windows": ((2, 4, 5, 5), Sampling(Window((3, 3), (1, 1), (1, 1), (1, 1))), Blocks(1, 36, pixels=False)),
    "flat": ((2, 4, 5, 5), Sampling(PIXEL, flat=True), Blocks(1, 4)),
    "interleaved": ((2, 4, 5, 5), Sampling(PIXEL), Blocks(2, 2, interleaved=True, pixels=False)),
    "no image": ((0, 4, 5, 5), Sampling(PIXEL), Blocks(1, 4)),
    "no pixel": ((2, 4, 5, 0), Sampling(PIXEL), Blocks(1, 4)),
    "an offset beyond the image": ((2, 4, 5, 5), pixels(1, 1, offset=(0, 6)), Blocks(1, 4)),
    "another number of channels": ((2, 6, 5, 5), Sampling(PIXEL), Blocks(1, 4)),
}


@pytest.mark.parametrize(("shape", "sampling", "blocks"), SILENT.values(), ids=SILENT.keys())
def test_what_is_meant_for_the_plain_form_is_left_to_it_silently(
    shape: tuple[int, ...], sampling: Sampling, blocks: Blocks
) -> None:
    x, mean = torch.randn(shape), torch.randn(blocks.sets, blocks.features)
    cov = torch.randn(*mean.shape, blocks.features)
    with pytest.raises(Unfit) as error:
        kernels.sampled_moments(x, sampling, blocks)
    assert not str(error.value)
    with pytest.raises(Unfit) as error:
        kernels.add_moments_gradient_(torch.zeros(shape), x, mean, mean, cov, sampling, blocks)
    assert not str(error.value)


def test_float64_and_gradients_that_overlap_themselves_are_unfit_with_a_reason() -> None:
    x, sampling, blocks = torch.randn(2, 4, 3, 3), Sampling(PIXEL), Blocks(1, 4)
    with pytest.raises(Unfit, match="float64"):
        kernels.sampled_moments(x.double(), sampling, blocks)
    mean, cov = kernels.sampled_moments(x, sampling, blocks)
    with pytest.raises(Unfit, match="float64"):
        kernels.add_moments_gradient_(x, x, mean, mean, cov.double(), sampling, blocks)
    for grad_x in (torch.zeros(1, 4, 3, 3).expand_as(x), torch.zeros(60).as_strided(x.shape, (20, 4, 2, 1))):
        with pytest.raises(Unfit, match="overlaps"):
            kernels.add_moments_gradient_(grad_x, x, mean, mean, cov, sampling, blocks)
