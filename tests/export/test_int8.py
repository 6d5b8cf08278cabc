"""Eight bits on real photographs, and what the command prints of them."""

import json
from pathlib import Path

import onnx
import pytest
import timm

from tests.pictures import read_cifar, read_photographs, write_folders
from timm_deconv.cli.export import export
from timm_deconv.convert import calibrate
from timm_deconv.errors import InputError
from timm_deconv.export import Request, export_network
from timm_deconv.export.formats import check_operators
from timm_deconv.export.pictures import labelled_pictures, picture_loader, top1
from timm_deconv.export.plain import plain_form, run
from timm_deconv.models.pretrained import create_batch_norm
from timm_deconv.models.weights import save_network

from .networks import of_size, trained


@pytest.fixture(scope="module")
def photographs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    write_folders(read_photographs(data_dir, 24), folder)
    return folder


def test_whitened_photographs_are_named_in_eight_bits_as_in_32_and_as_the_twin_names_them(photographs, tmp_path):
    few = {"block": 16, "roles": {"classifier": {"block": 16}}}  # blocks that few photographs tell of
    deconv = of_size(timm.create_model("tf_efficientnet_lite0_deconv", pretrained=True, deconv=few), 128)
    twin = of_size(create_batch_norm("tf_efficientnet_lite0"), 128)
    pictures = picture_loader(deconv, photographs)
    calibrate(deconv, pictures)
    files = [export_network(deconv, tmp_path / "deconv.onnx", int8=pictures)]
    files.append(export_network(twin, tmp_path / "twin.onnx", int8=pictures))
    weights = sum(parameter.numel() for parameter in plain_form(deconv).parameters())
    for written in files:
        assert check_operators(written.file) >= {"QuantizeLinear", "DequantizeLinear", "Conv"}
        assert written.same_class >= 0.75 and 0 < written.difference < 0.3
        assert weights < written.bytes < 1.4 * weights
        kernels = [each for each in onnx.load(written.file).graph.initializer if len(each.dims) == 4]
        assert len(kernels) == 49 and {each.data_type for each in kernels} == {onnx.TensorProto.INT8}
    labelled = labelled_pictures(deconv, photographs)
    deconv.eval(), twin.eval()
    assert top1(lambda images: run(deconv, images), labelled) == top1(lambda images: run(twin, images), labelled) > 60


@pytest.fixture
def runs(data_dir: Path, tmp_path: Path) -> Path:
    """A folder with a saved network, its twin, and real pictures by class."""
    write_folders(read_cifar(data_dir, 2), tmp_path / "pictures")
    for name in ("resnet18_025_cifar_deconv", "resnet18_025_cifar"):
        save_network(trained(name), tmp_path / name.removeprefix("resnet18_025_"))
    return tmp_path


def test_the_command_tells_of_float_int8_and_the_twin(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    pictures = Path("pictures")
    export("cifar_deconv", int8=pictures, int8_images=12, data_dir=pictures, twin="cifar", json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [(row["network"], row["form"]) for row in rows] == [
        ("cifar_deconv", "PyTorch float32"),
        ("cifar_deconv", "onnx int8"),
        ("cifar", "PyTorch float32"),
        ("cifar", "onnx int8"),
    ]
    assert all(0 <= row["top1"] <= 100 for row in rows)
    written = runs / "resnet18_025_cifar_deconv_int8.onnx"
    assert rows[1]["MB"] == written.stat().st_size / 1e6
    assert sorted(file.name for file in runs.iterdir()) == ["cifar", "cifar_deconv", "pictures", written.name]


def test_the_command_prints_a_table(runs, capsys):
    export("local-dir:" + str(runs / "cifar_deconv"), format="safetensors", half=True, output=runs / "half")
    title, head, row = capsys.readouterr().out.splitlines()
    assert title == f"{runs / 'half'}: written"
    assert head.split() == ["network", "form", "MB", "largest_difference", "same_class", "top1"]
    assert "safetensors float16" in row and (runs / "half" / "config.json").exists()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"model": "resnet18_025_cifar_decon"}, "no model or folder .*; nearest: .*resnet18_025_cifar_deconv"),
        ({"model": "resnet18_025_cifar_deconv"}, "has no pretrained weights|there are no weights"),
        ({"model": "resnet18_025_cifar"}, "has no pretrained weights|there are no weights"),
        ({"model": "cifar_decon"}, "no model or folder|no folder"),
        ({"format": "tensorrt"}, "no format 'tensorrt'"),
        ({"int8": Path("empty")}, "no images in .*empty"),
        ({"int8": Path("missing")}, "no folder or tar of pictures .*missing"),
        ({"int8": Path("pictures"), "int8_images": 0}, "int8_images=0: one picture is needed"),
        ({"int8": Path("pictures"), "half": True}, "int8 and half exclude each other"),
        ({"int8": Path("no_pictures")}, "cannot be read|cannot identify"),
        ({"data_dir": Path("other")}, "'cats' is the name of none"),
        ({"output": Path("cifar_deconv")}, "cifar_deconv is there already"),
    ],
)
def test_what_the_command_cannot_do_is_one_line_and_nothing_is_written(options, said, runs, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "empty").mkdir()
    for folder in ("no_pictures", "other"):
        (runs / folder / "cats").mkdir(parents=True)
        (runs / folder / "cats" / "page.jpg").write_text("<html>")
    before = sorted(runs.rglob("*"))
    with pytest.raises((InputError, OSError), match=said) as caught:
        export(options.pop("model", "cifar_deconv"), **options)
    assert "\n" not in str(caught.value)
    assert sorted(runs.rglob("*")) == before


def test_a_request_says_its_form():
    assert Request("torch-export", half=True).form == "torch-export float16"
    assert Request(int8=Path("pictures")).form == "onnx int8"
