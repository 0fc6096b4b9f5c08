"""The plan's numbers, each against what the codec writes or against plain arithmetic."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from client.app import app as client_app
from server.app import serve_in_process
from server.ledger import reply_overhead
from tofu import plan as planning
from tofu.compression import uplink_compressor
from tofu.data import FederatedData, ImageShape
from tofu.errors import SettingError
from tofu.models import build_model
from tofu.plan import Plan, estimate_seconds, make_plan, planned_privacy
from tofu.privacy import Accountant
from tofu.reference_model import ReferenceModel
from tofu.settings import Settings
from tofu.wire import HEADER_BYTES

SHAPE = ImageShape(1, 8, 8, 10)
OVERHEAD = 600


def network_of(settings: Settings) -> ReferenceModel:
    return ReferenceModel(build_model(settings.model.model, SHAPE, norm=settings.model.norm).eval(), SHAPE)


def plan(fedavg_rounds: int = 0, **values: object) -> Plan:
    settings = Settings.of({"model": "mlp", "rounds": 10, "bits": 8, "correction": 0.0} | values)
    return make_plan(settings, network_of(settings), fedavg_rounds=fedavg_rounds, message_overhead=OVERHEAD)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"ratio": 10.0},
        {"proxies": 3, "proxy-size": 8},
        {"bits": 5},
        {"codec-mode": "paper"},
        {"compressor": "none"},
        {"model": "cnn", "norm": "batch", "ratio": 200.0},
    ],
)
def test_the_payload_is_what_the_codec_writes(values: dict[str, object]) -> None:
    settings = Settings.of({"model": "mlp", "max_evals": 1} | values)
    network = network_of(settings)
    made = make_plan(settings, network, fedavg_rounds=0, message_overhead=OVERHEAD)
    update = {name: torch.randn(shape) / 100 for name, shape in network.param_spec.shapes.items()}
    compressor = uplink_compressor(settings, "compressed", network)
    body = compressor.compress(network, update, generator=torch.Generator().manual_seed(0)).body
    # A correction may leave a few bytes: it takes whole entries, and as many as explain the most.
    assert 0.95 * made.payload_bytes <= HEADER_BYTES + len(body) <= made.payload_bytes


@pytest.mark.parametrize("ratio", [2.0, 17.0, 100.0, 900.0])
def test_as_many_proxies_as_the_ratio_affords(ratio: float) -> None:
    made = plan(ratio=ratio)
    assert made.payload_ratio >= ratio
    assert plan(ratio=ratio, proxies=made.proxies).payload_bytes == made.payload_bytes
    assert plan(ratio=ratio, proxies=made.proxies + 1).payload_ratio < ratio


def test_a_model_and_its_update() -> None:
    made = plan()
    assert made.parameters == 64 * 200 + 200 + 200 * 100 + 100 + 100 * 10 + 10
    assert made.update_bytes == 4 * made.parameters
    buffers = plan(model="cnn", norm="batch", ratio=200)
    # 32 + 64 + 128 channels, each with a running mean and variance, and three batch counters.
    assert buffers.update_bytes == 4 * (buffers.parameters + 2 * 224 + 3)


def test_the_proxies_asked_for() -> None:
    made = plan(proxies=5, **{"proxy-size": 6})
    assert (made.proxies, made.proxy_side) == (5, 6)


def test_the_run_is_the_sum_of_its_messages() -> None:
    made = plan(fedavg_rounds=2, rounds=8, clients=5)
    full = HEADER_BYTES + made.update_bytes + OVERHEAD
    assert (made.compressed_rounds, made.fedavg_rounds) == (6, 2)
    assert made.uplink_bytes == 5 * (6 * (made.payload_bytes + OVERHEAD) + 2 * full)
    assert made.downlink_bytes == made.fedavg_uplink_bytes == 5 * 8 * full
    assert made.uplink_ratio == pytest.approx(made.fedavg_uplink_bytes / made.uplink_bytes)


def test_fedavg_rounds_throughout_are_fedavg() -> None:
    made = plan(fedavg_rounds=4, rounds=4, schedule="fedavg")
    assert made.uplink_bytes == made.fedavg_uplink_bytes
    assert made.uplink_ratio == 1


@pytest.mark.parametrize(
    ("values", "rounds"),
    [
        ({"schedule": "fedavg", "server_noise": "correlated", "min_separation": 4, "client_fraction": 0.25}, 10),
        ({"schedule": "fedavg", "server_noise": "correlated", "min_separation": 4, "client_fraction": 0.25,
          "max_epsilon": 3.0}, 8),
        ({"schedule": "secure", "secure_ratio": 1.5, "secret_sampling": True, "client_fraction": 0.25}, 10),
        ({"schedule": "secure", "secure_ratio": 1.5, "max_epsilon": 4.5}, 4),
    ],
)  # fmt: skip
def test_what_a_run_spends_of_its_privacy_budget(values: dict[str, Any], rounds: int) -> None:
    """Rounds of a block of `min_separation` rounds have disjoint clients, so that they count once."""
    settings = Settings.of({"model": "mlp", "rounds": 10, "clients": 20, "noise_multiplier": 2.0} | values)
    planned = planned_privacy(settings)
    assert planned is not None
    assert planned.private_rounds == rounds
    account = Accountant(settings.privacy.privacy_delta)
    drawn = (5, 20) if "secret_sampling" in values else ()
    for _ in range(math.ceil(rounds / settings.privacy.min_separation)):
        account.spend(2.0, "secure", *drawn)
    assert planned.epsilon == (math.inf if "server_noise" in values else account.epsilon)
    assert planned.model_epsilon == (account.model_epsilon if drawn else account.epsilon)


@pytest.mark.parametrize("schedule", ["fedavg", "secure"])
def test_a_ratio_that_no_round_uses_is_not_checked(schedule: str) -> None:
    settings = Settings.of({"model": "mlp", "ratio": 1e5, "rounds": 4, "schedule": schedule})
    secure = 4 if schedule == "secure" else 0
    made = make_plan(
        settings, network_of(settings), message_overhead=OVERHEAD, fedavg_rounds=4 - secure, secure_rounds=secure
    )
    assert (made.payload_bytes, made.proxies, made.payload_ratio) == (0, 0, 0.0)
    assert made.secure_bytes == (made.uplink_bytes // 40 if schedule == "secure" else 0)


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        ({}, 10),
        ({"client_fraction": 0.5}, 5),
        ({"client_fraction": 0.01}, 1),
        ({"client_fraction": 0.2, "min-clients": 4}, 4),
    ],
)
def test_only_the_clients_asked_count(values: dict[str, Any], asked: int) -> None:
    one = plan(clients=1)
    made = plan(**values)
    assert made.uplink_bytes == asked * one.uplink_bytes
    assert made.downlink_bytes == asked * one.downlink_bytes
    assert made.fedavg_uplink_bytes == asked * one.fedavg_uplink_bytes


def test_other_codecs_have_no_proxies() -> None:
    made = plan(compressor="none")
    assert (made.proxies, made.proxy_side) == (0, 0)
    assert made.payload_bytes == HEADER_BYTES + made.update_bytes


# Warnings and errors


def test_a_usual_plan_has_no_warnings() -> None:
    assert plan().warnings == ()


def test_a_payload_larger_than_the_update_is_warned_of() -> None:
    (warning,) = plan(proxies=9000).warnings
    assert "no smaller than the update" in warning
    assert plan(fedavg_rounds=10, schedule="fedavg", proxies=9000).warnings == ()  # it would not be sent


def test_a_message_larger_than_its_payload_is_warned_of() -> None:
    (warning,) = plan(ratio=1000).warnings
    assert "Flower's 600 bytes a message outweigh the payload" in warning
    assert plan(fedavg_rounds=10, schedule="fedavg", ratio=1000).warnings == ()


def test_a_ratio_without_room_for_a_proxy_is_noted_with_the_best_that_has_it() -> None:
    made = plan(ratio=2500, correction=0.4)
    note = made.warnings[0]
    assert made.proxies == 0
    assert f"at ratio 2500 a payload of this model has {made.payload_bytes} bytes and no room for a proxy" in note
    best = float(note.split("at most ")[1].split()[0])
    assert plan(ratio=best, correction=0.4).proxies == 1
    assert plan(ratio=best + 0.1, correction=0.4).proxies == 0
    assert not any("proxy" in text for text in plan(ratio=2500, correction=1.0).warnings)  # nobody asked for proxies
    assert not plan(fedavg_rounds=10, schedule="fedavg", ratio=2500, correction=0.4).warnings
    (step,) = plan(correction=0.4, downlink="proxy", **{"downlink-ratio": 2500.0}).warnings
    assert step.startswith("steps of the server: at ratio 2500")


def test_a_ratio_out_of_reach_is_refused_with_the_best_there_is() -> None:
    with pytest.raises(SettingError, match=r"^ratio=100000\.0 is not usable: expected at most ") as caught:
        plan(ratio=1e5)
    best = float(caught.value.accepted.split()[2])
    assert plan(ratio=best).proxies == 1


def test_a_compressed_downlink_is_planned_as_the_run_sends_it(tmp_path: Path) -> None:
    for fraction in (1.0, 0.5):
        settings = Settings.of({"model": "mlp", "clients": 4, "rounds": 6, "client_fraction": fraction,
                                "local-epochs": 1, "max_evals": 2, "ratio": 40.0, "downlink": "proxy",
                                "downlink-ratio": 30.0,
                                "run-folder": str(tmp_path / f"{fraction}")})  # fmt: skip
        network = network_of(settings)
        made = make_plan(settings, network, fedavg_rounds=0, message_overhead=reply_overhead())
        summary = serve_in_process(client_app, settings)
        assert made.step_bytes <= network.param_spec.float32_bytes / 30
        downlink = summary["downlink_bytes"]
        assert isinstance(downlink, int)
        assert made.downlink_bytes == pytest.approx(downlink, rel=0.1 if fraction == 1 else 0.3)


def test_a_large_model_is_estimated_without_a_whole_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extrapolated from brief searches, the time is near that of whole encodes, and takes a fraction of it."""
    settings = Settings.of({"model": "cnn", "ratio": 100.0, "tolerance": 0.0})
    data = FederatedData.of(settings.data, 0)
    network = ReferenceModel(build_model(settings.model.model, data.shape).eval(), data.shape)
    monkeypatch.setattr(planning.time, "perf_counter", time.process_time)  # other processes do not count
    estimate_seconds(settings, network, data.client(0), images=1000, compressed_rounds=1)  # what is slow at first only
    seconds, spent = [], []
    for limit in (0.0, 1e9):
        monkeypatch.setattr(planning, "_TIMED_SECONDS", limit)
        began = time.process_time()
        made = estimate_seconds(settings, network, data.client(0), images=1000, compressed_rounds=1)
        spent.append(time.process_time() - began)
        seconds.append(made.encoding)
    assert 1 / 4 < seconds[0] / seconds[1] < 2
    assert spent[0] < spent[1] / 2
