"""A file is whole or not there."""

import subprocess
import sys

import pytest

from timm_deconv.training.atomic_io import write_text, write_whole


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "weights", "old")

    def half(file):
        file.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "weights", half)
    assert (tmp_path / "weights").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]


WITHOUT_FCNTL = """
import os, sys, types
sys.modules["fcntl"] = None
from timm_deconv.training import atomic_io, loop, results
locked = []
sys.modules["msvcrt"] = types.SimpleNamespace(LK_LOCK=1, locking=lambda *how: locked.append(how))
for _ in range(2):
    results.append_rows(loop.Path(sys.argv[1]), ["a", "b"], [{"a": 1, "b": 2}])
atomic_io.write_text(loop.Path(sys.argv[1] + ".txt"), "whole")
assert len(locked) == 2 and {how[1:] for how in locked} == {(1, 1)}, locked
"""


def test_where_there_is_no_fcntl_as_on_windows_results_are_written_under_its_own_lock(tmp_path):
    file = tmp_path / "rows.csv"
    subprocess.run([sys.executable, "-c", WITHOUT_FCNTL, str(file)], check=True)
    assert file.read_text() == "a,b\n1,2\n1,2\n"
    assert (tmp_path / "rows.csv.txt").read_text() == "whole"
