"""`tofu deploy`: a federation in the background, for machines without containers.

Everything listens on 127.0.0.1 only. This module and the supervisor do not import torch, which takes seconds.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deploy.app_folder import write_app
from deploy.control import CompletedRun, Control, last_lines
from deploy.patience import load_factor
from deploy.pinned import INSTALLED
from deploy.processes import missing_commands, read_names
from deploy.state import Process, State, end_group
from deploy.superlink import CONTROL_TOKEN
from tofu.errors import RunError, SettingError
from tofu.imports import MODULES, check_module
from tofu.log import FILE
from tofu.reporting.run_settings import check_new, check_resumed, read_config
from tofu.settings import Settings
from tofu.settings.datasets import check_dataset
from tofu.settings.deprecated import present_names

_STOP_SECONDS = 40.0
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_CHATTER = re.compile(r"(INFO|DEBUG) *:|Using SuperLink: |Successfully installed |\s*$")
"""Beginnings of the lines that Flower writes about a run."""
_STARTED = re.compile(r"Successfully started run (\d+)")
_ERROR = "error: "
_RAISED = "ServerApp failed with exception: "
"""The beginning of a failed run's details."""


def up(
    folder: Path,
    *,
    nodes: int,
    app: Path | None = None,
    data: Path | None = None,
    warm: bool = True,
    identities: bool = False,
    policy: Path | None = None,
    timeout: float = 120.0,
    follow: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Start a federation that outlives this process, and wait until all its nodes are online.

    Args:
        folder: for keys, logs, database and results. The keys and results of an earlier federation in it are kept.
        app: folder of the Flower app; by default Tofu's own. The nodes accept the bundle of its present content only.
        nodes, data, warm, identities, policy: see `LocalCluster`.
        timeout: seconds within which all nodes must be online, times the load of the machine (`load_factor`).
        follow: called with a line whenever more nodes are online.

    Returns:
        What `status` returns.

    Raises:
        SettingError: the folder, the app or the data cannot be used.
        RunError: the federation did not start; none of its processes is left running.
    """
    _check_arguments(nodes, app, data, policy)
    folder = folder.resolve()
    before = State.read(folder)
    if before is not None and before.alive:
        raise SettingError("folder", str(folder), "one without a running federation (`tofu deploy down` ends it)")
    try:
        (folder / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written before the supervisor starts, so that an old state is not taken for its own.
        State("starting", Process(0, "")).write(folder)
        app_is_ours, app = app is None, app or write_app(folder / "app")
        log = (folder / "logs" / "supervisor.log").open("ab")
    except OSError as error:
        raise SettingError("folder", str(folder), f"a folder that can be written ({error.strerror})") from error
    paths = {"--app": app, "--data": data, "--policy": policy}.items()
    given = [str(part) for flag, path in paths if path is not None for part in (flag, path.resolve())]
    flags = [flag for flag, wanted in {"--warm": warm, "--identities": identities}.items() if wanted]
    command = [
        sys.executable, "-m", "deploy.supervisor", str(folder), "--nodes", str(nodes), *given, *flags,
        "--pinned", INSTALLED if app_is_ours else pin_of(app),
    ]  # fmt: skip
    with log:
        supervisor = subprocess.Popen(
            command, cwd=folder, env=_environment(folder), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        _await(folder, supervisor, timeout, follow)
    except BaseException:
        supervisor.terminate()
        supervisor.wait()
        raise
    return status(folder)


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of the processes. They run in `folder`; the user's modules are in the current one."""
    own = {FILE: str(folder / "logs" / "supervisor.jsonl"), MODULES: os.environ.get(MODULES, os.getcwd())}
    return os.environ | own


def _check_arguments(nodes: int, app: Path | None, data: Path | None, policy: Path | None) -> None:
    """Raises SettingError if `up` cannot use one of its arguments, and RunError if a command of Flower is missing."""
    if missing := missing_commands():
        raise RunError(f"{missing[0]} is missing: pip install --force-reinstall --no-deps flwr, in this environment")
    if nodes < 1:
        raise SettingError("nodes", nodes, "at least 1")
    if app is not None and not (app / "pyproject.toml").is_file():
        raise SettingError("app", str(app), "a folder with the pyproject.toml of a Flower app")
    if data is not None and not data.is_dir():
        raise SettingError("data", str(data), "a folder (it does not exist)")
    for name in (f"node-{node}" for node in range(nodes)):
        if data is not None and not (data / name).is_dir():
            raise SettingError("data", str(data), f"a folder that has the folder {name}")
    if policy is not None:
        from tofu.flower.policy import read_policy

        read_policy(policy)


def pin_of(app: Path) -> str:
    """Return the SHA-256 sum of the bundle that `flwr run` builds from an app's folder, in hexadecimal.

    Raises:
        SettingError: Flower cannot build a bundle.
    """
    import typer
    from flwr.cli.build import build_fab_from_disk

    try:
        built: Any = build_fab_from_disk(app)
    except (OSError, ValueError, typer.Exit) as error:
        raise SettingError("app", str(app), f"a folder that flwr build accepts ({error or 'see above'})") from error
    return hashlib.sha256(built if isinstance(built, bytes) else built[0]).hexdigest()


def _await(folder: Path, supervisor: "subprocess.Popen[bytes]", timeout: float, follow: Callable[[str], None]) -> None:
    began, reported, count = time.monotonic(), -1, "no nodes"
    while time.monotonic() - began < timeout * load_factor():
        state = State.read(folder)
        if supervisor.poll() is not None or state is None:
            said = (folder / "logs" / "supervisor.log").read_text(encoding="utf-8", errors="replace")
            reason = state.error if state is not None and state.error else last_lines(said)
            raise RunError(f"the federation did not start: {reason}")
        if state.phase == "running":
            found = online(folder, state)
            count = f"{found} of {state.nodes} nodes"
            if found > reported:
                follow(f"{count} online")
                reported = found
            if found >= state.nodes:
                return
        time.sleep(0.5)
    passed = time.monotonic() - began
    raise RunError(f"{count} were online after {passed:.0f} s: a slow machine needs --timeout; see {folder / 'logs'}")


def status(folder: Path) -> dict[str, Any]:
    """Return the state of processes, nodes and runs, as JSON values.

    The key `error` is present if the SuperLink runs but does not answer.

    Raises:
        SettingError: no federation was ever started in this folder.
    """
    folder = folder.resolve()
    state = _state(folder)
    named = {"supervisor": state.supervisor} | state.members
    result: dict[str, Any] = {
        "folder": str(folder),
        "phase": state.phase if state.alive or state.phase in ("stopped", "failed") else "gone",
        "address": state.address,
        "processes": [
            {"name": name, "pid": process.pid, "alive": process.alive, "restarts": process.restarts}
            for name, process in named.items()
        ],
        "nodes": [],
        "runs": [],
    }
    if "superlink" in state.alive:
        control, names = _control(folder, state), read_names(folder)
        try:
            nodes, runs = control.overview("nodes", "runs")
            result["nodes"] = [
                {
                    "name": names.get(node["node-id"], node["node-id"]),
                    "node": node["node-id"],  # as logs and metrics call it
                    "status": node["status"],
                }
                for node in nodes
            ]
            result["runs"] = [{"run": run["run-id"], "status": run["status"]} for run in runs]
        except RunError as error:  # the SuperLink starts or hangs: the processes are still reported
            result["error"] = str(error)
    return result


def online(folder: Path, state: State) -> int:
    """Return the number of nodes that are online."""
    return sum(node["status"] == "online" for node in _control(folder, state).overview("nodes")[0])


def run(folder: Path, overrides: Mapping[str, object], *, follow: Callable[[str], None]) -> tuple[CompletedRun, Path]:
    """Run the app on a federation and follow it to its end.

    Args:
        overrides: settings by name. By default `clients` is the number of nodes and `secure-identities` the list of
            their keys; with `resume`, all other settings are those that the run was started with.
        follow: called with each line that the server app prints.

    Returns:
        The run and the folder of its results.

    Raises:
        SettingError: a setting is not usable, or no federation runs in the folder.
        RunError: the run failed; the results of its finished rounds are kept.
    """
    folder = folder.resolve()
    state = _state(folder)
    if state.phase != "running" or "superlink" not in state.alive:
        raise SettingError("folder", str(folder), "one in which a federation runs (`tofu deploy up` starts one)")
    own: dict[str, object] = {"clients": state.nodes, "secure-identities": state.identities}
    if resumed := overrides.get("resume"):
        own = dict(read_config(Path(str(resumed))).to_config())
    settings = Settings.of(own | present_names(overrides))
    _check_run(folder, state, settings)
    count = sum(1 for _ in (folder / "runs").glob("run-*"))
    results = Path(settings.run.resume or settings.run.run_folder or folder / "runs" / f"run-{count + 1}").resolve()
    dataset, known = Path(settings.data.dataset), settings.secure.secure_identities
    # The apps run in another folder than this command.
    settings = settings.replace(
        run_folder=str(results),
        resume=str(results) if settings.run.resume else "",
        secure_identities=str(Path(known).resolve()) if known else "",
        dataset=str(dataset.resolve()) if dataset.is_dir() else settings.data.dataset,
    )
    named = partial(name_nodes, read_names(folder), folder / "logs")
    view = RunLines(lambda line: follow(named(line)))
    done = _control(folder, state).run(Path(state.app), settings.to_config(), follow=view.add)
    reason = " ".join(done.details.split()).removeprefix(_RAISED) or last_lines(done.log)
    view.end("" if done.completed else reason)
    if not done.completed:
        raise RunError(f"run {done.identity} {done.status.removeprefix('finished:')}: {named(reason)}")
    return done, results


def _check_run(folder: Path, state: State, settings: Settings) -> None:
    """Refuse what this machine, which is the server's, knows to be unusable before a run is started.

    Only our own app is known to read datasets and models as `tofu run` does.

    Raises:
        SettingError: the dataset or the model does not exist, or the run folder cannot be used.
    """
    if Path(state.app) == folder / "app":
        check_dataset(settings.data)
        _check_model(settings.model.model, settings.data.kind)
    if settings.run.resume:
        check_resumed(settings)
    elif settings.run.run_folder:
        check_new(Path(settings.run.run_folder))


def _check_model(name: str, kind: str) -> None:
    """Raises SettingError for a user's model whose module is found here, but which it lacks or cannot build."""
    if ":" not in name:
        return
    with suppress(ModuleNotFoundError):  # the apps may find it: `up` may have been started elsewhere
        check_module(name)
        from tofu.models import check_factory

        check_factory(name, kind)


class RunLines:
    """Passes on the lines of a run without those that Flower writes about itself.

    A line that starts with "error: " waits for the end: the command's own error has the same text.
    """

    def __init__(self, follow: Callable[[str], None]) -> None:
        self._follow, self._errors = follow, list[str]()

    def add(self, line: str) -> None:
        """Take the next line."""
        line = _COLOR.sub("", line)
        if started := _STARTED.match(line):
            self._follow(f"run {started[1]} started")
        elif line.startswith(_ERROR):
            self._errors.append(line)
        elif not _CHATTER.match(line):
            self._follow(line)

    def end(self, reason: str) -> None:
        """Pass on the errors that are not in the reason for which the run failed; "" if it did not."""
        for line in self._errors:
            if " ".join(line.removeprefix(_ERROR).split()) not in reason:
                self._follow(line)


def name_nodes(names: Mapping[str, str], logs: Path, text: str) -> str:
    """Return a line of the server app with the names of nodes before their ids, and the file of a log that it names.

    Client 0 is the one of node-0: partition ids are given in the order of the nodes. A line about several clients, or
    about none that is known, gets the folder of the logs.

    Args:
        names: node id -> name.
        logs: folder of the federation's logs.

    Example:
        >>> name_nodes({"7": "node-0"}, Path("F/logs"), "node 7 cannot take part: see its log")
        'node-0 (node 7) cannot take part: see its log F/logs/node-0-exec.log'
    """
    about = {names.get(node, "") for node in re.findall(r"\b(?:node|client) (\d+)\b", text)}
    about |= {f"node-{client}" for client in re.findall(r"\bclient (\d+)\b", text)}
    about &= set(names.values())
    log = f"see its log {logs / f'{about.pop()}-exec.log'}" if len(about) == 1 else f"see its log in {logs}"
    text = re.sub(
        r"\bnode (\d+)\b", lambda found: f"{names[found[1]]} ({found[0]})" if found[1] in names else found[0], text
    )
    return text.replace("see its log", log)


def down(folder: Path) -> list[str]:
    """End the federation's processes, including those that a killed supervisor left behind.

    Returns:
        Names of the processes that were ended.

    Raises:
        SettingError: no federation was ever started in this folder.
        RunError: a process could not be ended.
    """
    folder = folder.resolve()
    state = _state(folder)
    ended = state.alive
    end_group(state.supervisor, seconds=_STOP_SECONDS)
    state = _state(folder)
    # What a killed supervisor left behind. Nodes are ended first, as in `LocalCluster.stop`.
    for name in sorted(state.alive, key=lambda name: name.startswith("superlink")):
        end_group(state.members[name], seconds=10)
    if state.alive:
        raise RunError(f"still running: {', '.join(state.alive)}")
    replace(state, phase="stopped", members={}).write(folder)
    return ended


def summary(done: CompletedRun, results: Path) -> dict[str, Any]:
    """Return the summary of a completed run, with Flower's run id and number of bytes."""
    file = results / "summary.json"
    own = json.loads(file.read_text()) if file.is_file() else {}
    return {**own, "flower_run": done.identity, "traffic_bytes": done.traffic_bytes, "run": str(results)}


def _state(folder: Path) -> State:
    state = State.read(folder)
    if state is None:
        raise SettingError("folder", str(folder), "one in which `tofu deploy up` started a federation")
    return state


def _control(folder: Path, state: State) -> Control:
    token = folder / "keys" / CONTROL_TOKEN
    return Control(folder / "homes", state.address, folder / "keys" / "ca.crt", token if token.exists() else None)
