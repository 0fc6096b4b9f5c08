"""Lists a SuperLink's nodes and runs in one process, without the imports of Flower's other commands.

`flwr supernode list` and `flwr ls` are two processes, each of which imports all commands, which takes seconds.
"""

import sys
from collections.abc import Callable, Sequence

import typer
from flwr.cli.ls import ls
from flwr.cli.supernode.ls import ls as supernode_ls

COMMANDS: dict[str, Callable[..., None]] = {"nodes": supernode_ls, "runs": ls}


def main(arguments: Sequence[str]) -> int:
    """Print a JSON object for each of these commands, as Flower's own do with `--format json`.

    Args:
        arguments: the name of a SuperLink connection, and names of `COMMANDS`.
    """
    connection, *names = arguments
    for name in names:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(COMMANDS[name])
        try:
            app([connection, "--format", "json"], standalone_mode=True)
        except SystemExit as end:
            if end.code:
                return int(end.code)
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
