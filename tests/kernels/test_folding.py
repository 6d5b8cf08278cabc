"""Folding is a sound operation, gives what the plain form gives, and can be derived twice by it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from timm_deconv.kernels import Blocks, Operation, fold_whitening, fold_whitening_backward, onednn
from timm_deconv.kernels.folding import fold

# torch's own check looks at gradients of inner tensors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

FORMATS = [torch.contiguous_format, torch.channels_last]
FEW = pytest.mark.parametrize("few", [2**23, 0], ids=["matrix products", "convolutions"])
FOLDINGS = {
    "interleaved": ((6, 8, 3, 3), Blocks(4, 18, interleaved=True, pixels=False)),
    "windows": ((6, 8, 3, 3), Blocks(4, 18, pixels=False)),
    "pixels": ((6, 8, 3, 2), Blocks(2, 4)),
    "kernels of one": ((6, 8, 1, 1), Blocks(2, 4)),
    "groups": ((6, 4, 3, 3), Blocks(2, 36, groups=2, pixels=False)),
    "pixels of groups": ((6, 4, 3, 3), Blocks(2, 4, groups=2)),
    "depthwise": ((16, 1, 3, 3), Blocks(8, 1, groups=8)),
    "single channels": ((6, 8, 3, 3), Blocks(8, 1)),
}


def check_operator(operation: Operation, *args: Any) -> None:
    torch.library.opcheck(operation.op, tuple(operation.encoded(args)))


def folding_inputs(
    shape: tuple[int, ...], blocks: Blocks, memory_format: torch.memory_format, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Draw a weight, a bias, a mean and a whitener; statistics are in float32 or better."""
    wide = torch.promote_types(dtype, torch.float32)
    sets, features = blocks.sets, blocks.features
    weight = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)
    bias, mean = torch.randn(shape[0], dtype=dtype), torch.randn(sets, features, dtype=wide)
    whitener = torch.randn(sets, features, features, dtype=wide)  # not symmetric, so that no transpose is mistaken
    return [tensor.requires_grad_() for tensor in (weight, bias, mean, whitener)]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("shape", "blocks"), FOLDINGS.values(), ids=FOLDINGS.keys())
def test_folding_is_a_sound_operation(
    shape: tuple[int, ...], blocks: Blocks, memory_format: torch.memory_format
) -> None:
    weight, bias, mean, whitener = folding_inputs(shape, blocks, memory_format)
    for last, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        check_operator(fold_whitening, weight, bias, mean, whitener, blocks, dtype, last)
    check_operator(fold_whitening, weight, None, mean, whitener, blocks, torch.float32, True)
    weight, bias, mean, whitener = (value.detach() for value in (weight, bias, mean, whitener))
    for statistics in (False, True):
        grads = torch.randn_like(weight).bfloat16(), bias.bfloat16()
        check_operator(fold_whitening_backward, *grads, weight, mean, whitener, blocks, statistics)


@FEW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("shape", "blocks"), FOLDINGS.values(), ids=FOLDINGS.keys())
def test_folding_and_its_gradients_are_those_of_the_plain_form(
    shape: tuple[int, ...],
    blocks: Blocks,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    few: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "FEW_PRODUCTS", few)
    inputs = folding_inputs(shape, blocks, memory_format, dtype)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    for has_bias, last in ((True, False), (False, True)):
        (weight, bias, *statistics), (exact_weight, exact_bias, *exact_statistics) = inputs, exact
        found = fold_whitening(weight, bias if has_bias else None, *statistics, blocks, dtype, last)
        expected = fold(exact_weight, exact_bias if has_bias else None, *exact_statistics, blocks)
        assert [value.dtype for value in found] == [dtype, dtype]
        assert found[0].is_contiguous(memory_format=FORMATS[last])
        assert_near(found, expected, tolerance)
        cotangents = [torch.randn_like(value) for value in found]
        wanted = [index for index in range(4) if has_bias or index != 1]
        ours = torch.autograd.grad(found, [inputs[i] for i in wanted], cotangents)
        theirs = torch.autograd.grad(expected, [exact[i] for i in wanted], [value.double() for value in cotangents])
        assert [value.dtype for value in ours] == [inputs[i].dtype for i in wanted]
        assert ours[0].stride() == weight.stride() or 1 in (shape[1], shape[2])
        assert_near(ours, theirs, tolerance)


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for value, reference in zip(found, expected, strict=True):
        assert value.shape == reference.shape
        assert (value.double() - reference).norm() <= tolerance * reference.norm()


def test_the_statistics_gradient_of_folding_is_left_out_where_nothing_asks_for_it() -> None:
    blocks = Blocks(2, 4)
    weight, bias, mean, whitener = (value.detach() for value in folding_inputs((6, 8, 3, 3), blocks, *FORMATS[:1]))
    arguments = (torch.randn_like(weight), bias, weight, mean, whitener, blocks)
    (own, nothing), (expected, _) = (fold_whitening_backward(*arguments, statistics) for statistics in (False, True))
    torch.testing.assert_close(own, expected)
    assert nothing == []


def test_folding_can_be_derived_twice() -> None:
    blocks = Blocks(2, 2)
    inputs = folding_inputs((3, 4, 2, 1), blocks, torch.contiguous_format, torch.float64)
    assert torch.autograd.gradgradcheck(lambda *given: fold_whitening(*given, blocks, torch.float64, False), inputs)
