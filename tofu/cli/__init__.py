"""The command line, one file per command, imported when it is used, so that `--help` is quick."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import click
import typer
from typer.core import TyperCommand, TyperGroup

from tofu.errors import Interrupted, TofuError
from tofu.formatting import printable

COMMANDS = {
    "run": "Run a federation in this process: the same server and client apps as `flwr run`, no ray, no open port.",
    "plan": "Print what a run will cost in bytes and about how long it will take here, without running it.",
    "demo": "Train the same federation twice, with FedAvg and with proxies, and compare accuracy and bytes.",
    "compare": "Run compressors at several ratios, and FedAvg, on the same data: "
    "which is more accurate at equal bytes.",
    "predict": "Classify images with a run's model; with the ood plugin, mark out-of-distribution images.",
    "attack": "Measure what messages leak: those of a recorded run, or messages that are made for the purpose.",
    "settings": "Print every setting with its default, as a TOML file for `--config`; "
    "or the JSON schema of such a file.",
    "report": "Write a run's report again.",
    "serve": "List the runs of a folder and follow live ones in a browser, on this machine only.",
    "doctor": "Check this installation: versions, devices, ports, disk, and one encode of a small update.",
    "deploy": "A federation of real processes on this machine: TLS, node keys, a database. "
    "Everything listens on 127.0.0.1.",
}
"""Name -> the first lines of its help. The command is `NAME` of tofu/cli/NAME.py, which is imported when it is used."""

SUGGEST_COMMANDS = not hasattr(click.exceptions, "NoSuchCommand")
"""Whether typer should suggest a command for a misspelled one: from that exception on, click itself does."""

_MODULES = {"serve": "report"}


@contextmanager
def usage_errors_in_one_line(group: click.Context | None = None) -> Iterator[None]:
    """Raise TofuError for an option, argument or command that click refuses: it would print a box of several lines.

    Args:
        group: the group that invokes a command, which click's error of an option without its value does not name.
    """
    try:
        yield
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # no error but a help page; older releases of click have none
            raise
        command = "tofu" if group is None else f"{group.command_path} {group.invoked_subcommand or ''}".strip()
        if error.ctx is not None:
            command = error.ctx.command_path
        message = error.format_message()
        if isinstance(error, click.NoSuchOption):
            from tofu.settings import ELSEWHERE

            if known := ELSEWHERE.get(error.option_name.lstrip("-")):
                message = f"No such option '{error.option_name}'. (Did you mean '--{known}'?)"
        raise TofuError(f"{message} (see `{command} --help`)") from error


class CommandsOnDemand(TyperGroup):
    """The group of all commands. A list of them, as in `tofu --help`, imports none."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._listed: dict[str, click.Command] = {
            name: TyperCommand(name, help=text) for name, text in COMMANDS.items()
        }
        self.commands = dict(self._listed)

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:
        with usage_errors_in_one_line():
            return super().make_context(*arguments, **named)

    def invoke(self, ctx: click.Context) -> Any:
        with usage_errors_in_one_line(ctx):
            return super().invoke(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS and self.commands[cmd_name] is self._listed[cmd_name]:
            self.commands[cmd_name] = load_command(cmd_name)
        return super().get_command(ctx, cmd_name)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listing = TyperGroup(name=self.name, commands=self._listed, help=self.help, params=self.params)
        listing.format_help(ctx, formatter)


def load_command(name: str) -> click.Command:
    """Import a command of `COMMANDS`."""
    part = getattr(import_module(f"tofu.cli.{_MODULES.get(name, name)}"), name)
    if not isinstance(part, typer.Typer):
        function, part = part, typer.Typer(add_completion=False)
        part.command(name)(function)
    command = typer.main.get_command(part)
    command.name = name
    return command


app = typer.Typer(
    cls=CommandsOnDemand,
    suggest_commands=SUGGEST_COMMANDS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Communication-efficient federated learning: proxy images, secure aggregation, training plugins.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"tofu {version('tofu-fl')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _with_present_flags(arguments: list[str]) -> list[str]:
    if arguments[:1] in ([], ["--help"], ["--version"]):
        return arguments
    from tofu.cli.options import with_present_flags

    return with_present_flags(arguments)


def main() -> None:
    """Run the command line; errors that a user can act on take one line. docs/command-line.md has the exit codes."""
    for name, value in {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}.items():
        os.environ.setdefault(name, value)
    for stream, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():  # in this order: that of the descriptors
        if getattr(sys, stream) is None:  # it was closed, and a file of the run would get its descriptor
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    try:
        app(_with_present_flags(sys.argv[1:]), prog_name="tofu")
    except TofuError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from error
    except Interrupted as end:
        print(printable(str(end)), file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as end:
        if end.code == 130:  # typer turns Ctrl-C into this, without a word
            print("interrupted", file=sys.stderr)
        raise
