"""A run's metrics for Prometheus: what an operator watches, in the file metrics.prom and, where wanted, behind a port.

All of it is made from the rows of metrics.jsonl, so that a run that was resumed goes on counting where it was. The file
is what the node exporter's textfile collector reads: --collector.textfile.directory='/…/runs/*'.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from tofu.errors import SettingError
from tofu.settings import Settings

HOST = "127.0.0.1"
STATES = ("running", "done", "failed")


class RunMetrics(Collector):
    """The metrics of one run.

    Args:
        flower_run: the number by which Flower and the logs know the run.
    """

    def __init__(self, flower_run: int, settings: Settings) -> None:
        self._name, self._planned, self._state = "", settings.rounds, STATES[0]
        self._info = {"flower_run": str(flower_run), "model": settings.model, "dataset": settings.dataset}
        self._totals: Counter[str] = Counter()
        self._rounds: Counter[str] = Counter()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._explained: dict[tuple[str, str], float] = {}
        self._last: Mapping[str, Any] = {}
        self._ended = time.time()
        self._families: tuple[Metric, ...] = ()
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def begin(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """The rounds begin, after those of `rows`; `name` is the label `run` of every sample: the folder's name."""
        self._name = name
        self.add(rows)

    @property
    def begun(self) -> bool:
        """Whether they have."""
        return bool(self._name)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count rounds, each a row of metrics.jsonl."""
        for row in rows:
            self._last, self._ended = row, time.time()
            if row["round"]:
                self._rounds[row["kind"]] += 1
            self._totals.update({name: row[name] for name in ("uplink_bytes", "downlink_bytes")})
            self._totals["abandoned"] += bool(row.get("abandoned"))
            for entry in row["failures"]:
                self._failures[entry["client"], entry.get("node", "")] += 1
            for entry in row.get("by_client", ()):
                self._explained[entry["client"], entry.get("node", "")] = entry["explained_variance"]
        self._families = self._made()

    def end(self, *, failed: bool) -> None:
        """The run is over."""
        self._state = STATES[2 if failed else 1]
        self._families = self._made()

    def collect(self) -> Iterable[Metric]:
        """What Prometheus's library asks for; another thread than the run's may."""
        return self._families

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)

    @contextmanager
    def served(self, port: int) -> Iterator[None]:
        """Answer http://127.0.0.1:port/metrics; port 0 does nothing. Raises SettingError for one that is taken."""
        if not port:
            yield
            return
        try:
            server, thread = start_http_server(port, addr=HOST, registry=self.registry)
        except OSError as error:
            raise SettingError("metrics-port", port, f"a port of {HOST} that is free ({error.strerror})") from error
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _made(self) -> tuple[Metric, ...]:
        row, one = self._last, {"run": self._name}
        epsilon = float("inf") if row.get("epsilon") is None else row["epsilon"]  # JSON has no infinity
        families = (
            InfoMetricFamily("tofu_run", "What is run.", value=one | self._info),
            gauge("tofu_run_state", "1 for the state that the run is in; one that was killed stays as it was.",
                  [(one | {"state": state}, state == self._state) for state in STATES]),
            gauge("tofu_rounds_planned", "Rounds that the run is to have.", [(one, self._planned)]),
            counter("tofu_rounds", "Rounds done, by kind.",
                    [(one | {"kind": kind}, count) for kind, count in sorted(self._rounds.items())]),
            counter("tofu_abandoned_rounds", "Secure rounds that came to nothing.", [(one, self._totals["abandoned"])]),
            gauge("tofu_last_round_end_timestamp_seconds", "When the last round ended.", [(one, self._ended)]),
            gauge("tofu_round_seconds", "What the last round took.", [(one, row.get("seconds"))]),
            gauge("tofu_clients", "Clients whose updates are in the last round.", [(one, row.get("clients"))]),
            gauge("tofu_accuracy", "Share of the test images told rightly.", [(one, row.get("accuracy"))]),
            gauge("tofu_loss", "Loss on the test images.", [(one, row.get("loss"))]),
            gauge("tofu_epsilon", "Privacy spent, at the run's privacy-delta.",
                  [(one, epsilon)] if "epsilon" in row else []),
            counter("tofu_uplink_bytes", "Bytes that clients sent.", [(one, self._totals["uplink_bytes"])]),
            counter("tofu_downlink_bytes", "Bytes sent to clients.", [(one, self._totals["downlink_bytes"])]),
            gauge("tofu_explained_variance", "Of a client's update, by the last payload that it sent.",
                  self._by_client(self._explained)),
            counter("tofu_client_failures", "Rounds in which something of a client's could not be used.",
                    self._by_client(self._failures)),
        )  # fmt: skip
        return tuple(family for family in families if family.samples)

    def _by_client(self, values: Mapping[tuple[str, str], float]) -> "Samples":
        return [({"run": self._name, "client": client, "node": node}, v) for (client, node), v in values.items()]


Samples = list[tuple[dict[str, str], float | None]]
"""Labels and value; one without a value is left out."""


def gauge(name: str, what: str, samples: Samples) -> Metric:
    """What goes up and down."""
    return _filled(GaugeMetricFamily(name, what), samples)


def counter(name: str, what: str, samples: Samples) -> Metric:
    """What only grows; its samples are called `name`_total."""
    return _filled(CounterMetricFamily(name, what), samples, "_total")


def _filled(family: Metric, samples: Samples, suffix: str = "") -> Metric:
    for labels, value in samples:
        if value is not None:
            family.add_sample(family.name + suffix, labels, float(value))
    return family
