"""On a GPU a layer does what it does on the CPU, in one graph if compiled, and never makes the host wait."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import timm_deconv  # noqa: F401  registers the networks
from benchmarks.graphs import captured
from tests.layers.test_host import LAYERS as OF_HOST
from timm_deconv.kernels import plain_form
from timm_deconv.layers import Deconv2d, DeconvCfg, DeconvLinear, preset

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:whitening runs in its plain form:UserWarning"),  # of float64
]

LAYERS = OF_HOST | {"wide conv": (lambda cfg: Deconv2d(128, 64, 3, padding=1, cfg=cfg), (4, 128, 8, 8))}
CFGS = {
    "paper": preset("paper").override({"min_rows": 1.0}),
    "fast": preset("fast"),
    "freezing": DeconvCfg(freeze=True, freeze_iter=1, min_rows=1.0, start_corrected=True),
}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
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


Batch = tuple[Tensor, Tensor]
Train = Callable[[Batch], Tensor]


def network_and_batches(steps: int = 6) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar_deconv", width=0.25).cuda().to(memory_format=torch.channels_last)
    images = [torch.randn(64, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last) for _ in range(steps)]
    return model, [(batch, torch.randint(10, (64,), device="cuda")) for batch in images]


def losses_of(train: Train, model: nn.Module, batches: list[Batch]) -> Tensor:
    """Losses of steps with an update each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for batch in batches:
        losses.append(train(batch).clone())
        optimizer.step()
    return torch.stack(losses)


def eagerly(model: nn.Module, amp: torch.dtype | None = None) -> Train:
    def train(batch: Batch) -> Tensor:
        model.zero_grad(set_to_none=False)
        with torch.autocast("cuda", amp, enabled=amp is not None):
            output = model(batch[0])
        loss = F.cross_entropy(output.float(), batch[1])
        loss.backward()
        return loss.detach()

    return train


def by_replays(model: nn.Module, like: Batch, amp: torch.dtype | None = None, warmup: int = 3) -> Train:
    """Steps that are replays of one CUDA graph, captured on the first batch."""
    images, labels = like[0].clone(), like[1].clone()
    train = eagerly(model, amp)
    replay = captured(lambda: train((images, labels)), model, warmup)

    def copy_and_replay(batch: Batch) -> Tensor:
        images.copy_(batch[0])
        labels.copy_(batch[1])
        return replay()

    return copy_and_replay


@pytest.fixture
def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.usefixtures("precise")
def test_steps_are_replayed_from_the_second_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm_deconv.kernels.gpu.tape import Tape

    played, play = [], Tape.play
    monkeypatch.setattr(Tape, "play", lambda tape, tensors: played.append(tape) or play(tape, tensors))
    layer = Deconv2d(64, 48, 3, padding=1, cfg="fast").cuda().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(layer)
    for step in range(3):
        x = torch.randn(8, 64, 13, 13, device="cuda").to(memory_format=torch.channels_last)
        with plain_form():
            expected = train_twice(plain, [x])
        found = train_twice(layer, [x])
        assert len(played) == 2 * step
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
def test_replays_of_a_captured_step_train_as_the_eager_one(amp: torch.dtype | None) -> None:
    eager, batches = network_and_batches()
    graphed = copy.deepcopy(eager)
    expected = losses_of(eagerly(eager, amp), eager, batches)
    found = losses_of(by_replays(graphed, batches[0], amp), graphed, batches)
    tolerance = 1e-3 if amp is None else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for (name, buffer), other in zip(graphed.named_buffers(), eager.buffers(), strict=True):
        if name.endswith("num_batches_tracked"):
            assert buffer == other == len(batches), name
        else:
            difference = (buffer - other).norm() / other.norm()
            assert difference <= 10 * tolerance, f"{name} {difference}"


@pytest.mark.usefixtures("precise")
def test_eager_steps_go_on_where_replays_ended() -> None:
    eager, batches = network_and_batches()
    graphed = copy.deepcopy(eager)
    expected = losses_of(eagerly(eager), eager, batches)
    replayed, train = by_replays(graphed, batches[0]), eagerly(graphed)
    turns = iter([replayed, replayed, train, replayed, train, train])
    found = losses_of(lambda batch: next(turns)(batch), graphed, batches)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for buffer, other in zip(graphed.buffers(), eager.buffers(), strict=True):
        if buffer.dtype == torch.int64:
            assert buffer == other == len(batches)


def test_a_capture_of_a_layer_that_saw_nothing_leaves_its_buffers_as_they_were() -> None:
    model, batches = network_and_batches(1)
    before = copy.deepcopy(model)
    by_replays(model, batches[0])
    for (name, buffer), other in zip(model.named_buffers(), before.buffers(), strict=True):
        assert torch.equal(buffer, other), name


@pytest.mark.usefixtures("precise")
@pytest.mark.filterwarnings("ignore")  # of torch's own modules, raised while it compiles
def test_compiled_into_cuda_graphs_a_network_trains_as_the_eager_one() -> None:
    torch._dynamo.reset()
    eager, batches = network_and_batches()
    compiled = copy.deepcopy(eager)
    expected = losses_of(eagerly(eager), eager, batches)
    train = eagerly(torch.compile(compiled, mode="reduce-overhead"))
    found = losses_of(train, compiled, batches)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert all(b == len(batches) for n, b in compiled.named_buffers() if n.endswith("num_batches_tracked"))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    if not dist.is_nccl_available():
        pytest.skip("there is no NCCL")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("precise", "alone")
@pytest.mark.filterwarnings("ignore")  # of what torch calls deprecated itself
def test_a_step_under_distributed_data_parallel_is_captured_too() -> None:
    eager, batches = network_and_batches()
    graphed = copy.deepcopy(eager)
    expected = losses_of(eagerly(eager), eager, batches)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        parallel = DistributedDataParallel(graphed, broadcast_buffers=False)
    torch.cuda.current_stream().wait_stream(side)
    found = losses_of(by_replays(parallel, batches[0], warmup=11), graphed, batches)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
