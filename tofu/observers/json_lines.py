"""Puts what a run's view is told into the structured log too (`tofu.log`)."""

import logging
from collections.abc import Mapping
from typing import Any

from tofu.errors import TofuError
from tofu.log import about
from tofu.observers.terminal import Progress

LOG = logging.getLogger("tofu.server")
_OF_A_ROUND = (
    "kind", "accuracy", "loss", "clients", "explained_variance", "uplink_bytes", "downlink_bytes", "epsilon",
    "abandoned", "seconds",
)  # fmt: skip
_OF_A_RUN = ("rounds", "final_accuracy", "uplink_bytes", "downlink_bytes", "epsilon", "stopped", "seconds")


class LoggedProgress(Progress):
    """Logs, and hands on to another view.

    Args:
        run: Flower's number of the run.
    """

    def __init__(self, view: Progress, run: int) -> None:
        self._view, self._run = view, run

    def start(self, rounds: int, clients: int, title: str) -> None:
        LOG.info("run begins", extra=about(run=self._run, rounds=rounds, clients=clients, title=title))
        self._view.start(rounds, clients, title)

    def phase(self, round_: int, kind: str, phase: str, done: int, total: int) -> None:
        self._view.phase(round_, kind, phase, done, total)

    def failed(self, round_: int, client: str, node: int, reason: str) -> None:
        LOG.warning("client failed", extra=about(run=self._run, round=round_, node=node, client=client, reason=reason))
        self._view.failed(round_, client, node, reason)

    def round_done(self, row: Mapping[str, Any]) -> None:
        fields = {name: row[name] for name in _OF_A_ROUND if name in row}
        fields["failures"] = len(row["failures"])
        LOG.info("round done", extra=about(run=self._run, round=row["round"], **fields))
        self._view.round_done(row)

    def note(self, text: str, **where: Any) -> None:
        LOG.warning("note", extra=about(run=self._run, text=text, **where))
        self._view.note(text, **where)

    def finish(self, summary: Mapping[str, Any]) -> None:
        fields = {name: summary[name] for name in _OF_A_RUN if name in summary}
        LOG.info("run done", extra=about(run=self._run, folder=summary["run"], **fields))
        self._view.finish(summary)

    def broke_off(self, error: BaseException) -> None:
        foreseen = isinstance(error, TofuError | KeyboardInterrupt)
        reason = str(error) or type(error).__name__
        LOG.error("run failed", exc_info=None if foreseen else error, extra=about(run=self._run, reason=reason))
        self._view.broke_off(error)

    def close(self) -> None:
        self._view.close()
