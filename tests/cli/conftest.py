"""The command line in this process: what a user types, and what he gets."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from timm_deconv.cli import main


class Done(NamedTuple):
    """What a command has printed, and its exit status; the line of an error is part of `errors`."""

    status: int
    output: str
    errors: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `timm-deconv` with these words."""

    def run(*words: object) -> Done:
        monkeypatch.setattr("sys.argv", ["timm-deconv", *map(str, words)])
        status, line = 0, ""
        try:
            main()
        except SystemExit as ended:  # the interpreter prints a text, and ends with 1
            is_text = isinstance(ended.code, str)
            status, line = (1, f"{ended.code}\n") if is_text else (int(ended.code or 0), "")
        output, errors = capsys.readouterr()
        return Done(status, output, errors + line)

    return run
