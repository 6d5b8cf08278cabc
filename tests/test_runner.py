"""python -m timm_deconv SCRIPT.py: a script that knows nothing of the package finds its networks."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch

from tests.data.test_datasets import take_of_each_class

SCRIPT = Path(__file__).parent / "other_project" / "script.py"
FINETUNE = SCRIPT.with_name("finetune.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "timm_deconv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def test_a_script_sees_our_networks_and_its_own_arguments_and_neighbours() -> None:
    done = run(str(SCRIPT), "--model", "resnet18_cifar_deconv", "--width", "0.25")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(SCRIPT), "__main__", "CifarResNet", "7", "neighbour"]


@pytest.mark.parametrize(("arguments", "status", "line"), [((), 1, "usage:"), (("no.py",), 1, "no script 'no.py'")])
def test_without_a_script_the_usage_is_shown(arguments: tuple[str, ...], status: int, line: str) -> None:
    done = run(*arguments)
    assert done.returncode == status and done.stderr.startswith(line) and "Traceback" not in done.stderr


def test_help_is_no_error() -> None:
    done = run("--help")
    assert done.returncode == 0 and done.stdout.startswith(
        "usage: python -m timm_deconv [--calibrate DATA [--images N]"
    )


def test_the_scripts_own_failure_is_its_own() -> None:
    done = run(str(SCRIPT), "--model", "no_such_network")
    assert done.returncode == 1 and "Unknown model (no_such_network)" in done.stderr


CARRIED_OVER = """
import sys
import timm, torch
from timm.models import create_model

for name, options in (("resnet18_cifar", {}), ("resnet18_cifar_deconv", {}), ("deconv", {"base": "resnet18_cifar"})):
    overlay = {"file": sys.argv[1]}
    torch.manual_seed(3)
    model = create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, width=0.125, **options)
    seen = {int(value) for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    print(name, sorted(seen), model.training, model.eval()(torch.ones(1, 3, 32, 32)).sum().item(), torch.rand(1).item())
create_model("resnet18_cifar_deconv", width=0.125)
"""


@pytest.fixture
def carried_over(tmp_path: Path) -> tuple[str, str]:
    """A script that makes networks of these batch-norm weights, and the weights."""
    torch.manual_seed(1)
    model = timm.create_model("resnet18_cifar", width=0.125)
    for _ in range(3):
        model(torch.randn(16, 3, 32, 32))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "script.py").write_text(CARRIED_OVER)
    return str(tmp_path / "script.py"), str(tmp_path / "weights.pth")


def test_networks_of_carried_over_weights_are_calibrated_as_they_are_created(carried_over: tuple[str, str]) -> None:
    plain, calibrated, again = (
        [line.split() for line in done.stdout.splitlines()]
        for done in (
            run(*carried_over),
            *(run("--calibrate", "digits", "--images=300", *carried_over) for _ in range(2)),
        )
    )
    assert calibrated == again, "every process calibrates alike"
    for before, after in zip(plain, calibrated, strict=True):
        assert before[0] == after[0] and before[2:3] == after[2:3] == ["True"]
        assert float(after[3]) == pytest.approx(float(before[3]), rel=1e-3), "the function stays"
        assert before[4] == after[4], "the script's random numbers are its own"
        assert (before[1] == after[1]) == (before[0] == "resnet18_cifar"), "whitened networks have seen batches"


def test_what_was_calibrated_is_said_and_that_nothing_was(carried_over: tuple[str, str], tmp_path: Path) -> None:
    said = run("--calibrate", "digits", *carried_over).stderr
    assert "calibrated resnet18_cifar_deconv on 1024 images of digits\ncalibrated deconv on 1024" in said
    (tmp_path / "nothing.py").write_text("import timm; timm.create_model('resnet18_cifar_deconv', width=0.125)")
    said = run("--calibrate", "digits", str(tmp_path / "nothing.py"))
    assert said.returncode == 0 and "nothing was calibrated" in said.stderr


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--calibrate", "nowhere"], "--calibrate nowhere: no such folder or tar"),
        (["--calibrate"], "--calibrate needs a value"),
        (["--images", "5"], "--images is for --calibrate DATA"),
        (["--calibrate", "digits", "--images", "none"], "--images none: a whole number"),
        (["--calibrate", "digits", "--images=0"], "--images 0: a whole number"),
        (["--image-size", "64"], "--image-size is for --calibrate DATA"),
        (["--calibrate", "digits", "--image-size", "-64"], "--image-size -64: a whole number"),
        (["--calibrate", "digits", "--images", "2"], "--calibrate digits: too few samples to calibrate"),
    ],
)
def test_what_cannot_be_calibrated_ends_in_one_line(
    carried_over: tuple[str, str], options: list[str], line: str
) -> None:
    done = run(*options, *([] if options == ["--calibrate"] else carried_over))
    assert done.returncode == 1 and done.stderr.startswith(line) and "Traceback" not in done.stderr


@pytest.mark.slow
def test_fine_tuning_by_a_foreign_script_is_ahead_of_the_uncalibrated_start(data_dir: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for split, count in (("train", 40), ("test", 20)):
        packed = tmp_path / f"{split}.tar"
        take_of_each_class(data_dir / "cifar10" / "jpeg75" / f"{split}.tar.gz", packed, count)
        with tarfile.open(packed) as tar:
            tar.extractall(images / split, filter="data")
    model = ("--model", "tf_efficientnet_lite0_deconv", "--pretrained", "--num-classes", "10", "--img-size", "64")
    model += ("--epochs", "2")
    calibrate = ("--calibrate", str(images), "--images", "256", "--image-size", "64")
    runs = [run(*options, str(FINETUNE), str(images), *model, "--batch-size", "25") for options in ((), calibrate)]
    for done in runs:
        assert done.returncode == 0, done.stderr
    plain, calibrated = (max(map(float, done.stdout.split()[1:])) for done in runs)  # of the network and its average
    assert "carried over from batch norm" in runs[0].stderr and "carried over" not in runs[1].stderr
    assert plain < 13 and calibrated > plain + 5, "in %; 10 is chance"
