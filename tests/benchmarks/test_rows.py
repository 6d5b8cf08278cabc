"""Files of rows: those of the checkout can be added to, each task has columns of its own."""

import csv
from pathlib import Path

import pytest

from benchmarks import (
    conversion,
    gpu_check,
    host,
    kernels,
    layer,
    memory,
    profiling,
    rows,
    scaling,
    step,
    study,
    transfer,
)
from timm_deconv.errors import InputError
from timm_deconv.resources import checkout_configs
from timm_deconv.training import results


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("cifar10.csv", results.COLUMNS),
        ("benchmark.csv", step.COLUMNS),
        ("benchmark_layer.csv", layer.COLUMNS),
        ("benchmark_host.csv", host.COLUMNS),
        ("benchmark_kernels.csv", kernels.COLUMNS),
        ("benchmark_memory.csv", memory.COLUMNS),
        ("benchmark_profile.csv", profiling.COLUMNS),
        ("benchmark_scaling.csv", scaling.COLUMNS),
        ("convert.csv", conversion.COLUMNS),
        ("finetune.csv", study.COLUMNS),
        ("study.csv", study.COLUMNS),
        ("study_pareto.csv", study.PARETO_COLUMNS),
        ("gpu_check.csv", gpu_check.COLUMNS),
        ("transfer.csv", transfer.COLUMNS),
    ],
)
def test_recorded_files_have_the_columns_of_new_rows(name: str, columns: list[str]) -> None:
    assert len(set(columns)) == len(columns)
    configs = checkout_configs()
    if configs is None or not (configs / "results" / name).exists():
        pytest.skip(f"no {name} yet")
    with open(configs / "results" / name, newline="") as file:
        assert next(csv.reader(file)) == columns


def test_records_of_a_task_go_to_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rows, "checkout_configs", lambda: tmp_path)
    assert rows.result_files(Path("mine.csv"), True, "benchmark_layer.csv") == [
        Path("mine.csv"),
        tmp_path / "results" / "benchmark_layer.csv",
    ]
    monkeypatch.setattr(rows, "checkout_configs", lambda: None)
    with pytest.raises(InputError, match="needs a checkout"):
        rows.result_files(Path("mine.csv"), True, "benchmark_layer.csv")


def test_a_network_that_was_added_is_done(tmp_path: Path) -> None:
    path, columns = tmp_path / "new" / "convert.csv", conversion.COLUMNS
    assert rows.rows_done([path], columns) == set()
    for name in ("resnet18", "vgg11_bn"):
        row = conversion.ConversionRow(name, "a, b", loss=0.123456, seconds=2.0)
        rows.add_rows([path], columns, [row.as_dict()])
    assert rows.rows_done([path], columns) == {"resnet18", "vgg11_bn"}
    assert rows.rows_done([path, tmp_path / "recorded.csv"], columns) == set()
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(columns)
    assert lines[1].startswith('resnet18,"a, b",0,0,') and lines[1].endswith(",0.123,,,,,,,,2")
    path.write_text("network,outcome\n")
    with pytest.raises(InputError, match="other columns"):
        rows.add_rows([path], columns, [row.as_dict()])
    with pytest.raises(InputError, match="other columns"):
        rows.rows_done([path], columns)
    assert path.read_text() == "network,outcome\n"
