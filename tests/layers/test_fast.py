"""The preset 'fast': the same function whichever side is whitened, decorrelated channels, sound with bad inputs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_deconv.convert import DeconvPolicy
from timm_deconv.convert.policy import SMALL_BATCH_DEFAULTS, Role
from timm_deconv.kernels.onednn import FEW_PRODUCTS
from timm_deconv.layers import Deconv2d, DeconvCfg, DeconvLinear, geometry, operation

Layer = Deconv2d | DeconvLinear
FORMATS = [torch.contiguous_format, torch.channels_last]


def fast(role: Role) -> DeconvCfg:
    """What a layer of this role gets under the preset."""
    cfg = DeconvPolicy(preset="fast").over_published(SMALL_BATCH_DEFAULTS).cfg("layer", role)
    assert cfg is not None
    return cfg


def correlated(*shape: int) -> Tensor:
    """Images or feature vectors whose neighbouring channels are correlated, with a mean."""
    x = torch.randn(shape, dtype=torch.float64)
    return x + 0.8 * x.roll(1, dims=1) + 0.3


SMALL = DeconvCfg(layout="channels", block=4, n_iter=3, sampling_stride=2, max_rows=60, min_rows=1.0)
SIDES: dict[str, Callable[[], Layer]] = {
    "3x3": lambda: Deconv2d(8, 6, 3, padding=1, dtype=torch.float64, cfg=SMALL),
    "strided, dilated": lambda: Deconv2d(8, 6, 3, 2, 2, dilation=2, dtype=torch.float64, cfg=SMALL),
    "tall": lambda: Deconv2d(8, 6, (3, 2), (2, 1), (2, 1), bias=False, dtype=torch.float64, cfg=SMALL),
    "reflect": lambda: Deconv2d(8, 6, 3, padding=1, padding_mode="reflect", dtype=torch.float64, cfg=SMALL),
    "1x1": lambda: Deconv2d(8, 6, 1, stride=2, dtype=torch.float64, cfg=SMALL),
    "one block": lambda: Deconv2d(8, 6, 3, padding=1, dtype=torch.float64, cfg=SMALL.override({"block": 8})),
    "many steps": lambda: Deconv2d(8, 6, 3, padding=1, dtype=torch.float64, cfg=SMALL.override({"n_iter": 12})),
    "quartic": lambda: Deconv2d(8, 6, 3, padding=1, dtype=torch.float64, cfg=SMALL.override({"quartic": True})),
}


def count_calls(patch: pytest.MonkeyPatch, name: str, calls: list[str]) -> None:
    function = getattr(operation, name)
    patch.setattr(operation, name, lambda *args: (calls.append(name), function(*args))[1])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("build", SIDES.values(), ids=SIDES.keys())
def test_whitening_the_input_is_whitening_the_weight(
    build: Callable[[], Layer], memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = build()
    x = correlated(4, 8, 9, 10).contiguous(memory_format=memory_format)
    layer.to(memory_format=memory_format)
    assert layer.blocks.pixels and layer.blocks.groups == layer.blocks.sets == 1
    results, sides = [], []
    for of_input in (False, True):
        torch.manual_seed(3)
        this, image = copy.deepcopy(layer), x.clone().requires_grad_()
        monkeypatch.setattr(operation, "whitens_input", lambda *_, of_input=of_input: of_input)
        whitened: list[str] = []
        with monkeypatch.context() as counted:
            for name in ("apply_whitener", "fold_whitening"):
                count_calls(counted, name, whitened)
            output = this(image)
            grads = torch.autograd.grad(output, [image, *this.parameters()], torch.randn(output.shape, dtype=x.dtype))
        sides.append(whitened)
        results.append([output.detach(), *grads, this.running_mean, this.running_deconv])
    assert sides == [2 * ["fold_whitening"], 2 * ["apply_whitener"]]  # forward, and again in the backward pass
    for by_weight, by_input in zip(*results, strict=True):
        assert (by_input - by_weight).norm() <= 1e-9 * by_weight.norm()


@pytest.mark.parametrize(
    ("block", "wide_block", "features"),
    [
        (16, 4, {8: 8, 16: 16, 24: 4, 18: 3}),
        (4, 16, {3: 3, 4: 4, 24: 4}),
        (8, 0, {3: 3, 8: 8, 24: 8, 18: 6}),
    ],
)
def test_channels_are_whitened_together_up_to_the_block_and_wider_layers_in_smaller_ones(
    block: int, wide_block: int, features: dict[int, int]
) -> None:
    cfg = DeconvCfg(layout="channels", block=block, wide_block=wide_block)
    found = {channels: Deconv2d(channels, 4, 3, cfg=cfg).blocks.features for channels in features}
    assert found == features
    assert DeconvLinear(24, 2, cfg=cfg).blocks.features == features[24]
    assert Deconv2d(2, 4, (1, 2), cfg=cfg).blocks.features == 4  # a window of that many


def test_the_side_with_fewer_products_is_whitened() -> None:
    layer = Deconv2d(64, 128, 3, padding=1, cfg=fast("spatial"))
    for size, of_input in ((4, True), (32, False)):
        x = torch.empty(16, 64, size, size)
        assert operation.whitens_input(x, layer.weight, layer._geometry(x)) is of_input
        assert not operation.whitens_input(x.to("meta"), layer.weight, layer._geometry(x))
    layer, x = Deconv2d(8, 8, 3, groups=2, cfg=SMALL), torch.empty(1, 8, 3, 3)
    assert not operation.whitens_input(x, layer.weight, layer._geometry(x))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("block", [4, 8])
def test_blocks_of_channels_leave_with_unit_covariance(block: int, memory_format: torch.memory_format) -> None:
    cfg = DeconvCfg(layout="channels", block=block, n_iter=20, sampling_stride=1, eps=1e-9)
    layer = Deconv2d(8, 8, 1, dtype=torch.float64, cfg=cfg)
    nn.init.dirac_(layer.weight)  # the output is the whitened input
    nn.init.zeros_(layer.bias)
    mixing = torch.eye(8, dtype=torch.float64) + 0.3 * torch.randn(8, 8, dtype=torch.float64)
    x = torch.einsum("ij,njhw->nihw", mixing, torch.randn(8, 8, 12, 12, dtype=torch.float64)) + 2
    rows = layer(x.contiguous(memory_format=memory_format)).permute(0, 2, 3, 1).reshape(-1, block)
    torch.testing.assert_close(rows.mean(0), torch.zeros(block, dtype=torch.float64), rtol=0, atol=1e-8)
    eye = torch.eye(block, dtype=torch.float64)
    torch.testing.assert_close(rows.T @ rows / len(rows), eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_depthwise_layers_standardise_every_channel(memory_format: torch.memory_format) -> None:
    layer = Deconv2d(8, 16, 3, groups=8, dtype=torch.float64, cfg=fast("depthwise").override({"sampling_stride": 1}))
    assert layer.running_deconv.shape == (8, 1, 1)
    scale = torch.logspace(-1, 2, 8, dtype=torch.float64).view(-1, 1, 1)
    x = (scale * (correlated(4, 8, 9, 10) + 3)).contiguous(memory_format=memory_format)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    standardised = (x - mean) / (var + layer.cfg.eps).sqrt()
    expected = F.conv2d(standardised, layer.weight, layer.bias, groups=8)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("kernel", "memory_format"),
    [
        (3, torch.contiguous_format),
        (3, torch.channels_last),
        (1, torch.channels_last),
        (1, torch.contiguous_format),
    ],
)
@pytest.mark.parametrize("few", [FEW_PRODUCTS, 0], ids=["matrix products", "convolutions"])
def test_activations_keep_the_memory_format_that_a_plain_convolution_gives_them(
    few: int, kernel: int, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm_deconv.kernels.onednn.FEW_PRODUCTS", few)
    layer = Deconv2d(16, 8, kernel, cfg=SMALL).to(memory_format=memory_format)
    x = torch.randn(4, 16, 9, 10).contiguous(memory_format=memory_format).requires_grad_()
    output = layer(x)
    (grad,) = torch.autograd.grad(output.square().sum(), x)
    layer.eval()
    for values in (output, grad, layer(x), layer.fuse()(x)):
        assert values.is_contiguous(memory_format=memory_format)


LAYERS: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "spatial": (lambda: Deconv2d(16, 24, 3, padding=1, cfg=fast("spatial")), (16, 12, 12)),
    "on the input": (lambda: Deconv2d(64, 96, 3, padding=1, cfg=fast("spatial")), (64, 4, 4)),
    "pointwise": (lambda: Deconv2d(128, 16, 1, cfg=fast("pointwise")), (128, 8, 8)),
    "depthwise": (lambda: Deconv2d(16, 16, 3, padding=1, groups=16, cfg=fast("depthwise")), (16, 12, 12)),
    "grouped": (lambda: Deconv2d(32, 32, 3, padding=1, groups=2, cfg=fast("grouped")), (32, 8, 8)),
    "stem": (lambda: Deconv2d(3, 16, 3, stride=2, padding=1, cfg=fast("stem")), (3, 16, 16)),
    "one pixel": (lambda: Deconv2d(64, 8, 1, cfg=fast("pointwise")), (64, 1, 1)),
    "linear": (lambda: DeconvLinear(64, 10, cfg=fast("linear")), (64,)),
    "classifier": (lambda: DeconvLinear(512, 10, cfg=fast("classifier")), (512,)),
}
BY_LAYER = {"argvalues": LAYERS.values(), "ids": LAYERS.keys()}
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(batch: int, shape: tuple[int, ...], kind: str) -> Tensor:
    x = correlated(batch, *shape).float()
    if kind == "dead":
        x[:, ::2] = 0
    elif kind == "constant":
        x[:] = torch.randn(batch, shape[0]).view(batch, shape[0], *(1 for _ in shape[1:]))
    elif kind == "zero":
        x.zero_()
    return x


def forward_backward(layer: Layer, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output, gradients by name and the cotangent, of ordinary size, that they are of.

    In float16 the loss is scaled down as a gradient scaler does: sums of large inputs would leave its range in plain
    layers too.
    """
    scale = 1 / 64 if dtype == torch.float16 else 1.0
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = layer(x)
    cotangent = torch.randn(output.shape).to(output.dtype)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    grads = [grad / scale for grad in torch.autograd.grad(output, [x, *layer.parameters()], scale * cotangent)]
    return output.detach().float(), dict(zip(names, grads, strict=True)), cotangent.float()


def check_ordinary(layer: Layer, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One training step; returns the output.

    Whitened rows have second moment 1 at most, and a layer at its initialisation weight vectors of norm 1 / sqrt(3):
    outputs of more than 20 are more than 30 standard deviations away. A gradient of the weight sums a product of a
    whitened value and a standard normal one for each output position: 100 times the square root of their number, as
    windows that are no samples may be ten times larger where these are hardly more than the features. That of x is the
    plain layer's times D, and what flows through the statistics is of that size again: 10 times their product. Rounding
    to half precision adds its epsilon times |D x|, which is large where x has hardly any variance.
    """
    fresh = copy.deepcopy(layer)
    fresh.reset_running_stats()
    fresh(x)
    size = x.shape[1] // fresh.blocks.features if fresh.blocks.pixels else 1
    amplification = float(torch.linalg.eigvalsh(fresh.running_deconv).max())
    rounding = torch.finfo(dtype).eps * amplification * float(x.abs().max()) * size**0.5
    output, grads, cotangent = forward_backward(layer, x, dtype)
    bound = 20 * (1 + rounding)
    assert output.isfinite().all() and output.abs().max() < bound
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads["weight"].abs().max() < 5 * bound * (cotangent.numel() / cotangent.shape[1]) ** 0.5
    plain = layer.plain if isinstance(layer, Deconv2d) else nn.Linear
    image = torch.zeros_like(x, requires_grad=True)
    if plain is nn.Linear:
        mapped = F.linear(image, layer.weight.detach())
    else:
        mapped = F.conv2d(image, layer.weight.detach(), None, layer.stride, layer.padding, layer.dilation, layer.groups)
    (of_plain,) = torch.autograd.grad(mapped, image, cotangent)
    assert grads["x"].norm() < 10 * (1 + rounding) * amplification * of_plain.norm()
    for name in ("running_mean", "running_deconv"):
        assert getattr(layer, name).isfinite().all(), name
    assert not layer.saw_nonfinite
    return output


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("build", "shape"), **BY_LAYER)
def test_bad_inputs_give_outputs_and_gradients_of_ordinary_size(
    build: Callable[[], Layer], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    padded = any(getattr(build(), "padding", ())) and build().blocks.pixels  # see the next test
    for kind in ("ordinary", "dead", "constant", "zero"):
        for batch in (1, 2, 8):
            alone = batch == 1 and (shape[1:] in ((), (1, 1)) or (padded and kind == "constant"))  # see other tests
            if not alone:
                check_ordinary(build(), inputs(batch, shape, kind), dtype)


@pytest.mark.parametrize("name", ["spatial", "on the input", "grouped"])
def test_one_constant_image_gives_outputs_of_ordinary_size_at_the_border_too(name: str) -> None:
    build, shape = LAYERS[name]
    check_ordinary(build(), inputs(1, shape, "constant"))


GEOMETRIES = [
    dict(kernel_size=3),
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, padding=1, stride=2),
    dict(kernel_size=(5, 2), padding=(2, 1), stride=(1, 3), dilation=(1, 2)),
    dict(kernel_size=3, padding=6, dilation=6),
    dict(kernel_size=1, padding=1),
]


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_padding_counts_as_often_as_the_convolution_sees_it_but_for_a_cap(
    shape: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = DeconvCfg(layout="channels", block=block, n_iter=20, sampling_stride=1, eps=1e-9, momentum=1.0)
    layer = Deconv2d(8, 6, **shape, dtype=torch.float64, cfg=cfg)
    x = correlated(20, 8, 1, 1).add(1).expand(-1, -1, 7, 9)  # so that it does not matter which pixels are seen
    padding = [layer.padding[1]] * 2 + [layer.padding[0]] * 2
    assert layer.moments(x).padding == (geometry.MOST_PADDING if any(padding) else 0)
    monkeypatch.setattr(geometry, "MOST_PADDING", 1.0)
    windows = F.unfold(F.pad(x, padding), layer.kernel_size, layer.dilation, 0, layer.stride)
    pixels = windows.unflatten(1, [8, -1]).permute(0, 2, 3, 1).reshape(-1, 8)
    seen = pixels.reshape(-1, block).T  # all blocks share one mean and covariance
    layer(x)
    torch.testing.assert_close(layer.running_mean, seen.mean(1))
    whitened = layer.running_deconv @ (seen - seen.mean(1, keepdim=True))
    eye = torch.eye(block, dtype=torch.float64)
    torch.testing.assert_close(whitened @ whitened.T / seen.shape[1], eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("build", "shape"), **BY_LAYER)
def test_a_sudden_change_of_scale_leaves_outputs_and_gradients_of_ordinary_size(
    build: Callable[[], Layer], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for scale in (1e3, 1e-3):
        for batch in (2, 4):
            layer, x = build(), inputs(batch, shape, "ordinary")
            before = check_ordinary(layer, x, dtype)
            after = check_ordinary(layer, scale * x, dtype)
            check_ordinary(layer, x, dtype)
            if scale > 1:  # variance over eps: the scale is taken out
                assert (after - before).norm() < 0.03 * before.norm()
            else:
                assert after.norm() < 1.03 * before.norm()


