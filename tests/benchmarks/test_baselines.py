"""The restated operation sequence is the published one."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines import (
    IterativeNorm2d,
    PublishedChannel,
    PublishedConv2d,
    PublishedLinear,
    published_isqrt,
)
from tests.golden_files import LayerCase, layer_case, layer_case_names, relative_error, tolerance

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


def test_iterative_normalisation_is_what_the_paper_writes_group_by_group() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 12, 5, 4).double() @ torch.randn(4, 4).double() + 3
    norm = IterativeNorm2d(12, block=6, eps=1e-3).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    output = norm(x)
    for group in range(2):
        channels = slice(6 * group, 6 * group + 6)
        matrix = x[:, channels].transpose(0, 1).flatten(1)  # (d, m)
        centred = matrix - matrix.mean(1, keepdim=True)
        sigma = centred @ centred.T / matrix.shape[1] + 1e-3 * torch.eye(6).double()
        p = torch.eye(6).double()
        for _ in range(5):
            p = 0.5 * (3 * p - p @ p @ p @ (sigma / sigma.trace()))
        whitened = (p / sigma.trace().sqrt() @ centred).unflatten(1, (6, 5, 4)).transpose(0, 1)
        scale, shift = (value[channels].view(-1, 1, 1) for value in (norm.weight, norm.bias))
        torch.testing.assert_close(output[:, channels], whitened * scale + shift)


def test_iterative_normalisation_evaluates_with_running_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6, 4, 4)
    norm = IterativeNorm2d(6, momentum=1.0)
    trained = norm(x)
    torch.testing.assert_close(norm.eval()(x), trained)
    assert IterativeNorm2d(96).block == 48
