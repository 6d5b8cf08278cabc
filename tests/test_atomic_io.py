"""A file is whole or not there."""

import os
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


def test_what_an_earlier_process_left_is_no_part_of_a_folder(tmp_path):
    left = tmp_path / ".export.partial"
    left.mkdir()
    (left / "stale.txt").write_text("of a process that was killed")
    (tmp_path / "export").mkdir()

    def write(folder):
        folder.mkdir()
        (folder / "new.txt").write_text("new")

    write_whole(tmp_path / "export", write)
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.txt")] == ["export/new.txt"]


def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("renamed") or replace(*paths))

    def write(folder):
        (folder / "folded").mkdir(parents=True)
        (folder / "folded" / "weights").write_text("new")

    write_whole(tmp_path / "tree", write)
    partial = tmp_path / ".tree.partial"
    before = {str(path) for path in (partial, partial / "folded", partial / "folded" / "weights")}
    assert set(done[:3]) == before and done[3:] == ["renamed", str(tmp_path)]


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
