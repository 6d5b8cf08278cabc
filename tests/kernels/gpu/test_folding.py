"""Kernels of folding and of the gradients through it, against the plain form in float64."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu.poison import poisoned_memory
from timm_deconv.kernels import Blocks, folding
from timm_deconv.kernels.formats import is_channels_last
from timm_deconv.kernels.gpu import folding as kernels
from timm_deconv.kernels.gpu.launch import Unfit

PLAIN, PLAIN_BACKWARD = folding.fold_whitening.function, folding.fold_whitening_backward.function
FORMATS = [torch.contiguous_format, torch.channels_last]

CASES = {
    "windows": ((6, 8, 3, 3), Blocks(4, 18, pixels=False)),
    "pixels": ((5, 10, 3, 2), Blocks(2, 5)),
    "24 features": ((3, 24, 2, 1), Blocks(1, 24)),
    "36 features, more than one tile of rows": ((40, 36, 1, 1), Blocks(1, 36)),
    "rows split among programs": ((140, 2, 1, 1), Blocks(1, 2)),
    "two tiles": ((3, 96, 2, 1), Blocks(1, 96)),
    "two tiles, rows split among programs": ((131, 66, 1, 1), Blocks(1, 66)),
    "three tiles of a window": ((3, 3, 7, 7), Blocks(1, 147, pixels=False)),
    "groups": ((6, 4, 3, 3), Blocks(2, 36, groups=2, pixels=False)),
    "pixels of groups": ((6, 24, 3, 2), Blocks(2, 24, groups=2)),
    "single channels of one set": ((6, 4, 3, 3), Blocks(4, 1)),
    "depthwise": ((6, 1, 3, 3), Blocks(3, 1, groups=3)),
    "depthwise, large kernels": ((2, 1, 33, 33), Blocks(2, 1, groups=2)),
}
of_cases = pytest.mark.parametrize(("shape", "blocks"), CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance() -> Iterator[None]:
    with poisoned_memory():
        yield


def statistics(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Draw a mean and a whitener that is not symmetric, so that no transpose is mistaken."""
    return torch.randn(blocks.sets, blocks.features), torch.randn(blocks.sets, blocks.features, blocks.features)


def in_double(*values: Tensor | None) -> list[Tensor | None]:
    return [None if value is None else value.double() for value in values]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for value, reference in zip(found, expected, strict=True):
        assert value.shape == reference.shape
        assert (value.double() - reference).norm() <= tolerance * reference.norm()


def check_folding(weight: Tensor, bias: Tensor | None, blocks: Blocks, dtype: torch.dtype, last: bool) -> None:
    mean, whitener = statistics(blocks)
    found = kernels.fold_whitening(weight, bias, mean, whitener, blocks, dtype, last)
    expected = PLAIN(*in_double(weight, bias, mean, whitener), blocks, torch.float64, last)
    assert found[0].is_contiguous(memory_format=FORMATS[last]) and {value.dtype for value in found} == {dtype}
    assert_near(found, expected, max(torch.finfo(dtype).eps, 1e-5))


def check_gradients(grad: Tensor, grad_bias: Tensor, weight: Tensor, blocks: Blocks, with_statistics: bool) -> None:
    given = (grad, grad_bias, weight, *statistics(blocks))
    own, of_statistics = kernels.fold_whitening_backward(*given, blocks, with_statistics)
    expected, expected_of_statistics = PLAIN_BACKWARD(*in_double(*given), blocks, with_statistics)
    assert own.dtype == weight.dtype and own.is_contiguous(memory_format=FORMATS[is_channels_last(weight)])
    assert_near([own], [expected], max(torch.finfo(own.dtype).eps, 1e-5))
    assert_near(of_statistics, expected_of_statistics)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@of_cases
def test_values_and_gradients_are_those_of_the_plain_form(
    shape: tuple[int, ...], blocks: Blocks, last: bool
) -> None:
    weight, grad = (torch.randn(shape).contiguous(memory_format=FORMATS[last]) for _ in range(2))
    bias = torch.randn(len(weight))
    check_folding(weight, bias, blocks, torch.float32, last)
    check_gradients(grad, bias, weight, blocks, with_statistics=True)


@pytest.mark.parametrize("name", ["windows", "pixels", "two tiles", "depthwise"])
def test_formats_and_dtypes_of_weight_and_gradient_may_differ(name: str) -> None:
    shape, blocks = CASES[name]
    for weight_last in (False, True):
        weight = torch.randn(shape).contiguous(memory_format=FORMATS[weight_last])
        grad = torch.randn(shape).half().contiguous(memory_format=FORMATS[not weight_last])
        bias = torch.randn(len(weight)).half()
        check_folding(weight, None, blocks, torch.float16, not weight_last)
        check_folding(weight.half(), bias, blocks, torch.float32, not weight_last)
        check_gradients(grad, bias, weight, blocks, with_statistics=True)
        check_gradients(grad.float(), bias, weight.half(), blocks, with_statistics=False)


@pytest.mark.parametrize("name", ["pixels", "depthwise"])
def test_any_strides_will_do(name: str) -> None:
    shape, blocks = CASES[name]
    spaced = torch.randn([2 * extent for extent in shape])[::2, ::2, ::2, ::2]
    turned = torch.randn(shape[::-1]).permute(3, 2, 1, 0)
    constant = torch.randn(()).expand(shape)
    for weight, grad in ((spaced, turned), (turned, constant), (constant, spaced)):
        bias = torch.randn(2 * len(weight))[::2]
        check_folding(weight, bias, blocks, torch.float32, False)
        check_gradients(grad, bias, weight, blocks, with_statistics=True)


@pytest.mark.parametrize("name", ["windows", "two tiles, rows split among programs", "depthwise"])
def test_the_gradient_of_the_weight_alone_is_the_same(name: str) -> None:
    shape, blocks = CASES[name]
    given = (torch.randn(shape), torch.randn(shape[0]), torch.randn(shape), *statistics(blocks))
    own, nothing = kernels.fold_whitening_backward(*given, blocks, False)
    assert torch.equal(own, kernels.fold_whitening_backward(*given, blocks, True)[0]) and nothing == []


def test_a_number_that_is_not_finite_stays_in_its_output() -> None:
    blocks = Blocks(2, 4)
    weight = torch.randn(6, 8, 3, 3)
    weight[2, 3, 1, 1] = float("nan")
    for values in kernels.fold_whitening(weight, None, *statistics(blocks), blocks, torch.float32, False):
        finite = values.isfinite().reshape(6, -1).all(1)
        assert finite.tolist() == [True, True, False, True, True, True]


def test_interleaved_and_very_long_rows_are_left_to_the_plain_form_without_a_word() -> None:
    for blocks, channels in ((Blocks(2, 4, interleaved=True), 8), (Blocks(1, 600), 600)):
        weight, bias = torch.randn(2, channels, 1, 1), torch.randn(2)
        mean, whitener = statistics(blocks)
        with pytest.raises(Unfit, match=r"^$"):
            kernels.fold_whitening(weight, bias, mean, whitener, blocks, torch.float32, False)
        with pytest.raises(Unfit, match=r"^$"):
            kernels.fold_whitening_backward(weight, bias, weight, mean, whitener, blocks, True)


def test_float64_is_left_to_the_plain_form() -> None:
    blocks = Blocks(1, 4)
    weight, bias, (mean, whitener) = torch.randn(2, 4, 1, 1).double(), torch.randn(2), statistics(blocks)
    with pytest.raises(Unfit, match="float64"):
        kernels.fold_whitening(weight, bias, mean, whitener, blocks, torch.float32, False)
    with pytest.raises(Unfit, match="float64"):
        kernels.fold_whitening_backward(weight, bias, weight, mean, whitener, blocks, True)
