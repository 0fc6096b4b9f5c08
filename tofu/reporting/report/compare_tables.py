"""The tables of a comparison from compare.json's document: the same cells for the terminal and for the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tofu.formatting import format_bytes, format_count, format_factor, format_fraction, printable, proxies_line

FEDAVG = "none"
_NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """Header and rows of equal length; the first `left` columns are words, the others numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1

    def markdown(self) -> str:
        """As Markdown, aligned for a terminal as well."""
        rules = tuple("---" if index < self.left else "--:" for index in range(len(self.header)))
        lines = [tuple(_escaped(cell) for cell in row) for row in (self.header, rules, *self.rows)]
        widths = [max(len(line[index]) for line in lines) for index in range(len(self.header))]
        return "\n".join(f"| {' | '.join(self._padded(line, widths))} |" for line in lines)

    def _padded(self, line: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell.ljust(width) if index < self.left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]


def method_name(compressor: str) -> str:
    """Return the name of a compressor in tables and figures."""
    return "FedAvg" if compressor == FEDAVG else compressor


def cell_table(document: Mapping[str, Any]) -> Table:
    """Return one row per cell: FedAvg, then by ratio and accuracy, with cells that cannot reach their ratio last."""
    tune, both = document["tune"], _compressed_downlink(document)
    encoded = any(cell.get("encode_seconds") for cell in document["cells"])  # older documents have none
    reference, *others = document["cells"]
    others = sorted(others, key=lambda cell: (cell["ratios"][0], -_mean(cell["final_accuracy"], -1.0)))
    header = ("ratio asked", "method", "test accuracy, %", "points lost", "uplink", "less than FedAvg", "payload ratio")
    rows = []
    for cell in (reference, *others):
        row = [
            ", ".join(ratio_text(ratio) for ratio in cell["ratios"]) or _NONE,
            method_name(cell["compressor"]),
            _accuracy(cell, len(document["seeds"])),
            _NONE if cell is reference else _plus_minus(cell["points_lost"]),
            format_bytes(round(cell["uplink_bytes"]["mean"])) if cell["uplink_bytes"] else _NONE,
            format_factor(cell["uplink_ratio"]["mean"]) if cell["uplink_ratio"] and cell is not reference else _NONE,
            _payload_ratio(cell),
        ]
        if encoded:
            row.append(_plus_minus(cell.get("encode_seconds")))
        if both:
            ratio = cell["both_ratio"] if cell is not reference else None
            row.append(format_factor(ratio["mean"]) if ratio else _NONE)
        rows.append((*row, *([_value(cell["tuned"])] if tune else [])))
    extra = (
        *(["encoding, s"] if encoded else []),
        *(["both directions, less"] if both else []),
        *([tune["setting"]] if tune else []),
    )
    return Table((*header, *extra), tuple(rows), left=2)


def _compressed_downlink(document: Mapping[str, Any]) -> bool:
    """Return whether any method of the comparison compresses the downlink."""
    changes = [document["settings"], *document["overrides"].values()]
    return any(change.get("downlink", "full-weights") != "full-weights" for change in changes)


def target_table(document: Mapping[str, Any]) -> Table | None:
    """Return for each compressor the smallest uplink that reaches each target accuracy;
    None before FedAvg has ended.
    """
    targets = document["targets"]
    if not targets:
        return None
    header = ("to end at or above", *(_target(target) for target in targets))
    names = targets[0]["smallest_uplink"]
    uplinks = [target["smallest_uplink"] for target in targets]
    rows = tuple((method_name(name), *(_smallest(smallest[name]) for smallest in uplinks)) for name in names)
    return Table(header, rows)


def markdown(document: Mapping[str, Any]) -> str:
    """Both tables and their notes, as `tofu compare` prints them."""
    targets = target_table(document)
    parts = [cell_table(document).markdown()]
    if targets:
        parts += [
            "Smallest uplink that ends at most so many points below FedAvg:",
            targets.markdown(),
        ]
    if lines := notes(document):
        parts.append("\n".join(f"- {printable(line)}" for line in lines))
    return "\n\n".join(parts)


def notes(document: Mapping[str, Any]) -> list[str]:
    """Notes below the tables, one line each: settings of single compressors, tuning, and failures."""
    lines = [
        f"{method_name(name)} was run with {', '.join(f'{key}={_value(value)}' for key, value in changes.items())}."
        for name, changes in document["overrides"].items()
    ]
    if tune := document["tune"]:
        values = ", ".join(map(_value, tune["values"]))
        lines.append(
            f"Each row has the {tune['setting']} of {values} that was best in one run with seed {tune['seed']}."
        )
    runs = document["runs"]
    for name, ratio in dict.fromkeys((row["compressor"], row["ratio"]) for row in runs if row.get("updates")):
        mine = [row for row in runs if (row["compressor"], row["ratio"]) == (name, ratio)]
        found, updates = (sum(row.get(key, 0) for row in mine) for key in ("with_proxies", "updates"))
        lines.append(f"{name} at {ratio_text(ratio)}: {proxies_line(found, updates)}.")
    if unreadable := max((row.get("unreadable", 0) for row in runs), default=0):
        lines.append(f"{format_count(unreadable, 'image')} that cannot be read, left out of every run.")
    for cell in document["cells"]:
        for failure in cell["failed"]:
            lines.append(f"{cell_name(cell)}, seed {failure['seed']} failed: {failure['reason']}")
    return lines


def cell_name(cell: Mapping[str, Any]) -> str:
    """Return a cell in words: `FedAvg`, `topk at 50x`."""
    return method_name(cell["compressor"]) + (f" at {ratio_text(cell['ratios'][0])}" if cell["ratios"] else "")


def ratio_text(ratio: float) -> str:
    """Return a ratio as it was asked: `50x`, `2.5x`."""
    return f"{ratio:.12g}x"


def _target(target: Mapping[str, Any]) -> str:
    return f"{format_fraction(target['accuracy'], 2)} (FedAvg - {target['points_below_fedavg']:g})"


def _smallest(best: Mapping[str, Any] | None) -> str:
    if best is None:
        return _NONE
    at = f" at {ratio_text(best['ratio'])}" if best["ratio"] is not None else ""
    return format_bytes(round(best["uplink_bytes"])) + at


def _accuracy(cell: Mapping[str, Any], seeds: int) -> str:
    if cell["not_reachable"]:
        return f"not reachable: {cell['not_reachable']}"
    if cell["final_accuracy"] is None:
        return "failed" if cell["failed"] else "not run yet"
    text = _plus_minus(cell["final_accuracy"], scale=100)
    return text if cell["complete"] else f"{text} ({len(cell['seeds'])} of {seeds} seeds)"


def _plus_minus(spread: Mapping[str, float | None] | None, scale: float = 1.0) -> str:
    if spread is None or spread["mean"] is None:
        return _NONE
    text = f"{round(scale * spread['mean'], 2) + 0.0:.2f}"  # no negative zero
    return text if spread["sd"] is None else f"{text} ± {scale * spread['sd']:.2f}"


def _payload_ratio(cell: Mapping[str, Any]) -> str:
    ratio = _mean(cell["payload_ratio"], cell["planned_payload_ratio"] or 0.0)
    return format_factor(ratio) if ratio else _NONE


def _mean(spread: Mapping[str, float] | None, otherwise: float) -> float:
    return spread["mean"] if spread else otherwise


def _value(value: object) -> str:
    if value is None:
        return _NONE
    return f"{value}".lower() if isinstance(value, bool) else f"{value}"


def _escaped(cell: str) -> str:
    return printable(cell).replace("|", "\\|")
