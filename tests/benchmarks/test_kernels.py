"""Launched kernels are counted, on examples that can be counted by hand."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.kernels import COLUMNS, LAYERS, KernelSettings, compiled_kernels, eager_kernels, kernel_rows
from timm_deconv.errors import InputError


class Products(nn.Module):
    """Forward a product, a sine and a view; backward the two gradients of the product, and that of the sine."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x.mT @ self.weight).sin().view(-1)


def test_views_and_allocations_launch_nothing() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    forward = ["mm", "sin"]
    backward = ["cos", "mul", "mm", "mm"]
    accumulation = ["clone of the weight's gradient", "clone of that of x"]
    assert len(forward + backward) <= eager_kernels(Products(), x) <= len(forward + backward + accumulation)


def test_pointwise_whitening_launches_at_most_18_kernels_on_a_gpu_and_140_in_its_plain_form() -> None:
    example = LAYERS["pointwise"]
    settings = KernelSettings(layers=["pointwise"], presets=["fast"], compiled=False)
    row, on_gpu = kernel_rows(settings, lambda message: None)
    assert set(row) == set(on_gpu) == set(COLUMNS)
    assert row["eager_plain"] == eager_kernels(
        example.plain(**example.arguments), torch.randn(example.shape, requires_grad=True)
    )
    assert row["eager_plain"] < on_gpu["eager"] <= 18
    assert on_gpu["eager"] < row["eager"] <= 140
    assert [row["path"], on_gpu["path"]] == ["plain", "triton"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, raised while it compiles
def test_compiled_kernels_are_those_that_are_left_after_fusion() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    assert compiled_kernels(Products(), x) == 5  # three products, a sine, a cosine with its product


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(InputError, match="no layer 'pointwize'; nearest: depthwise, pointwise"):
        KernelSettings(layers=["pointwize"])
