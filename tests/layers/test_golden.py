"""The layers give the published numbers: outputs, gradients, running statistics, freezing, evaluation."""

import pytest
import torch
from torch import Tensor, nn

from tests.golden_files import LayerCase, layer_case, layer_case_names, relative_error, tolerance
from timm_deconv.layers import compat


def build(case: LayerCase, dtype: torch.dtype) -> nn.Module:
    layer = getattr(compat, case.layer)(**case.args).to(dtype)
    initial = {name.removeprefix("init."): value for name, value in case.tensors.items() if name.startswith("init.")}
    layer.load_state_dict(initial, strict=False)
    return layer


def forward_backward(layer: nn.Module, case: LayerCase, step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    layer.zero_grad()
    x = case.tensors[f"step{step}.input"].to(dtype, copy=True).requires_grad_()
    output = layer(x)
    (output * case.tensors[f"step{step}.cotangent"].to(dtype)).sum().backward()
    gradients = {f"grad_{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output, "grad_input": x.grad, **gradients}


def assert_golden(ours: dict[str, Tensor], case: LayerCase, prefix: str, dtype: torch.dtype) -> None:
    golden = {name.removeprefix(prefix): name for name in case.tensors if name.startswith(prefix)}
    for name in golden.keys() - {"input", "cotangent"}:
        value, key = ours[name], golden[name]
        assert value.shape == case.tensors[key].shape, key
        error = relative_error(value, case.tensors[key])
        assert error <= tolerance(dtype, case.err32.get(key, 0.0)), f"{key}: relative error {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", layer_case_names())
def test_layers_equal_the_published_ones(name: str, dtype: torch.dtype) -> None:
    case = layer_case(name)
    layer = build(case, dtype)
    for step in range(case.steps):
        ours = forward_backward(layer, case, step, dtype)
        assert_golden(ours | dict(layer.named_buffers()), case, f"step{step}.", dtype)
    layer.eval()
    assert_golden(forward_backward(layer, case, case.steps - 1, dtype), case, "eval.", dtype)
