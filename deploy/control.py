"""A client of a SuperLink's Control API: it registers nodes, starts runs and follows them.

Flower's Control API has no login: whoever reaches its port can run code as the operator. `tofu deploy` adds a login
(deploy/superlink.py); containers keep the port on a separate network. deploy/processes.py uses the class `Control`,
and deploy/compose.yaml the command `python -m deploy.control`.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from deploy.app_folder import write_app
from deploy.certificates import check_server
from deploy.files import run_command
from deploy.patience import load_factor
from deploy.superlink import write_credentials
from deploy.topology import ENVIRONMENT
from tofu.errors import RunError
from tofu.reporting.run_settings import read_config
from tofu.settings import Settings, Value, read_toml
from tofu.settings.deprecated import present_names

_CONNECTION = "tofu"
_BIN = Path(sys.executable).parent
_COMMAND_SECONDS = 90.0
_RESTART_SECONDS = 120.0
"""Both are multiplied by `load_factor`."""
_KEY_IN_USE = "[code: 23]"
_UNREACHABLE = "Connection to the SuperLink is unavailable"


class NoAnswerError(RunError):
    """The SuperLink cannot be reached, or does not answer in time: a run that it has goes on, as far as we know."""


@dataclass(frozen=True)
class CompletedRun:
    """A run that ended.

    Attributes:
        status: Flower's status: finished:completed, finished:failed or finished:stopped.
        details: the reason of a failure.
        log: what the server app printed.
        traffic_bytes: between SuperLink and SuperNodes, both directions, as Flower counts it.
    """

    identity: int
    status: str
    details: str
    log: str
    traffic_bytes: int

    @property
    def completed(self) -> bool:
        """Whether the server app came to its end without an error."""
        return self.status == "finished:completed"


class Control:
    """Commands to one SuperLink.

    Args:
        folder: for Flower's configuration of this client, and the commands' working directory; created if missing.
        address: host:port of the SuperLink.
        ca: certificate of the CA that signed its certificate.
        token: file with the login token (deploy/superlink.py); None for a SuperLink without a login.
    """

    def __init__(self, folder: Path, address: str, ca: Path, token: Path | None = None) -> None:
        self._folder, self._address, self._ca = folder.resolve(), address, ca
        home = self._folder / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f"[superlink.{_CONNECTION}]\naddress = {json.dumps(address)}\n"
            f"root-certificates = {json.dumps(str(ca.resolve()))}\n"
        )
        if token is not None:
            write_credentials(home, address, token)
        self._environment = os.environ | ENVIRONMENT | {"FLWR_HOME": str(home)}

    def register(self, key: Path, name: str) -> str:
        """Register a node's public key. It is no error if the key is registered already.

        Returns:
            The node's id; "" if the key was registered before.

        Raises:
            RunError: the SuperLink cannot be reached, or refuses.
        """
        arguments = ("supernode", "register", str(key.resolve()), _CONNECTION, "--name", name)
        return str(self._ask(*arguments, accepted=_KEY_IN_USE).get("node-id", ""))

    def overview(self, *names: str) -> list[list[dict[str, Any]]]:
        """Return what `nodes` and `runs` do, for each of these names, in one process."""
        command = [sys.executable, "-m", "deploy.listing", _CONNECTION, *names]
        output = self._output(command, "the list of nodes and runs")
        found: list[list[dict[str, Any]]] = []
        for name in names:
            answer, output = _first_object(output)
            found.append(list(self._checked(answer, "the list of nodes and runs")[name]))
        return found

    def nodes(self) -> list[dict[str, Any]]:
        """Return the registered nodes as Flower lists them, with `node-id` and `status`:
        registered, online or offline.
        """
        return list(self._ask("supernode", "list", _CONNECTION)["nodes"])

    def runs(self) -> list[dict[str, Any]]:
        """Return all runs as Flower lists them, with `run-id` and `status`."""
        return list(self._ask("ls", _CONNECTION)["runs"])

    def run(
        self,
        app: Path | None,
        run_config: Mapping[str, Value],
        *,
        timeout: float = float("inf"),
        follow: Callable[[str], None] = lambda line: None,
    ) -> CompletedRun:
        """Run the app and wait for its end, whether it completes or fails.

        A run is stopped where its end is not awaited, but not for want of the SuperLink's answer.

        Args:
            app: folder of the Flower app; None for Tofu's own app without code, which the nodes have installed.
            run_config: overrides of keys in the app's `[tool.flwr.app.config]`.
            timeout: seconds, after which the run is stopped.
            follow: called with each line that the server app prints.

        Raises:
            RunError: the run could not be started, or did not end in time.
        """
        check_server(self._address, self._ca)
        app = app or write_app(self._folder / "app")
        config = self._folder / f"run-{secrets.token_hex(8)}.toml"  # others may start runs at the same time
        lines = [f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}" for key, value in run_config.items()]
        config.write_text("\n".join(lines), encoding="utf-8")
        end = time.monotonic() + timeout
        overrides = ["--run-config", str(config)] if run_config else []
        log = _LogStream(follow)
        identity = None
        try:
            log.start("run", str(app.resolve()), _CONNECTION, "--stream", *overrides, **self._place)
            while True:
                ended = log.read()
                started = re.search(r"started run (\d+)", log.text)
                identity = int(started[1]) if started else None
                if ended or time.monotonic() >= end:
                    break
                time.sleep(0.1)
            if identity is None:
                raise RunError(f"the run did not start: {last_lines(log.text)}")
            return self._await_end(identity, end, log)
        except BaseException as error:
            if identity is not None and not isinstance(error, NoAnswerError):
                self._ask("stop", str(identity), _CONNECTION, accepted="")
            raise
        finally:
            log.stop()
            config.unlink()

    def _await_end(self, identity: int, end: float, log: "_LogStream") -> CompletedRun:
        """Follow a run to its end, also through a restart of the SuperLink, which continues its runs."""
        lost, patience = float("inf"), _RESTART_SECONDS
        while True:
            log.read()
            try:
                run = self._ask("ls", _CONNECTION, "--run-id", str(identity))["runs"][0]
            except NoAnswerError as error:
                if lost == float("inf"):
                    patience = _RESTART_SECONDS * load_factor()
                    log.add(f"the SuperLink does not answer; waiting {patience:.0f} s for it")
                lost = min(lost, time.monotonic())
                if time.monotonic() >= min(end, lost + patience):
                    raise NoAnswerError(f"{error}; the list of runs says whether run {identity} went on") from error
                time.sleep(1)
                continue
            if run["status"].startswith("finished"):
                if log.failed:  # what it missed
                    log.start("log", str(identity), _CONNECTION, "--show", **self._place)
                    log.finish()
                traffic = int(run["network-traffic"]["total-bytes"])
                return CompletedRun(identity, run["status"], run["status-details"], log.text, traffic)
            if time.monotonic() >= end:
                raise RunError(f"run {identity} had not ended in time: {last_lines(log.text)}")
            if lost < float("inf") or log.failed:
                lost = float("inf")
                log.add(f"run {identity} goes on")
                log.start("log", str(identity), _CONNECTION, "--stream", **self._place)
            time.sleep(0.5)

    @property
    def _place(self) -> dict[str, Any]:
        return {"cwd": self._folder, "env": self._environment}

    def _ask(self, *arguments: str, accepted: str | None = None) -> Any:
        """Return the JSON answer of a `flwr` command. An error whose message contains `accepted` is returned, too."""
        command = [str(_BIN / "flwr"), *arguments, "--format", "json"]
        what = f"flwr {' '.join(arguments[:2])}"
        return self._checked(_first_object(self._output(command, what))[0], what, accepted)

    def _output(self, command: Sequence[str], what: str) -> str:
        """Run a command and return what it printed, standard output first. Raises RunError if it does not end."""
        check_server(self._address, self._ca)
        seconds = _COMMAND_SECONDS * load_factor()
        try:
            result = subprocess.run(
                command, cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise NoAnswerError(f"{what} had no answer after {seconds:.3g} s") from None
        return result.stdout + result.stderr

    def _checked(self, answer: dict[str, Any], what: str, accepted: str | None = None) -> dict[str, Any]:
        """Return an answer without an error, or with one that contains `accepted`. Raises RunError for others."""
        message = str(answer.get("error-message", ""))
        if answer.get("success") or (accepted is not None and accepted in message):
            return answer
        kind = NoAnswerError if _UNREACHABLE in message else RunError
        raise kind(f"{what} failed: {last_lines(message)}")


def _first_object(text: str) -> tuple[dict[str, Any], str]:
    """Return the JSON object at the start of a text, and what follows it; an error with the text if there is none."""
    text = text.lstrip()
    try:
        answer, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return {"success": False, "error-message": text}, ""
    return answer, text[end:]


class _LogStream:
    """Follows the log of one run with a `flwr` command, which is started again if it loses the SuperLink.

    Attributes:
        text: everything that was printed, each line of the log once.
        failed: the last command did not reach the end of the log.
    """

    def __init__(self, follow: Callable[[str], None]) -> None:
        self._follow, self.text, self.failed = follow, "", False
        self._process: subprocess.Popen[bytes] | None = None
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `stop`
        self._read_bytes, self._line = 0, b""
        self._known: Counter[str] = Counter()

    def start(self, *arguments: str, **place: Any) -> None:
        """Start a command that prints the log from its beginning; lines that were read before are skipped."""
        self.stop()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._read_bytes, self._line = 0, b""
        self._known = Counter(self.text.split("\n"))
        command = [str(_BIN / "flwr"), *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True,
            **place,
        )  # fmt: skip

    def read(self) -> bool:
        """Follow what was printed since the last call -> whether the command ended."""
        assert self._process is not None
        ended = self._process.poll() is not None
        piece = os.pread(self._file.fileno(), 1 << 24, self._read_bytes)
        self._read_bytes += len(piece)
        *lines, self._line = (self._line + piece).split(b"\n")
        if ended and self._line:
            lines, self._line = [*lines, self._line], b""
        for line in lines:
            self.add(line.decode("utf-8", "replace"), known=self._known)
        self.failed = ended and self._process.returncode != 0
        return ended

    def finish(self) -> None:
        """Read to the end of a command that ends by itself."""
        assert self._process is not None
        self._process.wait(_COMMAND_SECONDS * load_factor())
        self.read()

    def add(self, line: str, known: "Counter[str] | None" = None) -> None:
        """Append a line and pass it to `follow`; a line that is in `known` is removed from there instead."""
        if known and known[line] > 0:
            known[line] -= 1
            return
        self.text += line + "\n"
        self._follow(line)

    def stop(self) -> None:
        """End the command."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._file.close()


def last_lines(text: str) -> str:
    """Return the end of a log, on one line."""
    lines = [line.strip("│╭╮╰╯─ ") for line in text.split("\n")]
    return " | ".join([line for line in lines if line][-6:])


app = typer.Typer(
    add_completion=False, help="Command a SuperLink.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback()
def options(
    context: typer.Context,
    address: Annotated[str, typer.Option(help="host:port of the SuperLink")] = "superlink:8000",
    ca: Annotated[Path, typer.Option(help="certificate of its CA")] = Path("/run/secrets/ca.crt"),
    folder: Annotated[Path, typer.Option(help="where this command keeps its files")] = Path("/tmp/control"),
    token: Annotated[Path | None, typer.Option(help="file with the token of a SuperLink that has a login")] = None,
) -> None:
    context.obj = partial(Control, folder, address, ca, token)


@app.command()
def register(context: typer.Context, keys: Annotated[list[Path], typer.Argument(help="public keys, NAME.pub")]) -> None:
    """Admit nodes."""
    control = context.obj()
    for key in keys:
        control.register(key, key.stem)


@app.command()
def nodes(context: typer.Context) -> None:
    """List nodes, as JSON."""
    print(json.dumps(context.obj().nodes(), indent=1))


@app.command()
def runs(context: typer.Context) -> None:
    """List runs, as JSON."""
    print(json.dumps(context.obj().runs(), indent=1))


@app.command()
def run(
    context: typer.Context,
    settings: Annotated[list[str] | None, typer.Argument(help="name=value; overrides the file")] = None,
    app: Annotated[Path | None, typer.Option(help="folder of the Flower app; by default Tofu's, without code")] = None,
    results: Annotated[Path, typer.Option(help="where the server app writes its runs")] = Path("/results"),
    config: Annotated[Path | None, typer.Option(help="TOML file with settings")] = None,
) -> None:
    """Run the app and follow it."""
    values = read_toml(config) if config else {}
    values |= dict(map(_pair, settings or ()))
    run_config = Settings.of(with_stored_settings(values, results)).to_config()
    done = context.obj().run(app, run_config, follow=lambda line: print(line, flush=True))
    if not done.completed:
        raise RunError(f"run {done.identity} {done.status}: {' '.join(done.details.split())}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 with one line on standard error when something failed or was refused."""
    return run_command(app, arguments, "python -m deploy.control")


def with_stored_settings(overrides: Mapping[str, object], results: Path) -> dict[str, object]:
    """Return the given settings; with `resume`, they override those that the run was started with.

    Args:
        results: folder that the path in `resume` is relative to.

    Raises:
        SettingError: the folder of `resume` has no settings.
    """
    given = present_names({name.replace("-", "_"): value for name, value in overrides.items()})
    if not given.get("resume"):
        return dict(given)
    return read_config(results / str(given["resume"])).to_config() | given


def _pair(text: str) -> tuple[str, object]:
    """Split `name=value`; a value that is not TOML is text."""
    import tomllib

    name, _, value = text.partition("=")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value


if __name__ == "__main__":
    sys.exit(main())
