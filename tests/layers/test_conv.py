"""Deconv2d is complete as nn.Conv2d is complete, and whitens what the convolution sees."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_deconv.layers import Deconv2d, DeconvCfg

EXACT = DeconvCfg(n_iter=40, eps=1e-9, sampling_stride=1)


def correlated(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images whose neighbouring pixels and channels are correlated, with a mean."""
    x = torch.randn(shape, dtype=dtype)
    return F.avg_pool2d(x, 3, 1, 1) + 0.5 * x.roll(1, dims=-3) + 0.3


def whitened_windows(layer: Deconv2d, x: Tensor) -> Tensor:
    """D (window - mu) of every window, (N * positions, K), written out with padding and unfold."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    windows = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride).mT.flatten(0, 1)
    mean = windows.mean(0)
    cov = (windows - mean).T @ (windows - mean) / len(windows) + layer.cfg.eps * torch.eye(len(mean), dtype=x.dtype)
    values, vectors = torch.linalg.eigh(cov)
    return (windows - mean) @ (vectors * values.rsqrt()) @ vectors.T


GEOMETRIES = {
    "pair": dict(kernel_size=(1, 3), padding=(0, 1)),
    "tall": dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)),
    "even": dict(kernel_size=4, stride=2, padding=1),
    "dilated": dict(kernel_size=3, dilation=(2, 1), padding=(2, 1)),
    "same": dict(kernel_size=3, padding="same"),
    "same-even": dict(kernel_size=(2, 4), padding="same", dilation=(1, 2)),
    "valid": dict(kernel_size=3, padding="valid"),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "replicate": dict(kernel_size=3, padding=(1, 2), padding_mode="replicate"),
    "circular": dict(kernel_size=3, padding="same", padding_mode="circular"),
    "no-bias": dict(kernel_size=3, padding=1, bias=False),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # a remark of torch's about speed
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_output_is_the_convolution_of_exactly_whitened_windows(options: dict) -> None:
    layer = Deconv2d(2, 5, **options, dtype=torch.float64, cfg=EXACT)
    x = correlated(6, 2, 9, 10)
    expected = whitened_windows(layer, x) @ layer.weight.flatten(1).T + (0 if layer.bias is None else layer.bias)
    output = layer(x)
    plain = nn.Conv2d(2, 5, **options, dtype=torch.float64)
    assert output.shape == plain(x).shape
    torch.testing.assert_close(output.permute(0, 2, 3, 1).reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # a remark of torch's about speed
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_evaluation_uses_the_running_values_and_fuses_to_a_plain_convolution(options: dict) -> None:
    layer = Deconv2d(4, 6, **options, cfg=DeconvCfg(block=2, momentum=0.5))
    for _ in range(3):
        layer(correlated(4, 4, 9, 10, dtype=torch.float32))
    layer.eval()
    x = torch.randn(2, 4, 9, 10)
    plain = layer.fuse()
    assert type(plain) is nn.Conv2d and not plain.training
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(layer(x), nn.Conv2d._conv_forward(layer, x, layer.weight, layer.bias), atol=1e-2)


def test_each_group_is_whitened_by_itself() -> None:
    layer = Deconv2d(6, 4, 3, padding=1, groups=2, dtype=torch.float64)
    x = correlated(4, 6, 8, 8)
    halves = []
    for group in range(2):
        half = Deconv2d(3, 2, 3, padding=1, dtype=torch.float64)
        half.load_state_dict(
            {"weight": layer.weight[2 * group : 2 * group + 2], "bias": layer.bias[2 * group : 2 * group + 2]},
            strict=False,
        )
        halves.append(half(x[:, 3 * group : 3 * group + 3]))
    torch.testing.assert_close(layer(x), torch.cat(halves, 1))


def test_shared_statistics_pool_the_rows_of_all_blocks() -> None:
    cfg = DeconvCfg(block=2, layout="window", momentum=1.0)
    layer = Deconv2d(4, 3, 3, padding=1, dtype=torch.float64, cfg=cfg)
    x = correlated(4, 4, 8, 8)
    pooled = Deconv2d(2, 3, 3, padding=1, dtype=torch.float64, cfg=DeconvCfg(momentum=1.0))
    layer(x), pooled(torch.cat([x[:, :2], x[:, 2:]]))
    torch.testing.assert_close(layer.running_mean, pooled.running_mean)
    torch.testing.assert_close(layer.running_deconv, pooled.running_deconv)


def test_flat_blocks_are_the_published_linear_layer_on_flattened_windows() -> None:
    from timm_deconv.layers import DeconvLinear

    cfg = DeconvCfg(block=8, layout="flat", sampling_stride=1)
    conv = Deconv2d(4, 5, 4, dtype=torch.float64, cfg=cfg)
    linear = DeconvLinear(64, 5, dtype=torch.float64, cfg=DeconvCfg(block=8))
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias}, strict=False)
    x = correlated(16, 4, 4, 4)
    torch.testing.assert_close(conv(x).flatten(1), linear(x.flatten(1)))
    torch.testing.assert_close(conv.running_deconv, linear.running_deconv)


def test_1x1_layers_sample_a_list_of_pixels_or_in_channels_the_same_places_of_every_image() -> None:
    x = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    x[:, :, ::3, ::3] = 1.0
    grid = Deconv2d(1, 1, 1, dtype=torch.float64, cfg=DeconvCfg(layout="channels", momentum=1.0))
    flat = Deconv2d(1, 1, 1, dtype=torch.float64, cfg=DeconvCfg(momentum=1.0))
    grid(x), flat(x)
    assert grid.running_mean == 1.0
    assert flat.running_mean == x.permute(0, 2, 3, 1).reshape(-1)[::9].mean()


@pytest.mark.parametrize("min_rows", [1.0, 2.0])
def test_fewer_rows_than_features_stay_of_ordinary_size_with_min_rows(min_rows: float) -> None:
    x = torch.randn(2, 64, 1, 1)
    unguarded = Deconv2d(64, 64, 1)
    guarded = Deconv2d(64, 64, 1, cfg=DeconvCfg(min_rows=min_rows))
    guarded.load_state_dict(unguarded.state_dict())
    assert unguarded(x).abs().max() > 20
    assert guarded(x).abs().max() < 5


def test_min_rows_samples_more_densely_before_it_shrinks() -> None:
    x = correlated(2, 4, 12, 12)
    dense = Deconv2d(4, 2, 3, padding=1, dtype=torch.float64, cfg=DeconvCfg(sampling_stride=2, momentum=1.0))
    asked = Deconv2d(
        4, 2, 3, padding=1, dtype=torch.float64, cfg=DeconvCfg(sampling_stride=3, min_rows=2.0, momentum=1.0)
    )
    dense(x), asked(x)  # at stride 3 there are 32 rows of 36 features, at stride 2 there are 72
    torch.testing.assert_close(asked.running_deconv, dense.running_deconv)


def test_unbatched_channels_last_and_half_inputs_give_the_same_numbers() -> None:
    layer = Deconv2d(8, 6, 3, padding=1, cfg=DeconvCfg(block=4))
    x = correlated(1, 8, 12, 12, dtype=torch.float32)
    expected = layer(x)
    torch.testing.assert_close(layer(x[0]), expected[0])
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    in_channels_last = layer.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(in_channels_last, expected, rtol=1e-4, atol=1e-5)
    assert in_channels_last.is_contiguous(memory_format=torch.channels_last)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_statistics_in_float32_and_returns_its_own_type(dtype: torch.dtype) -> None:
    x = 10 + correlated(4, 8, 12, 12, dtype=torch.float32)
    layer, reference = Deconv2d(8, 6, 3, padding=1), Deconv2d(8, 6, 3, padding=1)
    reference.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", dtype):
        output = layer(x)
        output.float().sum().backward()
    expected = reference(x)
    assert output.dtype == dtype and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.running_deconv, reference.running_deconv)
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_empty_batch_gives_an_empty_output_and_leaves_the_statistics_alone() -> None:
    layer = Deconv2d(3, 5, 3, stride=2, padding=1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert layer(torch.zeros(0, 3, 8, 8)).shape == (0, 5, 4, 4)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_device_and_dtype_reach_parameters_and_buffers() -> None:
    layer = Deconv2d(3, 5, 3, device="meta", dtype=torch.float64)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert {t.dtype for t in layer.state_dict().values()} == {torch.float64, torch.int64}


def test_the_printed_layer_shows_what_differs_from_the_published_settings() -> None:
    assert repr(Deconv2d(128, 8, 3, cfg=DeconvCfg(n_iter=3))).endswith("blocks=2x576, n_iter=3)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kernel_size=0), "kernel_size=0: must be one or two positive"),
        (dict(kernel_size=3, stride=(1, 0)), r"stride=\(1, 0\): must be one or two positive"),
        (dict(kernel_size=2.5), "kernel_size=2.5"),
        (dict(kernel_size=3, groups=2), "divisible by groups"),
        (dict(kernel_size=3, padding_mode="mirror"), "padding_mode"),
    ],
)
def test_senseless_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Deconv2d(3, 5, **arguments)


def test_inputs_that_do_not_fit_are_refused_with_their_size() -> None:
    layer = Deconv2d(3, 5, 5)
    with pytest.raises(ValueError, match=r"input of shape \(2, 4, 8, 8\): expected \(N, 3, H, W\)"):
        layer(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="input of 4x8 pixels: smaller than the kernel"):
        layer(torch.zeros(2, 3, 4, 8))
    assert layer.num_batches_tracked == 0
