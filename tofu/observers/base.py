"""The one interface through which a run is observed: progress views, logs, metrics, trackers and the report.

An observer that writes the accuracy of each round to a file, passed to `server.app.serve_in_process`:

    class Csv(Observer):
        def on_round_end(self, record: RoundRecord) -> None:
            with open("accuracy.csv", "a") as file:
                file.write(f"{record.round},{record.accuracy}\\n")
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tofu.hooks import for_each
from tofu.rounds.record import RoundRecord, RunSummary


class Observer:
    """Receives the events of one run. Every hook is optional and does nothing here.

    Order of calls: `on_run_start`, `on_history`; then for each round `on_phase` (any number of times),
    `on_client_failure` for each failed client, and `on_round_end`; then `on_run_end` or `on_run_error`; `on_note` at
    any time. `close` is last and may be called twice; leaving the context calls it.
    """

    def on_run_start(self, rounds: int, clients: int, title: str) -> None:
        """A run of `rounds` rounds with `clients` clients starts."""

    def on_history(self, folder: Path, records: Sequence[RoundRecord]) -> None:
        """Receive the run folder, and the records before the next round:
        round 0 and, in a resumed run, all earlier rounds.
        """

    def on_phase(self, round_: int, kind: str, phase: str, done: int, total: int) -> None:
        """`done` of the `total` steps of a phase ("share", "train", "reveal", "evaluate") of a round are complete."""

    def on_client_failure(self, round_: int, client: str, node: int, reason: str) -> None:
        """The reply of a client could not be used."""

    def on_round_end(self, record: RoundRecord) -> None:
        """A round from 1 has ended. The run folder already holds its record."""

    def on_note(self, text: str, **where: Any) -> None:
        """There is a message for the user; `where` has its `round` and `node`, if it is about one."""

    def on_run_end(self, summary: RunSummary) -> None:
        """The run has finished."""

    def on_run_error(self, error: BaseException) -> None:
        """The run ends with an error, which the caller reports to the user."""

    def close(self) -> None:
        """Release all resources, such as the terminal or a port."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Observers(tuple[Observer, ...], Observer):
    """Several observers as one: each event goes to all of them, in the order given."""

    on_run_start = for_each(Observer.on_run_start)
    on_history = for_each(Observer.on_history)
    on_phase = for_each(Observer.on_phase)
    on_client_failure = for_each(Observer.on_client_failure)
    on_round_end = for_each(Observer.on_round_end)
    on_run_end = for_each(Observer.on_run_end)
    on_run_error = for_each(Observer.on_run_error)
    close = for_each(Observer.close)

    def on_note(self, text: str, **where: Any) -> None:
        for observer in self:
            observer.on_note(text, **where)
