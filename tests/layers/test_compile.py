"""torch.compile, torch.export and TorchScript give what eager mode gives, in one graph and without recompiling."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_deconv.kernels.onednn import FEW_PRODUCTS
from timm_deconv.layers import ChannelDeconv, Deconv2d, DeconvCfg, DeconvLinear


class Net(nn.Module):
    """Every kind of whitening layer: a freezing stem, grouped, depthwise, spatial, channel and linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Deconv2d(3, 8, 3, padding=1, cfg=DeconvCfg(freeze=True, freeze_iter=2, n_iter=4))
        self.grouped = Deconv2d(8, 8, 3, padding=1, groups=2, cfg=DeconvCfg(start_corrected=True))
        self.depthwise = Deconv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.spatial = Deconv2d(8, 8, 3, padding=1, cfg=DeconvCfg(layout="channels", n_iter=3, quartic=True))
        self.pointwise = Deconv2d(8, 8, 1, cfg=DeconvCfg(block=4, layout="window", min_rows=2.0))
        self.channel = ChannelDeconv(8, cfg=DeconvCfg(block=3))
        self.head = DeconvLinear(8, 5, cfg=DeconvCfg(block=4))

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.stem, self.grouped, self.depthwise, self.spatial, self.pointwise):
            x = conv(x).relu()
        return self.head(self.channel(x).mean((2, 3)))


def train_steps(net: nn.Module, module: nn.Module, steps: int) -> list[Tensor]:
    torch.manual_seed(1)
    optimiser = torch.optim.SGD(module.parameters(), 0.005)  # more would amplify rounding
    losses = []
    for _ in range(steps):
        loss = (net(torch.randn(4, 3, 12, 12)) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize(
    ("backend", "few"),
    [
        pytest.param("aot_eager", FEW_PRODUCTS, id="matrix products"),
        pytest.param("aot_eager", 0, id="convolutions"),
        pytest.param("inductor", 0, id="inductor", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # both of torch's own modules, raised while it compiles
def test_compiled_training_is_eager_training_in_one_graph(
    backend: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm_deconv.kernels.onednn.FEW_PRODUCTS", few)
    torch._dynamo.reset()
    eager = Net()
    compiled = copy.deepcopy(eager)
    graph = torch.compile(compiled, fullgraph=True, backend=backend)
    expected = train_steps(eager, eager, 6)  # freezes after the third
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train_steps(graph, compiled, 6)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    for (name, value), other in zip(eager.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(graph.eval()(x), eager.eval()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, raised while it compiles
def test_eager_training_goes_on_where_compiled_training_stopped() -> None:
    torch._dynamo.reset()
    net = Net()
    train_steps(torch.compile(net, fullgraph=True, backend="eager"), net, 5)
    before = net.stem.running_deconv.clone()
    train_steps(net, net, 1)
    assert net.stem.num_batches_tracked == 6
    assert torch.equal(net.stem.running_deconv, before)


def trained() -> Net:
    net = Net()
    train_steps(net, net, 2)
    return net.eval()


def test_exported_network_equals_the_evaluating_one() -> None:
    net, x = trained(), torch.randn(2, 3, 12, 12)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x), rtol=1e-4, atol=1e-5)


def test_scripted_network_equals_the_evaluating_one_and_refuses_to_train(tmp_path) -> None:
    net, x = trained(), torch.randn(2, 3, 12, 12)

    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.grouped, self.channel, self.head = net.stem, net.grouped, net.channel, net.head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.channel(self.grouped(self.stem(x))).mean((2, 3)))

    plain = Convolutions()
    scripted = torch.jit.script(plain.eval())
    torch.jit.save(scripted, tmp_path / "net.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "net.pt")(x), plain(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(torch.jit.Error, match="only evaluates"):
        scripted.train()(x)


class NoHostReads(TorchDispatchMode):
    """Fails on every operator that makes the host wait for the device."""

    HOST = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        assert name not in self.HOST, f"{name} in the training path"
        if name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            raise AssertionError("boolean indexing in the training path")
        return func(*args, **(kwargs or {}))


def test_training_steps_never_read_the_device() -> None:
    net = Net()
    with NoHostReads():
        for _ in range(4):
            net(torch.randn(4, 3, 12, 12)).square().mean().backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        torch.ones(()).item()
