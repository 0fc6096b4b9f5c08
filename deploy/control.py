"""The operator's side: register nodes, start runs, follow them, over a SuperLink's Control API.

That API has no login: who reaches its port can run code on every node. deploy/processes.py uses the class, and
deploy/compose.yaml the command `python -m deploy.control`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.topology import ENVIRONMENT
from tofu.errors import RunError, TofuError
from tofu.settings import Settings, Value, read_toml

_CONNECTION = "tofu"
_BIN = Path(sys.executable).parent
_COMMAND_SECONDS = 90.0
_RESTART_SECONDS = 120.0
_KEY_IN_USE = "[code: 23]"
_UNREACHABLE = "Connection to the SuperLink is unavailable"


@dataclass(frozen=True)
class CompletedRun:
    """A run that ended.

    Attributes:
        status: as Flower says it: finished:completed, finished:failed or finished:stopped.
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
        folder: for this side's own files, which is made if it is not there; also the commands' working directory.
        address: host:port of the SuperLink.
        ca: certificate of the CA that signed its certificate.
    """

    def __init__(self, folder: Path, address: str, ca: Path) -> None:
        self._folder = folder.resolve()
        home = self._folder / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f"[superlink.{_CONNECTION}]\naddress = {json.dumps(address)}\n"
            f"root-certificates = {json.dumps(str(ca.resolve()))}\n"
        )
        self._environment = os.environ | ENVIRONMENT | {"FLWR_HOME": str(home)}

    def register(self, key: Path, name: str) -> str:
        """Admit the node that has the private half of this public key. A key that is admitted already stays so.

        Returns:
            The node's id; empty where the key was admitted before.

        Raises:
            RunError: the SuperLink cannot be reached, or refuses.
        """
        arguments = ("supernode", "register", str(key.resolve()), _CONNECTION, "--name", name)
        return str(self._ask(*arguments, accepted=_KEY_IN_USE).get("node-id", ""))

    def nodes(self) -> list[dict[str, Any]]:
        """The registered nodes as Flower lists them, with `node-id` and `status`: registered, online or offline."""
        return list(self._ask("supernode", "list", _CONNECTION)["nodes"])

    def runs(self) -> list[dict[str, Any]]:
        """All runs as Flower lists them, with `run-id` and `status`."""
        return list(self._ask("ls", _CONNECTION)["runs"])

    def run(
        self,
        app: Path,
        run_config: Mapping[str, Value],
        *,
        timeout: float = float("inf"),
        follow: Callable[[str], None] = lambda line: None,
    ) -> CompletedRun:
        """Run the app and wait for its end, whether it completes or fails. A run that is interrupted is stopped.

        Args:
            app: folder of the Flower app.
            run_config: overrides of keys in the app's `[tool.flwr.app.config]`.
            timeout: seconds, after which the run is stopped.
            follow: is given each line that the server app prints.

        Raises:
            RunError: the run could not be started, or had not ended in time.
        """
        config = self._folder / "run.toml"
        lines = [f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}" for key, value in run_config.items()]
        config.write_text("\n".join(lines), encoding="utf-8")
        end = time.monotonic() + timeout
        overrides = ["--run-config", str(config)] if run_config else []
        path = self._folder / "run.log"
        command = [str(_BIN / "flwr"), "run", str(app.resolve()), _CONNECTION, "--stream", *overrides]
        identity = None
        with path.open("wb") as log, path.open(encoding="utf-8", errors="replace") as seen:
            stream = subprocess.Popen(
                command, cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            text = line = ""
            try:
                while True:
                    ended = stream.poll() is not None
                    piece = seen.read()
                    text += piece
                    *lines, line = (line + piece).split("\n")
                    for complete in lines:
                        follow(complete)
                    started = re.search(r"started run (\d+)", text)
                    identity = int(started[1]) if started else None
                    if ended or time.monotonic() >= end:
                        break
                    time.sleep(0.1)
                if line:
                    follow(line)
                if identity is not None and stream.returncode:
                    follow(f"the log of run {identity} broke off; waiting for the run's end")
                if identity is None:
                    raise RunError(f"the run did not start: {last_lines(text)}")
                return self._await_end(identity, end, text)
            except BaseException:
                if identity is not None:
                    self._ask("stop", str(identity), _CONNECTION, accepted="")
                raise
            finally:
                if stream.poll() is None:
                    stream.kill()
                    stream.wait()

    def _await_end(self, identity: int, end: float, log: str) -> CompletedRun:
        lost = float("inf")
        while True:
            try:
                run = self._ask("ls", _CONNECTION, "--run-id", str(identity))["runs"][0]
            except RunError as error:
                # A SuperLink that is started again goes on with its runs.
                lost = min(lost, time.monotonic())
                if _UNREACHABLE not in str(error) or time.monotonic() >= min(end, lost + _RESTART_SECONDS):
                    raise
                time.sleep(1)
                continue
            lost = float("inf")
            if run["status"].startswith("finished"):
                traffic = int(run["network-traffic"]["total-bytes"])
                return CompletedRun(identity, run["status"], run["status-details"], log, traffic)
            if time.monotonic() >= end:
                raise RunError(f"run {identity} had not ended in time: {last_lines(log)}")
            time.sleep(0.5)

    def _ask(self, *arguments: str, accepted: str | None = None) -> Any:
        """The answer of a `flwr` command; a refusal that contains `accepted` is one too."""
        command = [str(_BIN / "flwr"), *arguments, "--format", "json"]
        what = f"flwr {' '.join(arguments[:2])}"
        try:
            result = subprocess.run(
                command, cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, timeout=_COMMAND_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RunError(f"{what} had no answer after {_COMMAND_SECONDS:g} s") from None
        try:
            answer = json.loads(result.stdout)
        except json.JSONDecodeError:
            answer = {"success": False, "error-message": result.stdout + result.stderr}
        message = str(answer.get("error-message", ""))
        if answer.get("success") or (accepted is not None and accepted in message):
            return answer
        raise RunError(f"{what} failed: {last_lines(message)}")


def last_lines(text: str) -> str:
    """The end of a log, on one line."""
    lines = [line.strip("│╭╮╰╯─ ") for line in text.split("\n")]
    return " | ".join([line for line in lines if line][-6:])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 with one line on standard error when something failed or was refused."""
    parser = argparse.ArgumentParser(prog="python -m deploy.control", description="Command a SuperLink.")
    parser.add_argument("--address", default="superlink:8000", help="host:port of the SuperLink")
    parser.add_argument("--ca", type=Path, default=Path("/run/secrets/ca.crt"), help="certificate of its CA")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/control"), help="where this command keeps its files")
    commands = parser.add_subparsers(dest="command", required=True)
    register = commands.add_parser("register", help="admit nodes")
    register.add_argument("keys", type=Path, nargs="+", help="public keys, NAME.pub")
    commands.add_parser("nodes", help="list nodes, as JSON")
    commands.add_parser("runs", help="list runs, as JSON")
    run = commands.add_parser("run", help="run the app and follow it")
    run.add_argument("--app", type=Path, default=Path("."), help="folder of the Flower app")
    run.add_argument("--config", type=Path, help="TOML file with settings")
    run.add_argument("settings", nargs="*", help="name=value, over the file's")
    given = parser.parse_args(arguments)
    try:
        control = Control(given.folder, given.address, given.ca)
        if given.command == "register":
            for key in given.keys:
                control.register(key, key.stem)
        elif given.command == "run":
            values = read_toml(given.config) if given.config else {}
            values |= dict(map(_pair, given.settings))
            settings = Settings.of({name.replace("-", "_"): value for name, value in values.items()})
            done = control.run(given.app, settings.to_config(), follow=lambda line: print(line, flush=True))
            if not done.completed:
                raise RunError(f"run {done.identity} {done.status}: {' '.join(done.details.split())}")
        else:
            print(json.dumps(control.nodes() if given.command == "nodes" else control.runs(), indent=1))
    except TofuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _pair(text: str) -> tuple[str, object]:
    """`name=value` with the value as TOML has it, or as text where it is not TOML."""
    import tomllib

    name, _, value = text.partition("=")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value


if __name__ == "__main__":
    sys.exit(main())
