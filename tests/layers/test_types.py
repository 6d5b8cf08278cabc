"""Training takes the inputs that evaluation and plain layers take, and says of others what is wrong."""

import pytest
import torch
from torch import nn

from timm_deconv.errors import InputError
from timm_deconv.layers import ChannelDeconv, Deconv2d, DeconvLinear
from timm_deconv.layers.notices import share_notices

LAYERS = {
    "conv": (lambda: Deconv2d(3, 4, 3), (4, 3, 8, 8)),
    "linear": (lambda: DeconvLinear(6, 2), (9, 6)),
}
BY_LAYER = {"argvalues": LAYERS.values(), "ids": LAYERS.keys()}
OTHERS = [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.bool]


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize(("build", "shape"), **BY_LAYER)
def test_inputs_that_a_plain_layer_refuses_are_refused_in_training(build, shape, dtype) -> None:
    layer = build()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.ones(shape).to(dtype)
    with pytest.raises(RuntimeError):
        layer.fuse()(x)
    with pytest.raises(InputError, match=rf"input of {dtype}: the layer's weight is torch.float32"):
        layer(x)
    for name, value in before.items():
        assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.complex64], ids=str)
def test_channel_whitening_takes_floating_point_numbers(dtype) -> None:
    with pytest.raises(InputError, match=f"input of {dtype}"):
        ChannelDeconv(6, cfg={"block": 4})(torch.ones(9, 6).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("build", "shape"), **BY_LAYER)
def test_autocast_converts_in_training_what_it_converts_in_evaluation(build, shape, dtype) -> None:
    layer = build()
    with torch.autocast("cpu", torch.bfloat16):
        trained = layer(torch.randn(shape).to(dtype))
        assert trained.dtype == layer.eval()(torch.randn(shape).to(dtype)).dtype == torch.bfloat16


@pytest.mark.parametrize(("build", "shape"), **BY_LAYER)
def test_float64_stays_float64_under_autocast_in_training_too(build, shape) -> None:
    layer = build().double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        assert output.dtype == layer.fuse()(x).dtype == torch.float64
        with pytest.raises(InputError, match=r"input of torch.float64: the layer's weight is torch.float32"):
            build()(x)
    torch.testing.assert_close(output, expected)


ONE_ROW = {
    "pointwise": (lambda: Deconv2d(4, 6, 1), (1, 4, 1, 1)),
    "spatial": (lambda: Deconv2d(4, 6, 3, padding=1), (1, 4, 1, 1)),
    "one window": (lambda: Deconv2d(4, 6, 3), (1, 4, 3, 3)),
    "one image": (lambda: Deconv2d(4, 6, 1), (4, 1, 1)),
    "depthwise": (lambda: Deconv2d(4, 4, 3, padding=1, groups=4, cfg="fast"), (1, 4, 1, 1)),
    "linear": (lambda: DeconvLinear(6, 2), (1, 6)),
    "vector": (lambda: DeconvLinear(6, 2), (6,)),
    "channels": (lambda: ChannelDeconv(4, cfg={"block": 4}), (1, 4)),
    "remaining channel": (lambda: ChannelDeconv(1, cfg={"block": 4}), (1, 1)),
}


@pytest.mark.parametrize(("build", "shape"), ONE_ROW.values(), ids=ONE_ROW.keys())
def test_one_row_is_refused_in_training_as_batch_norm_refuses_it(build, shape) -> None:
    layer, x = build(), torch.randn(shape)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    message = r"has one row to whiten in training, from an input of \(.*timm_deconv.freeze"
    with pytest.raises(InputError, match=message) as error:
        layer(x)
    assert "\n" not in str(error.value)
    for name, value in before.items():
        assert torch.equal(layer.state_dict()[name], value), name
    layer.statistics_frozen = True
    assert layer(x).isfinite().all() and layer.eval()(x).isfinite().all()


@pytest.mark.parametrize("layer", [Deconv2d(4, 6, 1), Deconv2d(4, 6, 3, padding=1), DeconvLinear(4, 6)], ids=repr)
def test_equal_rows_pass_on_no_gradient_instead_of_a_huge_one(layer: nn.Module) -> None:
    shape = (2, 4) if isinstance(layer, nn.Linear) else (2, 4, 1, 1)
    x = torch.randn(shape)[:1].expand(shape).clone().requires_grad_()
    before = layer.running_deconv.clone()
    output = layer(x)
    torch.testing.assert_close(output, layer.bias.reshape(1, -1, *shape[2:]).expand_as(output))
    cotangent = torch.randn_like(output)
    grads = torch.autograd.grad(output, [x, layer.weight, layer.bias], cotangent)
    assert grads[0].abs().max() < 1e-3 and grads[1].abs().max() < 1e-3
    torch.testing.assert_close(grads[2], cotangent.flatten(1).sum(0))
    assert torch.equal(layer.running_deconv, before) and layer.running_mean.abs().sum() > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Deconv2d(3, 8, (3, 3, 3)), r"kernel_size=\(3, 3, 3\): must be one or two positive whole numbers"),
        (lambda: Deconv2d(3, 8, (3,)), r"kernel_size=\(3,\)"),
        (lambda: Deconv2d(3, 8, 3, stride=(1, 1, 1)), r"stride=\(1, 1, 1\)"),
        (lambda: Deconv2d(3, 8, 3, padding=-1), "padding=-1: must be one or two whole numbers"),
        (lambda: Deconv2d((3, 3), 8, 3), r"in_channels=\(3, 3\): must be one positive"),
        (lambda: DeconvLinear(2.5, 3), "in_features=2.5: must be a positive whole number"),
        (lambda: ChannelDeconv(-3), "num_features=-3: must be a positive whole number, or None"),
        (lambda: Deconv2d(3, 8, 3, cfg=7), "cfg=7: give a preset's name"),
        (lambda: Deconv2d(3, 8, 3, cfg={"blok": 8}), "no whitening option 'blok'; nearest: block"),
        (lambda: DeconvLinear(3, 8, cfg="fsat"), "no preset 'fsat'; nearest: fast"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_one_line(build, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_a_row_alone_names_the_layer_of_the_network() -> None:
    network = nn.Sequential(Deconv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), DeconvLinear(4, 2))
    share_notices(network)
    with pytest.raises(InputError, match="DeconvLinear 3 has one row to whiten in training"):
        network(torch.randn(1, 3, 8, 8))
