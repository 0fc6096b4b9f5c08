"""The source files that one update enters: from a client's local training to the server's new global weights.

    python -m benchmarks.update_path proxy
    python -m benchmarks.update_path secure

Traces the functions that are called in the second round of a small run, so imports and what only the first round does
do not count. The trace begins when the round's last client starts to train and ends when the global model has been
stepped: encoding, both messages, decoding, aggregation and the server's step, without the evaluation and the records.
"""

import contextlib
import os
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Annotated, Any

import typer

from benchmarks.common import run_command

ROOT = Path(__file__).parents[1]
FOLDERS = ("tofu", "client", "server", "attacks", "deploy")
ROUND = 2
RUN = ("--clients", "3", "--rounds", "2", "--local-epochs", "1", "--train-images", "300", "--workers", "1", "--quiet")
KINDS = {"proxy": ("--ratio", "30"), "secure": ("--schedule", "secure")}


def update_path(kind: str) -> dict[str, set[str]]:
    """File -> qualified names of its functions that an update of round 2 calls. Ends the process's own tracing."""
    from client.local_round import LocalRound
    from server.global_model import GlobalModel
    from tofu.cli import main as tofu

    begin, end = LocalRound.train.__code__, GlobalModel.step.__code__
    found: dict[str, set[str]] = defaultdict(set)
    round_, tracing = 0, False

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal round_, tracing
        code: CodeType = frame.f_code
        if event == "return" and code is end:
            tracing = False
        if event != "call":
            return
        if code is begin:
            round_ = frame.f_locals["self"].round
            tracing = round_ == ROUND
            found.clear()
        if tracing and code.co_name != "<module>" and code.co_filename in files:
            found[files[code.co_filename]].add(code.co_qualname)

    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    files = {str(path): path.relative_to(ROOT).as_posix() for path in paths}
    threading.setprofile(trace)
    sys.setprofile(trace)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        sys.argv = ["tofu", "run", *RUN, *KINDS[kind], "--run-folder", os.path.join(folder, "run")]
        with contextlib.suppress(SystemExit):
            tofu()
    sys.setprofile(None)
    threading.setprofile(None)
    if not found:
        raise RuntimeError(f"round {ROUND} of the {kind} run did not take place")
    return dict(found)


def main(
    kind: Annotated[str, typer.Argument(help="kind of the rounds: proxy or secure")] = "proxy",
    functions: Annotated[bool, typer.Option(help="also list the functions")] = False,
) -> None:
    """Print the number of source files that one update enters, and their names."""
    if kind not in KINDS:
        raise typer.BadParameter(f"expected one of {', '.join(KINDS)}")
    found = update_path(kind)
    print(f"{len(found)} files in a {kind} round")
    for file in sorted(found):
        print(f"  {file}: {', '.join(sorted(found[file]))}" if functions else f"  {file}")


if __name__ == "__main__":
    run_command(main)
