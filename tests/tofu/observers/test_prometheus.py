"""Metrics for Prometheus, read back by its library's own parser."""

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import free_port
from tofu.errors import SettingError
from tofu.observers.prometheus import PrometheusMetrics
from tofu.rounds.record import ClientRecord, Failure, RoundRecord, RunSummary
from tofu.settings import Settings

Row = dict[str, Any]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
HOSTILE = 'a "client"\n{of="ours"} \\ 1'


def samples(text: str) -> Samples:
    """(name, labels other than the run's) -> value."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in ("gauge", "counter")
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("run") == "run-1"
            key = sample.name, tuple(sorted(labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def row(number: int, **more: Any) -> RoundRecord:
    own: Row = {
        "round": number, "kind": "compressed" if number else "start", "accuracy": number / 10, "loss": None,
        "clients": 2, "uplink_bytes": 100 * number, "downlink_bytes": 1000 * number, "seconds": 1.5,
    }  # fmt: skip
    return RoundRecord(**own | more)


def seen(metrics: PrometheusMetrics) -> Samples:
    return samples(metrics.text().decode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run-1").mkdir()
    return tmp_path / "run-1"


@pytest.fixture
def metrics() -> PrometheusMetrics:
    return PrometheusMetrics(2**63, Settings.of({"rounds": 9}))


def test_rounds_add_up(metrics: PrometheusMetrics, folder: Path) -> None:
    metrics.on_history(folder, [row(0)])
    failed = (Failure(HOSTILE, "late", "7"),)
    metrics.on_round_end(row(1, failures=failed, by_client=(ClientRecord("0", "6", 0.5),)))
    metrics.on_round_end(row(2, failures=failed, by_client=(ClientRecord("0", "6", 0.25),)))
    metrics.on_round_end(row(3, kind="secure", abandoned="too few", epsilon=1.5))
    found = seen(metrics)
    assert found["tofu_rounds_total", (("kind", "compressed"),)] == 2
    assert found["tofu_rounds_total", (("kind", "secure"),)] == 1
    assert ("tofu_rounds_total", (("kind", "start"),)) not in found
    assert found["tofu_abandoned_rounds_total", ()] == 1
    assert found["tofu_rounds_planned", ()] == 9
    assert (found["tofu_uplink_bytes_total", ()], found["tofu_downlink_bytes_total", ()]) == (600, 6000)
    assert found["tofu_client_failures_total", (("client", HOSTILE), ("node", "7"))] == 2
    assert found["tofu_explained_variance", (("client", "0"), ("node", "6"))] == 0.25
    assert (found["tofu_accuracy", ()], found["tofu_epsilon", ()], found["tofu_round_seconds", ()]) == (0.3, 1.5, 1.5)
    assert found["tofu_run_info", (("dataset", "digits"), ("flower_run", str(2**63)), ("model", "mlp"))] == 1
    assert not any(name == "tofu_loss" for name, _ in found)  # it is not finite


def test_epsilon_without_bound_is_infinite_and_absent_without_noise(metrics: PrometheusMetrics, folder: Path) -> None:
    metrics.on_history(folder, [row(0)])
    assert ("tofu_epsilon", ()) not in seen(metrics)
    metrics.on_round_end(row(1, epsilon=float("inf")))
    assert seen(metrics)["tofu_epsilon", ()] == float("inf")


@pytest.mark.parametrize(("failed", "state"), [(False, "done"), (True, "failed")])
def test_the_state_is_one_of_three(failed: bool, state: str, metrics: PrometheusMetrics, folder: Path) -> None:
    metrics.on_history(folder, [row(0)])
    assert seen(metrics)["tofu_run_state", (("state", "running"),)] == 1
    if failed:
        metrics.on_run_error(RuntimeError())
    else:
        metrics.on_run_end(RunSummary())
    states = {key[1][0][1]: value for key, value in seen(metrics).items() if key[0] == "tofu_run_state"}
    assert {name for name, value in states.items() if value} == {state}
    assert len(states) == 3


def test_they_are_served_while_the_run_goes_on_and_no_longer(metrics: PrometheusMetrics, folder: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/metrics"
    metrics.on_history(folder, [row(0)])
    metrics.serve(port)
    metrics.on_round_end(row(1))
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert samples(answer.read().decode()) == seen(metrics)
    with pytest.raises(SettingError) as caught:
        PrometheusMetrics(1, Settings()).serve(port)
    assert (caught.value.field, caught.value.value) == ("metrics-port", port)
    metrics.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=10)
