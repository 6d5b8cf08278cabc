"""A file is whole or not there."""

import runpy
import sys
import types

import pytest

from timm_deconv import atomic_io
from timm_deconv.atomic_io import write_text, write_whole
from timm_deconv.training import results


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "weights", "old")

    def half(file):
        file.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "weights", half)
    assert (tmp_path / "weights").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]


def test_where_there_is_no_fcntl_as_on_windows_results_are_written_under_its_own_lock(tmp_path, monkeypatch):
    locked = []
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(
        sys.modules, "msvcrt", types.SimpleNamespace(LK_LOCK=1, locking=lambda *how: locked.append(how))
    )
    imported = runpy.run_path(atomic_io.__file__)
    assert imported["fcntl"] is None
    monkeypatch.setattr(results, "lock", imported["lock"])
    for _ in range(2):
        results.append_rows(tmp_path / "rows.csv", ["a", "b"], [{"a": 1, "b": 2}])
    assert len(locked) == 2 and {how[1:] for how in locked} == {(1, 1)}
    assert (tmp_path / "rows.csv").read_text() == "a,b\n1,2\n1,2\n"
    imported["write_text"](tmp_path / "rows.csv.txt", "whole")
    assert (tmp_path / "rows.csv.txt").read_text() == "whole"
