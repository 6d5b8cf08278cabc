"""In evaluation a layer is a fold and a convolution, which every tracer and exporter takes; checkpointing is exact."""

import copy
import functools
import io

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torchvision.models.feature_extraction import create_feature_extractor

from timm_deconv.layers import ChannelDeconv, Deconv2d, Deconv2dSame, DeconvLinear

ATEN = torch.ops.aten
PRODUCTS = [getattr(ATEN, name).default for name in ("convolution", "mm", "bmm", "baddbmm", "addmm")]


def network(preset: str = "fast") -> nn.Sequential:
    """After three training forwards, in evaluation mode."""
    net = nn.Sequential(
        Deconv2d(3, 8, 3, padding=1, cfg=preset),
        nn.ReLU(),
        Deconv2d(8, 8, 3, padding=1, groups=8, cfg=preset),
        Deconv2dSame(8, 16, 3, stride=2, cfg=preset),
        Deconv2d(16, 16, 1, padding="same", cfg=preset),
        ChannelDeconv(16, cfg={"block": 8}),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        DeconvLinear(16, 4, cfg=preset),
    )
    for _ in range(3):
        net(images())
    return net.eval()


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16)


def script(net: nn.Module, _x: Tensor) -> nn.Module:
    return torch.jit.script(net)


def trace(net: nn.Module, x: Tensor) -> nn.Module:
    with torch.no_grad():
        return torch.jit.trace(net, x)


def symbolic(net: nn.Module, _x: Tensor) -> nn.Module:
    return torch.fx.symbolic_trace(net)


def features(net: nn.Module, _x: Tensor) -> nn.Module:
    extractor = create_feature_extractor(net, {"8": "logits", "3": "map"})
    assert extractor(images())["map"].shape == (4, 16, 8, 8)
    return nn.Sequential(extractor, Chosen("logits"))


class Chosen(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, values: dict[str, Tensor]) -> Tensor:
        return values[self.name]


def exported(net: nn.Module, x: Tensor) -> nn.Module:
    return torch.export.export(net, (x,)).module()


# How much 'SAME' pads depends on the size of the image, which a trace fixes.
fixed_size = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@fixed_size
@pytest.mark.parametrize("tracer", [script, trace, symbolic, features, exported])
@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_traced_networks_evaluate_the_same(tracer, preset: str) -> None:
    net, x = network(preset), images()
    expected = net(x).detach()
    torch.testing.assert_close(tracer(net, x)(x).detach(), expected)


@pytest.mark.parametrize("tracer", [symbolic, features])
def test_networks_are_traced_in_training_too(tracer) -> None:
    net, x = network(), images()
    other = copy.deepcopy(net)
    torch.testing.assert_close(tracer(net.train(), x).train()(x), other.train()(x))


def test_layers_that_pad_alike_are_traced_without_a_warning() -> None:
    net = nn.Sequential(Deconv2d(3, 8, 3, padding=1, cfg="fast"), nn.Flatten(), DeconvLinear(2048, 4, cfg="fast"))
    net(images())
    trace(net.eval(), images())


@fixed_size
@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Constant folding:UserWarning")
@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_unfused_networks_go_through_the_older_onnx_exporter(preset: str) -> None:
    file, net, x = io.BytesIO(), network(preset), images()
    torch.onnx.export(net, (x,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), net(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [PRODUCTS[:1], PRODUCTS, [*PRODUCTS, ATEN.mul.Tensor, ATEN.add.Tensor]])
@pytest.mark.parametrize("few", [2**23, 0], ids=["matrix products", "convolutions"])
@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_selective_checkpointing_gives_the_gradients_of_none(preset: str, few: int, kept, monkeypatch) -> None:
    monkeypatch.setattr("timm_deconv.kernels.onednn.FEW_PRODUCTS", few)

    def policy(_ctx, op, *_args, **_kwargs) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    plain = network(preset).train()
    net = copy.deepcopy(plain)
    x = images().requires_grad_()
    y = x.detach().clone().requires_grad_()
    plain(x).square().sum().backward()
    checkpoint(net, y, use_reentrant=False, context_fn=contexts).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    for name, value in plain.named_buffers():
        assert torch.equal(net.get_buffer(name), value), name
