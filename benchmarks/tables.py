"""Write the tables of the documentation again from benchmarks/results: python -m benchmarks.tables [--check].

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->` in README.md or a page of docs/; NAME is a key
of TABLES. With --check nothing is written, and the exit status is 1 if a table is not current.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import typer

from benchmarks import audit, audit_trained, central_dp, correlated, current_rivals, paper, published
from benchmarks.coding.__main__ import where_bytes_go
from benchmarks.common import RESULTS, markdown_table, run_command, spread
from benchmarks.error_feedback import sampled
from benchmarks.error_feedback.__main__ import (
    RATIOS,
    TUNED,
    VARIANTS,
    Table,
    ablation,
    best,
    bodies,
    comparison,
    default,
    splits,
    steps,
    thresholds,
    tuned_steps,
    tuning,
    variants,
)
from benchmarks.flower_apps.__main__ import HEADER as FLOWER_APPS
from benchmarks.flower_apps.__main__ import by_variant
from benchmarks.latency.__main__ import HEADER as LATENCY
from benchmarks.latency.__main__ import table_rows as latency_rows
from benchmarks.plugins.tables import PLUGIN_TABLES
from benchmarks.rivals import temporal
from benchmarks.robust.__main__ import ATTACKS, BACKDOORS
from benchmarks.speed.__main__ import HEADER as SPEED
from benchmarks.speed.__main__ import table_rows as speed_rows
from tofu.formatting import format_bytes

ROOT = RESULTS.parents[1]
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n\n)(?P<table>.*?)(\n\n<!-- end of table -->)", re.DOTALL)
NAMES = {
    "full": "FedAvg", "proxy": "proxies + correction", "stc": "STC", "topk": "top-k", "powersgd": "PowerSGD",
    "eden": "EDEN", "qsgd": "QSGD",
}  # fmt: skip
"""Compressors as `benchmarks.rivals` stores them -> as the tables name them. Its runs search for proxies in every
message, with plain error feedback and a server's step of 1, which is not the default any more."""

LEAD = "proxies ahead of the best rival, by seed"

Rows = list[dict[str, Any]]


def main(
    check: Annotated[
        bool, typer.Option("--check", help="write nothing; exit with 1 if a table is not current")
    ] = False,
) -> None:
    """Write the tables of the documentation again from benchmarks/results: python -m benchmarks.tables [--check]."""
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        old = page.read_text(encoding="utf-8")
        new = MARKED.sub(lambda found: found[1] + TABLES[found["name"]]() + found[4], old)
        if new != old:
            stale.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(new, encoding="utf-8")
    print("\n".join(stale) or "all tables are current")
    sys.exit(1 if check and stale else 0)


def accuracies(name: str, compressor: str, ratio: float | None) -> list[float]:
    """Final test accuracy in % by seed, of the runs of results/rivals-NAME.json; FedAvg has no ratio."""
    runs = read(f"rivals-{name}")["runs"]
    chosen = [run for run in runs if run["compressor"] == compressor and (ratio is None or run["ratio"] == ratio)]
    return [100 * run["final_accuracy"] for run in sorted(chosen, key=lambda run: run["seed"])]


def read(name: str) -> dict[str, Any]:
    """A file of benchmarks/results."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def rivals_row(name: str, ratio: float, compressors: Sequence[str], earlier: str = "") -> list[str]:
    """Accuracy by compressor, the largest mean in bold; those that `name` lacks are of the file `earlier`."""
    values = [accuracies(name, c, ratio) or accuracies(earlier, c, ratio) for c in compressors]
    best = max(values, key=statistics.fmean)
    return [f"**{spread(one, 2)}**" if one is best else spread(one, 2) for one in values]


def lead(name: str, ratio: float, compressors: Sequence[str]) -> str:
    """By how many points proxies are ahead of the rival with the best mean, by seed."""
    best = max((accuracies(name, c, ratio) for c in compressors if c != "proxy"), key=statistics.fmean)
    return spread([a - b for a, b in zip(accuracies(name, "proxy", ratio), best, strict=True)], 2)


def readme() -> str:
    """The default beside FedAvg, its correction alone and STC at their best settings."""
    found, rows = read("error-feedback")["rows"], []
    for data, task in (("MNIST", "mnist"), ("MNIST, 10 of 100", "mnist-100"), ("CIFAR-10", "cifar10")):
        for ratio in sorted(RATIOS[task]):
            cells = [best(found, task, method, ratio)[1] for method in ("fedavg", "correction", "proxies", "stc")]
            values = [cells[0], default(found, task, ratio), *cells[1:]]
            rows.append([f"{data}, {ratio:,}x", *(spread(value, 1) if value else "not run" for value in values)])
    head = ("data, payload ratio", "FedAvg", "default", "correction alone", "proxies alone", "STC")
    return markdown_table(head, rows)


def federated() -> str:
    """FedAvg and hybrid training, of results/federated-*.json."""
    rows = []
    for data, name in (("MNIST", "mnist"), ("CIFAR-10", "cifar10")):
        runs: Rows = read(f"federated-{name}")["rows"]
        fedavg = [run["final_accuracy"] for run in runs if run["method"] == "FedAvg"]
        for method, title in (("FedAvg", "FedAvg"), ("hybrid", "hybrid (last round secure)")):
            mine = [run for run in runs if run["method"] == method]
            lost = [100 * (f - run["final_accuracy"]) for f, run in zip(fedavg, mine, strict=True)]
            uplink = format_bytes(round(statistics.fmean(run["uplink_bytes"] for run in mine)))
            rows.append(
                [
                    data, title, spread([100 * run["final_accuracy"] for run in mine], 2),
                    "" if method == "FedAvg" else spread(lost, 2), uplink,
                    f"{statistics.fmean(run['uplink_ratio'] for run in mine):.1f}x",
                ]
            )  # fmt: skip
    return markdown_table(("data", "method", "test accuracy, %", "points lost", "uplink", "less than FedAvg"), rows)


def rivals_mnist() -> str:
    compressors = ("proxy", "stc", "topk", "powersgd", "eden", "qsgd")
    rows = [[f"{ratio}x", *rivals_row("mnist", ratio, compressors, "mnist-earlier")] for ratio in (50, 200, 500)]
    return markdown_table(("payload ratio", *(NAMES[c] for c in compressors)), rows)


def rivals_skew() -> str:
    rows, methods = [], ("proxy", "stc", "topk")
    for title, name, ratio in (
        ("Dirichlet 0.1", "mnist-alpha-0.1", 500), ("Dirichlet 0.3", "mnist-alpha-0.3", 500),
        ("Dirichlet 1", "mnist-alpha-1.0", 500), ("Dirichlet 10", "mnist-alpha-10.0", 500),
        ("10 of 100", "mnist-100", 200),
    ):  # fmt: skip
        fedavg = spread(accuracies(name, "full", None), 2)
        rows.append([title, fedavg, *rivals_row(name, ratio, methods), lead(name, ratio, methods)])
    return markdown_table(("setting", "FedAvg", *(NAMES[name] for name in methods), LEAD), rows)


def rivals_cifar10(name: str, compressors: Sequence[str]) -> str:
    rows = [
        [f"{ratio}x", *rivals_row(name, ratio, compressors), lead(name, ratio, compressors)] for ratio in (50, 200, 500)
    ]
    header = ("payload ratio", *(NAMES[c] for c in compressors), LEAD)
    return markdown_table(header, rows)


def rivals_vgg13() -> str:
    """One device that trains VGG13 at 65x, of results/rivals-cifar10-vgg13-small.json."""
    name, rows, methods = "cifar10-vgg13-small", [], ("proxy", "powersgd", "stc")
    fedavg, proxies = accuracies(name, "full", None), accuracies(name, "proxy", 65.0)
    shown = [spread(fedavg, 2), *rivals_row(name, 65.0, methods)]
    for compressor, accuracy in zip(("full", *methods), shown, strict=True):
        mine = [run for run in read(f"rivals-{name}")["runs"] if run["compressor"] == compressor]
        found = accuracies(name, compressor, None)
        lost, ahead = ([a - b for a, b in zip(one, found, strict=True)] for one in (fedavg, proxies))
        sent = f" (sends {statistics.fmean(run['payload_ratio'] for run in mine):.0f}x)" if compressor == "stc" else ""
        rows.append(
            [
                NAMES[compressor] + sent,
                accuracy,
                "" if compressor == "full" else spread(lost, 2),
                format_bytes(round(statistics.fmean(run["uplink_bytes"] for run in mine))),
                spread(ahead, 2) if compressor in methods[1:] else "",
            ]
        )
    head = ("one device, VGG13, 65x", "test accuracy, %", "points lost", "uplink", "proxies are ahead by, by seed")
    return markdown_table(head, rows)


def classes() -> str:
    """What coding positions by class adds, of results/classes.json."""
    measured: Rows = read("classes")["rows"]
    rows = []
    for round_ in (2, 12):
        for method in ("STC", "correction alone", "proxies and correction"):
            seeds = [
                [row for row in measured if (row["round"], row["method"], row["seed"]) == (round_, method, seed)]
                for seed in sorted({row["seed"] for row in measured})
            ]
            cells = [
                spread([statistics.fmean(row[field] for row in seed) for seed in seeds], digits)
                if all(field in row for seed in seeds for row in seed)
                else ""
                for field, digits in (("entries", 0), ("bits", 2), ("explained_variance", 2))
            ]
            rows.append([str(round_), method, *cells])
    return markdown_table(("round", "payload", "entries", "bits a position", "explained variance"), rows)


def codec() -> str:
    """What each part of the codec adds, of results/codec.json."""
    measured: Rows = read("codec")["rows"]
    rows = []
    for variant, title in (
        ("smooth (default)", "smooth mode, 8 bits"), ("4 bits", "smooth mode, 4 bits"),
        ("without the twin, Adam", "without the smooth surrogate (Adam)"),
        ("labels on the simplex", "labels on the simplex"), ("one scale", "one scale"),
        ("Adam in place of L-BFGS", "Adam instead of L-BFGS"), ("paper mode", "paper mode"),
        ("paper mode, 1000 evaluations, no early stop", "paper mode, 1,000 evaluations"),
    ):  # fmt: skip
        found = {(row["case"], row["wanted_ratio"]): row for row in measured if row["variant"] == variant}
        cases = [(case, ratio) for case in ("early", "late") for ratio in (64.0, 250.0)]
        times = found["early", 64.0]["seconds_over_epoch"]
        rows.append([title, *(spread(found[case]["cosine"]) for case in cases), f"{statistics.fmean(times):.2f}"])
    return markdown_table(("", "early, 64x", "early, 250x", "late, 64x", "late, 250x", "time / epoch"), rows)


def error_feedback(made: Callable[..., Table], *task: str) -> str:
    """A table of `benchmarks.error_feedback`."""
    return markdown_table(*made(read("error-feedback")["rows"], *task))


def current_rivals_table(task: str) -> str:
    """The default, the correction alone and STC beside current rivals."""
    rows, known = read("current-rivals")["rows"], read("error-feedback")["rows"]
    return markdown_table(*current_rivals.table(rows, known, task))


def error_feedback_leads() -> str:
    """By how many points the default is ahead of STC and of its correction alone on CIFAR-10, seed by seed."""
    ratios, rows, found = (50, 200, 500, 1000, 2000), [], read("error-feedback")["rows"]
    for method, name in (("stc", "STC"), ("correction", "the correction alone")):
        cells = []
        for ratio in ratios:
            own, other = default(found, "cifar10", ratio), best(found, "cifar10", method, ratio)[1]
            cells.append(", ".join(f"{a - b:.1f}" for a, b in zip(own, other, strict=True)))
        rows.append([name, *cells])
    return markdown_table(("ahead of", *(f"{ratio}x" for ratio in ratios)), rows)


def robust(measure: str, attacks: Sequence[str], partition: str = "iid") -> str:
    """Accuracy or success of the backdoor in %, by rule and attack; "diverged" where the weights were not finite."""
    rows = [row for row in read("robust")["rows"] if row["partition"] == partition]
    lines = []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        line = [f"`{rule}`"]
        for attack in attacks:
            found = [row.get(measure) for row in rows if (row["rule"], row["attack"]) == (rule, attack)]
            finite = [100 * value for value in found if value is not None]
            line.append(spread(finite, 1) if finite and len(finite) == len(found) else "diverged")
        lines.append(line)
    return markdown_table(("rule", *attacks), lines)


def soak() -> str:
    """What 200 rounds in containers with killed services came to, of results/soak.json."""
    found = read("soak")
    secure = [row for row in found["rows"] if row["kind"] == "secure"]
    clients = found["clients_in_a_round"]
    enough = sum(rounds for count, rounds in clients.items() if int(count) >= 3)
    rows = [
        ("rounds done, and missing between them", f"{found['rounds_done']}, {len(found['rounds_missing'])}"),
        ("services killed", str(sum(found["kills"].values()))),
        ("runs resumed", str(sum(event["event"] == "resumed" for event in found["events"]))),
        ("secure rounds, and abandoned ones", f"{len(secure)}, {len(found['rounds_abandoned'])}"),
        ("rounds in which three clients or more replied", str(enough)),
        ("seconds of a round, median and largest", f"{found['median_seconds']:.0f}, {found['largest_seconds']:.0f}"),
        ("accuracy at the end, %", f"{100 * found['final_accuracy']:.1f}"),
    ]
    for title, services in (
        ("SuperNode", [f"node-{node}" for node in range(3)]),
        ("warm client app", [f"node-{node}-exec" for node in range(3)]),
        ("SuperLink", ["superlink"]),
    ):
        memory = [found["memory_mib"][name] for name in services]
        first, last = (statistics.fmean(values[part] for values in memory) for part in ("first", "last"))
        rows.append((f"MiB of a {title}, first and last third", f"{first:.0f}, {last:.0f}"))
    for name, idle in found["idle"][0]["services"].items() if found["idle"] else ():
        rows.append((f"idle {name}: % of a core, MiB", f"{idle['cpu_percent']:.1f}, {idle['mib']:.0f}"))
    return markdown_table(("soak", "figure"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    "federated": federated,
    "codec": codec,
    "rivals-mnist": rivals_mnist,
    "rivals-skew": rivals_skew,
    "rivals-cifar10-group": lambda: rivals_cifar10("cifar10-group", ("proxy", "stc", "topk", "powersgd", "eden")),
    "rivals-cifar10-batch": lambda: rivals_cifar10("cifar10-batch", ("proxy", "stc", "topk", "powersgd")),
    "rivals-vgg13": rivals_vgg13,
    "classes": classes,
    "coding-bytes": lambda: markdown_table(*where_bytes_go(read("coding")["rows"])),
    **{f"error-feedback-{task}": partial(error_feedback, comparison, task) for task in RATIOS},
    "error-feedback-ablation": partial(error_feedback, ablation),
    **{f"error-feedback-{task}-variants": partial(error_feedback, variants, task) for task in VARIANTS},
    **{f"error-feedback-{task}-tuning": partial(error_feedback, tuning, task) for task in TUNED},
    "error-feedback-bodies": partial(error_feedback, bodies),
    "error-feedback-below": partial(error_feedback, thresholds),
    "error-feedback-splits": partial(error_feedback, splits),
    "error-feedback-steps": partial(error_feedback, steps),
    "error-feedback-tuned-steps": partial(error_feedback, tuned_steps),
    "error-feedback-sampled": lambda: markdown_table(*sampled.table(read("error-feedback-sampled")["rows"])),
    "error-feedback-leads": error_feedback_leads,
    **{f"current-rivals-{task}": partial(current_rivals_table, task) for task in current_rivals.SHAPES},
    "current-rivals-updates": lambda: markdown_table(*current_rivals.updates(read("current-rivals")["updates"])),
    "paper": lambda: markdown_table(*paper.table(read("paper")["rows"])),
    "published-pfl-iid": lambda: markdown_table(*published.table(read("published")["rows"], "pfl-iid", 40)),
    "rivals-temporal": lambda: markdown_table(*temporal.table(read("rivals-temporal")["rows"])),
    "flower-apps": lambda: markdown_table(FLOWER_APPS, by_variant(read("flower-apps")["rows"])),
    "soak": soak,
    "speed": lambda: markdown_table(SPEED, speed_rows(read("speed")["rows"])),
    "latency": lambda: markdown_table(LATENCY, latency_rows(read("latency")["rows"])),
    "audit": lambda: audit.table(read("audit")["rows"]),
    "audit-trained": lambda: audit.table(read("audit_trained")["rows"], audit_trained.NOISE),
    "central-dp": lambda: central_dp.table(read("central_dp")["rows"]),
    "correlated": lambda: correlated.table(read("correlated")["rows"]),
    "robust-accuracy": lambda: robust("accuracy", ATTACKS),
    "robust-backdoor": lambda: robust("backdoor", BACKDOORS),
    "robust-accuracy-skew": lambda: robust("accuracy", ATTACKS, "alpha 0.5"),
    "robust-backdoor-skew": lambda: robust("backdoor", BACKDOORS, "alpha 0.5"),
    **PLUGIN_TABLES,
}
"""Name of a marked table -> what makes it."""


if __name__ == "__main__":
    run_command(main)
