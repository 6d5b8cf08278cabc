"""The operations are sound custom ops, give what the plain forms give, and can be derived twice by these."""

from typing import Any

import pytest
import torch
from torch import Tensor

from timm_deconv.kernels import (
    PIXEL,
    Blocks,
    Operation,
    Root,
    Sampling,
    Window,
    add_moments_gradient_,
    apply_whitener,
    apply_whitener_backward,
    inverse_root,
    inverse_root_backward,
    onednn,
    sampled_moments,
)
from timm_deconv.kernels.application import plain_application
from timm_deconv.kernels.moments import plain_moments

# torch's own check looks at gradients of inner tensors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

FORMATS = [torch.contiguous_format, torch.channels_last]
FEW = pytest.mark.parametrize("few", [2**23, 0], ids=["matrix products", "convolutions"])

MOMENTS = {
    "windows": (Sampling(Window((3, 3), (2, 1), (1, 1), (1, 1)), 2), Blocks(4, 18, interleaved=True, pixels=False)),
    "pixels": (Sampling(PIXEL._replace(stride=(2, 2)), 1, (1, 0)), Blocks(2, 4)),
    "flat": (Sampling(PIXEL._replace(stride=(3, 3)), flat=True), Blocks(1, 8)),
    "groups": (Sampling(Window((3, 3), (1, 1), (1, 1), (1, 1))), Blocks(2, 36, groups=2, pixels=False)),
    "depthwise": (Sampling(PIXEL), Blocks(8, 1, groups=8)),
}
def check_operator(operation: Operation, *args: Any) -> None:
    """Let torch check schema, fake form, autograd and compilation of an operator."""
    torch.library.opcheck(operation.op, tuple(operation.encoded(args)))


def covariances(sets: int = 2, features: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(sets, 40, features, dtype=dtype)
    return rows.mT @ rows / 40 + 1e-3 * torch.eye(features, dtype=dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("sampling", "blocks"), MOMENTS.values(), ids=MOMENTS.keys())
def test_moments_are_a_sound_operation(
    sampling: Sampling, blocks: Blocks, memory_format: torch.memory_format
) -> None:
    x = torch.randn(5, 8, 9, 10).contiguous(memory_format=memory_format)
    check_operator(sampled_moments, x.clone().requires_grad_(), sampling, blocks)
    mean, cov = sampled_moments(x, sampling, blocks)
    check_operator(add_moments_gradient_, torch.zeros_like(x), x, mean, mean, cov, sampling, blocks)


@pytest.mark.parametrize(("n_iter", "quartic"), [(1, False), (3, True), (5, False), (9, False)])
def test_roots_are_a_sound_operation(n_iter: int, quartic: bool) -> None:
    mean, cov = torch.randn(2, 5), covariances(dtype=torch.float32)
    settings = (30, 0.01, Root(n_iter, quartic, 1e-2, 10.0, True))
    check_operator(inverse_root, mean.requires_grad_(), cov.clone().requires_grad_(), *settings)
    mean, whitener, _, kept = inverse_root(mean.detach(), cov, *settings)
    check_operator(inverse_root_backward, mean, whitener, mean, whitener, kept, *settings)


@FEW
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(4, 8, 5, 6), (4, 8, 1, 1)])
def test_applications_are_a_sound_operation(
    shape: tuple[int, ...], memory_format: torch.memory_format, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "FEW_PRODUCTS", few)
    images = torch.randn(shape).contiguous(memory_format=memory_format)
    whitener = covariances(1, 4, torch.float32)
    check_operator(apply_whitener, images.clone().requires_grad_(), whitener)
    check_operator(apply_whitener_backward, torch.randn_like(images), images, whitener)


@FEW
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(4, 8, 5, 6), (4, 8, 1, 1)])
def test_applications_and_their_gradients_are_those_of_the_plain_form(
    shape: tuple[int, ...], memory_format: torch.memory_format, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "FEW_PRODUCTS", few)
    images = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    whitener = covariances(1, 4, torch.float32).requires_grad_()
    found = apply_whitener(images, whitener)
    assert found.is_contiguous(memory_format=memory_format)
    expected = plain_application(images.double(), whitener.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(shape)
    ours = torch.autograd.grad(found, (images, whitener), cotangent)
    theirs = torch.autograd.grad(expected, (images, whitener), cotangent.double())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("sampling", "blocks"), MOMENTS.values(), ids=MOMENTS.keys())
def test_moments_and_their_gradient_are_those_of_the_plain_form(
    sampling: Sampling, blocks: Blocks, memory_format: torch.memory_format
) -> None:
    x = torch.randn(5, 8, 9, 10, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    found, expected = (form(x, sampling, blocks) for form in (sampled_moments, plain_moments))
    torch.testing.assert_close(found, expected)
    cotangents = [torch.randn_like(value) for value in expected]
    (ours,) = torch.autograd.grad(found, x, cotangents)
    (theirs,) = torch.autograd.grad(expected, x, cotangents)
    torch.testing.assert_close(ours, theirs)


def test_each_operation_can_be_derived_twice() -> None:
    x = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    sampling, blocks = Sampling(PIXEL), Blocks(2, 2)
    assert torch.autograd.gradgradcheck(lambda x: sampled_moments(x, sampling, blocks), (x,))
    mean, cov = torch.randn(1, 3, dtype=torch.float64, requires_grad=True), covariances(1, 3).requires_grad_()
    for n_iter, quartic in ((2, False), (3, True)):
        settings = (10, 0.01, Root(n_iter, quartic, 1e-2, 5.0, True))
        symmetric = lambda mean, cov, s=settings: inverse_root(mean, (cov + cov.mT) / 2, *s)[:2]  # noqa: E731
        assert torch.autograd.gradgradcheck(symmetric, (mean, cov))
    whitener = covariances(1, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(apply_whitener, (x, whitener))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_precision_are_in_float32_under_autocast_too(dtype: torch.dtype) -> None:
    x = torch.randn(5, 8, 9, 10).to(dtype)
    sampling, blocks = MOMENTS["windows"]
    with torch.autocast("cpu", torch.bfloat16):
        found = sampled_moments(x, sampling, blocks)
    torch.testing.assert_close(found, plain_moments(x.float(), sampling, blocks))


def test_a_registered_kernel_runs_on_its_device_in_eager_mode_and_as_an_operator() -> None:
    twice = Operation(_doubled, "(Tensor x, SymInt[] blocks) -> Tensor")
    x, blocks = torch.ones(3), Blocks(2, 4)
    with torch.no_grad():
        assert torch.equal(twice(x, blocks), 2 * x * 4)
        twice.register_kernel("cpu", lambda x, blocks: 10 * x * blocks.features)
        assert torch.equal(twice(x, blocks), 40 * x)
    assert torch.equal(twice(x, blocks), 40 * x)


def _doubled(x: Tensor, blocks: Blocks) -> Tensor:
    return 2 * x * blocks.features
