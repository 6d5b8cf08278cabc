"""The command line, `timm-deconv COMMAND`: one module a command, which is imported when it is asked for.

A command is a function of plain typed arguments. Its docstring is its help: the first line, examples as an indented
block, and `Args:`. It calls the room that does the work, and prints by `output`; what is wrong with the input is raised
as `InputError`, which ends the program with one line.
"""

import sys

from cyclopts import App, CycloptsError, Parameter

import timm_deconv
from timm_deconv.errors import one_line_errors

__all__ = ["app", "main"]

COMMANDS = {
    "list": "list_networks",
    "info": "info",
    "predict": "predict",
    "train": "train",
    "validate": "validate",
    "convert": "convert",
    "calibrate": "calibrate",
    "export": "export",
    "push": "push",
    "bench": "bench",
    "demo": "demo",
}
"""By name, in the order of the help: the function in the module of this name."""

EXIT_USAGE = 2
EXIT_STATUS = """\
Exit status: 0 done; 1 something given cannot be used, and one line says what
to do; 2 no such command or option; 75 a run was told to stop and has saved
itself, to be resumed; 130 interrupted."""



def _shown(default: object) -> str | None:
    """Write a default in the help; of flags, which are off, and options that have none, nothing."""
    return None if default in (None, False) else str(default)


app = App(
    name="timm-deconv",
    help="Networks with deconvolution (whitening) in place of batch norm: weights, pictures, training, deployment.",
    help_format="plaintext",
    help_epilogue=EXIT_STATUS,
    version=timm_deconv.__version__,
    default_parameter=Parameter(negative=(), show_default=_shown),  # no --no-OPTION
    print_error=False,
    exit_on_error=False,
    result_action="return_none",
)
for _place, (_name, _function) in enumerate(COMMANDS.items()):
    app.command(f"timm_deconv.cli.{_name}:{_function}", name=_name, sort_key=_place, help_epilogue="")
app.register_install_completion_command(help_epilogue="")


def main(*command: str) -> None:
    """Run the command line.

    Args:
        command: words before those that the user typed, as in a script for one command.

    Raises:
        SystemExit: where it is not done; see EXIT_STATUS.
    """
    words = [*command, *sys.argv[1:]]
    try:
        with one_line_errors():
            if not words or words[0] in app.help_flags:
                app.resolved_commands()  # so that the list of commands says what each does
            app(words)
    except CycloptsError as error:
        named = " ".join([app.name[0], *(word for word in words[:1] if word in COMMANDS)])
        print(f"{' '.join(str(error).split())} ({named} --help)", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
