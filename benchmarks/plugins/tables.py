"""The tables on the pages of four plugins, from benchmarks/results/plugins-*.json; `python -m benchmarks.tables`."""

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common import RESULTS, markdown_table, spread
from benchmarks.plugins.hierarchy import interval

Row = dict[str, Any]


def read(name: str) -> Any:
    """The rows of a plugin's results: a list, or by name."""
    return json.loads((RESULTS / f"plugins-{name}.json").read_text(encoding="utf-8"))["rows"]


def crossbar(name: str) -> str:
    """Zeros, accuracy and energy of the pruned networks."""
    rows, lines = read(f"crossbar-{name}"), []
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == what]
        savings = [
            spread([row["saving"][kind] for row in own], 2) if "saving" in own[0] else "1"
            for kind in ("exponential", "exponential, tiles equal", "survey")
        ]
        accuracies = spread([100 * row["accuracy"] for row in own], 2)
        lines.append([what, str(len(own)), spread([100 * row["zeros"] for row in own], 1), accuracies, *savings])
    header = ("network", "seeds", "zeros %", "accuracy %", "energy, times less", "with all tiles equal", "`survey`")
    return markdown_table(header, lines)


def crossbar_federated(pruned_after: int = 5) -> str:
    """Accuracy, zeros, energy and kilobytes of a round's messages."""
    rows, lines = read("crossbar-federated"), []
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == what]
        masks = "without" not in what
        explained = [statistics.fmean(row["explained_variance"][-3:]) for row in own if row["explained_variance"][-1]]
        sent = [
            f"{statistics.fmean(row[way][round_] for row in own) / 1000:,.0f}"
            for way, rounds in (("uplink_bytes", (-1,)), ("downlink_bytes", (pruned_after, -1)))
            for round_ in (pruned_after - 1, *rounds)
        ]
        lines.append([
            what, str(len(own)), spread([100 * row["accuracy"] for row in own], 1),
            spread([100 * row["zeros"] for row in own], 1) if masks else "",
            spread([row["saving"] for row in own], 2) if masks else "", *sent,
            spread(explained, 2) if explained else "",
        ])  # fmt: skip
    header = ("run", "seeds", "accuracy %", "zeros %", "energy, times less", "uplink before", "uplink after",
              "downlink before", "downlink in round 6", "downlink after", "explained variance")  # fmt: skip
    return markdown_table(header, lines)


def curvature(*data: str) -> str:
    """AUROC of finding wrong labels, by data and fraction."""
    rows, lines = read("curvature"), []
    scores = ("mean curvature", "mean loss", "mean gradient", "last epoch's curvature", "last epoch's confidence")
    for kind in data:
        for fraction in ("0.01", "0.05", "0.1"):
            own = [row for name, row in rows.items() if name.startswith(f"noise/{kind}/{fraction}/")]
            if own:
                how = own[0]["settings"]
                lines.append([
                    f"{how['model']}, {how['epochs']} epochs", str(how["lr"]), f"{float(fraction):.0%}", str(len(own)),
                    *(spread([row["auroc"][score] for row in own]) for score in scores),
                ])  # fmt: skip
    return markdown_table(("network", "lr", "wrong labels", "seeds", *scores), lines)


def curvature_duplicates(name: str = "duplicates") -> str:
    """How high the planted pairs rank."""
    own = [row for key, row in read("curvature").items() if key.rpartition("/")[0] == name]
    scores = list(own[0]["auroc"])
    lines = [
        [title, *(spread([row[key][score] for row in own]) for score in scores)]
        for title, key in (("AUROC", "auroc"), ("among the highest", "among the highest"))
    ]
    return markdown_table(("", *scores), lines)


def curvature_federated() -> str:
    """Accuracy with and without dropping suspects, and which images were dropped."""
    rows, lines = read("curvature"), []
    for name in dict.fromkeys(key.rpartition("/")[0] for key in rows if key.startswith("federated/")):
        own = [row for key, row in rows.items() if key.rpartition("/")[0] == name]
        counts = (f"{statistics.fmean(row[field] for row in own):.0f}" for field in ("dropped", "of them mislabeled"))
        accuracies = spread([100 * row["accuracy"] for row in own], 2)
        lines.append([name.partition("/")[2], str(len(own)), accuracies, *counts])
    header = ("action after 3 rounds", "seeds", "test accuracy %", "dropped in the last round", "of them mislabeled")
    return markdown_table(header, lines)


def hierarchy(part: str, name: str = "lenet5") -> str:
    """Every network's measures on the labels of one part, and the paired differences from the flat one."""
    rows, lines = read(f"hierarchy-{name}"), []
    for network in rows[0]["networks"]:
        line = [network]
        for measure, scale, digits in (("accuracy", 100.0, 1), ("distance", 1.0, 3), ("f", 100.0, 1)):
            values, flat = (
                [scale * row["networks"][which][part][measure] for row in rows] for which in (network, "flat")
            )
            mean, half = interval([value - base for value, base in zip(values, flat, strict=True)])
            minus = "" if network == "flat" else f"{mean:+.{digits}f} ± {half:.{digits}f}"
            line += [spread(values, digits), minus]
        lines.append(line)
    header = ("network", "accuracy", "minus flat", "graph distance", "minus flat", "F", "minus flat")
    return markdown_table(header, lines)


def trend_transfers(name: str, strength: float) -> str:
    """Percent of the source's adversarial images that fool the target, and each member's accuracies."""
    rows, lines = read(f"trend-{name}"), []
    members = rows[0]["members"]
    k = min(range(len(rows[0]["epsilons"])), key=lambda k: abs(rows[0]["epsilons"][k] - strength))
    for i, target in enumerate(members):
        rates = (transfer_rates(rows, i, j, k) for j in range(len(members)))
        alone = (spread([100 * row[key][i] for row in rows], 1) for key in ("accuracy", "robust"))
        lines.append([target, *rates, *alone])
    return markdown_table(("target", *(f"from {name}" for name in members), "accuracy", "robust"), lines)


def trend_members(name: str, titles: Sequence[str], strengths: Sequence[float] = (0.05, 0.15, 0.3)) -> str:
    """Transfers from and to the first member, at several strengths."""
    rows, lines = read(f"trend-{name}"), []
    ks = [rows[0]["epsilons"].index(strength) for strength in strengths]
    for i, title in enumerate(titles, start=1):
        transfers = [transfer_rates(rows, i, 0, k) for k in ks] + [transfer_rates(rows, 0, i, k) for k in ks[1:]]
        alone = (spread([100 * row[key][i] for row in rows], 1) for key in ("accuracy", "robust"))
        lines.append([title, *transfers, *alone])
    header = ["target", *(f"from fp, {s:g}" for s in strengths), *(f"to fp, {s:g}" for s in strengths[1:]), "accuracy"]
    return markdown_table([*header, "robust"], lines)


def transfer_rates(rows: Sequence[Row], target: int, source: int, strength: int) -> str:
    """Mean and deviation over seeds, in percent."""
    counts = [(row["transferred"][target][source][strength], row["fooled"][target][source][strength]) for row in rows]
    return spread([100 * transferred / max(1, fooled) for transferred, fooled in counts], 1)


def trend_ensembles(name: str) -> str:
    """The chosen ensemble of each seed and its most robust member, under the three attacks."""
    lines = []
    for row in read(f"trend-{name}"):
        (chosen,) = (ensemble for ensemble in row["ensembles"] if ensemble["chosen"])
        figures = (chosen["accuracy"], chosen["best_member_robust"], *chosen["robust"].values())
        lines.append([str(row["seed"]), ", ".join(chosen["members"]), *(f"{100 * figure:.1f}" for figure in figures)])
    return markdown_table(("seed", "chosen", "accuracy", "best member alone", "average", "sign", "unanimous"), lines)


TITLES = ("fp-b (initialization)", "1 bit", "2 bits", "4 bits", "halftone", "lenet5 (architecture)",
          "weights of 1 bit", "weights of 2 bits", "activations of 1 bit", "activations of 2 bits")  # fmt: skip

PLUGIN_TABLES: dict[str, Callable[[], str]] = {
    "crossbar-mnist": lambda: crossbar("mnist"),
    "crossbar-mnist-all": lambda: crossbar("mnist-all"),
    "crossbar-cifar10": lambda: crossbar("cifar10"),
    "crossbar-federated": crossbar_federated,
    "curvature-digits": lambda: curvature("digits", "digits-slow"),
    "curvature-mnist": lambda: curvature("mnist", "mnist-long"),
    "curvature-duplicates": curvature_duplicates,
    "curvature-federated": curvature_federated,
    "hierarchy-seen": lambda: hierarchy("seen"),
    "hierarchy-unseen": lambda: hierarchy("unseen"),
    "hierarchy-all-seen": lambda: hierarchy("seen", "lenet5-all"),
    "hierarchy-all-unseen": lambda: hierarchy("unseen", "lenet5-all"),
    "hierarchy-cnn-unseen": lambda: hierarchy("unseen", "cnn-10000"),
    "trend-mnist-decay": lambda: trend_transfers("mnist-decay", 0.15),
    "trend-mnist-decay-ensembles": lambda: trend_ensembles("mnist-decay"),
    "trend-mnist-mlp": lambda: trend_members("mnist-mlp-decay", TITLES),
    "trend-cifar10": lambda: trend_transfers("cifar10", 0.03137),
    "trend-cifar10-ensembles": lambda: trend_ensembles("cifar10"),
}
"""Name of a marked table -> what makes it."""
