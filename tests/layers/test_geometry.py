"""A convolution's geometry is read when it is called: encoders are dilated by setting attributes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2d, Deconv2dSame, DeconvCfg

CHANGES = {
    "stride": {"stride": (1, 1)},
    "stride as a number": {"stride": 1},
    "dilated": {"stride": (1, 1), "dilation": (2, 2), "padding": (2, 2)},
    "dilated by numbers": {"dilation": 3, "padding": 3},
    "no padding": {"padding": (0, 0)},
    "padding by name": {"stride": (1, 1), "padding": "same", "dilation": (1, 3)},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("options", [{}, {"layout": "window"}, {"layout": "channels"}], ids=str)
def test_geometry_set_after_construction_is_that_of_a_layer_made_with_it(changes: dict, options: dict) -> None:
    cfg = DeconvCfg(block=4, momentum=1.0).override(options)
    made = {"stride": 2, "padding": 1, **changes}
    expected = Deconv2d(8, 6, 3, **made, cfg=cfg).double()
    layer = Deconv2d(8, 6, 3, stride=2, padding=1, cfg=cfg).double()
    layer.load_state_dict(expected.state_dict())
    for name, value in changes.items():
        setattr(layer, name, value)
    x = torch.randn(4, 8, 16, 15, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    torch.testing.assert_close(output, expected(x))
    torch.testing.assert_close(layer.running_deconv, expected.running_deconv)
    cotangent = torch.randn_like(output)
    for ours, theirs in zip(
        torch.autograd.grad(output, [x, layer.weight], cotangent),
        torch.autograd.grad(expected(x), [x, expected.weight], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_training_and_evaluation_follow_changed_geometry_alike(changes: dict) -> None:
    layer = Deconv2d(8, 6, 3, stride=2, padding=1, cfg=DeconvCfg(block=4, momentum=1.0)).double()
    for name, value in changes.items():
        setattr(layer, name, value)
    x = torch.randn(4, 8, 16, 16, dtype=torch.float64)
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained)
    weight, bias = layer.folded()
    plain = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
    torch.testing.assert_close(trained, plain)
    torch.testing.assert_close(layer.fuse()(x), plain)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_geometry_set_between_two_steps_holds_in_the_second(changes: dict) -> None:
    layer = Deconv2d(8, 6, 3, stride=2, padding=1, cfg=DeconvCfg(block=4, momentum=1.0)).double()
    x = torch.randn(4, 8, 16, 16, dtype=torch.float64)
    layer(x)
    for name, value in changes.items():
        setattr(layer, name, value)
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained)


def test_geometry_held_in_a_list_is_read_at_each_step() -> None:
    layer = Deconv2d(8, 6, 3, padding=1, cfg=DeconvCfg(block=4))
    layer.stride = [1, 1]
    assert layer(torch.randn(4, 8, 16, 16)).shape[2:] == (16, 16)
    layer.stride[0] = 2
    assert layer(torch.randn(4, 8, 16, 16)).shape[2:] == (8, 16)


def test_dilating_every_convolution_of_an_encoder_dilates_ours() -> None:
    encoder = nn.Sequential(Deconv2d(3, 8, 3, 2, 1), nn.ReLU(), Deconv2d(8, 8, 3, 2, 1))
    dilated = copy.deepcopy(encoder)
    for module in dilated.modules():
        if isinstance(module, nn.Conv2d):
            module.stride, module.dilation, module.padding = (1, 1), (2, 2), (2, 2)
    x = torch.randn(2, 3, 16, 16)
    assert dilated(x).shape == dilated.eval()(x).shape == (2, 8, 16, 16)


def test_input_channels_set_after_construction_are_refused_in_one_line() -> None:
    layer = Deconv2d(3, 4, 3)
    layer.in_channels, layer.weight = 1, nn.Parameter(torch.randn(4, 1, 3, 3))
    with pytest.raises(InputError, match=r"in_channels=1 was set after construction.*in_chans="):
        layer(torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding": "same", "stride": (2, 2)}, r"padding='same' with stride=\(2, 2\)"),
        ({"stride": 0}, "stride=0: must be one or two positive whole numbers"),
        ({"padding": (1, 1, 1)}, r"padding=\(1, 1, 1\): must be one or two whole numbers"),
    ],
)
def test_geometry_that_a_convolution_refuses_is_refused_in_training_too(changes: dict, message: str) -> None:
    layer = Deconv2d(3, 4, 3)
    for name, value in changes.items():
        setattr(layer, name, value)
    with pytest.raises(InputError, match=message):
        layer(torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError):
        layer.eval()(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("training", [True, False])
def test_padding_to_the_same_size_follows_a_stride_set_as_a_number(training: bool) -> None:
    layer = Deconv2dSame(3, 4, 3, stride=2).train(training)
    layer.stride = 1
    assert layer(torch.randn(2, 3, 9, 8)).shape == (2, 4, 9, 8)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_paddings_are_those_of_evaluation(mode: str) -> None:
    layer = Deconv2d(3, 4, 3, padding=2, padding_mode=mode, cfg=DeconvCfg(momentum=1.0)).double()
    layer.stride, x = (2, 2), torch.randn(4, 3, 9, 8, dtype=torch.float64)
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained)
