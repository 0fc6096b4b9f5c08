"""The client's handlers, called as Flower calls them, with real messages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from client import local_round
from client.app import app
from client.local_round import client_data
from tofu.codec.compressor import ProxyCompressor
from tofu.compression import uplink_compressor
from tofu.data import ImageShape, LabeledImages
from tofu.errors import DataError, PayloadError, PolicyError
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.secagg.encoding import EncodingConfig
from tofu.settings import Settings
from tofu.weights import cosine, fingerprint, layout_of, weights_of
from tofu.wire import (
    FIELD,
    HEADER_BYTES,
    RECORD,
    WEIGHTS,
    Payload,
    SecurePart,
    TrainReply,
    TrainRequest,
    float32_bytes,
    read_payload,
)

SHAPE = ImageShape(1, 8, 8, 10)
SETTINGS = Settings.of(
    {
        "model": "mlp",
        "clients": 2,
        "ratio": 40.0,
        "max_evals": 15,
        "lr": 0.1,
        "over_relaxation": 1.0,
        "step_ahead": 0.0,
        "bits": 8,
        "local-epochs": 1,
        "batch-size": 32,
    }
)


def context(**node_config: str | int) -> Context:
    return Context(1, 2, dict(node_config), RecordDict(), SETTINGS.to_config())


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's Message asks which task it is made in."""
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


def request(kind: str = "compressed", round_: int = 1, acknowledged: int = -1, *, seed: int = 0) -> TrainRequest:
    model = build_model("mlp", SHAPE, seed=seed)
    weights = weights_of(model)
    payload = Payload(WEIGHTS, round_, fingerprint(weights), float32_bytes(weights, layout_of(model)))
    return TrainRequest(kind, acknowledged, SHAPE, payload.to_bytes(), payload.fingerprint)


def train_round(request: TrainRequest, round_: int, settings: Settings, context: Context) -> TrainReply:
    return TrainReply.from_bytes(local_round.train_round(request, round_, settings, context))


def decoded(reply: TrainReply, kind: str, round_: int) -> dict[str, torch.Tensor]:
    """What the server makes of a reply to `request()`."""
    network = ReferenceModel(build_model("mlp", SHAPE, seed=0).eval(), SHAPE)
    compressor = uplink_compressor(SETTINGS, kind, network)
    base = fingerprint(weights_of(network.model))
    payload = read_payload(reply.payload, codec=compressor.code, round_=round_, fingerprint=base, max_bytes=10**7)
    return compressor.decompress(network, payload.body)


def write_images(folder: Path, data: LabeledImages, classes: list[int]) -> None:
    for label in classes:
        (folder / str(label)).mkdir(parents=True)
        rows = (data.labels == label).nonzero().flatten()[:8]
        for i, row in enumerate(rows):
            Image.fromarray(data.images[row, 0].numpy()).save(folder / str(label) / f"{i}.png")


def test_a_proxy_reply_decodes_to_about_the_update_and_a_full_one_to_it() -> None:
    proxy = train_round(request(), 1, SETTINGS, context(**{"partition-id": 0}))
    full = train_round(request("fedavg"), 1, SETTINGS, context(**{"partition-id": 0}))
    approximate, exact = decoded(proxy, "compressed", 1), decoded(full, "fedavg", 1)
    assert cosine(exact, approximate) == pytest.approx(proxy.cosine, abs=1e-3)
    assert proxy.cosine > 0.6
    assert full.cosine == pytest.approx(1)
    param_spec = layout_of(build_model("mlp", SHAPE))
    assert len(full.payload) == HEADER_BYTES + param_spec.float32_bytes
    assert len(proxy.payload) <= param_spec.float32_bytes / 40


def test_error_feedback_sends_later_what_was_lost() -> None:
    """Two rounds at the same weights: what both decode to is nearer to twice the update than two fresh replies are."""
    ctx = context(**{"partition-id": 0})
    first = decoded(train_round(request(), 1, SETTINGS, ctx), "compressed", 1)
    second = decoded(train_round(request("fedavg", 2, acknowledged=1), 2, SETTINGS, ctx), "fedavg", 2)
    fresh = context(**{"partition-id": 0})
    exact_first = decoded(train_round(request("fedavg"), 1, SETTINGS, fresh), "fedavg", 1)
    exact_second = decoded(train_round(request("fedavg", 2), 2, SETTINGS, context(**{"partition-id": 0})), "fedavg", 2)
    for name in first:
        assert torch.allclose(first[name] + second[name], exact_first[name] + exact_second[name], atol=1e-5)


def test_a_reply_that_the_server_never_got_is_sent_again() -> None:
    ctx = context(**{"partition-id": 0})
    lost = train_round(request(), 1, SETTINGS, ctx)
    again = decoded(train_round(request("fedavg", 2, acknowledged=-1), 2, SETTINGS, ctx), "fedavg", 2)
    assert lost.payload
    exact_first = decoded(train_round(request("fedavg"), 1, SETTINGS, context(**{"partition-id": 0})), "fedavg", 1)
    exact_second = decoded(train_round(request("fedavg", 2), 2, SETTINGS, context(**{"partition-id": 0})), "fedavg", 2)
    for name in again:
        assert torch.allclose(again[name], exact_first[name] + exact_second[name], atol=1e-5)


def test_step_ahead_trains_from_where_the_residual_leads() -> None:
    """The first round has no residual. Without error feedback nothing changes."""

    def second_round(**changes: Any) -> tuple[bytes, bytes]:
        settings, ctx = Settings.of(SETTINGS.to_config() | changes), context(**{"partition-id": 0})
        first = train_round(request(), 1, settings, ctx).payload
        return first, train_round(request("compressed", 2, acknowledged=1), 2, settings, ctx).payload

    plain, ahead = second_round(), second_round(**{"step-ahead": 0.5})
    assert plain[0] == ahead[0]
    assert plain[1] != ahead[1]
    last = {"rounds": 2, "step-ahead": 0.5}  # the second of two rounds
    assert second_round(**last) != plain
    assert second_round(**last, **{"step-ahead-final-factor": 0.0}) == plain
    off = {"error-feedback": 0.0}
    assert second_round(**off) == second_round(**off, **{"step-ahead": 0.5, "over-relaxation": 1.8})
    steps: dict[str, Any] = {"plugins": "crossbar"}  # it changes local steps
    assert second_round(**steps) == second_round(**steps, **{"step-ahead": 0.5})


def test_ef21_sends_the_change_of_what_the_client_sent_before() -> None:
    settings = Settings.of(SETTINGS.to_config() | {"server-optimizer": "ef21", "step-ahead": 0.0})
    ctx = context(**{"partition-id": 0})
    first = decoded(train_round(request("fedavg"), 1, settings, ctx), "fedavg", 1)
    second = decoded(train_round(request("fedavg", 2, acknowledged=1), 2, settings, ctx), "fedavg", 2)
    fresh = decoded(train_round(request("fedavg", 2), 2, SETTINGS, context(**{"partition-id": 0})), "fedavg", 2)
    for name in fresh:  # without compression the server's sum is the update of this round
        assert torch.allclose(first[name] + second[name], fresh[name], atol=1e-5)


@pytest.mark.parametrize("setting", [{"error_feedback": 0.9}, {"noise_multiplier": 1.0, "clip_norm": 1.0}])
def test_terms_that_lose_values_are_refused_where_nothing_keeps_them(setting: dict[str, float]) -> None:
    settings = Settings.of({"model": "mlp", "clients": 3, "batch-size": 32, "schedule": "secure"} | setting)
    param_spec = layout_of(build_model("mlp", SHAPE))
    terms = EncodingConfig(2, 6, 50.0, (0.1,) * len(param_spec.shapes), nearest_rounding=True)
    asked = replace(request("secure"), secure=SecurePart(terms.to_bytes(), b"").to_bytes())
    with pytest.raises(PayloadError, match="nearest_rounding"):
        local_round.train_round(asked, 1, settings, context(**{"partition-id": 0}))


def test_the_same_round_twice_is_the_same_reply_and_another_client_another() -> None:
    replies = [train_round(request(), 1, SETTINGS, context(**{"partition-id": k})).payload for k in (0, 0, 1)]
    assert replies[0] == replies[1] != replies[2]


def test_weights_of_another_model_or_round_are_refused() -> None:
    good = request()
    ctx = context(**{"partition-id": 0})
    with pytest.raises(PayloadError, match="belongs to round 1, expected 2"):
        train_round(good, 2, SETTINGS, ctx)
    other = Settings.of(SETTINGS.to_config() | {"model": "cnn"})
    with pytest.raises(PayloadError, match=r"this model takes|expected 22 to"):
        train_round(good, 1, other, ctx)
    swapped = TrainRequest("compressed", -1, SHAPE, good.payload[:10] + bytes(8) + good.payload[18:], bytes(8))
    with pytest.raises(PayloadError, match="fingerprint"):
        train_round(swapped, 1, SETTINGS, ctx)
    assert not ctx.state.config_records  # nothing was kept of a round that failed


def test_a_real_client_trains_on_its_own_folder(tmp_path: Path, digits: LabeledImages) -> None:
    write_images(tmp_path / "own", digits, list(range(10)))
    reply = train_round(request(), 1, SETTINGS, context(data=str(tmp_path / "own")))
    assert reply.examples == 80


def test_class_names_number_the_labels_of_a_folder_that_lacks_some(tmp_path: Path, digits: LabeledImages) -> None:
    write_images(tmp_path / "own", digits, [3, 7])
    settings = Settings.of(SETTINGS.to_config() | {"class-names": "0,1,2,3,4,5,6,7,8,9"})
    data = client_data(settings, context(data=str(tmp_path / "own")))
    assert sorted(set(data.labels.tolist())) == [3, 7]


def test_data_that_does_not_fit_is_refused(tmp_path: Path, digits: LabeledImages) -> None:
    write_images(tmp_path / "own", digits, list(range(10)))
    wide = TrainRequest("compressed", -1, ImageShape(1, 8, 9, 10), request().payload, bytes(8))
    few = TrainRequest("compressed", -1, ImageShape(1, 8, 8, 3), request().payload, bytes(8))
    for bad in (wide, few):
        with pytest.raises((DataError, PayloadError)):
            train_round(bad, 1, SETTINGS, context(data=str(tmp_path / "own")))
    with pytest.raises(DataError, match=r"neither data .* nor partition-id"):
        client_data(SETTINGS, context())


def test_errors_travel_as_one_line_and_garbage_is_an_error_reply() -> None:
    for content in (RecordDict(), RecordDict({RECORD: ConfigRecord({FIELD: b"garbage"})})):
        message = Message(content, 2, "train", group_id="1")
        message.metadata.__dict__["_message_id"] = "1"
        reply = app(message, context(**{"partition-id": 0}))
        assert reply.has_error()
        assert "request " in str(reply.error.reason)
        assert "\n" not in str(reply.error.reason)


def test_hello_names_the_client_and_counts_its_images() -> None:
    message = Message(RecordDict(), 2, "query", group_id="1")
    message.metadata.__dict__["_message_id"] = "1"
    record = app(message, context(**{"partition-id": 1})).content.config_records[RECORD]
    assert record["client"] == "1"
    assert isinstance(record["examples"], int)
    assert 0 < record["examples"] < 1437


def test_warm_start_uses_the_last_proxies() -> None:
    ctx = context(**{"partition-id": 0})
    train_round(request(), 1, SETTINGS, ctx)
    network = ReferenceModel(build_model("mlp", SHAPE, seed=0).eval(), SHAPE)
    compressor = uplink_compressor(SETTINGS, "compressed", network)
    assert isinstance(compressor, ProxyCompressor)
    memory = ctx.state.config_records["tofu"]["memory"]
    assert isinstance(memory, bytes)
    assert compressor._read_memory(memory) is not None


def test_a_client_takes_part_on_its_own_terms_only() -> None:
    for kinds in ("secure", "compressed, secure"):
        for name in ("allowed-rounds", "kinds"):  # the second is the name before the renaming
            with pytest.raises(PolicyError, match=r"a fedavg round .* rule allowed-rounds accepts .*secure"):
                train_round(request("fedavg"), 1, SETTINGS, context(**{"partition-id": 0, name: kinds}))
    with pytest.raises(PolicyError, match=r"noise-multiplier=0 .* rule min-noise-multiplier accepts 1 or more"):
        train_round(request(), 1, SETTINGS, context(**{"partition-id": 0, "min-noise-multiplier": 1}))
    assert train_round(request(), 1, SETTINGS, context(**{"partition-id": 0, "allowed-rounds": "compressed"})).payload
    for kinds in ("secure,fedavg", "secure, full"):  # full is the name before the renaming
        allowed = context(**{"partition-id": 0, "allowed-rounds": kinds})
        assert train_round(request("fedavg"), 1, SETTINGS, allowed).payload
        with pytest.raises(PolicyError, match=r"accepts secure, fedavg"):
            train_round(request("compressed"), 1, SETTINGS, allowed)


def answer(context: Context) -> Message:
    """What the client app answers to a request to train."""
    message = Message(RecordDict({RECORD: ConfigRecord({FIELD: request().to_bytes()})}), 2, "train", group_id="1")
    message.metadata.__dict__["_message_id"] = "1"
    return app(message, context)


def test_a_client_trains_on_the_device_that_its_node_config_names() -> None:
    """One that it lacks is an error reply, whatever device the run's settings name."""
    lacking = answer(context(**{"partition-id": 0, "device": "cuda:999"}))
    assert lacking.has_error()
    assert lacking.error.reason == "device is not usable on this client: see its log"
    other = context(**{"partition-id": 0, "device": "cpu"})
    other.run_config["device"] = "cuda:999"
    assert not answer(other).has_error()
