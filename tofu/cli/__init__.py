"""The command line, one file per command. Commands import what they need when they run, so that `--help` is quick."""

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from tofu.cli.attack import attack
from tofu.cli.compare import compare
from tofu.cli.demo import demo
from tofu.cli.deploy import app as deploy
from tofu.cli.doctor import doctor
from tofu.cli.options import with_present_flags
from tofu.cli.plan import plan
from tofu.cli.predict import predict
from tofu.cli.report import report, serve
from tofu.cli.run import run
from tofu.cli.settings import settings
from tofu.errors import Interrupted, TofuError
from tofu.formatting import printable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Communication-efficient federated learning: proxy images, secure aggregation, training plugins.",
)
for command in (run, plan, demo, compare, predict, attack, settings, report, serve, doctor):
    app.command()(command)
app.add_typer(deploy, name="deploy")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tofu {version('tofu-fl')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; errors that a user can act on take one line. docs/command-line.md has the exit codes."""
    for name, value in {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}.items():
        os.environ.setdefault(name, value)
    try:
        app(with_present_flags(sys.argv[1:]), prog_name="tofu")
    except TofuError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from error
    except Interrupted as end:
        print(printable(str(end)), file=sys.stderr)
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
