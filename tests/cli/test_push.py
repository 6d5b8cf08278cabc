"""`timm-deconv push`: what it prints, and how it ends."""

import json
import sys
from pathlib import Path

import pytest

from timm_deconv.cli import main

NAME = "resnet18_cifar_deconv.nd_mine"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["timm-deconv", "push", *map(str, words)])
    main()


def test_a_dry_run_prints_the_files_with_their_sizes(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--org", "me", "--dry-run", "--no-eval", "--tag", "nd_mine")
    run(monkeypatch, finished_run, *options)
    printed = capsys.readouterr().out
    folder = Path("published", NAME)
    files = [path for path in folder.rglob("*") if path.is_file()]
    lines = [line.split() for line in printed.splitlines()]
    assert len(files) == 10
    assert all([path.relative_to(folder).as_posix(), str(path.stat().st_size)] in lines for path in files)
    assert f"what would go up as me/{NAME}; nothing was sent" in printed
    run(monkeypatch, finished_run, *options, "--output", "again", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["repository"] == f"me/{NAME}" and found["folder"] == "again"
    assert found["files"] == {name: (Path("again") / name).stat().st_size for name in found["files"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere", "--org", "me"), "no folder nowhere"),
        (("nowhere", "--org", "me", "--output", "x"), "--output is the folder of --dry-run"),
        (("nowhere", "--org", "me", "--dry-run", "--private"), "--private and --revision are of an upload"),
    ],
)
def test_what_cannot_be_done_ends_with_one_line(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *words)
    assert isinstance(end.value.code, str), "Python prints a text to stderr and ends with status 1"
    assert message in end.value.code and "\n" not in end.value.code
    assert list(tmp_path.iterdir()) == []


def test_without_a_token_nothing_is_sent(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SystemExit, match="no token of the Hub: `hf auth login`"):
        run(monkeypatch, finished_run, "--org", "me", "--no-eval")
