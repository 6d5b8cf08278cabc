"""The scripts, run as a user runs them."""

import runpy
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
from PIL import Image

from timm_deconv.models.weights import save_network

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ["model=test_resnet", "model_kwargs={}", "epochs=1", "batch_size=128"]


def _run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


@pytest.mark.parametrize("name", ["train.py", "validate.py", "quickstart.py", "gpu_check.py"])
def test_scripts_stay_thin(name):
    assert len((SCRIPTS / name).read_text().splitlines()) < 60


def test_what_train_saved_validate_reads_as_well(monkeypatch, tmp_path, capsys):
    _run(
        monkeypatch,
        "train.py",
        "digits",
        "--model",
        "test_resnet",
        "--output-dir",
        tmp_path / "run",
        "--cpu",
        "epochs=1",
    )
    trained = capsys.readouterr().err
    _run(monkeypatch, "validate.py", tmp_path / "run", "--cpu")
    validated = capsys.readouterr().out
    assert f"in evaluation {float(validated.split()[1]):.2f} %" in trained
    assert "364 images," in validated


def test_validate_takes_another_data_set_and_settings(monkeypatch, tmp_path, capsys):
    _run(monkeypatch, "train.py", "digits", *SMALL, "--output-dir", tmp_path / "run", "--cpu")
    _run(monkeypatch, "validate.py", tmp_path / "run", "--cpu", "val_split=train", "batch_size=200")
    assert "1433 images," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train.py", ["cifar10_e02"], "no recipe 'cifar10_e02'; nearest: "),
        ("train.py", ["digits", "--model", "resnet18_cifar_deconvv"], "no model 'resnet18_cifar_deconvv'; nearest: "),
        ("train.py", ["digits", "epochz=3"], "no recipe key 'epochz'; nearest: epochs"),
        ("train.py", ["digits", "model_kwargs.widht=0.5"], "no argument of .* 'widht'; nearest: .*width"),
        ("train.py", ["digits", "model_kwargs.width=0"], "width=0: .* must be positive"),
        ("train.py", ["digits", "model_kwargs.width=wide"], "width='wide': .* must be positive"),
        ("train.py", ["digits", *SMALL, "model_kwargs.layers=7"], "test_resnet cannot be made with model_kwargs="),
        ("train.py", ["digits", "num_classes=-3"], "num_classes=-3: "),
        ("train.py", ["digits", "model_kwargs.num_classes=7"], "model_kwargs.num_classes is decided by num_classes"),
        ("train.py", ["digits", *SMALL, "batch_size=1"], "batch_size=1 gives a batch norm of test_resnet"),
        ("train.py", ["digits", "model=resnet18_cifar_deconv", "model_kwargs.width=0.125", "batch_size=1"], "one row"),
        ("validate.py", ["nowhere"], "no model or folder 'nowhere'"),
        ("validate.py", ["runs/nowhere/here"], "no folder runs/nowhere/here "),
        ("validate.py", ["/runs/nowhere"], "no folder /runs/nowhere"),
        ("validate.py", ["local-dir:nowhere"], "local-dir:nowhere cannot be had .*nowhere"),
        ("validate.py", ["tf_efficientnet_lite0_deconv"], "nothing says which images .* is for"),
        ("validate.py", ["tf_efficientnet_lite0_deconv", "--recipe", "digits"], "has 1000 classes, .* digits have 10"),
        ("quickstart.py", ["lr=-1"], "lr=-1: "),
        ("benchmark.py", ["layer", "--rows", 23], "no row 23 in the paper's table 3"),
        ("benchmark.py", ["memory", "--presets", "fasst"], "no preset 'fasst'; nearest: fast"),
        ("gpu_check.py", ["--tiny", "--parts", "resnet19"], "no part 'resnet19'; nearest: .*resnet18"),
        ("benchmark.py", ["scaling", "--values", -1], "batch=-1: must be a positive whole number"),
    ],
)
def test_bad_input_ends_a_script_with_one_line(monkeypatch, tmp_path, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as ended:
        _run(monkeypatch, name, *arguments)
    assert "\n" not in ended.value.code
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_a_mistyped_run_folder_is_no_repository_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"no folder runs/digit; nearest: digits \(a repository .* hf-hub:ORG/NAME"):
        _run(monkeypatch, "validate.py", "runs/digit")


def test_a_repository_that_is_not_there_is_answered_in_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="hf-hub:nobody/nothing cannot be had") as ended:
        _run(monkeypatch, "validate.py", "nobody/nothing")
    assert "\n" not in ended.value.code


def test_validate_takes_a_folder_of_images_where_there_is_no_recipe(monkeypatch, tmp_path, capsys):
    save_network(timm.create_model("resnet18_cifar", num_classes=2, width=0.125), tmp_path / "two")
    save_network(timm.create_model("resnet18_cifar", width=0.125), tmp_path / "ten")
    for name in ("a", "b"):
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / "val" / name / "0.png")
    _run(monkeypatch, "validate.py", tmp_path / "two", "--data-dir", tmp_path / "images", "--cpu")
    assert "2 images," in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"the network has 10 classes, the images of \S+images have 2"):
        _run(monkeypatch, "validate.py", tmp_path / "ten", "--data-dir", tmp_path / "images", "--cpu")


def test_record_appends_to_the_results_of_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr("timm_deconv.training.results.checkout_configs", lambda: tmp_path / "hub_configs")
    _run(monkeypatch, "train.py", "digits", *SMALL, "--output-dir", tmp_path / "run", "--record", "--cpu")
    recorded = (tmp_path / "hub_configs" / "results" / "digits.csv").read_text()
    assert recorded == (tmp_path / "run" / "results.csv").read_text()


def test_quickstart_shows_both_curves_and_reads_digits(monkeypatch, tmp_path, capsys):
    settings = ["model=vgg11_cifar_deconv", "model_kwargs.width=0.125", "epochs=1"]
    _run(monkeypatch, "quickstart.py", "--output-dir", tmp_path, *settings)
    said = capsys.readouterr().out
    assert "vgg11_cifar_deconv, with deconvolution\n" in said and "vgg11_cifar, with batch norm\n" in said
    accuracies, read = (line.split() for line in said.splitlines() if line.startswith(("    1 ", "read as ")))
    assert [len(accuracies), len(read)] == [3, 12] and "digits      0 1 2 3 4 5 6 7 8 9\n" in said
    timm.create_model(f"local-dir:{tmp_path / 'vgg11_cifar_deconv'}", pretrained=True)
    _run(monkeypatch, "quickstart.py", "--output-dir", tmp_path, *settings)
    assert capsys.readouterr().out == said


TINY = ["--width", 0.125, "--batch", 4, "--memory-formats", "channels_last"]


@pytest.mark.parametrize(
    ("task", "arguments", "said", "rows"),
    [
        ("step", [*TINY, "--rounds", 1, "--warmup", 0, "--forms", "none", "twin"], "ratio_to_twin", 2),
        ("layer", ["--rows", 9, "--batch", 1, "--rounds", 1, "--warmup", 0], "paper_to_published: at most ", 1),
        ("memory", [*TINY, "--forms", "none", "deconv", "--presets", "fast"], "ratio_to_none", 2),
        ("profile", [*TINY, "--forms", "none"], "milliseconds", 3),
        ("scaling", [*TINY, "--values", 4, 8, "--rounds", 1, "--warmup", 0, "--preset", "fast"], "share", 2),
    ],
)
def test_benchmark_prints_and_records_rows(monkeypatch, tmp_path, capsys, task, arguments, said, rows):
    monkeypatch.setattr("benchmarks.rows.checkout_configs", lambda: tmp_path / "hub_configs")
    output = tmp_path / f"benchmark_{task}.csv"
    _run(monkeypatch, "benchmark.py", task, *arguments, "--output", output, "--record")
    assert said in capsys.readouterr().out
    measured = len(output.read_text().splitlines()) - 1
    assert measured == rows or (task == "profile" and measured > rows)
    recorded = "benchmark.csv" if task == "step" else output.name
    assert (tmp_path / "hub_configs" / "results" / recorded).read_text() == output.read_text()
    assert (tmp_path / "benchmark_scaling_batch.png").exists() == (task == "scaling")
