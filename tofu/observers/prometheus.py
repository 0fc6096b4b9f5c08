"""Prometheus metrics of a run, in the file metrics.prom and, with the setting metrics-port, over HTTP on loopback.

They are computed from round records alone, so a resumed run continues its counters. The node exporter's textfile
collector reads the file: --collector.textfile.directory='/path/to/runs/*'.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from tofu.errors import SettingError
from tofu.files import replace_file
from tofu.observers.base import Observer
from tofu.rounds.record import RoundRecord, RunSummary
from tofu.settings import Settings

HOST = "127.0.0.1"
STATES = ("running", "done", "failed")


class PrometheusMetrics(Collector, Observer):
    """The metrics of one run.

    Args:
        flower_run: the number by which Flower and the logs identify the run.
    """

    def __init__(self, flower_run: int, settings: Settings) -> None:
        self._name, self._planned, self._state = "", settings.training.rounds, STATES[0]
        self._info = {"flower_run": str(flower_run), "model": settings.model.model, "dataset": settings.data.dataset}
        self._folder = Path()
        self._totals: Counter[str] = Counter()
        self._rounds: Counter[str] = Counter()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._explained: dict[tuple[str, str], float] = {}
        self._last = RoundRecord(0, "start")
        self._ended = time.time()
        self._families: tuple[Metric, ...] = ()
        self._stop: Callable[[], None] = lambda: None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def on_history(self, folder: Path, records: Sequence[RoundRecord]) -> None:
        self._folder, self._name = folder, folder.resolve().name
        for record in records:
            self._add(record)
        self._update()

    def on_round_end(self, record: RoundRecord) -> None:
        self._add(record)
        self._update()

    def on_run_end(self, summary: RunSummary) -> None:
        self._state = STATES[1]
        self._update()

    def on_run_error(self, error: BaseException) -> None:
        self._state = STATES[2]
        if self._name:
            with suppress(OSError):
                self._update()

    def _add(self, record: RoundRecord) -> None:
        self._last, self._ended = record, time.time()
        if record.round:
            self._rounds[record.kind] += 1
        self._totals.update(
            uplink=record.uplink_bytes, downlink=record.downlink_bytes, abandoned=bool(record.abandoned)
        )
        for failure in record.failures:
            self._failures[failure.client, failure.node] += 1
        for client in record.by_client:
            if client.explained_variance is not None:
                self._explained[client.client, client.node] = client.explained_variance

    def _update(self) -> None:
        self._families = self._made()
        replace_file(self._folder / "metrics.prom", self.text())

    def collect(self) -> Iterable[Metric]:
        """Called by Prometheus's library, possibly in another thread."""
        return self._families

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def serve(self, port: int) -> None:
        """Serve http://127.0.0.1:port/metrics until `close`; port 0 does nothing.

        Raises:
            SettingError: the port is taken.
        """
        if not port:
            return
        try:
            server, thread = start_http_server(port, addr=HOST, registry=self.registry)
        except OSError as error:
            raise SettingError("metrics-port", port, f"a free port of {HOST} ({error.strerror})") from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stop = stop

    def close(self) -> None:
        self._stop()
        self._stop = lambda: None

    def _made(self) -> tuple[Metric, ...]:
        last, one = self._last, {"run": self._name}
        families = (
            InfoMetricFamily("tofu_run", "Flower run, model and dataset.", value=one | self._info),
            gauge("tofu_run_state", "1 for the current state of the run; a killed run keeps its last state.",
                  [(one | {"state": state}, state == self._state) for state in STATES]),
            gauge("tofu_rounds_planned", "Planned number of rounds.", [(one, self._planned)]),
            counter("tofu_rounds", "Completed rounds by kind.",
                    [(one | {"kind": kind}, count) for kind, count in sorted(self._rounds.items())]),
            counter("tofu_abandoned_rounds", "Abandoned secure rounds.", [(one, self._totals["abandoned"])]),
            gauge("tofu_last_round_end_timestamp_seconds", "End of the last round.", [(one, self._ended)]),
            gauge("tofu_round_seconds", "Duration of the last round.", [(one, last.seconds)]),
            gauge("tofu_clients", "Clients whose updates the last round aggregated.", [(one, last.clients)]),
            gauge("tofu_accuracy", "Test accuracy.", [(one, last.accuracy)]),
            gauge("tofu_loss", "Test loss.", [(one, last.loss)]),
            gauge("tofu_epsilon", "Spent epsilon at the run's privacy-delta.", [(one, last.epsilon)]),
            counter("tofu_uplink_bytes", "Bytes sent by clients.", [(one, self._totals["uplink"])]),
            counter("tofu_downlink_bytes", "Bytes sent to clients.", [(one, self._totals["downlink"])]),
            gauge("tofu_explained_variance", "Explained variance of the client's last decoded update.",
                  self._by_client(self._explained)),
            counter("tofu_client_failures", "Rounds in which the client's reply could not be used.",
                    self._by_client(self._failures)),
        )  # fmt: skip
        return tuple(family for family in families if family.samples)

    def _by_client(self, values: Mapping[tuple[str, str], float]) -> "LabeledValues":
        return [({"run": self._name, "client": client, "node": node}, v) for (client, node), v in values.items()]


LabeledValues = list[tuple[dict[str, str], float | None]]
"""Labels and value; samples whose value is None are omitted."""


def gauge(name: str, help_: str, samples: LabeledValues) -> Metric:
    return _filled(GaugeMetricFamily(name, help_), samples)


def counter(name: str, help_: str, samples: LabeledValues) -> Metric:
    """Its samples are called `name`_total."""
    return _filled(CounterMetricFamily(name, help_), samples, "_total")


def _filled(family: Metric, samples: LabeledValues, suffix: str = "") -> Metric:
    for labels, value in samples:
        if value is not None:
            family.add_sample(family.name + suffix, labels, float(value))
    return family
