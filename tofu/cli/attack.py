"""What each kind of message leaks: `python -m attacks --help`, or `python -m attacks RUN` for a recorded run."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from attacks.evaluate import AttackEvaluation, evaluate
from attacks.recorded import ATTACKS as RECORDED
from attacks.recorded import attack_run
from attacks.registry import ATTACKS
from attacks.report import print_tables, write_report
from tofu.errors import SettingError, TofuError
from tofu.formatting import printable

DEFAULTS = AttackEvaluation()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line -> exit status; what a user can act on takes one line and status 2."""
    try:
        return _run(_parsed(arguments))
    except TofuError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    say = (lambda line: None) if options.quiet else (lambda line: print(printable(line), file=sys.stderr, flush=True))
    if options.run is not None:
        folder = options.folder or options.run / "attacks"
        attacks = RECORDED if options.attacks is None else tuple(options.attacks.split(","))
        rows = attack_run(options.run, folder, attacks=attacks, seconds=options.seconds, say=say)
    else:
        folder = options.folder or Path("runs/attacks")
        rows = evaluate(_evaluation(options), folder, say=say, seconds=options.time_limit)
    page = write_report(rows, folder)
    if options.json:
        print(json.dumps(rows))
    else:
        print_tables(rows)
        print(f"\nreport: {page}")
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m attacks", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run with recorded clients, to attack that")
    parser.add_argument("--folder", type=Path, help="for the results; finished cells in it are not run again")
    for field in dataclasses.fields(AttackEvaluation):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", help="tell the attacker the labels")
        elif isinstance(default, tuple):
            text = ",".join(map(str, default))
            more = f" of {', '.join(ATTACKS)}" if field.name == "attacks" else ""
            parser.add_argument(flag, help=f"separated by commas{more} [default: {text}]")
        else:
            parser.add_argument(flag, type=type(default), default=default, help=f"[default: {default}]")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which no cell begins")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser.parse_args(arguments)


def _evaluation(options: argparse.Namespace) -> AttackEvaluation:
    values: dict[str, object] = {}
    for field in dataclasses.fields(AttackEvaluation):
        given = getattr(options, field.name)
        if isinstance(field.default, tuple):
            given = field.default if given is None else _listed(field.name, given, type(field.default[0]))
        values[field.name] = given
    return AttackEvaluation(**values)  # type: ignore[arg-type]


def _listed(name: str, text: str, kind: type) -> tuple[object, ...]:
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise SettingError(name, text, "whole numbers separated by commas") from error


if __name__ == "__main__":
    sys.exit(main())
