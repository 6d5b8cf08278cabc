"""What goes wrong in one of two processes (gloo) ends both, with its reason, or neither."""

import json
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from benchmarks.killing import Kill, kill_loop, start
from tests import forked
from timm_deconv.errors import EXIT_STOPPED

SCRIPT = Path(__file__).with_name("faults.py")


@pytest.fixture(autouse=True)
def forks(monkeypatch):
    """Fork processes: most of the time would be imports."""
    monkeypatch.setattr("benchmarks.killing.subprocess", forked)


@pytest.fixture
def run(short_recipe, tmp_path):
    """Start a run with a fault in one of its processes."""
    started = []

    def run(rank, passes, fault, processes=2, environment=None, folder="run", **settings):
        recipe = short_recipe.merged({"batch_size": 64, "epochs": 2, **settings})
        (tmp_path / "recipe.yaml").write_text(recipe.yaml())
        command = [sys.executable, SCRIPT, tmp_path / "recipe.yaml", tmp_path / folder, rank, passes, fault]
        started.extend(found := start(list(map(str, command)), processes, **environment or {}))
        return found

    yield run
    for process in started:
        process.kill()
        process.communicate()


def _end(processes, seconds=120):
    said = [process.communicate(timeout=seconds)[1].strip() for process in processes]
    return said, [process.returncode for process in processes]


def test_an_error_in_one_process_ends_both_with_its_reason(run):
    (first, second), codes = _end(run(1, 3, "unreadable"))
    assert codes == [1, 1]
    assert second == "OSError: unreadable image cat/7.jpg (index 12): truncated"
    assert first.startswith("ConnectionError: process 0: another process has ended or no longer answers (")
    assert "\n" not in first


def test_a_process_that_hangs_ends_the_other_within_process_timeout(run):
    first, second = run(1, 3, "SIGSTOP", process_timeout=0.1)
    (said,), codes = _end([first])
    assert codes == [1] and said.startswith(
        "ConnectionError: process 0: another process has ended or no longer answers"
    )
    second.send_signal(signal.SIGKILL)


def test_a_nonfinite_loss_in_one_process_stops_both_and_both_name_the_layer(run):
    said, codes = _end(run(1, 3, "nonfinite"))
    assert codes == [1, 1]
    expected = (
        "NonFiniteError: non-finite loss at epoch 1, update 3, first seen by no layer when the batch was repeated"
    )
    assert all(text.startswith(expected) for text in said)


def test_a_signal_to_one_process_saves_all_and_another_number_of_processes_shows_the_same_images(run, tmp_path):
    """Before it a loss is non-finite in one process, and the update is left out in both."""
    processes = run(1, 2, "nonfinite", nonfinite="skip", log_interval=1)
    while not (tmp_path / "run.seen-1").exists() or len((tmp_path / "run.seen-1").read_text().splitlines()) < 5:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    (first, second), codes = _end(processes)
    assert codes == [EXIT_STOPPED, EXIT_STOPPED] and second == ""
    assert "update 2 is left out (1 of 10)" in first and "is saved; --resume goes on from it" in first
    shares = [_seen(tmp_path / f"run.seen-{rank}") for rank in "01"]
    joined = [a + b for a, b in zip(*shares, strict=True)]
    (tmp_path / "run.seen-0").unlink()
    (said,), codes = _end(run(0, 0, "none", processes=1, nonfinite="skip"))
    assert codes == [0], said
    assert "saved by 2 processes: the images stay the same" in said
    _end(run(0, 0, "none", processes=1, folder="whole"))
    assert joined + _seen(tmp_path / "run.seen-0") == _seen(tmp_path / "whole.seen-0")


def _seen(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_process_that_never_joins_is_waited_for_no_longer_than_said(run, tmp_path):
    first, second = run(0, 0, "none", process_timeout=0.1)
    second.kill()
    (said,), codes = _end([first])
    assert codes == [1] and said.startswith("InputError: the processes cannot meet at MASTER_ADDR:MASTER_PORT (")
    assert "1/2 clients joined" in said and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_named(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (said,), codes = _end(run(0, 0, "none", environment={"MASTER_PORT": port})[:1])
    assert codes == [1] and said.startswith("InputError: the processes cannot meet at MASTER_ADDR:MASTER_PORT (")
    assert port in said and "\n" not in said


@pytest.mark.slow
def test_killed_runs_end_bit_for_bit_where_they_would_have(tmp_path):
    planned = [Kill(1, None, True, 0.7), Kill(2, 1, False, 0.5)]
    rows = list(kill_loop(dict(enumerate(planned)), tmp_path))
    assert [row["identical"] for row in rows] == 2 * [True]
    assert all(row["repeated"] <= row["allowed"] and row["state"] != "none" for row in rows)
