"""Every command: its help, its examples, completion, and what is wrong on the command line."""

import os
import pty
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from cyclopts import CycloptsError

import timm_deconv
from timm_deconv.cli import COMMANDS, app
from timm_deconv.cli.export import Format
from timm_deconv.export.formats import FORMATS

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-c", "from timm_deconv.cli import main; main()"]
THERE = [name for name in COMMANDS if find_spec(f"timm_deconv.cli.{name}")]


@pytest.mark.parametrize("name", THERE)
def test_the_help_has_every_option_and_examples_that_can_be_typed(name, command):
    done = command(name, "--help")
    assert done.status == 0 and done.output.startswith(f"Usage: timm-deconv {name}")
    for argument in app[name].assemble_argument_collection(parse_docstring=True):
        assert argument.parameter.help, f"{argument.name} is not described"
        assert argument.name in done.output or argument.name.isupper()
    examples = re.findall(r"^ {4}(.*\btimm-deconv .*)$", done.output, re.MULTILINE)
    assert examples and all(len(example) <= 76 for example in examples)
    for example in examples:
        words = shlex.split(example)
        called = app.parse_args(words[words.index("timm-deconv") + 1 :])[0]
        assert called.__module__ == f"timm_deconv.cli.{name}", example


def test_the_help_lists_all_commands_in_one_line_each_and_the_exit_statuses(command):
    output = command("--help").output
    listed = re.findall(r"│ (\w+) +\S", output)
    assert listed == list(COMMANDS)
    assert all(f"{status} " in output.partition("Exit status:")[2] for status in (0, 1, 2, 75, 130))
    assert command().output == output and command("--version").output == f"{timm_deconv.__version__}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["prdict"], 'Unknown command "prdict". Did you mean "predict"?'),
        (["predict"], "requires an argument. (timm-deconv predict --help)"),
        (["predict", "resnet18", "x.png", "--topp", "3"], "Unknown option: --topp. Did you mean --top?"),
        (["predict", "resnet18", "x.png", "--top", "three"], 'unable to convert "three" into int'),
        (["--nothing"], "--nothing"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_one_line_and_status_2(words, line, command):
    done = command(*words)
    assert (done.status, done.output) == (2, "") and line in done.errors and done.errors.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_knows_commands_and_options(shell, tmp_path, command):
    file = tmp_path / "completion"
    assert command("--install-completion", "--shell", shell, "--output", file).status == 0
    script = file.read_text()
    assert all(name in script for name in THERE) and "batch-size" in script and "pretrained" in script
    if shell == "bash":
        subprocess.run(["bash", "-n", file], check=True)


def test_formats_of_an_export_are_offered_and_a_mistyped_one_is_answered_with_them(command):
    assert set(get_args(Format)) == set(FORMATS)
    for text in (command("export", "--help").output, app.generate_completion(shell="bash")):
        assert "torch-export" in text and "torchscript" in text
    done = command("export", "resnet18_025_cifar_deconv", "--format", "onx")
    assert (done.status, done.output) == (2, "") and done.errors.count("\n") == 1
    assert all(name in done.errors for name in FORMATS)


def test_a_terminal_gets_rules_and_a_reader_may_go_away():
    words = [*RUN, "list", "resnet18_cifar*"]
    master, slave = pty.openpty()
    shown = subprocess.Popen(words, cwd=ROOT, stdout=slave, stderr=slave, env=os.environ | {"TERM": "xterm"})
    os.close(slave)
    terminal = b""
    while b"\xe2\x94\x98" not in terminal:  # the last corner
        terminal += os.read(master, 4096)
    assert shown.wait() == 0
    os.close(master)
    assert "┃ network" in re.sub(r"\x1b\[[\d;]*m", "", terminal.decode())
    piped = f"{shlex.join(words)} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_the_entry_point_is_the_function_that_scripts_call():
    assert [each.value for each in entry_points(group="console_scripts", name="timm-deconv")] in (
        ["timm_deconv.cli:main"],
        [],  # a checkout on the path that is not installed
    )


def test_an_unknown_option_of_one_command_is_not_taken_for_that_of_another():
    with pytest.raises(CycloptsError, match="--batch-size"):
        app.parse_args(["predict", "resnet18", "x.png", "--batch-size", "3"])
