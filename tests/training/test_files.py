"""A file is whole or not there."""

import pytest

from timm_deconv.training.files import write_text, write_whole


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "weights", "old")

    def half(file):
        file.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "weights", half)
    assert (tmp_path / "weights").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]
