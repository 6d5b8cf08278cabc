"""Kernels of the inverse root compile for GPUs that are not here, within their limits, and are launched as seldom as is
said."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.ahead import Launched, check_resources, launches_of, on_gpus
from timm_deconv.kernels import Root
from timm_deconv.kernels.gpu import roots

QUARTIC = Root(3, True, 1e-5, 1.0, True)
ONE_STEP, STEPS = (QUARTIC._replace(n_iter=n_iter, quartic=False) for n_iter in (1, 5))
CASES = {
    "numbers": (1, QUARTIC),
    "numbers, one step": (1, ONE_STEP),
    "16": (16, QUARTIC),
    "27": (27, QUARTIC),
    "64": (64, QUARTIC),
    "64, one step": (64, ONE_STEP),
    "27, steps": (27, STEPS),
    "64, steps": (64, STEPS),
    "128": (128, QUARTIC),
    "256": (256, QUARTIC),
    "256, one step": (256, ONE_STEP),
}
of_cases = pytest.mark.parametrize(("features", "root"), CASES.values(), ids=CASES.keys())


def forward(features: int, root: Root, sets: int = 2) -> list[Launched]:
    mean, cov = torch.empty(sets, features), torch.empty(sets, features, features)
    return launches_of(lambda: roots.inverse_root(mean, cov, 100, 0.01, root))


def backward(features: int, root: Root, sets: int = 2) -> list[Launched]:
    mean, cov = torch.empty(sets, features), torch.empty(sets, features, features)
    kept = [torch.empty(sets, 1, 1), *(torch.empty_like(cov) for _ in range(3 if root.coefficients else 1))]
    given = mean, cov, mean, cov, kept, 100, 0.01, root
    return launches_of(lambda: roots.inverse_root_backward(*given))


@of_cases
def test_up_to_64_features_are_one_launch_there_and_one_back_and_more_are_three(features: int, root: Root) -> None:
    expected = 1 if features <= 64 else 2 if root.n_iter == 1 else 3
    assert [len(forward(features, root)), len(backward(features, root))] == [expected, expected]


def test_a_program_has_a_matrix_or_a_tile_of_one_or_many_numbers() -> None:
    assert [one.grid for one in forward(64, QUARTIC, 5)] == [(5,)]
    assert [one.grid for one in forward(256, QUARTIC, 5)] == [(16, 5)] * 3
    assert [one.grid for one in forward(1, QUARTIC, 960)] == [(8,)]


@on_gpus([name for name in CASES if name != "128"], ["numbers", "27, steps", "64", "256"])
def test_every_kernel_fits_a_gpu_without_spilling(case: str, capability: int) -> None:
    features, root = CASES[case]
    for one in forward(features, root) + backward(features, root):
        check_resources(one, capability)


def test_a_limit_that_is_not_kept_is_noticed() -> None:
    with pytest.raises(AssertionError, match="whiten_matrix"):
        check_resources(forward(64, QUARTIC)[0], 90, most_registers=64)
