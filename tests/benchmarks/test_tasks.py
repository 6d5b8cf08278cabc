"""Tasks of scripts/benchmark.py: a conversion goes on where it stopped, the script needs nothing but the checkout."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import conversion
from benchmarks.tasks import OPTIONS, TASKS, run
from tests.pictures import read_cifar, write_folders

ROOT = Path(__file__).parents[2]


def test_convert_passes_over_networks_that_the_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def check(name: str, time_limit: int) -> conversion.ConversionRow:
        if len(checked) == 2:
            raise KeyboardInterrupt
        checked.append(name)
        return conversion.ConversionRow(name, "pass", seconds=time_limit)

    monkeypatch.setattr(conversion, "check_in_process", check)
    output = tmp_path / "convert.csv"
    options = {"networks": ["test_resnet", "test_convnext", "test_efficientn*t", "test_byobnet"], "time_limit": 7}
    with pytest.raises(KeyboardInterrupt):
        run("convert", options, output=output)
    assert checked == ["test_resnet", "test_efficientnet"]  # the other one has no batch norm
    checked[:] = []
    run("convert", options, output=output)
    assert checked == ["test_byobnet"]
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert [row["network"] for row in rows] == ["test_resnet", "test_efficientnet", "test_byobnet"]
    assert {row["seconds"] for row in rows} == {"7"}


def test_scripts_run_from_anywhere_in_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: study.py ")


@pytest.mark.parametrize("name", ["benchmark.py", "study.py", "plot_runs.py", "soak.py"])
def test_scripts_stay_thin(name: str) -> None:
    assert len((ROOT / "scripts" / name).read_text().splitlines()) < 60


def test_every_option_belongs_to_a_task() -> None:
    assert {option for task in TASKS.values() for option in task.options.split()} == set(OPTIONS)


def test_the_loops_own_cost_is_that_over_a_bare_loop(tmp_path: Path, data_dir: Path) -> None:
    write_folders(read_cifar(data_dir, 4), tmp_path / "train")
    write_folders(read_cifar(data_dir, 4), tmp_path / "val")
    output = tmp_path / "loop.csv"
    run("loop", {"data_dir": str(tmp_path), "batch": 16, "workers": 1}, quick=True, output=output)
    (row,) = csv.DictReader(output.read_text().splitlines())
    script, bare = float(row["script"]), float(row["bare"])
    assert 0 < bare < script and float(row["overhead"]) > 0.1  # a batch of 16 is no work
    assert float(row["cpu_overhead_lower"]) <= float(row["cpu_overhead"]) <= float(row["cpu_overhead_upper"])
