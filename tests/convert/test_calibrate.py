"""calibrate: whitened from the first step, and the same function; or a refusal that changes nothing."""

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from tests.layers.sampled import sampled_rows
from timm_deconv import Deconv2d, DeconvCfg, DeconvLinear, calibrate, convert_deconv_model, fuse, transfer
from timm_deconv.data import Digits
from timm_deconv.data.evaluation import picture_loader
from timm_deconv.errors import InputError
from timm_deconv.layers import ChannelDeconv, WhiteningMixin
from timm_deconv.linalg import isqrt_newton_schulz
from timm_deconv.models.checkpoints import STATISTICS

Data = tuple[Tensor, Tensor]


def digits(train: bool) -> Data:
    """The embedded digits at 16x16."""
    data = Digits(train)
    images = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in data.images])
    return F.avg_pool2d((images.float() / 255 - 0.3) / 0.32, 2), torch.as_tensor(data.targets)


@pytest.fixture(scope="module")
def training_images() -> Data:
    return digits(train=True)


@pytest.fixture(scope="module")
def test_images() -> Tensor:
    return digits(train=False)[0]


@pytest.fixture(scope="module")
def trained(training_images: Data) -> nn.Module:
    """A batch-norm ResNet-18 of an eighth of the width, trained for a few seconds."""
    torch.manual_seed(0)
    images, targets = training_images
    model = timm.create_model("resnet18_cifar", width=0.125).train()
    steps = 3 * (len(images) // 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    order = torch.cat([torch.randperm(len(images)) for _ in range(3)])
    for step in range(steps):
        batch = order[64 * step : 64 * step + 64]
        loss = F.cross_entropy(model(images[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def transferred(trained: nn.Module, policy: Any = None) -> nn.Module:
    model = copy.deepcopy(trained)
    transfer(model, policy)
    return model.eval()


def batches(data: Data, size: int = 128) -> list[Data]:
    images, targets = data
    return [(images[i : i + size], targets[i : i + size]) for i in range(0, len(images), size)]


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, batch: int = 100) -> Tensor:
    return torch.cat([model(part) for part in images.split(batch)])


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def agreement(a: Tensor, b: Tensor) -> float:
    return float((a.argmax(1) == b.argmax(1)).double().mean())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


POLICIES = [
    None,
    {"preset": "paper", "min_rows": 0.0, "roles": {"stem": {"n_iter": 15, "freeze": True}}},
    {"preset": "paper", "layout": "window", "block": 16},
]


@pytest.mark.parametrize("policy", POLICIES)
def test_calibration_keeps_the_function_and_training_starts_on_the_right_class(
    trained: nn.Module, training_images: Data, test_images: Tensor, policy: Any
) -> None:
    model = transferred(trained, policy)
    expected = outputs(trained, test_images)
    with pytest.warns(UserWarning, match=r"timm_deconv.calibrate\(model, loader\)") as said:
        uncalibrated = agreement(outputs(copy.deepcopy(model).train(), test_images), expected)
    assert len(said) == 1, "once a network"
    calibrate(model, batches(training_images))
    assert difference(outputs(model, test_images), expected) < 1e-3
    first_training_forward = outputs(copy.deepcopy(model).train(), test_images)
    assert agreement(first_training_forward, expected) >= 0.95 > uncalibrated


def test_calibration_is_exact_in_float64_and_again_when_repeated(trained: nn.Module, training_images: Data) -> None:
    model = transferred(trained).double()
    images = training_images[0][:300].double()
    expected = outputs(model, images)
    for _ in range(2):
        calibrate(model, [images[:100], images[100:]])
        assert difference(outputs(model, images), expected) < 1e-10
    assert difference(outputs(model, images), expected) > 0


LAYERS = {
    "interleaved": (lambda cfg: Deconv2d(8, 6, 3, padding=1, cfg=cfg), DeconvCfg(block=4)),
    "flat": (lambda cfg: Deconv2d(8, 6, 3, stride=2, cfg=cfg), DeconvCfg(block=12, layout="flat", sampling_stride=2)),
    "window": (lambda cfg: Deconv2d(8, 6, 3, cfg=cfg), DeconvCfg(block=4, layout="window")),
    "grouped": (lambda cfg: Deconv2d(8, 4, 3, groups=2, cfg=cfg), DeconvCfg(n_iter=3)),
    "depthwise": (lambda cfg: Deconv2d(8, 16, 3, groups=8, cfg=cfg), DeconvCfg(n_iter=1)),
    "pointwise": (lambda cfg: Deconv2d(8, 6, 1, cfg=cfg), DeconvCfg(n_iter=15)),
    "linear": (lambda cfg: nn.Sequential(nn.Flatten(), DeconvLinear(800, 6, cfg=cfg)), DeconvCfg(block=16)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_whitener_is_the_inverse_root_of_the_average_covariance_of_all_rows(kind: str) -> None:
    make, cfg = LAYERS[kind]
    net = nn.Sequential(make(cfg)).double()
    layer = next(m for m in net.modules() if isinstance(m, WhiteningMixin))
    images = [torch.randn(n, 8, 10, 10, dtype=torch.float64) * n + n for n in (9, 3)]
    mixing = torch.randn(8, 8, dtype=torch.float64)
    images = [torch.einsum("ij,njhw->nihw", mixing, x) for x in images]
    expected = outputs(net.eval(), images[0])
    counts = calibrate(net, images)
    rows = torch.cat([sampled_rows(layer, x.flatten(1) if kind == "linear" else x) for x in images], 1)
    assert list(counts.values()) == [rows.shape[1]]
    cov = torch.stack([torch.cov(r.T, correction=0) for r in rows])
    root = isqrt_newton_schulz(cov + cfg.eps * torch.eye(cov.shape[-1]).double(), cfg.n_iter)
    torch.testing.assert_close(layer.running_deconv.reshape(root.shape), root, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.running_mean.reshape(rows.shape[0], -1), rows.mean(1), rtol=1e-9, atol=1e-12)
    assert difference(outputs(net, images[0]), expected) < 1e-10


def test_images_alone_are_taken_as_images_with_targets_and_no_more_than_asked_for(training_images: Data) -> None:
    images = training_images[0][:200]
    nets = [nn.Sequential(Deconv2d(3, 4, 3)) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    seen: list[int] = []

    def endless() -> Iterator[Tensor]:
        while True:
            seen.append(1)
            yield images[:100] if len(seen) == 1 else images[100:]

    calibrate(nets[0], endless(), batches=2)
    calibrate(nets[1], [(images[:100], torch.zeros(100)), [images[100:], None]])
    calibrate(nets[2], [images])
    assert len(seen) == 2
    assert_unchanged(nets[1], state(nets[0]))
    for key, value in nets[2].state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, nets[0].state_dict()[key], rtol=1e-4, atol=1e-5)


def test_frozen_layer_starts_frozen_and_corrected_averages_do_not_forget_the_calibration() -> None:
    layers = {
        "frozen": Deconv2d(3, 4, 3, cfg=DeconvCfg(freeze=True, freeze_iter=5)),
        "corrected": Deconv2d(3, 4, 3, cfg=DeconvCfg(start_corrected=True)),
    }
    for kind, layer in layers.items():
        net = nn.Sequential(layer)
        calibrate(net, [torch.randn(4, 3, 12, 12) for _ in range(9)])
        before = state(layer)
        net.train()(100 * torch.randn(4, 3, 12, 12))
        change = difference(layer.running_mean, before["running_mean"])
        assert change == 0 if kind == "frozen" else change > 0
        if kind == "corrected":  # by the weight that a tenth batch has: 0.1 / (1 - 0.9 ** 10)
            live = Deconv2d(3, 4, 3, cfg=DeconvCfg(momentum=1.0))
            torch.manual_seed(1)
            x = torch.randn(4, 3, 12, 12)
            live.train()(x)
            kept = state(layer)["running_mean"]
            net(x)
            share = 0.1 / (1 - 0.9**11)
            torch.testing.assert_close(layer.running_mean, kept + share * (live.running_mean - kept))


def test_modes_hooks_and_gradients_are_as_before_also_after_an_error() -> None:
    net = nn.Sequential(Deconv2d(3, 4, 3), nn.Dropout(0.5), nn.Sequential(Deconv2d(4, 2, 1))).train()
    net[2].eval()
    modes = [m.training for m in net.modules()]
    before = state(net)

    def breaks() -> Iterator[Tensor]:
        yield torch.randn(8, 3, 9, 9)
        raise OSError("unreadable image")

    with pytest.raises(OSError, match="unreadable"):
        calibrate(net, breaks())
    assert_unchanged(net, before)
    calibrate(net, [torch.randn(8, 3, 9, 9)])
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(p.requires_grad and p.grad is None and p.grad_fn is None for p in net.parameters())


def test_too_few_samples_name_the_neediest_layer_and_how_many_images_it_needs_and_change_nothing() -> None:
    net = timm.create_model("resnet18_cifar_deconv", width=0.25)
    before = state(net)
    said = "calibrate fc: it saw 4 rows and needs at least 128, one a feature; give 128 images, not 4"
    with pytest.raises(InputError, match=said):
        calibrate(net, [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)])
    assert_unchanged(net, before)
    assert net.training
    calibrate(net, [torch.randn(128, 3, 32, 32)])


def test_as_many_images_are_named_as_the_rows_of_one_need() -> None:
    net = nn.Sequential(Deconv2d(3, 8, 3))  # 27 features; of 7 x 7 rows an image, each third a side is used
    with pytest.raises(InputError, match="it saw 18 rows and needs at least 27, one a feature; give 3 images, not 2"):
        calibrate(net, [torch.randn(2, 3, 9, 9)])
    calibrate(net, [torch.randn(3, 3, 9, 9)])


def test_layers_that_evaluation_does_not_use_and_channel_whitening_stay_as_they_are() -> None:
    net = timm.create_model("fcn_resnet50_deconv", layers=(1, 1, 1, 1), aux_head=True, drop_rate=0.0, deconv="paper")
    before = state(net.aux_decoder)
    counts = calibrate(net, [torch.randn(2, 3, 65, 65) for _ in range(4)])
    assert_unchanged(net.aux_decoder, before)
    assert not [name for name in counts if name.startswith("aux_")]
    net = nn.Sequential(Deconv2d(3, 64, 3), ChannelDeconv(64))
    before = state(net[1])
    calibrate(net, [torch.randn(4, 3, 12, 12)])
    assert_unchanged(net[1], before)


def test_networks_and_loaders_that_cannot_be_calibrated_are_refused_in_one_line() -> None:
    net = nn.Sequential(Deconv2d(3, 4, 3))
    images = torch.randn(8, 3, 9, 9)
    tied = nn.Sequential(Deconv2d(3, 3, 1), Deconv2d(3, 3, 1))
    tied[1].weight = tied[0].weight
    broken = images.clone()
    broken[0, 0, 0, 0] = float("nan")
    cases: list[tuple[nn.Module, Any, str]] = [
        (fuse(net), [images], "no whitening layer in Conv2d|no whitening layer in Sequential.*before fusing"),
        (net, [], "no batches to calibrate on"),
        (net, [images.to(torch.uint8)], "a batch of torch.uint8"),
        (net, [{"image": images}], "a batch of dict"),
        (tied, [images], "1 shares its weight with 0"),
        (net, [broken], "input of 0 is not finite"),
    ]
    for model, loader, message in cases:
        before = state(model)
        with pytest.raises(InputError, match=message) as error:
            calibrate(model, loader)
        assert "\n" not in str(error.value)
        assert_unchanged(model, before)


def whitened(**options: Any) -> nn.Sequential:
    """A stem, and a layer with these options behind it."""
    return nn.Sequential(Deconv2d(3, 4, 3), Deconv2d(4, 4, 3, **options))


def parametrised() -> nn.Module:
    net = whitened()
    nn.utils.parametrizations.weight_norm(net[1])
    return net


def pruned() -> nn.Module:
    net = whitened()
    nn.utils.prune.l1_unstructured(net[1], "weight", 0.5)
    return net


def tied_to_a_plain_layer() -> nn.Module:
    net = whitened()
    net.append(nn.Conv2d(4, 4, 3))
    net[2].weight = net[1].weight
    return net


def tied_in_storage() -> nn.Module:
    net = whitened()
    net.append(Deconv2d(4, 4, 3))
    net[2].bias.data = net[1].bias.data
    return net


def without_room() -> nn.Module:
    """In half precision, where the inverse of a small whitener is too large."""
    net = whitened()
    with torch.no_grad():
        net[0].weight.mul_(1e4)
        net[1].weight.mul_(100)
    return net.half()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: whitened(bias=False), r"1 has no bias, .* layer\.bias = nn\.Parameter\(torch\.zeros\(4\)\)"),
        (parametrised, "the weight of 1 is computed"),
        (pruned, "the weight of 1 is computed"),
        (tied_to_a_plain_layer, "2 shares its weight with 1"),
        (tied_in_storage, "2 shares its bias with 1"),
        (without_room, "the weight of 1 cannot absorb the inverse of its whitener in torch.float16"),
    ],
)
def test_where_one_layer_cannot_be_calibrated_none_is_changed(make: Callable[[], nn.Module], message: str) -> None:
    net = make()
    before = state(net)
    with pytest.raises(InputError, match=message) as error:
        calibrate(net, [torch.randn(16, 3, 12, 12)])
    assert "\n" not in str(error.value)
    assert_unchanged(net, before)


def test_one_tensor_of_images_is_one_batch() -> None:
    images = torch.randn(16, 3, 12, 12)
    nets = [whitened()]
    nets.append(copy.deepcopy(nets[0]))
    counts = [calibrate(net, loader) for net, loader in zip(nets, (images, [images]), strict=True)]
    assert counts[0] == counts[1] and counts[0]["0"] > 0
    assert_unchanged(nets[0], state(nets[1]))


def test_what_is_no_batch_of_images_is_refused() -> None:
    image = torch.randn(3, 12, 12)
    for loader, options, message in (
        (image, {}, r"a tensor of shape \(3, 12, 12\)"),
        ([(image, 0)], {}, r"0 was given one image, \(3, 12, 12\)"),
        ([image[None]], {"batches": 0}, "batches=0: at least one"),
        ([image[None]], {"batches": -1}, "batches=-1: at least one"),
    ):
        net = whitened()
        before = state(net)
        with pytest.raises(InputError, match=message):
            calibrate(net, loader, **options)
        assert_unchanged(net, before)


def test_a_layer_called_by_keyword_is_calibrated_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Deconv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    assert calibrate(Net(), torch.randn(16, 3, 12, 12))["conv"] > 0


def test_a_network_made_in_inference_mode_is_calibrated_there_and_refused_elsewhere() -> None:
    with torch.inference_mode():
        net = whitened().eval()
        images = torch.randn(16, 3, 12, 12)
        expected = net(images)
        calibrate(net, images)
        assert difference(net(images), expected) < 1e-3
        before = state(net)
    with pytest.raises(InputError, match="0 was made in inference mode"):
        calibrate(net, [images.clone()])
    assert_unchanged(net, before)


def test_in_inference_mode_the_next_output_comes_from_the_new_weight() -> None:
    net, images = whitened().eval(), torch.randn(16, 3, 12, 12)
    with torch.inference_mode():
        calibrate(net, images)
        found = net(images)
    assert torch.equal(found, copy.deepcopy(net)(images))


def test_what_was_measured_of_the_whitener_of_before_is_forgotten() -> None:
    net = whitened(cfg=DeconvCfg(gain_corrected=True))
    for _ in range(3):
        net.train()(torch.randn(16, 3, 12, 12))
    assert not torch.equal(net[1].running_gain, torch.ones(1))
    calibrate(net, torch.randn(16, 3, 12, 12))
    assert torch.equal(net[1].running_gain, torch.ones(1)) and not net[1].running_power.any()


def test_a_statistic_that_a_layer_may_keep_is_known_to_the_filter_of_weights() -> None:
    layer = Deconv2d(1, 1, 1, cfg=DeconvCfg(gain_corrected=True))
    assert {name for name, _ in layer.named_buffers()} == set(STATISTICS)


def test_devices_without_float64_are_calibrated_in_float64_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [whitened()]
    nets.append(copy.deepcopy(nets[0]))
    images = torch.randn(16, 3, 12, 12)
    calibrate(nets[0], images)
    double = Tensor.double

    def refusing(tensor: Tensor) -> Tensor:
        assert tensor.moved  # type: ignore[attr-defined]
        return double(tensor)

    def moving(tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        copied.moved = True  # type: ignore[attr-defined]
        return copied

    monkeypatch.setattr(importlib.import_module("timm_deconv.linalg"), "WITHOUT_DOUBLE", ("cpu",))
    monkeypatch.setattr(Tensor, "double", refusing)
    monkeypatch.setattr(Tensor, "cpu", moving)
    calibrate(nets[1], images)
    assert_unchanged(nets[1], state(nets[0]))


def test_converted_network_without_trained_weights_is_calibrated_too() -> None:
    net = timm.create_model("mobilenetv2_050", num_classes=10)
    convert_deconv_model(net)
    loader = picture_loader(net, "digits", images=64)
    calibrate(net.train(), (F.interpolate(images, 64) for images, _ in loader))
    assert net.training
    assert net(torch.randn(2, 3, 64, 64)).isfinite().all()
