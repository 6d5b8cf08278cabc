"""What a GPU would be given is seen without one: kernels are listed, and go as far as to the driver."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_path import MODULES, driver_without_gpu, on_gpu_path
from benchmarks.host import COLUMNS, HostSettings, host_rows
from benchmarks.kernels import _Counting, eager_kernels
from timm_deconv import kernels
from timm_deconv.errors import InputError
from timm_deconv.kernels import PIXEL, Blocks, Sampling, plain_form, sampled_moments, windows
from timm_deconv.kernels.gpu.dispatch import GpuForm
from timm_deconv.kernels.operation import wants_plain_form
from timm_deconv.layers import Deconv2d, convolution, operation

pytest.importorskip("triton")

SAMPLED = (Sampling(PIXEL), Blocks(1, 4))


@pytest.fixture(autouse=True)
def fake_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of fewer than 100 images by two kernels that there are not; they leave zeros."""

    def moments(x: Tensor, sampling: Sampling, blocks: Blocks) -> tuple[Tensor, Tensor]:
        from timm_deconv.kernels.gpu.launch import Launch, Unfit

        if x.shape[0] >= 100:
            raise Unfit
        for name in ("first", "second"):
            Launch(SimpleNamespace(fn=SimpleNamespace(__name__=name), arg_names=[]), (1,))(x)
        return x.new_zeros(blocks.sets, blocks.features), x.new_zeros(blocks.sets, blocks.features, blocks.features)

    module = ModuleType(f"{MODULES}.fake")
    module.sampled_moments = moments
    monkeypatch.setitem(sys.modules, f"{MODULES}.fake", module)
    monkeypatch.setattr(kernels, "GPU_MODULES", {sampled_moments: "fake"})
    form = GpuForm(sampled_moments, "fake")
    switched = lambda *args: (sampled_moments.function if wants_plain_form() else form)(*args)  # noqa: E731
    monkeypatch.setitem(sampled_moments._kernels, "cuda", switched)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_launches_are_listed_and_not_made(requires_grad: bool) -> None:
    x = torch.randn(8, 4, 3, 3, requires_grad=requires_grad)
    with on_gpu_path() as launched:
        assert not sampled_moments(x, *SAMPLED)[1].any()
    assert launched == ["first", "second"]
    assert sampled_moments(x, *SAMPLED)[1].any() and len(launched) == 2


def test_the_path_is_that_of_a_gpu_back_to_the_plain_form_too() -> None:
    x = torch.randn(100, 4, 3, 3)
    with on_gpu_path() as launched:
        assert sampled_moments(x, *SAMPLED)[1].any()
        with plain_form():
            assert sampled_moments(x[:8], *SAMPLED)[1].any()
    assert launched == []


def test_kernels_for_gpus_are_counted_with_what_torch_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (windows, convolution, operation):  # for the plain forms too
        monkeypatch.setattr(module, "on_cpu", lambda x: False)
    layer, x = Deconv2d(4, 4, 1, cfg="fast"), torch.randn(8, 4, 3, 3, requires_grad=True)
    with torch.no_grad(), _Counting() as of_moments:
        sampled_moments.function(x, *SAMPLED)
    plain = eager_kernels(layer, x)
    assert eager_kernels(layer, x) == plain
    zeros, launches = 2, 2
    assert eager_kernels(layer, x, "triton") == plain - of_moments.kernels + zeros + launches


def test_a_launch_goes_as_far_as_to_the_driver() -> None:
    from timm_deconv.kernels.gpu.probe import add_one

    number = torch.zeros(())
    with driver_without_gpu(), on_gpu_path(launches=True) as launched:
        add_one(number)
    assert launched == ["_add_one"]
    assert number == 0


def test_the_hosts_time_is_measured_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm_deconv.kernels.gpu.launch.Launch.__call__", lambda *args: None)
    rows = list(host_rows(HostSettings(layers=["pointwise"], rounds=2, warmup=0), lambda message: None))
    assert [set(row) for row in rows] == [set(COLUMNS)] * 4
    assert {row["form"]: row["launches"] for row in rows} == {"none": 0, "twin": 0, "plain": 0, "triton": 2}
    assert all(row["microseconds"] > 0 and row["forward"] > 0 for row in rows)
    assert rows[1]["over_twin"] == 0


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(InputError, match="no layer 'pointwize'; nearest: depthwise, pointwise"):
        HostSettings(layers=["pointwize"])
