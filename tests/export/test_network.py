"""What is written gives what the network gives, or is not written."""

import dataclasses
import json
import sys

import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from timm_deconv.convert.module_types import is_whitened
from timm_deconv.errors import InputError
from timm_deconv.export import export_network, network
from timm_deconv.export.formats import FORMATS, check_operators, open_onnx
from timm_deconv.export.network import open_export
from timm_deconv.export.plain import plain_form
from timm_deconv.layers import Deconv2d
from timm_deconv.models.weights import write_weights

from .networks import evaluated, of_size, small, trained

# What every runtime of ONNX has; a network of convolutions needs no others.
PLAIN_OPERATORS = set(
    """Add Cast Clip Concat Conv Div Expand Flatten Gemm GlobalAveragePool MatMul MaxPool Mul Pad ReduceMean Relu
    Reshape Resize Shape Sigmoid Slice Squeeze Unsqueeze""".split()
)
ONE = torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_what_the_network_gives(format, half, tmp_path):
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export = export_network(model, tmp_path / "written", format, half=half)
    assert [file.name for file in tmp_path.iterdir()] == ["written"]
    assert model.training and is_whitened(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    given = open_export(export.file, format, half=half)(ONE)
    tolerance = 2e-2 if half else 1e-4
    torch.testing.assert_close(given, evaluated(model, ONE), rtol=tolerance, atol=tolerance)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert weights * (2 if half else 4) < export.bytes < weights * (2.6 if half else 4.9)


@pytest.mark.parametrize("name", ["resnet18_025_cifar_deconv", "resnet18_025_cifar", "preact_resnet18_cifar"])
def test_onnx_of_any_batch_and_size_has_plain_operators_only(name, tmp_path):
    model = trained(name, **({"width": 0.25} if "preact" in name else {}))
    export = export_network(model, tmp_path / "net.onnx", dynamic=True)
    stays = {"BatchNormalization"} if "preact" in name else set()  # behind sums, no convolution takes it in
    assert check_operators(export.file) - stays <= PLAIN_OPERATORS
    assert stays <= check_operators(export.file)
    session = onnxruntime.InferenceSession(export.file)
    for images in (ONE, torch.randn(5, 3, 40, 56)):
        (given,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(given), evaluated(model, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deeplabv3_resnet50_deconv", "segmenter"])
def test_a_class_for_every_pixel_is_exported_at_any_size(name, tmp_path):
    arguments = {"base": "test_efficientnet", "deconv": "fast"} if name == "segmenter" else {}
    model = of_size(timm.create_model(name, num_classes=5, **arguments), 64)
    export = export_network(model, tmp_path / "net.onnx", dynamic=True)
    assert check_operators(export.file) <= PLAIN_OPERATORS
    images = torch.randn(2, 3, 49, 70)
    given = open_export(export.file, "onnx")(images)
    assert given.shape == (2, 5, 49, 70)
    torch.testing.assert_close(given, evaluated(model, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["torch-export", "torchscript"])
def test_formats_of_torch_take_other_batches_and_sizes(format, tmp_path):
    model = small()
    export = export_network(model, tmp_path / "net", format, dynamic=True)
    images = torch.randn(4, 3, 96, 72)
    torch.testing.assert_close(open_export(export.file, format)(images), evaluated(model, images))


class Around(nn.Module):
    """A network with something behind it."""

    def __init__(self, after) -> None:
        super().__init__()
        self.net = small()
        self.pretrained_cfg, self.after = self.net.pretrained_cfg, after

    def forward(self, images):
        return self.after(self.net(images), images)


def test_sizes_that_a_trace_fixes_are_noticed(tmp_path):
    model = Around(lambda logits, images: logits * float(images.shape[2]))
    with pytest.raises(InputError, match="refused: written as torchscript the network gives other values"):
        export_network(model, tmp_path / "net", "torchscript", dynamic=True)
    assert not list(tmp_path.iterdir())
    export_network(model, tmp_path / "net", "torchscript")


@pytest.mark.parametrize("name", ["resnet18_025_cifar_deconv", "deconv", "segmenter"])
def test_folded_safetensors_load_as_a_plain_network(name, tmp_path):
    arguments = {} if "cifar" in name else {"base": "test_resnet", "deconv": "fast"}
    model = trained(name, num_classes=7, **arguments)
    folder = export_network(model, tmp_path / "folded", "safetensors").file
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert not any(isinstance(layer, Deconv2d) for layer in again.modules())
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    torch.testing.assert_close(again(images), evaluated(model, images))


def test_half_safetensors_are_those_of_the_zoo_with_vectors_in_float32(tmp_path):
    model = small()
    folder = export_network(model, tmp_path / "folded", "safetensors", half=True).file
    write_weights(plain_form(model), tmp_path / "zoo.safetensors", half=True)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "zoo.safetensors").read_bytes()
    types = {value.ndim > 1: value.dtype for value in load_file(folder / "model.safetensors").values()}
    assert types == {True: torch.float16, False: torch.float32}


def test_the_file_says_how_images_are_prepared(tmp_path):
    model = small()
    file = tmp_path / "net.onnx"
    FORMATS["onnx"].write(plain_form(model), file, ONE, False)
    told = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    assert told["timm.mean"] == list(model.pretrained_cfg["mean"]) and told["timm.interpolation"] == "bilinear"


@pytest.mark.parametrize("format", ["safetensors", "torchscript"])
def test_a_file_that_differs_is_refused_and_leaves_nothing(format, tmp_path, monkeypatch):
    how = FORMATS[format]

    def write_another(plain, file, images, dynamic):
        with torch.no_grad():
            plain.get_classifier().weight.mul_(1.01)
        how.write(plain, file, images, dynamic)

    monkeypatch.setitem(network.FORMATS, format, dataclasses.replace(how, write=write_another))
    with pytest.raises(InputError, match=f"refused: written as {format} the network gives other values"):
        export_network(small(), tmp_path / "net", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"format": "onx"}, "no format 'onx'; nearest: onnx"),
        ({"format": "torchscript", "int8": []}, "int8 is written as onnx, not as torchscript"),
        ({"half": True, "int8": []}, "int8 and half exclude each other"),
        ({"format": "safetensors", "dynamic": True}, "dynamic is not for safetensors"),
        ({"file": "taken.onnx"}, "taken.onnx is there already; remove it"),
        ({"file": "nowhere/net.onnx"}, "no folder .*nowhere for the output"),
        ({"file": "taken.onnx/net.onnx"}, "no folder .*taken.onnx for the output"),
        ({"model": "resnet18_025_cifar", "format": "safetensors", "file": "net"}, "folded weights fit no network"),
        ({"model": lambda: Around(lambda logits, images: (logits, images))}, "the network gives a tuple"),
        ({"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2))}, "Sequential has no pretrained_cfg"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line_and_nothing_is_lost(options, said, tmp_path):
    (tmp_path / "taken.onnx").write_text("precious")
    made = options.pop("model", "resnet18_025_cifar_deconv")
    model = timm.create_model(made) if isinstance(made, str) else made()
    file = tmp_path / options.pop("file", "net.onnx")
    with pytest.raises(InputError, match=said) as caught:
        export_network(model, file, **options)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["taken.onnx"]
    assert (tmp_path / "taken.onnx").read_text() == "precious"


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    for package in ("onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"onnxscript is not installed; pip install 'timm-deconv\[export\]'"):
        export_network(timm.create_model("resnet18_025_cifar_deconv"), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"onnxruntime is not installed; pip install 'timm-deconv\[export\]'"):
        open_onnx(tmp_path / "net.onnx")
