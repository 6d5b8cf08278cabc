"""python -m timm_deconv SCRIPT.py: a script that knows nothing of the package finds its networks."""

import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from tests.data.test_datasets import take_of_each_class
from timm_deconv import __main__ as runner
from timm_deconv.models import registration

SCRIPT = Path(__file__).parent / "other_project" / "script.py"
FINETUNE = SCRIPT.with_name("finetune.py")

Run = Callable[..., None]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, which takes seconds of imports."""
    command = [sys.executable, "-m", "timm_deconv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process, and leave nothing of it here."""

    def run_main(*arguments: str) -> None:
        monkeypatch.setattr(registration, "_when_transferred", [])
        monkeypatch.setattr(sys, "argv", ["timm_deconv", *arguments])
        monkeypatch.setattr(sys, "path", ["replaced", *sys.path])
        runner.main()

    return run_main


def test_a_script_sees_our_networks_and_its_own_arguments_and_neighbours() -> None:
    done = run(str(SCRIPT), "--model", "resnet18_cifar_deconv", "--width", "0.25")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(SCRIPT), "__main__", "CifarResNet", "7", "neighbour"]


def test_what_synchronises_batch_norms_synchronises_whitening_too(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As timm's train.py --sync-bn does."""
    (tmp_path / "script.py").write_text("from timm.layers import convert_sync_batchnorm\nconvert_sync_batchnorm('net')")
    given: list[str] = []
    monkeypatch.setattr(runner, "convert_sync", given.append)
    run_here(str(tmp_path / "script.py"))
    assert given == ["net"] and timm.layers.convert_sync_batchnorm is not given.append


def test_without_a_script_the_usage_is_shown(run_here: Run) -> None:
    with pytest.raises(SystemExit, match=r"^usage:"):
        run_here()
    with pytest.raises(SystemExit, match=r"^no script 'no.py'\n\nusage:"):
        run_here("no.py")


def test_help_is_no_error(run_here: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run_here("--help")
    assert capsys.readouterr().out.startswith("usage: python -m timm_deconv [--calibrate DATA [--images N]")


def test_the_scripts_own_failure_is_its_own(run_here: Run) -> None:
    with pytest.raises(RuntimeError, match=r"Unknown model \(no_such_network\)"):
        run_here(str(SCRIPT), "--model", "no_such_network")


TRANSFERRED = """
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
def transferred(tmp_path: Path) -> tuple[str, str]:
    """A script that makes networks of these batch-norm weights, and the weights."""
    torch.manual_seed(1)
    model = timm.create_model("resnet18_cifar", width=0.125)
    for _ in range(3):
        model(torch.randn(16, 3, 32, 32))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "script.py").write_text(TRANSFERRED)
    return str(tmp_path / "script.py"), str(tmp_path / "weights.pth")


def test_networks_of_transferred_weights_are_calibrated_as_they_are_created(
    transferred: tuple[str, str], run_here: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--calibrate", "digits", "--images=300")
    run_here(*transferred)
    plain = [line.split() for line in capsys.readouterr().out.splitlines()]
    run_here(*options, *transferred)
    said = capsys.readouterr()
    calibrated = [line.split() for line in said.out.splitlines()]
    assert "calibrated resnet18_cifar_deconv on 300 images of digits\ncalibrated deconv on 300" in said.err
    assert run(*options, *transferred).stdout == said.out, "every process calibrates alike"
    for before, after in zip(plain, calibrated, strict=True):
        assert before[0] == after[0] and before[2:3] == after[2:3] == ["True"]
        assert float(after[3]) == pytest.approx(float(before[3]), rel=1e-3), "the function stays"
        assert before[4] == after[4], "the script's random numbers are its own"
        assert (before[1] == after[1]) == (before[0] == "resnet18_cifar"), "whitened networks have seen batches"


def test_calibration_takes_1024_images_of_the_networks_own_size_unless_told() -> None:
    calibrator, command = runner.parse(["--calibrate", "digits", "script.py", "--images", "5"])
    assert (calibrator.data, calibrator.images, calibrator.image_size) == ("digits", 1024, None)
    assert command == ["script.py", "--images", "5"], "what stands behind the script is the script's"
    calibrator, _ = runner.parse(["--images=7", "--calibrate=digits", "--image-size", "64", "script.py"])
    assert (calibrator.images, calibrator.image_size) == (7, 64)


def test_that_nothing_was_calibrated_is_said(run_here: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nothing.py").write_text("import timm; timm.create_model('resnet18_cifar_deconv', width=0.125)")
    run_here("--calibrate", "digits", str(tmp_path / "nothing.py"))
    assert "nothing was calibrated" in capsys.readouterr().err


WRONG_OPTIONS = {
    "--calibrate": "--calibrate needs a value",
    "--calibrate nowhere": "--calibrate nowhere: no such folder or tar",
    "--images 5": "--images is for --calibrate DATA",
    "--calibrate digits --images none": "--images none: a whole number",
    "--calibrate digits --images=0": "--images 0: a whole number",
    "--image-size 64": "--image-size is for --calibrate DATA",
    "--calibrate digits --image-size -64": "--image-size -64: a whole number",
    "--calibrate digits --images 2": "--calibrate digits: too few samples to calibrate",
}


@pytest.mark.parametrize("options", WRONG_OPTIONS)
def test_what_cannot_be_calibrated_ends_in_one_line(transferred: tuple[str, str], run_here: Run, options: str) -> None:
    with pytest.raises(SystemExit, match=f"^{WRONG_OPTIONS[options]}"):
        run_here(*options.split(), *([] if options == "--calibrate" else transferred))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves images to the garbage collector
def test_fine_tuning_by_a_foreign_script_is_ahead_of_the_uncalibrated_start(
    data_dir: Path, tmp_path: Path, run_here: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    for split, count in (("train", 40), ("test", 10)):
        packed = tmp_path / f"{split}.tar"
        take_of_each_class(data_dir / "cifar10" / "jpeg75" / f"{split}.tar.gz", packed, count)
        with tarfile.open(packed) as tar:
            tar.extractall(images / split, filter="data")
    model = ("--model", "tf_efficientnet_lite0_deconv", "--pretrained", "--num-classes", "10", "--img-size", "64")
    command = (str(FINETUNE), str(images), *model, "--epochs", "2", "--batch-size", "25")
    with pytest.warns(UserWarning, match="transferred from batch norm, start training from another function"):
        run_here(*command)
    run_here("--calibrate", str(images), "--images", "128", "--image-size", "64", *command)
    plain, calibrated = (  # of the network and its average, behind the loss of the first batch
        max(map(float, line.split()[1:])) for line in capsys.readouterr().out.splitlines()
    )
    assert plain < 13 and calibrated > plain + 5, "in %; 10 is chance"
