"""The results of a comparison as one document of plain values: compare.json.

It holds every number of the tables and figures. Accuracies are fractions, sizes are bytes of whole messages, times are
seconds, and deviations are sample standard deviations (n - 1), null for fewer than two values.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tofu.errors import RunError
from tofu.reporting.compare.plan import FEDAVG, Cell, Comparison, Run
from tofu.rounds.record import read_rounds, read_summary
from tofu.settings import Value

Row = dict[str, Any]

POINTS_BELOW = (0.5, 1.0, 2.0, 5.0)
"""The target accuracies, in percentage points below FedAvg's mean."""
_MEASURED = (
    "final_accuracy", "points_lost", "uplink_bytes", "downlink_bytes", "uplink_ratio", "both_ratio", "payload_ratio",
    "explained_variance", "train_seconds", "encode_seconds",
)  # fmt: skip


def read_run(run: Run) -> Row:
    """Return one row of the document from a finished run's folder.

    `train_seconds` and `encode_seconds` are sums over the rounds of the mean over clients.

    Raises:
        RunError: a file of the folder is missing or cannot be read.
    """
    summary = read_summary(run.folder / "summary.json")
    rounds = read_rounds(run.folder / "metrics.jsonl")
    if summary is None or summary.final_accuracy is None:
        raise RunError(f"{run.folder} is not a finished run: summary.json is missing or has no final_accuracy")
    return _begin(run) | {
        "final_accuracy": summary.final_accuracy,
        "payload_ratio": summary.payload_ratio,
        "uplink_bytes": summary.uplink_bytes,
        "downlink_bytes": summary.downlink_bytes,
        "uplink_ratio": summary.uplink_ratio,
        "both_ratio": summary.both_ratio,
        "seconds": summary.seconds,
        "train_seconds": sum(row.train_seconds or 0.0 for row in rounds[1:]),
        "encode_seconds": sum(row.encode_seconds or 0.0 for row in rounds[1:]),
        "unreadable": summary.unreadable,
        "with_proxies": sum(row.with_proxies or 0 for row in rounds),
        "updates": sum(row.clients for row in rounds if row.with_proxies is not None),
        "accuracy_by_round": [row.accuracy for row in rounds],
        "uplink_bytes_by_round": [row.uplink_bytes for row in rounds],
        "explained_variance_by_round": [row.explained_variance for row in rounds],
    }


def failed_run(run: Run, reason: str) -> Row:
    """Return the row of a run that could not go on, for example because training diverged."""
    return _begin(run) | {"failed": reason}


def failed_compressors(made: Row) -> list[str]:
    """Return the compressors of a document all of whose runs failed."""
    finished = {row["compressor"] for row in made["runs"] if "failed" not in row}
    failed = dict.fromkeys(row["compressor"] for row in made["runs"] if row["compressor"] not in finished)
    return ["FedAvg" if name == FEDAVG else name for name in failed]


def _begin(run: Run) -> Row:
    row: Row = {"compressor": run.cell.compressor, "ratio": _asked(run.cell)[0] if _asked(run.cell) else None}
    return row | {"seed": run.seed, "tuned": run.value, "folder": run.folder.name}


def _asked(cell: Cell) -> list[float]:
    return [] if cell.compressor == FEDAVG else list(cell.ratios)


def best_value(rows: Sequence[Row]) -> Value | None:
    """Return the tuned value of the most accurate of a cell's tuning runs, the first of equals; None if all failed."""
    finished = [row for row in rows if "failed" not in row]
    if not finished:
        return None
    value: Value = max(finished, key=lambda row: row["final_accuracy"])["tuned"]
    return value


def document(
    comparison: Comparison, rows: Mapping[Cell, Sequence[Row]], tuning: Mapping[Cell, Sequence[Row]], *, runs_left: int
) -> Row:
    """Return the document of the runs so far.

    Args:
        rows: of each cell's runs that count, in the order of the seeds.
        tuning: of each cell's tuning runs.
        runs_left: how many have yet to be run.
    """
    tune, reference = comparison.tune, rows.get(comparison.reference, ())
    fedavg = {row["seed"]: row["final_accuracy"] for row in reference if "failed" not in row}
    cells = []
    for cell in comparison.cells:
        trials = tuning.get(cell, ())
        chosen = best_value(trials) if tune and len(trials) == len(cell.payloads) else None
        cells.append(_cell(comparison, cell, rows.get(cell, ()), fedavg, chosen))
    return {
        "settings": {
            name: value
            for name, value in comparison.shared.to_config().items()
            if name not in ("compressor", "ratio", "seed", "run-folder")
        },
        "compressors": list(comparison.compressors),
        "ratios": list(comparison.ratios),
        "seeds": list(comparison.seeds),
        "overrides": {
            name: {key.replace("_", "-"): value for key, value in changes.items()}
            for name, changes in comparison.overrides.items()
        },
        "tune": {"setting": tune.setting, "values": list(tune.values), "seed": tune.seed} if tune else None,
        "runs_left": runs_left,
        "cells": cells,
        "targets": _targets(cells),
        "runs": [row for cell in comparison.cells for row in rows.get(cell, ())],
        "tuning_runs": [row for cell in comparison.cells for row in tuning.get(cell, ())],
    }


def _cell(
    comparison: Comparison, cell: Cell, rows: Sequence[Row], fedavg: Mapping[int, float], chosen: Value | None
) -> Row:
    finished = [row for row in rows if "failed" not in row]
    measured = [
        row
        | {
            "points_lost": 100 * (fedavg[row["seed"]] - row["final_accuracy"]) if row["seed"] in fedavg else None,
            "explained_variance": _mean([v for v in row["explained_variance_by_round"] if v is not None]),
        }
        for row in finished
    ]
    return {
        "compressor": cell.compressor,
        "ratios": _asked(cell),
        "not_reachable": cell.unreachable or None,
        "planned_payload_ratio": cell.float32_bytes / max(cell.payloads.values()) if cell.payloads else None,
        "tuned": chosen,
        "seeds": [row["seed"] for row in finished],
        "failed": [{"seed": row["seed"], "reason": row["failed"]} for row in rows if "failed" in row],
        "complete": len(finished) == len(comparison.seeds),
        **{name: _spread([row[name] for row in measured if row[name] is not None]) for name in _MEASURED},
        "accuracy_by_round": _means([row["accuracy_by_round"] for row in finished]),
        "uplink_bytes_by_round": _means([row["uplink_bytes_by_round"] for row in finished]),
    }


def _targets(cells: Sequence[Row]) -> list[Row]:
    """Return for each target accuracy and compressor the cell with the smallest mean uplink that reaches it.

    Only cells that finished with every seed count: means over different seeds say nothing about each other.
    """
    reference = cells[0]
    if not reference["complete"]:
        return []
    targets = []
    for points in POINTS_BELOW:
        accuracy = reference["final_accuracy"]["mean"] - points / 100
        smallest: dict[str, Row | None] = {cell["compressor"]: None for cell in cells}
        for cell in cells:
            if not cell["complete"] or cell["final_accuracy"]["mean"] < accuracy - 1e-12:  # the tolerance is rounding's
                continue
            best, uplink = smallest[cell["compressor"]], cell["uplink_bytes"]["mean"]
            if best is None or uplink < best["uplink_bytes"]:
                ratio = cell["ratios"][0] if cell["ratios"] else None
                smallest[cell["compressor"]] = {
                    "ratio": ratio, "uplink_bytes": uplink, "final_accuracy": cell["final_accuracy"]["mean"],
                }  # fmt: skip
        targets.append({"points_below_fedavg": points, "accuracy": accuracy, "smallest_uplink": smallest})
    return targets


def _spread(values: Sequence[float]) -> Row | None:
    if not values:
        return None
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _means(series: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*series, strict=True)]
