"""scripts/transfer.py from a name and a checkpoint to a folder that timm loads."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import timm_deconv  # noqa: F401 - registers the models

SCRIPT = Path(__file__).parents[2] / "scripts" / "transfer.py"


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script with these arguments, in this process."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def trained(name: str, file: Path, **options: Any) -> nn.Module:
    model = timm.create_model(name, **options).eval()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
    save_file(model.state_dict(), file)
    return model


def test_checkpoint_becomes_a_folder_that_computes_the_same(tmp_path: Path, transfer: Any) -> None:
    file = tmp_path / "weights.safetensors"
    model = trained("mobilenetv2_cifar", file)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for folder, options in {
            "calibrated": ("--calibrate", "digits", "--images", 128),
            "fused": ("--fuse", "--policy", '{"block": 16}'),
        }.items():
            transfer("mobilenetv2_cifar", tmp_path / folder, "--checkpoint", file, *options)
            back = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True).eval()
            assert (back(x) - expected).abs().max() < 1e-3 * expected.abs().max()
            with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as weights:
                assert weights.metadata() == {"format": "pt"}
    whiteners = load_file(tmp_path / "calibrated" / "model.safetensors")
    whitener = whiteners["stem.conv.running_deconv"]
    assert (whitener - torch.eye(len(whitener))).abs().max() > 0.1
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert not [key for key in fused if "running" in key]


def test_what_cannot_be_transferred_ends_in_one_line_and_writes_nothing(tmp_path: Path, transfer: Any) -> None:
    file = tmp_path / "weights.safetensors"
    trained("preact_resnet18_cifar", file)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for arguments, message in (
        (("preact_resnet18_cifar", tmp_path / "new", "--checkpoint", file), "keep_affine=True"),
        (("resnet18_cifar", tmp_path / "full"), "is not empty"),
        (("resnet18_cifra", tmp_path / "new"), "nearest: .*resnet18_cifar"),
        (("resnet18_cifar", tmp_path / "new"), "there are no weights of resnet18_cifar_deconv"),
        (("resnet18_cifar", tmp_path / "new", "--policy", "{block: 3}"), "is not JSON"),
    ):
        with pytest.raises(SystemExit, match=message) as stop:
            transfer(*arguments)
        assert "\n" not in str(stop.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "weights.safetensors"]
    transfer("preact_resnet18_cifar", tmp_path / "new", "--checkpoint", file, "--keep-affine")
    assert timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True)


class Code:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def foreign(model: nn.Module) -> dict[str, Any]:
    """The network's tensors, in order, by names of another code base."""
    return {f"net._{name}": value for name, value in model.state_dict().items()}


def test_a_checkpoint_with_other_names_is_read_by_its_order(tmp_path: Path, transfer: Any) -> None:
    file = tmp_path / "weights.pth"
    x = torch.randn(2, 3, 32, 32)
    for name, options in (("mobilenetv2_cifar", ()), ("test_resnet", ("--num-classes", 0))):
        classes = {"num_classes": 0} if options else {}
        model = trained(name, tmp_path / "own.safetensors", **classes)
        torch.save({"state_dict": foreign(model)}, file)
        transfer(name, tmp_path / name, "--checkpoint", file, *options)
        back = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        with torch.no_grad():
            expected = model(x)
            assert (back(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_files_that_are_no_weights_of_the_network_end_in_one_line_and_write_nothing(
    tmp_path: Path, transfer: Any
) -> None:
    model = trained("test_resnet", tmp_path / "own.safetensors")
    weights, output, ran = model.state_dict(), tmp_path / "new", tmp_path / "ran"
    torch.save(weights, tmp_path / "whole.pth")
    whole, safe = ((tmp_path / name).read_bytes() for name in ("whole.pth", "own.safetensors"))
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "half.safetensors").write_bytes(safe[: len(safe) // 2])
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    torch.save({"state_dict": Code(ran)}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    torch.save(weights | {"extra.weight": torch.zeros(2)}, tmp_path / "extra.pth")
    torch.save(foreign(model) | {"extra.weight": torch.zeros(2)}, tmp_path / "extra_foreign.pth")
    torch.save(foreign(timm.create_model("mobilenetv2_cifar")), tmp_path / "other.pth")
    for file, message in {
        "half.pth": "cannot be read as weights",
        "half.safetensors": "cannot be read as weights",
        "text.pth": "cannot be read as weights",
        "empty.pth": "cannot be read as weights",
        "code.pth": "needs pickled code to be run, which is refused",
        "list.pth": "cannot be read as weights",
        "numbers.pth": "holds no weights by name",
        "extra.pth": "extra.weight",
        "extra_foreign.pth": "tensors, the network has",
        "other.pth": "tensors, the network has",
    }.items():
        with pytest.raises(SystemExit, match=message) as stop:
            transfer("test_resnet", output, "--checkpoint", tmp_path / file)
        assert "\n" not in str(stop.value), file
        assert not output.exists() and not ran.exists(), file
