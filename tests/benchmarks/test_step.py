"""Training and evaluation steps: what is timed computes the right thing, and prices are what they are said to be."""

import csv
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import step
from benchmarks.networks import FORMS
from benchmarks.rows import add_rows, print_table
from benchmarks.step import (
    COLUMNS,
    SHOWN,
    EvaluationSettings,
    StepSettings,
    price,
    step_rows,
    time_evaluation,
    time_training,
)
from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2d
from timm_deconv.timing import Timings

SMALL = StepSettings(width=0.0625, batch=32, rounds=2, warmup=1, memory_formats=("channels_last",))
FAKE = StepSettings(forms=("none", "twin", "deconv"), rounds=3)
SECONDS = {
    "none contiguous": [2.0, 2.0, 2.0],
    "none channels_last": [1.0, 1.0, 1.0],
    "twin contiguous": [1.5, 1.4, 1.6],
    "twin channels_last": [2.0, 2.0, 9.0],
    "deconv contiguous": [3.0, 3.0, 3.0],
    "deconv channels_last": [1.1, 1.2, 1.3],
}


def silent(message: str) -> None:
    """No progress on the screen."""


def test_price_takes_each_form_in_its_faster_memory_format() -> None:
    assert price(Timings(SECONDS), FAKE) == pytest.approx((1.2 - 1.0) / (1.5 - 1.0))


def test_rows_hold_medians_ratios_and_one_price(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = step_rows("step", Timings(SECONDS), FAKE)
    assert [set(row) for row in rows] == [set(COLUMNS)] * 6
    assert {(row["form"], row["memory_format"]): row["price"] for row in rows if row["price"] != ""} == {
        ("deconv", "channels_last"): pytest.approx(0.4)
    }
    assert rows[5]["ratio_to_twin"] == pytest.approx(0.55)
    assert rows[5]["ratio_to_none"] == pytest.approx(1.2)
    print_table(rows, SHOWN)
    assert len(capsys.readouterr().out.splitlines()) == 7
    add_rows([tmp_path / "new" / "rows.csv"], COLUMNS, rows)
    add_rows([tmp_path / "new" / "rows.csv"], COLUMNS, rows[:1])
    with open(tmp_path / "new" / "rows.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 7
    assert read[5]["seconds"] == "1.2"


def test_a_file_of_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="other columns"):
        add_rows([path], COLUMNS, step_rows("step", Timings(SECONDS), FAKE))
    assert path.read_text() == "a,b\n1,2\n"


def test_unknown_names_are_refused_before_anything_is_built() -> None:
    with pytest.raises(InputError, match="no form 'deconvv'; nearest: deconv"):
        StepSettings(forms=("none", "deconvv"))
    with pytest.raises(InputError, match="no memory format 'channel_last'; nearest: channels_last"):
        StepSettings(memory_formats=("channel_last",))
    with pytest.raises(InputError, match=r"no mode of torch\.compile 'reduce_overhead'; nearest: reduce-overhead"):
        StepSettings(compile="reduce_overhead")


@pytest.mark.parametrize(("time", "forms"), [(time_training, FORMS), (time_evaluation, (*FORMS, "fused"))])
def test_all_forms_of_a_registered_pair_are_timed(time: object, forms: tuple[str, ...]) -> None:
    kind = StepSettings if time is time_training else EvaluationSettings
    timings = time(kind(**{**asdict(SMALL), "forms": forms}), silent)
    assert {label.split()[0] for label in timings.seconds} == set(forms)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in timings.seconds.values())


def test_what_is_fused_is_timed_without_whitening_and_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[nn.Module] = []
    original = step._evaluation_step

    def remembering(model: nn.Module, *rest: object) -> object:
        timed.append(model)
        return original(model, *rest)

    monkeypatch.setattr(step, "_evaluation_step", remembering)
    time_evaluation(EvaluationSettings(**{**asdict(SMALL), "forms": ("deconv", "fused")}), silent)
    assert [any(isinstance(module, Deconv2d) for module in model.modules()) for model in timed] == [True, False]
    with pytest.raises(InputError, match="no form 'fused'"):
        StepSettings(forms=("none", "fused"))


def test_a_published_form_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = step.build

    def wrong(form: str, *args: object, **kwargs: object) -> nn.Module:
        model = original(form, *args, **kwargs)
        if form == "published":
            with torch.no_grad():
                model.conv1.weight.mul_(1.1)
        return model

    monkeypatch.setattr(step, "build", wrong)
    with pytest.raises(RuntimeError, match="published"):
        time_training(SMALL, silent)


def test_a_parameter_without_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = step.build

    def unused(form: str, *args: object, **kwargs: object) -> nn.Module:
        model = original(form, *args, **kwargs)
        model.unused = nn.Parameter(torch.zeros(1))
        return model

    monkeypatch.setattr(step, "build", unused)
    with pytest.raises(RuntimeError, match="no finite gradient for unused"):
        time_training(StepSettings(forms=("twin",), width=0.125, batch=4), silent)
