"""DeconvLinear whitens runs of features; ChannelDeconv whitens activations; both evaluate and fuse to the same."""

import pytest
import torch
from torch import nn

from tests.layers.sampled import sampled_rows
from timm_deconv.layers import ChannelDeconv, DeconvCfg, DeconvLinear, compat, operation
from timm_deconv.layers.functional import Moments, estimate, fold, root_of
from timm_deconv.linalg import covariance


def test_linear_output_is_that_of_exactly_whitened_features() -> None:
    layer = DeconvLinear(6, 4, dtype=torch.float64, cfg=DeconvCfg(n_iter=40, eps=1e-9))
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 2
    deviations = x - x.mean(0)
    values, vectors = torch.linalg.eigh(deviations.T @ deviations / len(x))
    whitened = deviations @ (vectors * values.rsqrt()) @ vectors.T
    torch.testing.assert_close(layer(x), whitened @ layer.weight.T + layer.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [4, 7])
@pytest.mark.parametrize(
    "options", [{}, {"block": 12}, {"min_rows": 1.0}, {"quartic": True}], ids=str
)
def test_fewer_vectors_than_features_are_whitened_by_their_covariance(options: dict, outputs: int) -> None:
    layer = DeconvLinear(24, outputs, dtype=torch.float64, cfg=DeconvCfg(block=24, n_iter=3).override(options))
    x = (torch.randn(5, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64) + 1).requires_grad_()
    rows = sampled_rows(layer, x)
    statistics = estimate(Moments(*covariance(rows), rows.shape[1]), root_of(layer.cfg))
    folded = fold(layer.weight, layer.bias, statistics.mean, statistics.whitener, layer.blocks)
    output, expected = layer(x), nn.functional.linear(x, *folded)
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(output)
    ours = torch.autograd.grad(output, [x, *layer.parameters()], cotangent)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, [x, *layer.parameters()], cotangent))


@pytest.mark.parametrize(("vectors", "on_vectors"), [(5, True), (7, False)])
def test_the_fewer_of_vectors_and_outputs_are_whitened(
    vectors: int, on_vectors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = DeconvLinear(24, 7, cfg=DeconvCfg(block=24))
    whitened: list[torch.Tensor] = []
    apply = operation.apply_whitener
    monkeypatch.setattr(operation, "apply_whitener", lambda *a: (whitened.append(a[0]), apply(*a))[1])
    layer(torch.randn(vectors, 24))
    assert [len(values) for values in whitened] == [vectors] * on_vectors


@pytest.mark.parametrize("vectors", [5, 9])
def test_the_output_can_be_changed_in_place(vectors: int) -> None:
    x, layer = torch.randn(vectors, 6, requires_grad=True), DeconvLinear(6, 7)
    kept, changed = (nn.Sequential(layer, nn.ReLU(inplace=inplace)) for inplace in (False, True))
    expected = torch.autograd.grad(kept(x).square().sum(), [x, layer.weight])
    torch.testing.assert_close(torch.autograd.grad(changed(x).square().sum(), [x, layer.weight]), expected)


def test_few_vectors_far_from_zero_keep_their_digits_under_autocast() -> None:
    layer, x = DeconvLinear(16, 32, cfg={"preset": "fast", "min_rows": 0.0}), 100 + torch.randn(5, 16)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16 and (found - expected).norm() < 0.02 * expected.norm()


def test_linear_layers_take_any_leading_dimensions() -> None:
    layer = DeconvLinear(6, 4)
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(layer(x).flatten(0, 1), layer(x.flatten(0, 1)))
    assert layer(torch.zeros(0, 6)).shape == (0, 4)
    with pytest.raises(ValueError, match=r"input of shape \(3, 5\): expected \(..., 6\)"):
        layer(torch.zeros(3, 5))


def test_fused_linear_layer_equals_the_evaluating_one() -> None:
    layer = DeconvLinear(16, 4, bias=False, cfg=DeconvCfg(block=4))
    layer(3 * torch.randn(64, 16) + 1)
    layer.eval()
    plain = layer.fuse()
    x = torch.randn(8, 16)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("channels", "block"), [(8, 4), (10, 4), (3, 8)])
def test_fused_channel_whitening_equals_the_evaluating_one(channels: int, block: int) -> None:
    layer = ChannelDeconv(channels, cfg=DeconvCfg(block=block, eps=1e-2))
    x = torch.randn(6, channels, 7, 7) * torch.rand(channels, 1, 1) + 1
    for _ in range(2):
        layer(x)
    plain = layer.fuse()
    assert layer.training and plain.training
    layer.eval()
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.fuse(spatial=False)(x[:, :, 0, 0]), layer(x[:, :, 0, 0]), rtol=1e-5, atol=1e-5)


def test_the_published_second_moment_is_not_centred() -> None:
    x = 5 + torch.randn(64, 4, 8, 8, dtype=torch.float64)
    layer = ChannelDeconv(4, dtype=torch.float64, cfg=DeconvCfg(block=4, n_iter=15, sampling_stride=1))
    rows = x.transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(rows @ rows.T / rows.shape[1] + layer.cfg.eps * torch.eye(4))
    expected = (vectors * values.rsqrt()) @ vectors.T @ (rows - rows.mean(1, keepdim=True))
    torch.testing.assert_close(layer(x).transpose(0, 1).flatten(1), expected, rtol=1e-3, atol=1e-3)


def test_channel_whitening_refuses_other_channels_and_ranks() -> None:
    layer = ChannelDeconv(4, cfg=DeconvCfg(block=2))
    for shape in ((2, 5), (2, 5, 3, 3), (2, 4, 3)):
        with pytest.raises(ValueError, match=r"expected \(N, 4\) or \(N, 4, H, W\)"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match="without num_features cannot be fused"):
        compat.ChannelDeconv(4).fuse()


def test_published_state_dicts_load_as_they_are() -> None:
    layer = compat.FastDeconv(8, 4, 3, padding=1, block=4)
    published = {
        name: torch.rand_like(value) for name, value in layer.state_dict().items() if value.is_floating_point()
    }
    assert set(published) == {"weight", "bias", "running_mean", "running_deconv"}
    layer.num_batches_tracked.fill_(7)
    layer.load_state_dict(published)
    assert layer.num_batches_tracked > 1000  # of many batches, not of none
    torch.testing.assert_close(layer.running_deconv, published["running_deconv"])
    channel = compat.ChannelDeconv(4)
    assert list(channel.state_dict()) == [
        "running_mean1",
        "running_deconv",
        "running_mean2",
        "running_var",
        "num_batches_tracked",
    ]
