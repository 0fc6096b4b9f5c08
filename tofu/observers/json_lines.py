"""The events of a run in the structured log (`tofu.log`)."""

import logging
from typing import Any

from tofu.errors import TofuError
from tofu.log import about
from tofu.observers.base import Observer
from tofu.rounds.record import RoundRecord, RunSummary, to_dict

LOG = logging.getLogger("tofu.server")
_OF_A_ROUND = (
    "kind", "accuracy", "loss", "clients", "explained_variance", "uplink_bytes", "downlink_bytes", "epsilon",
    "abandoned", "seconds",
)  # fmt: skip
_OF_A_RUN = ("rounds", "final_accuracy", "uplink_bytes", "downlink_bytes", "epsilon", "stopped", "seconds")


class JsonLinesLog(Observer):
    """Logs every event but phases.

    Args:
        run: Flower's number of the run.
    """

    def __init__(self, run: int) -> None:
        self._run = run

    def on_run_start(self, rounds: int, clients: int, title: str) -> None:
        LOG.info("run begins", extra=about(run=self._run, rounds=rounds, clients=clients, title=title))

    def on_client_failure(self, round_: int, client: str, node: int, reason: str) -> None:
        LOG.warning("client failed", extra=about(run=self._run, round=round_, node=node, client=client, reason=reason))

    def on_round_end(self, record: RoundRecord) -> None:
        fields = _some(to_dict(record), _OF_A_ROUND) | {"failures": len(record.failures)}
        LOG.info("round done", extra=about(run=self._run, round=record.round, **fields))

    def on_note(self, text: str, **where: Any) -> None:
        LOG.warning("note", extra=about(run=self._run, text=text, **where))

    def on_run_end(self, summary: RunSummary) -> None:
        fields = _some(to_dict(summary), _OF_A_RUN)
        LOG.info("run done", extra=about(run=self._run, folder=summary.run, **fields))

    def on_run_error(self, error: BaseException) -> None:
        expected = isinstance(error, TofuError | KeyboardInterrupt)
        reason = str(error) or type(error).__name__
        LOG.error("run failed", exc_info=None if expected else error, extra=about(run=self._run, reason=reason))


def _some(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
