"""`convert`, `calibrate` and `bench`; `train` and `validate` are tested as scripts."""

import json

import pytest
import timm
import torch

from tests.pictures import read_cifar
from timm_deconv.errors import NonFiniteError, Stopped
from timm_deconv.models.weights import save_network


def test_calibrated_weights_are_the_same_function_with_whitening(tmp_path, command):
    save_network(timm.create_model("resnet18_cifar", width=0.125), tmp_path / "twin")
    done = command("convert", f"local-dir:{tmp_path / 'twin'}", tmp_path / "whitened")
    assert done.status == 0 and f"'local-dir:{tmp_path / 'whitened'}'" in done.output
    assert command("calibrate", tmp_path / "whitened", "digits", tmp_path / "calibrated", "--images", 256).status == 0
    before, after = (
        timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval() for name in ("whitened", "calibrated")
    )
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(after(x), before(x), rtol=1e-3, atol=1e-4)
    eye = torch.eye(27)
    assert torch.equal(before.conv1.running_deconv.reshape(27, 27), eye)
    assert (after.conv1.running_deconv.reshape(27, 27) - eye).abs().max() > 0.1


def test_a_folder_of_pictures_alone_is_enough_to_calibrate_on(data_dir, tmp_path, command):
    (tmp_path / "photographs").mkdir()
    for index, (_, content) in enumerate(read_cifar(data_dir, 7)):
        (tmp_path / "photographs" / f"{index}.jpg").write_bytes(content)
    save_network(timm.create_model("resnet18_cifar", width=0.125), tmp_path / "twin")
    options = ("--calibrate", tmp_path / "photographs", "--images", 64)
    assert command("convert", f"local-dir:{tmp_path / 'twin'}", tmp_path / "converted", *options).status == 0
    places = (tmp_path / "converted", tmp_path / "photographs", tmp_path / "again")
    assert command("calibrate", *places, *options[2:]).status == 0
    for name in ("converted", "again"):
        network = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
        assert (network.conv1.running_deconv.reshape(27, 27) - torch.eye(27)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["calibrate", "{}/plain", "digits", "{}/new"], "no whitening layer"),
        (["calibrate", "{}/plain", "{}/none", "{}/new"], "no folder or tar of pictures {}/none"),
        (["calibrate", "{}/plain", "digits", "{}/plain"], "{}/plain is not empty: name a new folder"),
        (["calibrate", "{}/plain", "digits", "{}/file/new"], "{}/file/new cannot be made, as {}/file is no folder"),
        (["convert", "resnet18_cifar", "{}/file"], "{}/file cannot be made, as {}/file is no folder to write to"),
        (["convert", "local-dir:{}/plain", "{}/new", "--policy", "fasst"], "no preset 'fasst'; nearest: fast"),
        (["bench", "resnet18"], "no deconvolution network 'resnet18'; nearest: "),
        (["bench", "resnet18_cifar_deconv", "--rounds", "0"], "rounds 0: it is a positive number"),
        (["bench", "vgg11_cifar_deconv", "--image-size", "2", "--batch-size", "2"], "images of 2 x 3 x 2 x 2 cannot"),
    ],
)
def test_bad_input_is_one_line_before_any_work(words, line, tmp_path, command):
    save_network(timm.create_model("test_resnet"), tmp_path / "plain")
    (tmp_path / "file").touch()
    done = command(*(word.format(tmp_path) for word in words))
    assert (done.status, done.output) == (1, "") and done.errors.count("\n") == 1
    assert line.format(tmp_path, tmp_path) in done.errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "plain"]


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (Stopped(), 75, ""),
        (KeyboardInterrupt(), 130, ""),
        (NonFiniteError("the loss is NaN"), 1, "NonFiniteError: the loss is NaN\n"),
        (OSError(28, "No space left on device"), 1, "OSError: [Errno 28] No space left on device\n"),
    ],
)
def test_the_exit_status_says_how_a_run_has_ended(raised, status, line, monkeypatch, command):
    def train(*args, **options):
        raise raised

    monkeypatch.setattr("timm_deconv.training.loop.train", train)
    assert command("train", "digits", "epochs=1") == (status, "", line)


def test_bench_measures_all_forms_beside_batch_norm(command):
    words = ["bench", "resnet18_025_cifar_deconv", "--batch-size", 8, "--image-size", 16, "--rounds", 2, "--cpu"]
    measured = json.loads(command(*words, "--json").output)
    assert [(each["task"], each["form"]) for each in measured] == [
        ("training", "deconvolution"),
        ("training", "batch norm"),
        ("inference", "deconvolution"),
        ("inference", "folded"),
        ("inference", "batch norm"),
    ]
    for each in measured:
        assert each["images_per_second"] == pytest.approx(8000 / each["milliseconds"])
        assert each["times_batch_norm"] == 1 or each["form"] != "batch norm"
    table = command(*words[:-1], "--rounds", 1)
    assert table.status == 2, "an option given twice"
