"""Exports measured: rows of a network and of its twin, and tables of such rows."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import export_tables, exports
from benchmarks.tasks import run
from tests.export.networks import trained
from tests.pictures import read_cifar, write_folders
from timm_deconv.models.weights import save_network


@pytest.fixture
def options(data_dir: Path, tmp_path: Path) -> dict[str, object]:
    write_folders(read_cifar(data_dir, 1), tmp_path / "pictures")
    for name in ("resnet18_025_cifar_deconv", "resnet18_025_cifar"):
        save_network(trained(name), tmp_path / name)
    return {
        "data_dir": str(tmp_path / "pictures"),
        "run": str(tmp_path / "resnet18_025_cifar_deconv"),
        "twin_run": str(tmp_path / "resnet18_025_cifar"),
        "int8_images": 4,
    }


def test_both_networks_are_measured_in_every_form_and_stand_beside_each_other(options, tmp_path, monkeypatch):
    few = {form: exports.FORMS[form] for form in ("safetensors float16", "torchscript float32")}
    monkeypatch.setattr(exports, "FORMS", few)
    run("exports", {**options, "images": 10}, quick=True, output=tmp_path / "export.csv")
    rows = list(csv.DictReader((tmp_path / "export.csv").read_text().splitlines()))
    assert [(row["norm"], row["form"]) for row in rows] == [
        ("batch norm", "PyTorch float32"),
        ("batch norm", "torchscript float32"),
        ("deconv", "PyTorch float32"),
        ("deconv", "safetensors float16"),
        ("deconv", "torchscript float32"),
    ]
    assert {row["network"] for row in rows} == {"resnet18_025_cifar"}
    assert float(rows[3]["megabytes"]) == pytest.approx(1.4, abs=0.1)
    assert all(float(row["milliseconds"]) > 0 for row in rows) and float(rows[4]["ratio_to_twin"]) > 0
    assert rows[0]["images"] == "10" and 0 <= float(rows[0]["top1"]) <= 100
    table = export_tables.exports(tmp_path)
    assert [line[1] for line in table.body] == ["PyTorch float32", "safetensors float16", "torchscript float32"]
    assert table.body[2][2] == " / ".join(export_tables.significant(float(rows[n]["megabytes"])) for n in (1, 4))


def test_ranges_are_those_of_the_plain_layers(options, tmp_path):
    run("export-ranges", options, output=tmp_path / "export_ranges.csv")
    rows = list(csv.DictReader((tmp_path / "export_ranges.csv").read_text().splitlines()))
    assert len(rows) == 42 and {row["norm"] for row in rows} == {"batch norm", "deconv"}
    assert all(float(row[column]) >= 1 for row in rows for column in ("output_channels", "input_channels"))
    table = export_tables.export_ranges(tmp_path)
    assert [line[:2] for line in table.body] == [
        ["`resnet18_025_cifar`", "batch norm"],
        ["`resnet18_025_cifar`", "deconv"],
    ]


def test_a_wide_channel_and_a_long_tail_are_seen():
    weight = torch.ones(4, 3, 3, 3)
    weight[:, 1] = 5
    assert exports._spread(exports._by_input(weight)) == 5
    assert exports._spread(weight.flatten(1).abs().amax(1)) == 1
    assert exports._kurtosis(torch.randn(2, 100_000)) == pytest.approx(3, abs=0.1)
    assert exports._kurtosis(torch.randn(2, 100_000) ** 3) > 20
