"""A training step never makes the host wait for the device, forward or backward; equal steps compile once."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from timm_deconv import kernels
from timm_deconv.layers import ChannelDeconv, Deconv2d, DeconvCfg, DeconvLinear, preset

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item", "unique", "_unique")


OPERATIONS = {
    operation.overload: operation.of_numbers
    for name in kernels.__all__
    if isinstance(operation := getattr(kernels, name), kernels.Operation)
}


class NoHostReads(TorchDispatchMode):
    """Fails on every operator that makes the host wait for the device, and counts the others; looks into ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        assert not name.startswith(WAITING), f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} with a mask waits for the device"
        if name == "_to_copy":
            device = (kwargs or {}).get("device") or args[0].device
            assert torch.device(device) == args[0].device, f"a copy from {args[0].device} to {device}"
        if name == "copy_":
            assert args[0].device == args[1].device, f"a copy from {args[1].device} to {args[0].device}"
        self.seen[name] += 1
        if func in OPERATIONS:
            with self:
                return OPERATIONS[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


SETTINGS = {
    "paper": preset("paper"),
    "fast": preset("fast").override({"max_rows": 40, "block": 4}),
    "freezing": DeconvCfg(freeze=True, freeze_iter=1, min_rows=1.0, start_corrected=True),
    "fast, freezing": preset("fast").override({"freeze": True, "freeze_iter": 1}),
}
LAYERS: dict[str, tuple[Callable[[DeconvCfg], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda cfg: Deconv2d(8, 6, 3, stride=2, padding=1, cfg=cfg), (4, 8, 9, 9)),
    "conv on the input": (lambda cfg: Deconv2d(8, 16, 3, padding=1, cfg=cfg), (2, 8, 3, 3)),
    "pointwise": (lambda cfg: Deconv2d(8, 6, 1, cfg=cfg), (4, 8, 9, 9)),
    "depthwise": (lambda cfg: Deconv2d(8, 8, 3, padding=1, groups=8, cfg=cfg), (4, 8, 9, 9)),
    "grouped": (lambda cfg: Deconv2d(8, 8, 3, padding=1, groups=2, cfg=cfg), (4, 8, 9, 9)),
    "linear": (lambda cfg: DeconvLinear(16, 8, cfg=cfg), (12, 16)),
    "linear, few vectors": (lambda cfg: DeconvLinear(16, 8, cfg=cfg.override({"block": 16, "min_rows": 0})), (6, 16)),
}


def watched_step(layer: nn.Module, x: Tensor) -> tuple[Counter[str], Counter[str]]:
    """Operators of one forward and one backward."""
    x = x.requires_grad_()
    with NoHostReads() as forward:
        output = layer(x)
    cotangent = torch.randn_like(output)
    with NoHostReads() as backward:
        output.backward(cotangent)
    return forward.seen, backward.seen


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cfg", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_no_training_step_reads_the_device(
    build: Callable[[DeconvCfg], nn.Module],
    shape: tuple[int, ...],
    cfg: DeconvCfg,
    memory_format: torch.memory_format,
) -> None:
    layer = build(cfg)
    for step in range(12):  # over freezing after the second and thawing at the eleventh
        x = torch.randn(shape)
        if len(shape) == 4:
            x = x.contiguous(memory_format=memory_format)
        forward, backward = watched_step(layer, x)
        frozen = cfg.freeze and 2 <= step < 10
        assert bool(forward["sqrt"]) is not frozen  # of the covariance's norm
        of_statistics, of_map = ("baddbmm", "convolution_backward") if len(shape) == 4 else ("div", "mm")
        assert bool(backward[of_statistics]) is not frozen
        assert backward[of_map]
        if not cfg.freeze and step == 2:
            break
    assert not layer.saw_nonfinite


def test_channel_whitening_does_not_read_the_device() -> None:
    for name in ("paper", "fast"):
        layer = ChannelDeconv(10, cfg=preset(name).override({"block": 4}))
        for _ in range(3):
            _, backward = watched_step(layer, torch.randn(4, 10, 9, 9))
        assert backward["mm"] or backward["bmm"]


def test_a_loaded_counter_is_read_once_if_the_layer_freezes_and_never_if_not() -> None:
    layer = LAYERS["conv"][0](SETTINGS["freezing"])
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        layer(torch.randn(4, 8, 9, 9))
    layer(torch.randn(4, 8, 9, 9))
    other = LAYERS["conv"][0](SETTINGS["fast"])
    other.load_state_dict(other.state_dict())
    for _ in range(3):
        watched_step(layer, torch.randn(4, 8, 9, 9))
        watched_step(other, torch.randn(4, 8, 9, 9))


def test_the_counter_is_read_once_while_weights_are_uncalibrated() -> None:
    layer = LAYERS["conv"][0](SETTINGS["fast"])
    layer.notices.uncalibrated = True
    layer.num_batches_tracked.fill_(3)  # no longer the first batch, of which the user is told
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        layer(torch.randn(4, 8, 9, 9))
    layer(torch.randn(4, 8, 9, 9))
    for _ in range(3):
        watched_step(layer, torch.randn(4, 8, 9, 9))


class Reading(Deconv2d):
    """What this file is there to find."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output / output.detach().abs().max().item()


class ReadingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if grad.sum().item() > 0 else -grad


def test_a_layer_that_reads_the_device_is_caught() -> None:
    layer = Reading(8, 6, 3, padding=1, cfg=preset("fast"))
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"):
        watched_step(layer, torch.randn(2, 8, 9, 9))
    layer = LAYERS["conv"][0](preset("fast"))
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    with NoHostReads():
        output = ReadingBackward.apply(layer(x)).sum()
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoHostReads():
        output.backward()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool(x.isfinite().all()),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.to("meta"),
        lambda x: torch.empty_like(x, device="meta").copy_(x),
        lambda x: x.clone().__setitem__(x > 0, torch.zeros(int((x.tolist()[0]) > 0))),
    ],
    ids=["bool", "mask", "masked_select", "nonzero", "equal", "unique", "to", "copy_", "mask assignment"],
)
def test_every_way_to_read_the_device_is_caught(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match=r"waits for the device|a copy from"), NoHostReads():
        read(torch.ones(1))


@pytest.mark.parametrize("name", ["conv", "conv on the input"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, raised while it compiles
def test_three_equal_steps_compile_once(name: str) -> None:
    torch._dynamo.reset()
    build, shape = LAYERS[name]
    layer = build(SETTINGS["fast"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    eager = build(SETTINGS["fast"])
    eager.load_state_dict(layer.state_dict())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = torch.randn(shape)
            images = [x.clone().requires_grad_() for _ in range(2)]
            for module, image in zip((compiled, eager), images, strict=True):
                module(image).square().mean().backward()
            torch.testing.assert_close(images[0].grad, images[1].grad, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1
    torch.testing.assert_close(layer.weight.grad, eager.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.running_deconv, eager.running_deconv, rtol=1e-4, atol=1e-6)
    assert layer.num_batches_tracked == 3
