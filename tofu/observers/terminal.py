"""What a person sees while a run goes on.

All of it goes to one stream, stderr unless told otherwise, so that stdout stays free for results. `make_progress` picks
the live view on a terminal, one line a round everywhere else, and nothing at all on request. Names and reasons come
from other machines and are made printable before they reach a terminal.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tofu.formatting import format_bytes, format_factor, format_fraction, format_seconds, printable

PHASES = {"send": "sending", "train": "clients train", "decode": "decoding", "evaluate": "evaluating"}
_NONE = "-"
_LAST_ROUNDS = 6
_LISTED_FAILURES = 3
_OPTIONAL = ("task", "epsilon")
"""Columns of the live view that only runs with tasks or privacy have."""


class Progress:
    """A view of a run that shows nothing, and the base of those that do.

    Order of calls: `start`, then for every round `phase` (any number of times), `failed` for each client that did and
    `round_done`, then `finish` or `broke_off`; `note` at any time. `close` gives the terminal back and may be called
    twice; leaving the context does it.
    """

    _failed = 0
    """Failures of the round under way."""

    def start(self, rounds: int, clients: int, title: str) -> None:
        """A run of `rounds` rounds with `clients` clients begins."""

    def phase(self, round_: int, kind: str, phase: str, done: int, total: int) -> None:
        """Of the `total` pieces of a phase (a key of `PHASES`) of a round, `done` are done."""

    def failed(self, round_: int, client: str, node: int, reason: str) -> None:
        """Something of a client's could not be used in a round. People are told of the first few of a round."""
        self._failed += 1
        if self._failed <= _LISTED_FAILURES:
            self.note(f"round {round_}: client {client}: {reason}", round=round_, node=node)

    def round_done(self, row: Mapping[str, Any]) -> None:
        """A round has ended; `row` is its line of `metrics.jsonl`, in which any key may be missing."""
        if (more := self._failed - _LISTED_FAILURES) > 0:
            self.note(f"round {row.get('round', '?')}: {more} more failures")
        self._failed = 0

    def note(self, text: str, **where: Any) -> None:
        """Something that the user should know although the run goes on; `where`: the round and node that it is about,
        where it is about one."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run has ended; `summary` is what `summary.json` holds, in which any key may be missing."""

    def broke_off(self, error: BaseException) -> None:
        """The run ends with an error, which who started it tells people of."""

    def close(self) -> None:
        """Stop showing anything."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SilentProgress(Progress):
    """Shows nothing."""


class PlainProgress(Progress):
    """One line a round to a stream, for pipes and logs: no colors, nothing redrawn."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._rounds = 0

    def start(self, rounds: int, clients: int, title: str) -> None:
        self._rounds = rounds
        self._say(f"{title}: {rounds} rounds, {clients} clients")

    def round_done(self, row: Mapping[str, Any]) -> None:
        number = f"{row.get('round', '?')}"
        total = f"{self._rounds}"
        cells = _cells(row)
        words = [f"round {number:>{len(total)}}/{total}", f"{cells['kind']:<6}"]
        if cells["task"] != _NONE:
            words.append(f"task {cells['task']}")
        words.append(f"accuracy {cells['accuracy']:>6}")
        if cells["explained"] != _NONE:
            words.append(f"explained {cells['explained']:>6}")
        if cells["uplink"] != _NONE:
            words.append(f"uplink {cells['uplink']:>8} (FedAvg: {cells['less']} as much)")
        if cells["epsilon"] != _NONE:
            words.append(f"epsilon {cells['epsilon']:>5}")
        if cells["time"] != _NONE:
            words.append(cells["time"])
        super().round_done(row)
        self._say("  ".join(words))

    def note(self, text: str, **where: Any) -> None:
        self._say(f"note: {text}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._say(_in_short(summary))

    def _say(self, text: str) -> None:
        self._stream.write(f"{printable(text)}\n")
        self._stream.flush()


class RichProgress(Progress):
    """A live view on a terminal: a bar over the rounds with the time left, the current phase and the last rounds.

    `clock` returns seconds; a test can pass its own.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(stderr=True) if console is None else console
        self._clock = clock
        self._live: Live | None = None
        self._title = ""
        self._rounds = 0
        self._done = 0
        self._phase: tuple[int, str, str, int, int] | None = None
        self._rows: tuple[dict[str, str], ...] = ()
        self._durations: tuple[float, ...] = ()
        self._since = 0.0
        self._closing = False

    def start(self, rounds: int, clients: int, title: str) -> None:
        self.close()
        self._title = f"{title}: {rounds} rounds, {clients} clients"
        self._rounds, self._done, self._rows, self._durations = rounds, 0, (), ()
        self._since, self._closing = self._clock(), False
        # Stdout is left alone: what a program prints there must not end up in this view's stream.
        self._live = Live(get_renderable=self._view, console=self._console, refresh_per_second=4, redirect_stdout=False)
        self._live.start()

    def phase(self, round_: int, kind: str, phase: str, done: int, total: int) -> None:
        self._phase = (round_, kind, phase, done, total)

    def round_done(self, row: Mapping[str, Any]) -> None:
        number = row.get("round")
        self._done = number if isinstance(number, int) else self._done + 1
        now = self._clock()
        if self._done > 0:
            self._durations = (*self._durations[-4:], now - self._since)
        self._since = now
        self._phase = None
        self._rows = (*self._rows[1 - _LAST_ROUNDS :], _cells(row))
        super().round_done(row)
        if self._live is not None:
            self._live.refresh()

    def note(self, text: str, **where: Any) -> None:
        # Text, not markup: a client called "[red]" is called just that.
        self._console.print(Text.assemble(("note: ", "yellow"), printable(text)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.close()
        self._console.print(Text(_in_short(summary), style="bold"))

    def close(self) -> None:
        if self._live is not None:
            # What stays on the screen is how far the run came, not what it was about to do.
            self._phase, self._closing = None, True
            self._live.stop()
            self._live = None

    def seconds_left(self) -> float | None:
        """What the rounds to come will take if they take what the last five took; None before the first has ended."""
        if not self._durations:
            return None
        typical = sum(self._durations) / len(self._durations)
        return max(typical * (self._rounds - self._done) - (self._clock() - self._since), 0.0)

    def _view(self) -> RenderableType:
        left = self.seconds_left()
        status = f"{self._done}/{self._rounds} rounds"
        if left is not None and self._done < self._rounds and not self._closing:
            status += f", {format_seconds(round(left))} left"
        bar = Table.grid(padding=(0, 1))
        rail = ProgressBar(max(self._rounds, 1), self._done, 36, complete_style="cyan", finished_style="green")
        bar.add_row(rail, Text(status))
        parts: list[RenderableType] = [Text(printable(self._title), style="bold"), bar]
        if self._phase is not None:
            number, kind, phase, done, total = self._phase
            doing = f"round {number} ({printable(kind)}): {PHASES.get(phase, printable(phase))} {done}/{total}"
            parts.append(Text(doing, style="cyan"))
        if self._rows:
            parts.append(_table(self._rows))
        return Group(*parts)


def make_progress(stream: TextIO | None = None, *, quiet: bool = False) -> Progress:
    """The view that suits `stream` (stderr if None): silent if `quiet`, live on a terminal, else one line a round."""
    if quiet:
        return SilentProgress()
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        console = Console(file=stream)
        # A dumb terminal cannot move its cursor, so nothing can be redrawn on it.
        if not console.is_dumb_terminal:
            return RichProgress(console)
    return PlainProgress(stream)


def _table(rows: tuple[dict[str, str], ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    hidden = {key for key in _OPTIONAL if all(row[key] == _NONE for row in rows)}
    for key, title in (
        ("round", "\nround"),
        ("kind", "\nkind"),
        ("task", "\ntask"),
        ("accuracy", "\naccuracy"),
        ("explained", "explained\nvariance"),
        ("uplink", "\nuplink"),
        ("less", "less than\nFedAvg"),
        ("epsilon", "\nepsilon"),
        ("time", "\ntime"),
    ):
        if key not in hidden:
            table.add_column(title, justify="left" if key == "kind" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for key, cell in row.items() if key not in hidden))
    return table


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a round as text, in the order of the table."""
    sent, fedavg = _number(row, "uplink_bytes"), _number(row, "fedavg_uplink_bytes")
    accuracy, explained, seconds = (_number(row, key) for key in ("accuracy", "explained_variance", "seconds"))
    task = _number(row, "task")
    abandoned = ", abandoned" if row.get("abandoned") else ""
    return {
        "round": printable(f"{row.get('round', '?')}"),
        "kind": printable(f"{row.get('kind', '?')}{abandoned}"),
        "task": _NONE if task is None else f"{task:g}",
        "accuracy": _NONE if accuracy is None else format_fraction(accuracy, 2),
        "explained": _NONE if explained is None else format_fraction(explained),
        "uplink": format_bytes(int(sent)) if sent and sent > 0 else _NONE,
        "less": format_factor(fedavg / sent) if sent and fedavg and sent > 0 and fedavg > 0 else _NONE,
        "epsilon": _epsilon(row),
        "time": _NONE if seconds is None else format_seconds(seconds),
    }


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable and value is not None else None


def _epsilon(values: Mapping[str, Any]) -> str:
    epsilon = _number(values, "epsilon")
    if epsilon is not None:
        return f"{epsilon:.4g}"
    return "inf" if "epsilon" in values else _NONE  # JSON has no infinity: a run writes null for it


def _in_short(summary: Mapping[str, Any]) -> str:
    """The run in one line."""
    accuracy, sent, fedavg, seconds = (
        _number(summary, key) for key in ("final_accuracy", "uplink_bytes", "fedavg_uplink_bytes", "seconds")
    )
    words = [] if accuracy is None else [f"final accuracy {format_fraction(accuracy, 2)}"]
    learnt, kept = (_number(summary, key) for key in ("mean_accuracy", "backward_transfer"))
    if learnt is not None and kept is not None:
        words.append(f"ACC {format_fraction(learnt / 100)}, BWT {kept:+.1f} points")
    delta = _number(summary, "delta")
    if delta is not None:
        words.append(f"epsilon {_epsilon(summary)} at delta {delta:g}")
    if sent is not None and sent >= 0:
        words.append(f"uplink {format_bytes(int(sent))}")
        if sent and fedavg and fedavg >= sent:
            words[-1] += f", {format_factor(fedavg / sent)} less than the {format_bytes(int(fedavg))} FedAvg sends"
    if seconds is not None:
        words.append(format_seconds(seconds))
    return "done: " + "; ".join(words) if words else "done"
