"""What an attacker at the server recovers from each kind of message, by scenario, over seeds.

The exact update is the control: where it does not break, the rest of a scenario proves nothing, and the table says so.
Finished trials are kept in --runs and not repeated. Attacks end by their max_evals, not by the clock, so that a busy
machine finds the same (apart from a limit of an hour per trial).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from attacks.evaluate import SCENARIO_FIELDS, AttackEvaluation, evaluate, finished, summarize, verdicts
from attacks.report import print_tables, write_report
from benchmarks.attacks.membership import membership_rows, print_membership
from benchmarks.common import RESULTS, find_data, run_command, write_results

HOUR = 3600.0
FULL_MESSAGES = (
    "exact", "proxy:smooth:50", "proxy:smooth:100", "proxy:smooth:200", "proxy:paper:50", "proxy:paper:100",
    "proxy:paper:200", "topk:100", "powersgd:100", "signsgd", "dp:8", "dp:1000000", "secure:4", "secure:8",
)  # fmt: skip
CIFAR_MESSAGES = tuple(m for m in FULL_MESSAGES if m not in ("powersgd:100", "dp:1000000", "secure:8"))
PROXIES = tuple(m for m in FULL_MESSAGES if m.startswith(("exact", "proxy")))
SHORT_MESSAGES = ("exact", "proxy:smooth:100", "proxy:paper:100", "topk:100", "dp:8")
IMAGES = ("idlg", "codec-aware", "proxy-images", "label-counts")
STEPS = ("simulation", "codec-aware", "proxy-images", "label-counts")
ALL = ("dlg", "idlg", "inverting", "simulation", "codec-aware", "proxy-images", "label-counts", "label-signs")

QUICK: dict[str, dict[str, Any]] = {
    "digits": {"messages": FULL_MESSAGES, "attacks": IMAGES, "batch_sizes": (1, 4)},
    "digits-trained": {
        "messages": SHORT_MESSAGES,
        "attacks": IMAGES,
        "batch_sizes": (1, 4),
        "pretrain_rounds": (1, 2, 10),
    },
    "digits-steps": {"messages": SHORT_MESSAGES, "attacks": STEPS, "batch_sizes": (1,), "steps": (5, 10)},
    "digits-steps-of-four": {
        "messages": SHORT_MESSAGES[:3],
        "attacks": STEPS[:2],
        "batch_sizes": (4,),
        "steps": (5,),
        "know_labels": True,
    },
    "digits-batches": {"messages": SHORT_MESSAGES[:3], "attacks": IMAGES, "batch_sizes": (8, 16)},
    "cifar10": {"messages": CIFAR_MESSAGES, "attacks": ("idlg", "label-counts"), "batch_sizes": (1, 4)},
    "cifar10-proxies": {"messages": PROXIES, "attacks": ("codec-aware", "proxy-images"), "batch_sizes": (1, 4)},
}
"""Name -> arguments of `AttackEvaluation`. Each but the last, which extends the one before, differs from the others in
a field of the scenario, which identifies its rows. With several steps on four images the attacker knows the labels:
counting them fails there, and no control would break."""

FULL: dict[str, dict[str, Any]] = {
    "digits": {
        "messages": FULL_MESSAGES,
        "attacks": ALL,
        "batch_sizes": (1, 4, 8, 16),
        "pretrain_rounds": (0, 1, 2, 10),
    },
    "digits-steps": {"messages": FULL_MESSAGES, "attacks": STEPS, "batch_sizes": (1, 4, 8, 16), "steps": (5, 10)},
    "cifar10": {"messages": FULL_MESSAGES, "attacks": ALL, "batch_sizes": (1, 4), "pretrain_rounds": (0, 2)},
}

TRIAL_FIELDS = (*SCENARIO_FIELDS, "seed", "message", "attack")
"""Fields that identify a row."""


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"some of {', '.join(QUICK)}; all unless given")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="every attack, batch size and number of rounds before: many hours")
    ] = False,
    seeds: int = 3,
    runs: Annotated[Path, typer.Option(help="folder of the trials")] = Path("runs/benchmark-attacks"),
    time_limit: Annotated[float, typer.Option(help="seconds for each name")] = float("inf"),
    messages: Annotated[str | None, typer.Option(help="only these, separated by commas")] = None,
    no_membership: Annotated[bool, typer.Option("--no-membership", help="without membership inference")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="keep what the last results have and this does not measure")
    ] = False,
) -> None:
    """What an attacker at the server recovers from each kind of message, by scenario, over seeds."""
    torch.set_num_threads(1)
    rows = []
    suite = FULL if full else QUICK
    if unknown := set(names or ()) - set(suite):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: expected some of {', '.join(suite)}")
    for name in names or suite:
        values = suite[name] | {"seeds": seeds, "seconds": HOUR}
        if messages:
            values["messages"] = tuple(messages.split(","))
        data = "digits" if name.startswith("digits") else find_data("cifar10", "uoft-cs/cifar10")
        folder = runs / name
        done = evaluate(AttackEvaluation(dataset=data, **values), folder, seconds=time_limit,
                        log=lambda line: print(line, file=sys.stderr, flush=True))  # fmt: skip
        write_report(done, folder)
        rows += [row | {"dataset": name.partition("-")[0]} for row in finished(done)]
    last = json.loads((RESULTS / "attacks.json").read_text()) if keep else {"rows": [], "settings": {}}
    measured = {tuple(row[key] for key in TRIAL_FIELDS) for row in rows}
    rows = [row for row in last["rows"] if tuple(row[key] for key in TRIAL_FIELDS) not in measured] + rows
    print_tables(rows)
    if no_membership:
        membership = last["settings"].get("membership", [])
    else:
        membership = membership_rows(FULL_MESSAGES, seeds=seeds)
    print_membership(membership)
    shown = [{key: value for key, value in row.items() if key != "images"} for row in rows]
    settings = {
        "seeds": seeds,
        "full": full,
        "kept_from": [last["command"], *last["settings"]["kept_from"]] if keep else [],
        "verdicts": verdicts(rows),
        "summary": summarize(rows),
        "membership": membership,
    }
    write_results("attacks", settings=settings, rows=shown)


if __name__ == "__main__":
    run_command(main)
