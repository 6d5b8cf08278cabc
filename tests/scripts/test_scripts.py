"""The scripts, run as a user runs them."""

import runpy
import sys
from pathlib import Path

import pytest
import timm

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ["model=test_resnet", "model_kwargs={}", "epochs=1", "batch_size=128"]


def _run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


@pytest.mark.parametrize("name", ["train.py", "validate.py", "quickstart.py"])
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
        ("validate.py", ["nowhere"], "no model or folder 'nowhere'"),
        ("quickstart.py", ["lr=-1"], "lr=-1: "),
        ("benchmark.py", ["layer", "--rows", 23], "no row 23 in the paper's table 3"),
        ("benchmark.py", ["memory", "--presets", "fasst"], "no preset 'fasst'; nearest: fast"),
        ("benchmark.py", ["scaling", "--values", -1], "batch=-1: must be a positive whole number"),
    ],
)
def test_bad_input_ends_a_script_with_one_line(monkeypatch, tmp_path, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as ended:
        _run(monkeypatch, name, *arguments)
    assert "\n" not in ended.value.code
    assert not list(tmp_path.iterdir())


def test_record_appends_to_the_results_of_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr("timm_deconv.training.results.checkout_configs", lambda: tmp_path / "hub_configs")
    _run(monkeypatch, "train.py", "digits", *SMALL, "--output-dir", tmp_path / "run", "--record", "--cpu")
    recorded = (tmp_path / "hub_configs" / "results" / "digits.csv").read_text()
    assert recorded == (tmp_path / "run" / "results.csv").read_text()


def test_quickstart_shows_both_curves_and_reads_digits(monkeypatch, tmp_path, capsys):
    settings = ["model=vgg11_cifar_deconv", "model_kwargs.width=0.125", "epochs=1"]
    _run(monkeypatch, "quickstart.py", "--output-dir", tmp_path, *settings)
    said = capsys.readouterr().out
    assert "vgg11_cifar_deconv" in said and " vgg11_cifar\n" in said and "predicted [" in said and "truth     [" in said
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
    monkeypatch.setattr("timm_deconv.benchmark.rows.checkout_configs", lambda: tmp_path / "hub_configs")
    output = tmp_path / f"benchmark_{task}.csv"
    _run(monkeypatch, "benchmark.py", task, *arguments, "--output", output, "--record")
    assert said in capsys.readouterr().out
    measured = len(output.read_text().splitlines()) - 1
    assert measured == rows or (task == "profile" and measured > rows)
    recorded = "benchmark.csv" if task == "step" else output.name
    assert (tmp_path / "hub_configs" / "results" / recorded).read_text() == output.read_text()
    assert (tmp_path / "benchmark_scaling_batch.png").exists() == (task == "scaling")
