"""Options of a run that practitioners ask for: over-sampling, local layers, client accuracy, FedProx, slow links."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import TensorDataset

import tofu
from client import app as honest
from server.app import serve_in_process
from tofu.data import open_data, to_float
from tofu.errors import SettingError
from tofu.observers.base import Observer
from tofu.plugins import Export, export_to_bytes
from tofu.rounds.links import LinkSimulator
from tofu.rounds.record import RoundRecord
from tofu.settings import LinkSettings, Settings
from tofu.wire import CLIENT_ACCURACY, FIELD, RECORD, SECURE, TrainReply

QUICK: dict[str, Any] = {
    "rounds": 2, "local_epochs": 1, "batch_size": 32, "lr": 0.05, "compressor": "stc", "ratio": 10.0,
    "train_images": 200,
}  # fmt: skip


class Release(Observer):
    """Lets a waiting client go on once the second round has ended."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def on_round_end(self, record: RoundRecord) -> None:
        if record.round == 2:
            self.event.set()


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["compressed", "secure"])
def test_rounds_end_with_the_first_replies_and_the_late_client_is_no_failure(kind: str, tmp_path: Path) -> None:
    """Client 2 trains until two rounds are over: the key exchange of the second secure round is without it, too."""
    release = Release()
    app = ClientApp()
    app.query()(honest.hello)

    app.query(SECURE)(honest.secure)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if honest.client_name(context) == "2":
            release.event.wait(60)
        return honest.train(message, context)

    folder = tmp_path / "run"
    given = {"clients": 5, "over_sampling": 1.25, "workers": 5, "run_folder": str(folder), "secure_timeout": 50.0}
    if kind == "secure":
        given |= {"schedule": "switch", "switch_round": 1}
    serve_in_process(app, Settings.of(QUICK | given), release)
    for record in rounds(folder)[1:]:
        assert (record["kind"], record["clients"], record["late"], record["failures"]) == (kind, 4, 1, [])


@pytest.mark.parametrize("kind", ["compressed", "secure"])
def test_over_sampling_asks_more_of_the_clients(kind: str, tmp_path: Path) -> None:
    given = QUICK | {"clients": 10, "client_fraction": 0.4, "over_sampling": 1.25}
    if kind == "secure":
        given |= {"schedule": "switch", "switch_round": 1}
    result = tofu.run(**given, run_folder=str(tmp_path / "run"), progress=False)
    asked = [row for row in result.ledger if row["direction"] == "downlink" and row["kind"] == kind]
    assert {len({row["client"] for row in asked if row["round"] == number}) for number in (1, 2)} == {5}
    assert [(record.clients, record.late) for record in result.history[1:]] == [(4, 1)] * 2


def two_minds() -> list[TensorDataset]:
    """Two clients with the same digits, of which the second calls each class by the next one's name."""
    data = open_data("digits", clients=1, partition="iid", train_images=600, seed=0).client(0)
    images = to_float(data.images)
    return [TensorDataset(images[:300], data.labels[:300]), TensorDataset(images[300:], (data.labels[300:] + 1) % 10)]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def test_personal_heads_serve_clients_that_contradict_each_other(tmp_path: Path) -> None:
    given = QUICK | {
        "rounds": 4, "local_epochs": 4, "lr": 0.2, "client_test_fraction": 0.25, "progress": False,
        "clients": two_minds(), "model": mlp,
    }  # fmt: skip
    del given["train_images"]
    common = tofu.run(**given, run_folder=str(tmp_path / "common"))
    personal = tofu.run(**given, local_layers="3.*", run_folder=str(tmp_path / "personal"))
    worst = [run.history[-1].accuracy_quantiles["0"] for run in (common, personal)]
    assert (worst[0] or 0) < 0.6 < 0.75 < (worst[1] or 0)
    assert set(personal.weights) == {"1.weight", "1.bias"}
    assert personal.history[-1].by_client[0].examples == 225
    found = [entry.test_accuracy or 0 for entry in personal.history[-1].by_client]
    assert personal.history[-1].accuracy_quantiles["100"] == max(found)
    page = personal.report().read_text()
    assert "own test accuracy" in page
    assert "lowest tenth" in page


def test_local_layers_survive_an_interruption_and_go_through_secure_rounds(tmp_path: Path) -> None:
    given: dict[str, Any] = QUICK | {
        "clients": 3,
        "model": "mlp",
        "local_layers": "fc3.*",
        "rounds": 3,
        "progress": False,
    }

    class Interrupt(Observer):
        def on_round_end(self, record: RoundRecord) -> None:
            if record.round == 2:
                raise KeyboardInterrupt

    whole = tofu.run(**given, run_folder=str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        tofu.run(**given, run_folder=str(tmp_path / "cut"), callbacks=[Interrupt()])
    resumed = tofu.run(resume=str(tmp_path / "cut"), progress=False)
    assert resumed.summary.weights_sha256 == whole.summary.weights_sha256
    secure = tofu.run(**given, schedule="secure", run_folder=str(tmp_path / "secure"))
    assert "fc3.weight" not in secure.weights
    assert secure.history[-1].clients == 3


def test_an_impossible_accuracy_is_refused(tmp_path: Path) -> None:
    app = ClientApp()
    app.query()(honest.hello)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = honest.train(message, context)
        if honest.client_name(context) == "1":
            parsed = TrainReply.from_bytes(reply.content.config_records[RECORD][FIELD])
            wrong = dataclasses.replace(parsed, exported=export_to_bytes(Export({}, {CLIENT_ACCURACY: 7.0})))
            return Message(RecordDict({RECORD: ConfigRecord({FIELD: wrong.to_bytes()})}), reply_to=message)
        return reply

    folder = tmp_path / "run"
    given = QUICK | {"clients": 3, "client_test_fraction": 0.2, "rounds": 1, "run_folder": str(folder)}
    serve_in_process(app, Settings.of(given))
    (failure,) = rounds(folder)[1]["failures"]
    assert "accuracy 7, expected 0 to 1" in failure["reason"]


def test_a_proximal_term_keeps_clients_near_the_global_weights(tmp_path: Path) -> None:
    def distance(proximal: float) -> float:
        given = QUICK | {
            "clients": 2,
            "schedule": "fedavg",
            "rounds": 1,
            "ema_decay": 0.0,
            "model": "mlp",
            "local_epochs": 4,
        }
        result = tofu.run(**given, proximal=proximal, run_folder=str(tmp_path / str(proximal)), progress=False)
        from tofu.models import build_model

        start = dict(
            build_model("mlp", open_data("digits", clients=1, partition="iid", seed=0).shape).named_parameters()
        )
        return sum(float((value - start[name]).square().sum()) for name, value in result.weights.items())

    assert distance(5.0) < 0.7 * distance(0.0)


def test_links_turn_the_bytes_of_the_ledger_into_seconds(tmp_path: Path) -> None:
    given = QUICK | {"clients": 3, "uplink_mbps": 1.0, "downlink_mbps": 8.0, "link_latency": 0.5, "link_spread": 1.0}
    result = tofu.run(**given, run_folder=str(tmp_path / "run"), progress=False)
    link = {name: given[name] for name in ("uplink_mbps", "downlink_mbps", "link_spread", "link_latency")}
    links = LinkSimulator(LinkSettings(**link), seed=0)
    own = [row for row in result.ledger if row["client"] == "1" and row["round"] == 2]
    up, down = (sum(row["bytes"] for row in own if row["direction"] == way) for way in ("uplink", "downlink"))
    expected = len(own) * 0.5 + (up * 8 / 1e6 + down * 8 / 8e6) / links.factor("1")
    assert result.history[2].link_seconds["1"] == pytest.approx(expected)
    assert len({links.factor(str(n)) for n in range(3)}) == 3
    assert "transfers on simulated links" in result.report().read_text()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"local_layers": "nothing.*"}, "local_layers='nothing"),
        ({"local_layers": "fc1.*", "plugins": "rank"}, "local_layers='fc1.*' .* none with plugins"),
        ({"client_test_fraction": 0.1, "noise_multiplier": 1.0}, "client_test_fraction=0.1 .* noise_multiplier"),
        ({"over_sampling": 0.5}, "over_sampling=0.5"),
        ({"clients": 5, "over_sampling": 1.3, "schedule": "switch"}, "over_sampling=1.3 .* at most 1.25"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    given = {"model": "mlp", "clients": 2, "run_folder": str(tmp_path / "r"), "progress": False}
    with pytest.raises(SettingError, match=reason):
        tofu.run(**QUICK | given | settings)


def test_learning_rates_follow_their_schedule() -> None:
    def rates(**given: Any) -> list[float]:
        settings = Settings.of({"rounds": 5, "lr": 1.0} | given)
        return [round(settings.training.lr_of(number), 6) for number in range(1, 6)]

    assert rates() == [1.0] * 5
    assert rates(lr_final_factor=0.5)[0] == 1.0
    assert rates(lr_final_factor=0.5)[4] == 0.5
    assert rates(lr_final_factor=0.5, lr_schedule="constant") == [1.0] * 5
    assert rates(lr_schedule="step", lr_step_rounds=2, lr_step_factor=0.1) == [1.0, 1.0, 0.1, 0.1, 0.01]


def test_the_proximal_gradient_is_that_of_its_term() -> None:
    from tofu.training import SGD, LocalTrainingConfig

    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = SGD({"p": parameter}, LocalTrainingConfig(1, 1, lr=0.1, proximal=3.0))
    own, start = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([1.0, -2.0])
    for _ in range(3):
        parameter.grad = None
        (parameter**2).sum().backward()
        optimizer.step()
        (gradient,) = torch.autograd.grad((own**2).sum() + 1.5 * (own - start).square().sum(), own)
        own = (own - 0.1 * gradient).detach().requires_grad_()
    torch.testing.assert_close(parameter.detach(), own.detach())
