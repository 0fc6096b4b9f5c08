"""What an app's server receives, recorded and attacked with the app's own model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg, Krum

import tofu
from attacks.recorded import attack_run
from tests.attacks.conftest import attack_command
from tests.tofu.flower.quickstart import CLIENTS, DATA, SHAPE, Net, federate, strategy_of, train
from tofu.errors import RunError, SettingError, TofuError
from tofu.flower.update_codec import UpdateCodec
from tofu.recording import AppRecording, read_recording, recordings

KNOWN: dict[str, Any] = {"input_shape": SHAPE, "batch_size": 32}
WHERE = {"model": "tests.tofu.flower.test_record:net", "dataset": "tests.tofu.flower.test_record:images_of"}


def net() -> Net:
    """As an attacker builds it: other weights than those of the run."""
    torch.manual_seed(7)
    return Net()


def images_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if name == "sum":
        parts = [DATA.client(number) for number in range(CLIENTS)]
        return torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    data = DATA.test() if name == "test" else DATA.client(int(name))
    return data.images, data.labels


def named(message: Message, context: Context) -> Message:
    reply = train(message, context)
    reply.content["metrics"]["partition-id"] = int(context.node_config["partition-id"])
    return reply


def read(folder: Path) -> list[AppRecording]:
    found = [read_recording(path) for path in recordings(folder)]
    assert all(isinstance(one, AppRecording) for one in found)
    return [one for one in found if isinstance(one, AppRecording)]


def test_plain_arrays_are_recorded_and_attacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = federate(tofu.record(strategy_of(), tmp_path, clients=1, **KNOWN), rounds=2, handler=named)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    found = read(tmp_path)
    assert [(one.round, one.client, one.lr) for one in found] == [(1, found[0].client, 0.1), (2, found[0].client, 0.1)]
    assert found[0].examples == len(DATA.client(int(found[0].client)))
    arguments = ["--attacks", "label-counts,analytic", "--model", WHERE["model"], "--dataset", WHERE["dataset"]]
    assert attack_command([str(tmp_path), *arguments, "--quiet"]) == 0
    rows = attack_run(tmp_path, tmp_path / "attacks", attacks=("label-counts",), log=print, **WHERE)
    assert [row["message"] for row in rows] == ["exact", "exact"]
    assert rows[0]["labels"] > 0.7  # of an exact update the counts of the labels can be read
    assert rows[0]["steps"] == -(-found[0].examples // 32)
    assert (tmp_path / "attacks" / "report.html").is_file()


@pytest.mark.parametrize("descending", [False, True])
def test_the_first_clients_by_name_are_recorded_whichever_replies_first(tmp_path: Path, descending: bool) -> None:
    strategy = tofu.record(strategy_of(), tmp_path, clients=1, **KNOWN)
    aggregate = strategy.aggregate_train

    def in_order(server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        by_name = sorted(replies, key=lambda reply: reply.content["metrics"]["partition-id"], reverse=descending)
        return aggregate(server_round, by_name)

    strategy.aggregate_train = in_order  # type: ignore[method-assign]
    federate(strategy, rounds=1, handler=named)
    assert [one.client for one in read(tmp_path)] == ["0"]


def test_payloads_are_recorded_as_received_and_decode_to_what_the_strategy_got(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": 50, "proxies_below": 1}
    strategy = tofu.record(tofu.Compressed(strategy_of(), Net, SHAPE, **options), tmp_path, **KNOWN)
    result = federate(strategy, tofu.compress(Net, SHAPE, **options), rounds=1, handler=named)
    found = read(tmp_path)
    assert sorted(one.client for one in found) == [str(number) for number in range(CLIENTS)]
    total, mean = sum(one.examples for one in found), dict[str, torch.Tensor]()
    for one in found:
        assert one.codec is not None
        assert len(one.payload) < 4 * 9610 / 50
        codec = UpdateCodec(net, SHAPE, **vars(one.codec))
        update = codec.decode(codec.reference(one.base).reference, one.payload, 1)
        for name, value in update.items():
            mean[name] = mean.get(name, 0) + value * one.examples / total
    for name, value in result.arrays.to_torch_state_dict().items():
        torch.testing.assert_close(value, found[0].base[name] + mean[name], atol=1e-6, rtol=0)
    rows = attack_run(tmp_path, tmp_path / "attacks", attacks=("proxy-images",), log=lambda _: None, **WHERE)
    assert {row["message"] for row in rows} == {"recorded proxy"}
    assert all(row["psnr"] is not None for row in rows)


def test_of_secure_rounds_the_sum_is_recorded(tmp_path: Path) -> None:
    strategy = tofu.SecureAggregation(tofu.record(strategy_of(), tmp_path, **KNOWN))
    federate(strategy, tofu.secure(), rounds=2, handler=named)
    found = read(tmp_path)
    assert [(one.round, one.client, one.clients) for one in found] == [(1, "sum", CLIENTS), (2, "sum", CLIENTS)]
    rows = attack_run(tmp_path, tmp_path / "attacks", attacks=("label-counts",), log=lambda _: None, **WHERE)
    assert {row["message"] for row in rows} == {f"recorded sum of {CLIENTS}"}


def test_around_secure_rounds_there_is_nothing_to_record(tmp_path: Path) -> None:
    strategy = tofu.record(tofu.SecureAggregation(strategy_of()), tmp_path, **KNOWN)
    result = federate(strategy, tofu.secure(), rounds=1, handler=named)
    assert result.train_metrics_clientapp[1]["tofu-clients"] == CLIENTS
    with pytest.raises(RunError):
        recordings(tmp_path)


def test_a_recorded_strategy_that_needs_individual_updates_is_refused_in_secure_rounds(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="strategy='Krum'"):
        tofu.SecureAggregation(tofu.record(Krum(), tmp_path, **KNOWN))


def test_an_app_with_its_own_normalization_is_attacked_in_pixels(tmp_path: Path) -> None:
    strategy = tofu.record(strategy_of(), tmp_path, clients=1, mean=0.1, std=0.3, **KNOWN)
    federate(strategy, rounds=1, handler=named)
    rows = attack_run(tmp_path, tmp_path / "a", attacks=("analytic", "label-counts"), log=lambda _: None, **WHERE)
    assert [bool(row["refused"]) for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": None}, "model=None is not usable: expected package.module:function"),
        ({"dataset": "digits"}, "dataset='digits' is not usable: expected package.module:function"),
        ({"model": "no.such:thing"}, "model='no.such:thing' is not usable"),
        ({"model": "torch.nn:Flatten"}, "the recorded arrays are not those of model='torch.nn:Flatten'"),
        ({"model": "tests.tofu.flower.test_record:KNOWN"}, "is not usable"),
    ],
)
def test_a_wrong_model_or_dataset_is_one_line(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    federate(tofu.record(strategy_of(), tmp_path, clients=1, **KNOWN), rounds=1, handler=named)
    with pytest.raises(TofuError) as caught:
        attack_run(tmp_path, tmp_path / "a", attacks=("label-counts",), log=print, **(WHERE | change))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"examples": ', '"examples": -'), ('"std": 0.5', '"std": 0'), ('"version": 1', '"version": 2'),
        ('"clients": 1', '"clients": "many"'), ('"round": 1,\\n  "client"', '"round": 3,\\n  "client"'),
        ('"mean": 0.5', '"mean": 0.5, "more": 1'),
        ('"codec": null', '"codec": {"compressor": "a:b", "ratio": 1, "correction": 0, "over_relaxation": 1}'),
    ],
)  # fmt: skip
def test_a_damaged_recording_is_refused(tmp_path: Path, old: str, new: str) -> None:
    federate(tofu.record(strategy_of(), tmp_path, clients=1, **KNOWN), rounds=1, handler=named)
    path = recordings(tmp_path)[0]
    text = (path / "record.json").read_text()
    old, new = old.replace("\\n", "\n"), new.replace("\\n", "\n")
    assert old in text
    (path / "record.json").write_text(text.replace(old, new))
    with pytest.raises(RunError, match=r"record\.json"):
        read_recording(path)


def test_misuse_is_one_line(tmp_path: Path) -> None:
    for change, named_ in (({"batch_size": 0}, "batch_size=0"), ({"clients": 0}, "clients=0"), ({"lr": -1.0}, "lr=-1")):
        with pytest.raises(SettingError, match=f"^{named_}.* is not usable"):
            tofu.record(FedAvg(), tmp_path, **(KNOWN | change))
    with pytest.raises(SettingError, match=r"input_shape=\(64,\)"):
        tofu.record(FedAvg(), tmp_path, input_shape=(64,), batch_size=1)  # type: ignore[arg-type]
