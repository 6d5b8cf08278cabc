"""Eight bits on real pictures, and what the command prints of them."""

import copy
import json
from pathlib import Path

import onnx
import pytest
import timm
import torch

from tests.pictures import read_cifar, write_folders
from timm_deconv.cli.export import export
from timm_deconv.convert import calibrate, transfer
from timm_deconv.data.evaluation import picture_loader
from timm_deconv.errors import InputError
from timm_deconv.export import Request, export_network
from timm_deconv.export.formats import check_operators
from timm_deconv.export.network import open_export
from timm_deconv.export.pictures import labelled_pictures, top1
from timm_deconv.export.plain import plain_form, run
from timm_deconv.export.quantisation import agreement
from timm_deconv.models.weights import save_network

from .networks import trained


@pytest.fixture(scope="module")
def pictures(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_folders(read_cifar(data_dir, 12), folder)
    return folder


def test_eight_bits_name_real_pictures_as_32_do(pictures, tmp_path):
    model = timm.create_model("resnet18_025_cifar_deconv", pretrained=True)
    written = export_network(model, tmp_path / "net.onnx", int8=picture_loader(model, pictures))
    assert written.same_class >= 0.95 and 0 < written.difference < 0.1
    labelled = labelled_pictures(model, pictures)
    assert len(labelled.dataset) == 120
    model.eval()
    in_float = top1(lambda images: run(model, images), labelled)
    assert in_float > 75 and abs(top1(open_export(written.file, "onnx"), labelled) - in_float) < 4
    assert check_operators(written.file) >= {"QuantizeLinear", "DequantizeLinear", "Conv"}
    weights = sum(parameter.numel() for parameter in plain_form(model).parameters())
    assert weights < written.bytes < 1.4 * weights
    graph = onnx.load(written.file).graph
    kernels = {each.name: each for each in graph.initializer if len(each.dims) == 4}
    assert len(kernels) == 20 and {each.data_type for each in kernels.values()} == {onnx.TensorProto.INT8}
    sizes = {each.name: list(each.dims) for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in kernels:
            assert sizes[node.input[1]] == [kernels[node.input[0]].dims[0]]  # a scale for each output channel


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("zero", "one", "two"), [1, 2, 0]),  # folders are in the order of the alphabet, the network's classes are not
        (("zero", "one", "two", "three"), [1, 2, 0]),
        (("nought", "first", "second"), [0, 1, 2]),
        (None, [0, 1, 2]),
    ],
)
def test_folders_are_the_classes_of_their_names_or_else_in_order(labels, classes, data_dir, tmp_path):
    content = read_cifar(data_dir, 1)[0][1]
    write_folders([(name, content) for name in ("zero", "one", "two")], tmp_path)
    model = timm.create_model("resnet18_025_cifar", num_classes=len(labels or classes))
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": labels}
    assert [int(each) for _, batch in labelled_pictures(model, tmp_path) for each in batch] == classes


def test_folders_of_which_some_are_no_class_are_refused(data_dir, tmp_path):
    content = read_cifar(data_dir, 1)[0][1]
    write_folders([(name, content) for name in ("zero", "one", "too")], tmp_path)
    model = timm.create_model("resnet18_025_cifar", num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ("zero", "one", "two")}
    with pytest.raises(InputError, match="3 folders and the network 3 classes: 'too' is the name of none"):
        labelled_pictures(model, tmp_path)


def test_carried_over_and_calibrated_weights_give_in_eight_bits_what_batch_norms_do(pictures, tmp_path):
    twin = trained("resnet18_025_cifar").eval()
    model = copy.deepcopy(twin)
    transfer(model, {"preset": "fast", "block": 16})
    loader = picture_loader(twin, pictures, images=32)
    calibrate(model, loader)
    model(torch.randn(2, 3, 32, 32))
    files = [export_network(each, tmp_path / f"{n}.onnx", int8=loader).file for n, each in enumerate((twin, model))]
    images = next(iter(loader))[0][:1]
    ours, theirs = (open_export(file, "onnx")(images) for file in files)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


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
        ({"model": "vgg11_cifar_deconv"}, "vgg11_cifar_deconv"),
        ({"model": "vgg11_cifar"}, "vgg11_cifar"),
        ({"model": "cifar_decon"}, "no model or folder|no folder"),
        ({"format": "tensorrt"}, "no format 'tensorrt'"),
        ({"int8": Path("empty")}, "no images in .*empty"),
        ({"int8": Path("missing")}, "no folder or tar of pictures .*missing"),
        ({"int8": Path("pictures"), "int8_images": 0}, "int8_images=0: one picture is needed"),
        ({"int8": Path("pictures"), "half": True}, "int8 and half exclude each other"),
        ({"int8": Path("no_pictures")}, "cannot be read|cannot identify"),
        ({"data_dir": Path("other")}, "'cats' is the name of none"),
        ({"output": Path("cifar_deconv")}, "cifar_deconv is there already"),
        ({"output": Path("a.pt2")}, "a.pt2 ends as torch-export does, but would hold onnx: give --format torch-export"),
        ({"output": Path("a.TS")}, "a.TS ends as torchscript does, .* give --format torchscript"),
        ({"output": Path("a.onnx"), "format": "safetensors"}, "a.onnx ends as onnx does, but would hold safetensors"),
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


def test_no_pictures_to_find_ranges_on_are_an_error():
    with pytest.raises(InputError, match="no pictures to find ranges on: there are none"):
        agreement(Path("net.onnx"), Path("net.onnx"), iter(()))


def test_a_request_says_its_form():
    assert Request("torch-export", half=True).form == "torch-export float16"
    assert Request(int8=Path("pictures")).form == "onnx int8"
