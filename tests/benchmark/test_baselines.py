"""The restated operation sequence is the published one."""

import pytest
import torch
from torch import Tensor, nn

from tests.golden_files import LayerCase, layer_case, layer_case_names, relative_error, tolerance
from timm_deconv.benchmark.baselines import PublishedChannel, PublishedConv2d, PublishedLinear, published_isqrt

LAYERS = {"FastDeconv": PublishedConv2d, "Delinear": PublishedLinear, "ChannelDeconv": PublishedChannel}


def build(case: LayerCase, dtype: torch.dtype) -> nn.Module:
    layer = LAYERS[case.layer](**case.args).to(dtype)
    layer.load_state_dict({key: case.tensors[f"init.{key}"] for key, _ in layer.named_parameters()}, strict=False)
    return layer


def run(layer: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Output and gradients of sum(output * cotangent), named as in the golden files."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = layer(x)
    (output * cotangent).sum().backward()
    gradients = {f"grad_{key}": parameter.grad for key, parameter in layer.named_parameters()}
    return {"output": output, "grad_input": x.grad, **gradients}


def replay(case: LayerCase, dtype: torch.dtype) -> dict[str, Tensor]:
    layer = build(case, dtype)
    found = {}
    for step in range(case.steps):
        x, cotangent = (case.tensors[f"step{step}.{key}"].to(dtype) for key in ("input", "cotangent"))
        for key, value in (run(layer, x, cotangent) | {k: v.clone() for k, v in layer.named_buffers()}).items():
            found[f"step{step}.{key}"] = value
    layer.eval()
    return found | {f"eval.{key}": value for key, value in run(layer, x, cotangent).items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", layer_case_names())
def test_restated_sequence_equals_published_numbers(name: str, dtype: torch.dtype) -> None:
    case = layer_case(name)
    found = replay(case, dtype)
    given = (".input", ".cotangent", "init.weight", "init.bias")
    assert set(found) == {key for key in case.tensors if not key.endswith(given)}
    errors = {key: relative_error(value, case.tensors[key]) for key, value in found.items()}
    assert {key: error for key, error in errors.items() if error > tolerance(dtype, case.err32.get(key, 0.0))} == {}


def test_fifteen_steps_whiten_a_well_conditioned_covariance() -> None:
    rows = torch.randn(400, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    cov = rows.T @ rows / 400 + 0.1 * torch.eye(6, dtype=torch.float64)
    root = published_isqrt(cov, 15)
    assert torch.allclose(root @ cov @ root, torch.eye(6, dtype=torch.float64), atol=1e-6)
