"""On a GPU the inverse root runs by its kernels, and gives what the plain form gives in float64 on a CPU."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from timm_deconv.kernels import Root, inverse_root, inverse_root_backward
from timm_deconv.linalg import covariance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

QUARTIC = Root(3, True, 1e-5, 1.0, True)
ONE_STEP, STEPS = (QUARTIC._replace(n_iter=n_iter, quartic=False) for n_iter in (1, 6))
CASES = {
    "16": (3, 16, QUARTIC),
    "27": (1, 27, QUARTIC),
    "40": (2, 40, QUARTIC._replace(n_iter=2)),
    "64": (2, 64, QUARTIC),
    "27, steps": (2, 27, STEPS),
    "64, steps": (2, 64, STEPS),
    "64, one step": (2, 64, ONE_STEP),
    "128": (2, 128, QUARTIC),
    "147": (1, 147, QUARTIC),
    "256": (1, 256, QUARTIC),
    "512": (1, 512, QUARTIC),
    "256, one step": (1, 256, ONE_STEP),
    "numbers": (960, 1, ONE_STEP),
    "numbers, quartic": (1000, 1, QUARTIC),
}
of_cases = pytest.mark.parametrize(("sets", "features", "root"), CASES.values(), ids=CASES.keys())


def inputs(sets: int, features: int) -> list[Tensor]:
    """Draw moments, and cotangents of mean and whitener, on the CPU; the last set does not vary."""
    mixing = torch.randn(features, features) * torch.logspace(0, -2, features)
    mean, cov = covariance(torch.randn(sets + 1, 2 * features + 50, features) @ mixing + 0.5)
    mean[-1], cov[-1] = 0, 0
    return [mean, cov, torch.randn_like(mean), torch.randn_like(cov)]


def on_gpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Compare each set by itself."""
    for value, reference in zip(found, expected, strict=True):
        for one, other in zip(value.cpu().double(), reference, strict=True):
            assert torch.equal(one, other) or (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("row_count", [5, 10_000])
@of_cases
def test_roots_and_gradients_are_those_of_the_plain_form(
    sets: int, features: int, root: Root, row_count: int, launches: list[Any]
) -> None:
    given, settings = inputs(sets, features), (row_count, 0.01, root)
    with torch.no_grad():
        mean, whitener, varies, kept = inverse_root(*on_gpu(given[:2]), *settings)
        there = len(launches)
        grads = inverse_root_backward(*on_gpu(given[2:]), mean, whitener, kept, *settings)
    launched = 1 if features <= 64 else 2 if root.n_iter == 1 else 3
    assert [there, len(launches) - there] == [launched, launched]
    double = [value.double() for value in given]
    expected = inverse_root.function(*double[:2], *settings)
    assert torch.equal(varies.cpu(), expected[2]) and not varies[-1]
    assert_near([mean, whitener, *kept], [*expected[:2], *expected[3]], 2e-5)
    of_double = inverse_root_backward.function(*double[2:], *expected[:2], expected[3], *settings)
    assert_near(grads, of_double, 2e-4)


def test_products_in_memory_are_the_same_at_every_call() -> None:
    given, settings = on_gpu(inputs(300, 64)), (5000, 0.01, STEPS)
    with torch.no_grad():
        first = inverse_root(*given[:2], *settings)
        gradient = inverse_root_backward(*given[2:], *first[:2], first[3], *settings)
        for _ in range(20):
            again = inverse_root(*given[:2], *settings)
            assert torch.equal(again[1], first[1])
            assert torch.equal(inverse_root_backward(*given[2:], *again[:2], again[3], *settings)[2], gradient[2])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["27, steps", "64", "147", "numbers, quartic"])
def test_the_inverse_root_on_a_gpu_is_a_sound_operation(name: str) -> None:
    sets, features, root = CASES[name]
    mean, cov, *grads = on_gpu(inputs(sets, features))
    settings = (100, 0.01, root)
    args = (mean.clone().requires_grad_(), cov.clone().requires_grad_(), *settings)
    torch.library.opcheck(inverse_root.op, tuple(inverse_root.encoded(args)))
    mean, whitener, _, kept = inverse_root(mean, cov, *settings)
    args = (*grads, mean, whitener, kept, *settings)
    torch.library.opcheck(inverse_root_backward.op, tuple(inverse_root_backward.encoded(args)))


@of_cases
@torch.no_grad()
def test_a_captured_graph_finds_the_root_that_an_eager_call_does(sets: int, features: int, root: Root) -> None:
    given, settings = on_gpu(inputs(sets, features)), (5000, 0.01, root)

    def step() -> list[Tensor]:
        mean, whitener, varies, kept = inverse_root(*given[:2], *settings)
        grads = inverse_root_backward(*given[2:], mean, whitener, kept, *settings)
        return [mean, whitener, varies, *kept, *grads]

    expected, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(ours, eager) for ours, eager in zip(captured, expected, strict=True))
