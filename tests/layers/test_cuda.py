"""On a GPU a layer does what it does on the CPU, in one graph if compiled, and never makes the host wait."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_deconv  # noqa: F401  registers the networks
from tests.layers.test_host import LAYERS as OF_HOST
from timm_deconv.layers import Deconv2d, DeconvCfg, DeconvLinear, preset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LAYERS = OF_HOST | {"wide conv": (lambda cfg: Deconv2d(128, 64, 3, padding=1, cfg=cfg), (4, 128, 8, 8))}
CFGS = {
    "paper": preset("paper").override({"min_rows": 1.0}),
    "fast": preset("fast"),
    "freezing": DeconvCfg(freeze=True, freeze_iter=1, min_rows=1.0, start_corrected=True),
}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train_twice(layer: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients of inputs and parameters, and running values."""
    found = []
    for batch in batches:
        x = batch.clone().requires_grad_()
        output = layer(x)
        output.square().mean().backward()
        found += [output.detach(), x.grad]
    return [*found, *(p.grad for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cfg", CFGS.values(), ids=CFGS.keys())
@pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_a_gpu_computes_what_a_processor_computes(
    build: Callable[[DeconvCfg], nn.Module],
    shape: tuple[int, ...],
    cfg: DeconvCfg,
    memory_format: torch.memory_format,
) -> None:
    on_cpu = build(cfg).double()
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    if len(shape) == 4:
        batches = [batch.contiguous(memory_format=memory_format) for batch in batches]
    on_gpu = copy.deepcopy(on_cpu).cuda()
    expected = train_twice(on_cpu, batches)
    found = train_twice(on_gpu, [batch.cuda() for batch in batches])
    torch.testing.assert_close([value.cpu() for value in found], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["fast", "paper"])
@pytest.mark.parametrize("network", ["resnet18_cifar_deconv", "mobilenetv2_cifar_deconv"])
def test_training_steps_never_make_the_host_wait(network: str, name: str, amp: torch.dtype | None) -> None:
    model = timm.create_model(network, width=0.25, deconv=name).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(64, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)

    def step() -> Tensor:
        with torch.autocast("cuda", amp, enabled=amp is not None):
            output = model(images)
        loss = output.float().logsumexp(1).mean()
        loss.backward()
        return loss.detach()

    losses = [step()]  # the first may load and choose kernels
    with no_waiting():
        losses += [step(), step()]
    assert torch.stack(losses).isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["fast", "paper"])
@pytest.mark.filterwarnings("ignore")  # of torch's own modules, raised while it compiles
def test_a_compiled_step_is_the_eager_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    cfg = preset(name)
    eager = nn.Sequential(
        Deconv2d(3, 16, 3, padding=1, cfg=cfg),
        nn.ReLU(),
        Deconv2d(16, 16, 3, padding=1, groups=16, cfg=cfg),
        nn.ReLU(),
        Deconv2d(16, 16, 1, cfg=cfg),
        nn.Flatten(),
        DeconvLinear(16 * 64, 5, cfg=cfg.override({"min_rows": 1.0})),
    ).cuda()
    compiled = copy.deepcopy(eager)
    graph = torch.compile(compiled, fullgraph=True)
    for _ in range(3):
        images = torch.randn(64, 3, 8, 8, device="cuda")
        expected, output = eager(images), graph(images)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
        for network, result in ((eager, expected), (compiled, output)):
            network.zero_grad()
            result.square().mean().backward()
        for parameter, other in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-2, atol=1e-4)
