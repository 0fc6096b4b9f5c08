"""Progress views of a run in the terminal.

All output goes to one stream, stderr by default, so that stdout stays free for results. `make_progress` selects a live
view on a terminal, one line per round otherwise, and nothing if quiet. Names and reasons come from other machines;
control characters in them are replaced before they are printed.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tofu.formatting import (
    compared,
    format_bytes,
    format_count,
    format_factor,
    format_fraction,
    format_seconds,
    printable,
    proxies_line,
)
from tofu.observers.base import Observer
from tofu.rounds.record import RoundRecord, RunSummary

PHASES = {
    "share": "key exchange", "train": "clients train", "reveal": "unmasking", "evaluate": "evaluating",
}  # fmt: skip
_NONE = "-"
_LAST_ROUNDS = 6
_LEVEL = 0.005
"""A round's bytes differ from those of FedAvg by at least this fraction, or are not compared."""
_MAX_FAILURES = 3
_OPTIONAL = ("task", "loss", "epsilon")
"""Columns of the live view that are hidden in runs without tasks or differential privacy, or with accuracies."""


class _View(Observer):
    """Reports the first failures of a round as notes, and counts the others."""

    kept = True
    last: RoundRecord | None = None
    notes: Sequence[str] = ()
    _failed, _with_proxies, _updates = 0, 0, 0

    def on_history(self, folder: Path, records: Sequence[RoundRecord]) -> None:
        for record in records:
            self._count(record)
        if self.kept:
            self.on_text(f"results: {folder}")
        for note in self.notes:
            self.on_note(note)

    def on_text(self, text: str) -> None:
        """Show a line that is no warning."""

    def on_client_failure(self, round_: int, client: str, node: int, reason: str) -> None:
        self._failed += 1
        if self._failed <= _MAX_FAILURES:
            self.on_note(f"round {round_}: client {client}: {reason}", round=round_, node=node)

    def on_round_end(self, record: RoundRecord) -> None:
        if (more := self._failed - _MAX_FAILURES) > 0:
            self.on_note(f"round {record.round}: {more} more failures")
        self._failed, self.last = 0, record
        self._count(record)

    def _count(self, record: RoundRecord) -> None:
        if record.with_proxies is not None:
            self._with_proxies, self._updates = self._with_proxies + record.with_proxies, self._updates + record.clients

    def on_run_end(self, summary: RunSummary) -> None:
        if self._updates:
            self.on_text(proxies_line(self._with_proxies, self._updates))


class PlainProgress(_View):
    """One line per round, for pipes and logs: no colors, nothing is redrawn."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._rounds = 0

    def on_run_start(self, rounds: int, clients: int, title: str) -> None:
        self._rounds = rounds
        self._write(f"{title}: {format_count(rounds, 'round')}, {format_count(clients, 'client')}")

    def on_round_end(self, record: RoundRecord) -> None:
        super().on_round_end(record)
        cells = _cells(record)
        words = [f"round {record.round:>{len(f'{self._rounds}')}}/{self._rounds}", f"{cells['kind']:<10}"]
        if cells["task"] != _NONE:
            words.append(f"task {cells['task']}")
        words.append(_loss_text(record) or f"accuracy {cells['accuracy']:>6}")
        if cells["explained"] != _NONE:
            words.append(f"explained {cells['explained']:>6}")
        if cells["uplink"] != _NONE:
            fedavg = "" if cells["less"] == _NONE else f" (FedAvg: {cells['less']} as much)"
            words.append(f"uplink {cells['uplink']:>8}{fedavg}")
        if cells["epsilon"] != _NONE:
            words.append(f"epsilon {cells['epsilon']:>5}")
        if cells["time"] != _NONE:
            words.append(cells["time"])
        self._write("  ".join(words))

    def on_text(self, text: str) -> None:
        self._write(text)

    def on_note(self, text: str, **where: Any) -> None:
        self._write(f"note: {text}")

    def on_run_end(self, summary: RunSummary) -> None:
        super().on_run_end(summary)
        self._write(_summary_line(summary, self.last))

    def _write(self, text: str) -> None:
        self._stream.write(f"{printable(text)}\n")
        self._stream.flush()


class LiveProgress(_View):
    """A live view on a terminal: a progress bar with the remaining time, the current phase and the last rounds.

    Args:
        clock: returns seconds.
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

    def on_run_start(self, rounds: int, clients: int, title: str) -> None:
        self.close()
        self._title = f"{title}: {format_count(rounds, 'round')}, {format_count(clients, 'client')}"
        self._rounds, self._done, self._rows, self._durations = rounds, 0, (), ()
        self._since, self._closing = self._clock(), False
        # Stdout is not redirected: what a program prints there must not end up in this view's stream.
        self._live = Live(get_renderable=self._view, console=self._console, refresh_per_second=4, redirect_stdout=False)
        self._live.start()

    def on_phase(self, round_: int, kind: str, phase: str, done: int, total: int) -> None:
        self._phase = (round_, kind, phase, done, total)

    def on_round_end(self, record: RoundRecord) -> None:
        self._done = record.round
        now = self._clock()
        if self._done > 0:
            self._durations = (*self._durations[-4:], now - self._since)
        self._since = now
        self._phase = None
        self._rows = (*self._rows[1 - _LAST_ROUNDS :], _cells(record))
        super().on_round_end(record)
        if self._live is not None:
            self._live.refresh()

    def on_text(self, text: str) -> None:
        self._console.print(Text(printable(text)))

    def on_note(self, text: str, **where: Any) -> None:
        # Text, not markup: the name of a client may be "[red]".
        self._console.print(Text.assemble(("note: ", "yellow"), printable(text)))

    def on_run_end(self, summary: RunSummary) -> None:
        self.close()
        super().on_run_end(summary)
        self._console.print(Text(_summary_line(summary, self.last), style="bold"))

    def close(self) -> None:
        if self._live is not None:
            # The last frame stays on the screen, without the phase that was under way.
            self._phase, self._closing = None, True
            self._live.stop()
            self._live = None

    def seconds_left(self) -> float | None:
        """Estimated remaining time, from the mean of the last five rounds; None before the first round has ended."""
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


def make_progress(
    stream: TextIO | None = None, *, quiet: bool = False, kept: bool = True, notes: Sequence[str] = ()
) -> Observer:
    """Create the view for `stream` (stderr if None): none if `quiet`, live on a terminal,
    otherwise one line per round. Without `kept`, the run folder is temporary and is not named. It shows `notes` first.
    """
    if quiet:
        return Observer()
    stream = sys.stderr if stream is None else stream
    console = Console(file=stream) if stream.isatty() else None
    # A dumb terminal cannot move its cursor, so nothing can be redrawn on it.
    live = console is not None and not console.is_dumb_terminal
    view: _View = LiveProgress(console) if console is not None and live else PlainProgress(stream)
    view.kept, view.notes = kept, notes
    return view


def _table(rows: tuple[dict[str, str], ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    hidden = {key for key in _OPTIONAL if all(row[key] == _NONE for row in rows)}
    for key, title in (
        ("round", "\nround"),
        ("kind", "\nkind"),
        ("task", "\ntask"),
        ("accuracy", "\naccuracy"),
        ("loss", "\nloss"),
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


def _cells(record: RoundRecord) -> dict[str, str]:
    """Return the columns of a round as text, in the order of the table."""
    sent, fedavg = record.uplink_bytes, record.fedavg_uplink_bytes
    accuracy, explained, seconds = record.accuracy, record.explained_variance, record.seconds
    return {
        "round": f"{record.round}",
        "kind": printable(record.label + (", abandoned" if record.abandoned else "")),
        "task": _NONE if record.task is None else f"{record.task}",
        "accuracy": _NONE if accuracy is None else format_fraction(accuracy, 2),
        "loss": _loss_text(record) or _NONE,
        "explained": _NONE if explained is None else format_fraction(explained),
        "uplink": format_bytes(sent) if sent else _NONE,
        "less": format_factor(fedavg / sent) if sent and abs(fedavg / sent - 1) >= _LEVEL else _NONE,
        "epsilon": _round_epsilon(record),
        "time": _NONE if seconds is None else format_seconds(seconds),
    }


def _epsilon_text(epsilon: float) -> str:
    return f"{epsilon:.4g}" if math.isfinite(epsilon) else "inf"


def _round_epsilon(record: RoundRecord) -> str:
    """Return epsilon so far. Noise that the server adds bounds it against readers of the models only."""
    if record.epsilon is None:
        return _NONE
    if record.model_epsilon is not None and not math.isfinite(record.epsilon):
        return f"{_epsilon_text(record.model_epsilon)} (models)"
    return _epsilon_text(record.epsilon)


def _loss_text(record: RoundRecord) -> str:
    """Return the loss of a round without accuracy; "" for others."""
    return "{} {:.4g}".format(*record.shown_loss) if record.shown_loss else ""


def _summary_line(summary: RunSummary, last: RoundRecord | None) -> str:
    words = []
    if summary.final_accuracy is None and last is not None and (loss := _loss_text(last)):
        words.append(f"final {loss}")
    if summary.final_accuracy is not None:
        words.append(f"final accuracy {format_fraction(summary.final_accuracy, 2)}")
    if summary.mean_accuracy is not None and summary.backward_transfer is not None:
        transfer = f"BWT {summary.backward_transfer:+.1f} points"
        words.append(f"ACC {format_fraction(summary.mean_accuracy / 100)}, {transfer}")
    if summary.epsilon is not None and summary.delta is not None:
        words.append(f"epsilon {_epsilon_text(summary.epsilon)} at delta {summary.delta:g}")
        if summary.model_epsilon is not None:
            words[-1] += f" against the server, {_epsilon_text(summary.model_epsilon)} against readers of the models"
    sent, fedavg = summary.uplink_bytes, summary.fedavg_uplink_bytes
    if sent:
        words.append(f"uplink {format_bytes(sent)}")
        if fedavg:
            words[-1] += f", {' '.join(compared(fedavg / sent))} the {format_bytes(fedavg)} FedAvg sends"
    left_out = [(summary.declined, "client"), (summary.unreadable, "unreadable image")]
    if any(count for count, _ in left_out):
        words.append("left out: " + ", ".join(format_count(count, noun) for count, noun in left_out if count))
    if summary.seconds is not None:
        words.append(format_seconds(summary.seconds))
    return "done: " + "; ".join(words) if words else "done"
