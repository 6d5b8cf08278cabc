"""The operation's hand-written backward pass is the chain rule through statistics, root, fold and convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.layers.sampled import sampled_rows
from timm_deconv.kernels.onednn import FEW_PRODUCTS
from timm_deconv.layers import Deconv2d, DeconvCfg, DeconvLinear
from timm_deconv.layers.functional import Moments, estimate, fold, root_of
from timm_deconv.layers.notices import share_notices
from timm_deconv.linalg import covariance

CASES = {
    "interleaved": (dict(kernel_size=3, padding=1), DeconvCfg(block=4)),
    "window": (dict(kernel_size=3, padding=1), DeconvCfg(block=4, layout="window")),
    "flat": (dict(kernel_size=4, stride=2), DeconvCfg(block=16, layout="flat", sampling_stride=1)),
    "overlapping": (dict(kernel_size=5, padding=2), DeconvCfg(block=2, sampling_stride=2)),
    "pointwise": (dict(kernel_size=1), DeconvCfg(block=4)),
    "pointwise strided": (dict(kernel_size=1, stride=2), DeconvCfg(sampling_stride=2)),
    "grid": (dict(kernel_size=1, stride=(1, 2)), DeconvCfg(block=4, layout="channels")),
    "grouped": (dict(kernel_size=3, padding=1, groups=2), DeconvCfg()),
    "depthwise": (dict(kernel_size=(3, 1), groups=8), DeconvCfg(n_iter=1)),
    "shrunk": (dict(kernel_size=3), DeconvCfg(min_rows=40.0)),
    "many steps": (dict(kernel_size=3), DeconvCfg(block=4, n_iter=9)),
    "quartic": (dict(kernel_size=3, padding=1), DeconvCfg(block=4, n_iter=3, quartic=True)),
    "quartic of two steps, grouped": (dict(kernel_size=3, groups=2), DeconvCfg(n_iter=2, quartic=True)),
    "same, even": (dict(kernel_size=2, padding="same"), DeconvCfg(block=4)),
    "circular": (dict(kernel_size=3, padding=1, padding_mode="circular"), DeconvCfg(block=4)),
    "channels": (dict(kernel_size=3, padding=1), DeconvCfg(layout="channels", block=4, sampling_stride=2)),
    "channels, capped": (
        dict(kernel_size=5, stride=2, padding=2),
        DeconvCfg(layout="channels", block=4, sampling_stride=1, max_rows=90),
    ),
    "channels, no padding": (dict(kernel_size=3), DeconvCfg(layout="channels", block=4)),
    "channels of groups": (dict(kernel_size=3, groups=2), DeconvCfg(layout="channels", block=16)),
    "channels alone": (dict(kernel_size=3, padding=1, groups=8), DeconvCfg(layout="channels", block=1, n_iter=1)),
    "channels alone, of one map": (
        dict(kernel_size=3, padding=1),
        DeconvCfg(layout="channels", block=1, n_iter=1),
    ),
    "channels, few pixels": (dict(kernel_size=9, padding=3), DeconvCfg(layout="channels", block=8)),
    "pointwise channels": (dict(kernel_size=1, stride=2), DeconvCfg(layout="channels", block=2)),
    "window, capped": (dict(kernel_size=3, padding=1), DeconvCfg(block=4, layout="window", max_rows=30)),
    "dilated": (dict(kernel_size=3, padding=2, dilation=2), DeconvCfg(block=4)),
    "no bias": (dict(kernel_size=3, bias=False), DeconvCfg(block=4)),
}


def by_chain_rule(layer: Deconv2d, x: Tensor) -> Tensor:
    rows = sampled_rows(layer, x)
    moments = Moments(*covariance(rows), rows.shape[1], layer.moments(x.detach()).padding)
    statistics = estimate(moments, root_of(layer.cfg))
    folded = fold(layer.weight, layer.bias, statistics.mean, statistics.whitener, layer.blocks)
    return layer._conv_forward(x, *folded)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # a remark of torch's about speed
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("few", [FEW_PRODUCTS, 0], ids=["matrix products", "convolutions"])
@pytest.mark.parametrize(("options", "cfg"), CASES.values(), ids=CASES.keys())
def test_gradients_of_a_convolution_are_those_of_the_chain_rule(
    options: dict, cfg: DeconvCfg, few: int, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm_deconv.kernels.onednn.FEW_PRODUCTS", few)
    layer = Deconv2d(8, 6 if options.get("groups", 1) < 8 else 8, **options, dtype=torch.float64, cfg=cfg)
    x = F.avg_pool2d(torch.randn(4, 8, 11, 12, dtype=torch.float64), 3, 1, 1) + 0.2
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    parameters = [x, *layer.parameters()]
    output, expected = layer(x), by_chain_rule(layer, x)
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(output)
    ours = torch.autograd.grad(output, parameters, cotangent)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, parameters, cotangent), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "cfg", [DeconvCfg(block=6), DeconvCfg(block=3), DeconvCfg(block=3, n_iter=3, quartic=True)], ids=str
)
def test_gradients_of_a_linear_layer_are_right(cfg: DeconvCfg) -> None:
    layer = DeconvLinear(6, 4, dtype=torch.float64, cfg=cfg)
    x = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    weight = layer.weight.detach().clone().requires_grad_()
    call = lambda w: torch.func.functional_call(layer, {"weight": w}, (x.detach(),))  # noqa: E731
    assert torch.autograd.gradcheck(call, (weight,))


def kept_for_backward(layer: Deconv2d, x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return kept


def test_nothing_of_the_size_of_an_unfolded_input_is_kept_for_the_backward_pass() -> None:
    layer = Deconv2d(16, 4, 3, padding=1, cfg=DeconvCfg(block=2, sampling_stride=1))
    x = torch.randn(8, 16, 16, 16, requires_grad=True)
    sizes = [tensor.numel() for tensor in kept_for_backward(layer, x)]
    assert max(sizes) == x.numel()
    assert sum(sizes) < 1.5 * x.numel()


@pytest.mark.parametrize("size", [2, 32])
def test_no_folded_weight_and_no_whitened_input_is_kept_for_the_backward_pass(size: int) -> None:
    layer = Deconv2d(32, 64, 3, padding=1, cfg=DeconvCfg(layout="channels", block=8, n_iter=3))
    x = torch.randn(4, 32, size, size, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (x, layer.weight)}
    others = [t for t in kept_for_backward(layer, x) if t.untyped_storage().data_ptr() not in own]
    assert others and sum(t.numel() for t in others) < 0.2 * layer.weight.numel()


def test_a_second_derivative_through_a_single_row_is_refused_not_wrong() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 3), Deconv2d(3, 4, 3, cfg={"sampling_stride": 5}))
    share_notices(network)
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(network(x).pow(2).mean(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative of Deconv2d 1 .*model.eval\(\).*timm_deconv.freeze"):
        grad.pow(2).sum().backward()


DERIVED = {
    "eval": lambda: Deconv2d(3, 4, 3),
    "frozen": lambda: Deconv2d(3, 4, 3),
    "paper": lambda: Deconv2d(3, 4, 3, stride=2, padding=1),
    "fast": lambda: Deconv2d(4, 4, 1, cfg={"preset": "fast", "block": 2}),
    "quartic": lambda: Deconv2d(4, 6, 3, padding=1, groups=2, cfg="fast"),
    "depthwise": lambda: Deconv2d(4, 4, 3, groups=4, bias=False, cfg="fast"),
    "linear": lambda: DeconvLinear(6, 4),
    "few vectors": lambda: DeconvLinear(6, 10, cfg={"preset": "fast"}),
}


@pytest.mark.parametrize("mode", DERIVED)
def test_second_derivatives_are_right(mode: str) -> None:
    torch.manual_seed(0)
    layer = DERIVED[mode]().double()
    shape = (5, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 5, 5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    layer(x)
    if mode == "frozen":
        layer.statistics_frozen = True
    layer.train(mode != "eval")
    weight = layer.weight.detach().clone().requires_grad_()
    call = lambda x, weight: torch.func.functional_call(layer, {"weight": weight}, (x,))  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (x, weight))


def test_the_gradient_of_a_gradients_norm_reaches_the_layer_before() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 3), Deconv2d(3, 4, 3, cfg="fast")).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    weights = [network[0].weight, network[1].weight]

    def penalty(power: int, create_graph: bool) -> Tensor:
        (grad,) = torch.autograd.grad(network(x).pow(power).mean(), x, create_graph=create_graph)
        return grad.square().sum()

    for power in (1, 2):  # of 1 the incoming gradient requires none
        for weight, found in zip(weights, torch.autograd.grad(penalty(power, True), weights), strict=True):
            step, moved = 1e-6 * torch.randn_like(weight), []
            for sign in (1, -2):
                with torch.no_grad():
                    weight.add_(step, alpha=sign)
                moved.append(penalty(power, False))
            with torch.no_grad():
                weight.add_(step)
            torch.testing.assert_close((moved[0] - moved[1]) / 2, (found * step).sum(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("layer", [Deconv2d(3, 4, 1), DeconvLinear(3, 4)], ids=["conv", "linear"])
def test_hooks_of_what_is_derived_twice_are_called_once(layer: nn.Module) -> None:
    x = torch.randn((9, 3) if isinstance(layer, nn.Linear) else (4, 3, 5, 5), requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    x.register_hook(lambda grad: grad * 0.5)
    (halved,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(halved, 0.5 * expected, rtol=1e-3, atol=1e-4)


def test_a_graph_that_is_kept_but_not_derived_again_is_no_error() -> None:
    layer, x = Deconv2d(3, 4, 3).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    output = layer(x).square().sum()
    kept = torch.autograd.grad(output, [x, layer.weight], create_graph=True)
    torch.testing.assert_close(kept, torch.autograd.grad(output, [x, layer.weight]))


def test_gradients_under_autocast_are_close_to_those_in_float32() -> None:
    layer = Deconv2d(8, 6, 3, padding=1, cfg=DeconvCfg(block=4))
    x = torch.randn(4, 8, 12, 12, requires_grad=True)
    cotangent = torch.randn(4, 6, 12, 12)
    expected = torch.autograd.grad(layer(x), [x, layer.weight], cotangent)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    ours = torch.autograd.grad(output, [x, layer.weight], cotangent.bfloat16())
    for value, reference in zip(ours, expected, strict=True):
        assert value.dtype == torch.float32
        assert (value - reference).norm() < 0.02 * reference.norm()
