"""Tables as other programs get them, and JSON."""

import json
from pathlib import Path

from timm_deconv.cli.output import print_json, print_table, progress, status


def test_columns_are_as_wide_as_their_cells_and_numbers_stand_right(capsys):
    print_table([{"network": "a", "images": 12}, {"network": "bbbbbbbbb", "images": 3}], "two")
    assert capsys.readouterr().out == "two\nnetwork    images\na              12\nbbbbbbbbb       3\n"
    print_table([{"share": 0.123456, "of": None}, {"share": 12345.6, "of": "pixels"}])
    assert capsys.readouterr().out == "    share  of\n   0.1235\n1.235e+04  pixels\n"
    print_table([], "nothing")
    assert capsys.readouterr().out == ""


def test_cells_are_not_read_as_markup(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    print_table([{"class": "[red]cat[/red]", "share": 0.5}])
    assert "│ [red]cat[/red] │" in capsys.readouterr().out


def test_json_is_read_back(capsys):
    print_json({"path": Path("a"), "name": "Bär", "values": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"path": "a", "name": "Bär", "values": [1, None]}


def test_progress_passes_everything_on_and_is_silent_without_a_terminal(capsys):
    assert list(progress(range(3), "pictures", 3)) == [0, 1, 2]
    with status("timing") as say:
        say("round 1")
    assert capsys.readouterr() == ("", "")
