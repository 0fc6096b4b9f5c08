"""The table of clients: replies, images, quality and time of each from the open rounds, and bytes from all rounds."""

from collections import defaultdict
from collections.abc import Iterable

from tofu.formatting import format_bytes, format_fraction, format_seconds
from tofu.reporting.report.run_data import RunData
from tofu.rounds.record import ClientRecord

_NONE = "\N{EN DASH}"
_MAX = 500


def client_table(run: RunData) -> list[tuple[str, ...]]:
    """Return one row per client (the first 500): name and cells.

    Secure rounds, which show only sums, add only bytes.
    """
    replies: defaultdict[str, list[ClientRecord]] = defaultdict(list)
    failures: defaultdict[str, int] = defaultdict(int)
    for row in run.rounds:
        for entry in row.by_client:
            replies[entry.client].append(entry)
        for failure in row.failures:
            failures[failure.client] += 1
    known = replies.keys() | run.client_bytes.keys()
    if not known:
        return []
    names = sorted(known | failures.keys(), key=lambda name: (len(name), name))
    first, last = (list(columns.values()) for columns in (_first(run), _last(run)))
    return [
        (
            name[:300],
            *(cells.get(name, _NONE) for cells in first),
            *_cells(replies[name], failures[name]),
            *(cells.get(name, _NONE) for cells in last),
        )
        for name in names[:_MAX]
    ]


def client_columns(run: RunData) -> list[str]:
    """Return the names of the columns, the most important ones first: a phone shows three."""
    fixed = ("explained variance", "valid replies", "failed", "examples", "training", "encoding")
    return ["client", *_first(run), *fixed, *_last(run)]


def _first(run: RunData) -> dict[str, dict[str, str]]:
    """Column -> client -> cell, of the columns after the client's name that only some runs have."""
    tested: dict[str, str] = {}
    for row in run.rounds:
        for entry in row.by_client:
            if entry.test_accuracy is not None:
                tested[entry.client] = format_fraction(entry.test_accuracy)
    return _filled({"own test accuracy": tested, "uplink": _bytes(run, 0)})


def _last(run: RunData) -> dict[str, dict[str, str]]:
    """Column -> client -> cell, of the last columns, which only some runs have."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for row in run.rounds:
        for client, value in row.link_seconds.items():
            seconds[client].append(value or 0.0)
    transfers = {name: f"{format_seconds(sum(own) / len(own))} per round" for name, own in seconds.items()}
    return _filled({"downlink": _bytes(run, 1), "transfers": transfers})


def _bytes(run: RunData, direction: int) -> dict[str, str]:
    return {client: format_bytes(sizes[direction]) for client, sizes in run.client_bytes.items()}


def _filled(columns: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    return {name: cells for name, cells in columns.items() if cells}


def _cells(replies: list[ClientRecord], failures: int) -> list[str]:
    explained = _mean(entry.explained_variance for entry in replies)
    train, encode = (_mean(getattr(entry, name) for entry in replies) for name in ("train_seconds", "encode_seconds"))
    examples = max((entry.examples for entry in replies if entry.examples is not None), default=None)
    return [
        _NONE if explained is None else format_fraction(explained),
        f"{len(replies):,}" if replies else _NONE,
        f"{failures:,}",
        _NONE if examples is None else f"{examples:,}",
        _NONE if train is None else f"{format_seconds(train)} per round",
        _NONE if encode is None else f"{format_seconds(encode)} per round",
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
