"""The check of a GPU, tried on a CPU: parts measure, rows are written as they come, a second run goes on."""

import csv
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch

from benchmarks import gpu_check, gpu_parts
from benchmarks.gpu_check import COLUMNS, PARTS, Goal, check, describe_card, judged
from benchmarks.gpu_parts import Found, Network, kind_of, peak_memory, run_tests, step_times
from timm_deconv.errors import InputError

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class InProcess:
    """A worker whose parts find what a test says, or fail."""

    found: ClassVar[dict[str, list[Found]]] = {}
    asked: ClassVar[list[str]] = []

    def run(self, name: str, tiny: bool, limit: float) -> tuple[list[Found], str]:
        self.asked.append(name)
        return self.found.get(name, []), "" if name in self.found else "it broke"

    def stop(self) -> None:
        pass


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    monkeypatch.setattr(gpu_check, "_Worker", InProcess)
    monkeypatch.setattr(InProcess, "asked", [])
    monkeypatch.setattr(InProcess, "found", {"resnet18": [Found("deconv", "ms a step", 12.3456, ratio=1.1)]})
    return InProcess


def written(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_verdicts_are_of_the_whitened_form() -> None:
    relative, absolute = Goal(1.0, 1.2), Goal(16, 24, relative=False)
    ratios = [judged(Found("deconv", "ms", 9.0, ratio=ratio), relative)["verdict"] for ratio in (1.0, 1.2, 1.21)]
    assert ratios == ["met", "done", "missed"]
    assert judged(Found("deconv", "kernels", 20), absolute) == {"goal": 16, "least": 24, "verdict": "done"}
    for found in (Found("twin", "ms", 9.0, ratio=1.0), Found("deconv", "kernels a step", 9.0)):
        assert judged(found, relative)["verdict"] == ""
    assert judged(Found("deconv", "ms", 9.0, ratio=2.0), None)["verdict"] == ""


def test_a_second_run_measures_what_is_missing_or_failed(worker: type[InProcess], tmp_path: Path) -> None:
    output, names = tmp_path / "rows.csv", ["resnet18", "resnet50"]
    check(output, tiny=True, names=names)
    assert [(row["part"], row["value"], row["verdict"], row["note"]) for row in written(output)] == [
        ("resnet18", "12.35", "", ""),
        ("resnet50", "", "failed", "it broke"),
    ]
    worker.found["resnet50"] = [Found("deconv", "ms a step", 1.0)]
    check(output, tiny=True, names=names)
    check(output, tiny=True, names=names)
    assert worker.asked == ["resnet18", "resnet50", "resnet50"]
    assert list(written(output)[0]) == COLUMNS


def test_another_commit_or_card_is_measured_again(
    worker: type[InProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = describe_card()
    for changes in ({}, {"commit": "another"}, {"hardware": "another"}, {"commit": "another"}):
        monkeypatch.setattr(gpu_check, "describe_card", lambda changes=changes: card | changes)
        check(tmp_path / "rows.csv", tiny=True, names=["resnet18"])
    assert len(worker.asked) == 3


def test_no_part_begins_when_the_time_is_over(
    worker: type[InProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(tmp_path / "rows.csv", tiny=True, names=["resnet18"], seconds=4)
    assert worker.asked == [] and "resnet18: no time is left; run it again" in capsys.readouterr().out


@WITHOUT_GPU
def test_parts_that_need_a_gpu_say_so(
    worker: type[InProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(tmp_path / "rows.csv", tiny=True)
    needing = {row["part"] for row in written(tmp_path / "rows.csv") if row["note"] == "needs a GPU"}
    assert needing == {name for name, part in PARTS.items() if not part.on_cpu}
    assert not needing.intersection(worker.asked)
    assert "hardware" in capsys.readouterr().out
    with pytest.raises(InputError, match="there is no GPU; --tiny tries the parts on a processor"):
        check(tmp_path / "rows.csv")


def test_a_file_of_other_columns_is_left_alone(worker: type[InProcess], tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="other columns"):
        check(tmp_path / "rows.csv", tiny=True, names=["resnet18"])


def test_steps_and_memory_are_measured_in_three_forms() -> None:
    for part in (step_times(Network("resnet50", 128, "bfloat16")), peak_memory(Network("resnet50", 128))):
        found = list(part(True))
        assert [one.form for one in found] == ["none", "twin", "deconv"]
        assert all(one.value > 0 and one.ratio > 0 for one in found) and found[1].ratio == 1


def test_tests_are_counted_by_outcome(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = ["import pytest", "@pytest.mark.parametrize('x', [0, 1, 2])", "def test_x(x):", "    assert x"]
    (tmp_path / "test_some.py").write_text("\n".join([*lines, "def test_no():", "    pytest.skip('no')"]))
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_parts, "TESTS", ("test_some.py", "test_none.py"))
    found = {one.measure: (one.form, one.value) for one in run_tests(True)}
    assert found == {
        "tests failed": ("deconv", 1),
        "tests passed": ("", 2),
        "tests skipped": ("", 1),
        "tests stopped by the limit": ("", 0),
    }


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_stopped_and_the_next_one_runs() -> None:
    worker: Any = gpu_check._Worker()
    try:
        assert worker.run("resnet18", True, 0.01) == ([], "more than 0 s")
        found, note = worker.run("resnet18", True, 120)
        assert [one.form for one in found] == ["none", "twin", "deconv"] and note == ""
    finally:
        worker.stop()


def test_networks_are_those_of_the_goals() -> None:
    for network in (value for value in vars(gpu_check).values() if isinstance(value, Network)):
        settings = network.settings(False)
        assert timm.is_model(network.name) and timm.is_model(f"{network.name}_deconv")
        assert (settings.batch, settings.rounds, settings.update) == (network.batch, 20, True)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int>", "batch norm"),
        ("void at::native::batch_norm_transform_input_channels_last_kernel<float>", "batch norm"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize64x64x8", "matrix product"),
        ("cutlass::Kernel2<cutlass_80_tensorop_s1688gemm>", "matrix product"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "copy or fill"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<>", "update"),
        ("void at::native::reduce_kernel<512, 1>", "sum or mean"),
        ("Memcpy DtoD (Device -> Device)", "copy or fill"),
        ("void cudnn::ops::nchwToNhwcKernel<float>", "convolution"),
        ("philox", "other"),
    ],
)
def test_kernels_are_told_by_their_names(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind
