"""`tofu deploy`: a federation of real processes on this machine, over TLS."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.certificates import command as certificates
from tofu.cli import SUGGEST_COMMANDS
from tofu.cli.options import ConfigFile, Json, Quiet, line_printer, with_settings
from tofu.errors import Interrupted, RunError, SettingError
from tofu.formatting import format_bytes, format_count, printable
from tofu.settings import Value, read_toml
from tofu.settings.deprecated import present_names

deploy = typer.Typer(
    suggest_commands=SUGGEST_COMMANDS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A federation of real processes on this machine: TLS, node keys, a database. Everything listens on 127.0.0.1.",
)

Folder = Annotated[Path, typer.Option("--folder", help="the federation's folder: keys, logs, database, results")]
_FOLDER = Path("runs/federation")
_COMPOSE = Path("deploy/compose.yaml")


@deploy.callback()
def check_platform() -> None:
    """Raises RunError on Windows."""
    if platform.system() == "Windows":
        raise RunError("`tofu deploy` needs Linux or macOS, or WSL on Windows: it uses POSIX processes and file modes")


@deploy.command()
def up(
    *,
    nodes: Annotated[int, typer.Option("--nodes", help="number of clients")] = 3,
    folder: Folder = _FOLDER,
    app_: Annotated[Path | None, typer.Option("--app", help="folder of the Flower app; by default Tofu's own")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="folder with the clients' own data: node-0, node-1, …")
    ] = None,
    policy: Annotated[Path | None, typer.Option("--policy", help="policy file of every client (TOML)")] = None,
    warm: Annotated[
        bool, typer.Option(help="keep imports in memory between rounds: faster, about 500 MB a node")
    ] = True,
    identities: Annotated[
        bool, typer.Option("--identities", help="an identity key for each client, against a dishonest server")
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", help="seconds within which all nodes must be online; busy machines get more")
    ] = 120,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Start a federation in the background and wait until its nodes are online. It runs until `tofu deploy down`."""
    from deploy import background

    result = background.up(
        folder, nodes=nodes, app=app_, data=data, warm=warm, identities=identities, policy=policy, timeout=timeout,
        follow=line_printer(quiet=quiet or json_),
    )  # fmt: skip
    _show(result, as_json=json_)


@deploy.command()
@with_settings
def run(
    *,
    folder: Folder = _FOLDER,
    config: ConfigFile = None,
    json_: Json = False,
    quiet: Quiet = False,
    overrides: dict[str, Value],
) -> None:
    """Run on a federation that is up, and show its progress. The settings are those of `tofu run`."""
    from deploy import background

    file = read_toml(config) if config is not None else {}
    given = present_names(file) | present_names(overrides)

    log = line_printer(quiet=quiet or json_)
    try:
        done, results = background.run(folder, given, follow=log)
    except KeyboardInterrupt:
        text = f"interrupted; a run that was started goes on: `tofu deploy status --folder {folder}` lists it"
        raise Interrupted(text) from None
    result = background.summary(done, results)
    if json_:
        print(json.dumps(result))
        return
    print(f"run {done.identity} completed, {format_bytes(done.traffic_bytes)} between server and nodes")
    print(f"report: {results / 'report.html'}")


@deploy.command()
def status(*, folder: Folder = _FOLDER, json_: Json = False) -> None:
    """Show the processes, the nodes and the runs."""
    from deploy import background

    _show(background.status(folder), as_json=json_)


@deploy.command()
def down(*, folder: Folder = _FOLDER, json_: Json = False) -> None:
    """End the processes that `up` started, and no others. Keys, database and results stay."""
    from deploy import background

    ended = background.down(folder)
    print(json.dumps({"ended": ended}) if json_ else f"ended: {', '.join(ended) or 'nothing was running'}")


deploy.command("certificates")(certificates)


@deploy.command("add-client")
def add_client(
    name: Annotated[str, typer.Argument(help="name of the client, such as hospital-d")],
    superlink: Annotated[str, typer.Option("--superlink", help="host:port at which the client reaches this machine")],
    compose: Annotated[Path, typer.Option("--compose", help="the compose file of the federation")] = _COMPOSE,
) -> None:
    """Add a client on another machine to the federation in containers: create its keys and list what to copy."""
    if not compose.is_file():
        raise SettingError("compose", str(compose), "the compose file of a checkout in which `make certs` was run")
    command = ["docker", "compose", "-f", str(compose), "run", "--rm", "-T", "keys", "add-client", name]
    try:
        done = subprocess.run([*command, "--superlink", superlink], check=False)
    except FileNotFoundError as error:
        raise RunError("docker is not found: expected its command on the PATH, with the plugin compose") from error
    if done.returncode:
        raise typer.Exit(2)


@deploy.command()
def identities(
    names: Annotated[list[str], typer.Argument(help="the clients: their partition-id, or their names")],
    folder: Annotated[Path, typer.Option("--folder", help="where the keys go")],
) -> None:
    """Create an identity key for every client, and the list of public keys that secure rounds check."""
    from deploy.identities import make_identities

    print(make_identities(folder, names))


def _show(status: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(status))
        return
    print(f"{status['phase']} at {status['address'] or 'no address'}, in {status['folder']}")
    for process in status["processes"]:
        again = f", started again {format_count(process['restarts'], 'time')}" if process["restarts"] else ""
        print(f"  {process['name']:<16}{'runs' if process['alive'] else 'ended':<8}{process['pid']}{again}")
    if "error" in status:
        print(f"  {printable(status['error'])}")
    for node in status["nodes"]:
        print(f"  {printable(node['name']):<15} {node['status']:<12}node {node['node']}")
    for entry in status["runs"]:
        print(f"  run {entry['run']:<24}{entry['status']}")
