"""10,000 mutated messages of every kind: each is refused in one line or read, and nothing else happens."""

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn

from server.client_registry import _introduced
from tests.mutations import mutated_records, mutations
from tests.tofu.secagg.test_messages import KINDS, MESSAGES
from tofu.codec.options import CompressorOptions, ProxySettings
from tofu.compression import compressors, make_compressor
from tofu.compression.base import Compressor
from tofu.data import ImageShape
from tofu.errors import PayloadError
from tofu.flower.compress import _Request
from tofu.flower.internals import task_identity
from tofu.flower.secure import _layout
from tofu.flower.secure_mod import RECORD as SECURE_RECORD
from tofu.flower.secure_mod import SecureOptions, _SecureRequest, joint_digest
from tofu.flower.secure_options import VERSION as SECURE_VERSION
from tofu.flower.update_codec import RECORD as COMPRESSED_RECORD
from tofu.flower.update_codec import VERSION, ArrayModel, UpdateCodec, tensors_of
from tofu.plugins import SumSpec, make_plugins
from tofu.plugins.export import Export, export_from_bytes, export_to_bytes
from tofu.plugins.state import state_from_bytes, state_to_bytes
from tofu.reference_model import ReferenceModel
from tofu.rounds.downlink import ResyncError, WeightSteps, receive_weights
from tofu.secagg.client import ClientSession
from tofu.secagg.encoding import EncodingConfig
from tofu.secagg.participant import Participant
from tofu.weights import drift, sketch
from tofu.wire import (
    RECORD,
    Payload,
    SecureAnswer,
    SecurePart,
    SecureQuery,
    TrainReply,
    TrainRequest,
    class_names_from,
    class_names_to_text,
    read_payload,
)

SHAPE = ImageShape(1, 8, 8, 10)
PAYLOAD = Payload(2, 3, bytes(range(8)), b"a body of some bytes")
SUMS = {"moments": SumSpec((2, 3), 10.0)}
EXPORT = Export({"moments": torch.ones(2, 3, dtype=torch.float64)}, {"loss": 0.5})
STATE = {"count": 3, "mean": torch.ones(2, 3), "name": "x", "mask": b"\1\2"}
CONFIG = EncodingConfig(4, 12, 100.0, (0.5, 0.25), 0.5, 3)
WEIGHTS = {"w": torch.arange(9.0)}
SESSION = ClientSession(Participant(run=b"run", name="a"))
SESSION.advertise_keys()


def array_bytes(kind: str) -> bytes:
    """An array as Flower sends it."""
    file = io.BytesIO()
    np.save(file, np.arange(6, dtype=kind).reshape(2, 3))
    return file.getvalue()


def read_array(data: bytes) -> object:
    return tensors_of(ArrayRecord({"a": Array("float32", (2, 3), "numpy.ndarray", data)}))


def read_names(data: bytes) -> object:
    return class_names_from(data.decode(errors="replace"))


Reader = Callable[[bytes], object]

WIRE: dict[str, tuple[list[bytes], Reader]] = {
    "request": (
        [
            TrainRequest("compressed", 3, SHAPE, b"weights", bytes(8)).to_bytes(),
            TrainRequest("fedavg", -1, SHAPE, b"", bytes(8), steps=(b"one", b"two"), advert=True).to_bytes(),
            TrainRequest("secure", 2, SHAPE, b"w", bytes(8), secure=b"part", broadcast=b"state").to_bytes(),
        ],
        TrainRequest.from_bytes,
    ),
    "reply": ([TrainReply(9, 1.0, 0.5, 0.5, 2.0, 1.0, b"body", b"key", b"sums").to_bytes()], TrainReply.from_bytes),
    "secure part": ([SecurePart(CONFIG.to_bytes(), b"shares").to_bytes()], SecurePart.from_bytes),
    "query": ([SecureQuery("share", b"roster", advert=True).to_bytes()], SecureQuery.from_bytes),
    "answer": ([SecureAnswer(b"message", b"advert").to_bytes()], SecureAnswer.from_bytes),
    "payload": (
        [PAYLOAD.to_bytes()],
        lambda data: read_payload(data, codec=2, round_=3, fingerprint=PAYLOAD.fingerprint, max_bytes=999),
    ),
    "encoding": ([CONFIG.to_bytes()], EncodingConfig.from_bytes),
    "plugin state": ([state_to_bytes(STATE, max_bytes=4096)], lambda data: state_from_bytes(data, max_bytes=4096)),
    "array": ([array_bytes(kind) for kind in ("f4", "i8")], read_array),
    "sketch": ([sketch(WEIGHTS)], lambda data: drift(WEIGHTS, data)),
    "class names": ([class_names_to_text(names).encode() for names in (("a", "b"), "0123")], read_names),
    "saved session": ([SESSION.to_bytes()], lambda data: ClientSession.from_bytes(Participant(b"run", "a"), data)),
    "plugin export": ([export_to_bytes(EXPORT)], lambda data: export_from_bytes(data, SUMS)),
} | {
    kind.__name__: ([one.to_bytes() for one in MESSAGES if type(one) is kind], kind.from_bytes) for kind in KINDS
}  # fmt: skip


@pytest.mark.parametrize("name", WIRE)
def test_a_mutated_message_is_refused_in_one_line_or_read(name: str) -> None:
    originals, read = WIRE[name]
    for original in originals:
        read(original)
    refusals = []
    for data in mutations(originals):
        try:
            read(data)
        except PayloadError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert not [line for line in refusals if "\n" in line or len(line) > 1000]


def refusal(compressor: Compressor, network: ReferenceModel, body: bytes) -> str:
    """Why a body is refused; "" if it is decoded, which must give tensors of the model's names and shapes."""
    try:
        decoded = compressor.decompress(network, body)
    except PayloadError as error:
        return str(error)
    assert {name: value.shape for name, value in decoded.items()} == network.param_spec.shapes
    assert all(value.dtype == torch.float32 for value in decoded.values())
    return ""


@pytest.mark.parametrize("name", compressors.names())
def test_a_mutated_body_of_a_codec_is_refused_or_read(name: str) -> None:
    """What is read may hold any values, also infinite ones: the aggregation refuses what it cannot add."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    network = ReferenceModel(model, ImageShape(1, 4, 4, 4))
    ratio = {"none": 1.0, "signsgd": 13.0, "float16": 1.6, "proxy": 2.0, "3sfc": 3.0}.get(name, 4.0)
    options = CompressorOptions(encoder=ProxySettings(max_evals=3))
    compressor = make_compressor(name, network, ratio=ratio, options=options)
    bodies = []
    for seed in range(2):
        drawn = torch.Generator().manual_seed(seed)
        update = {n: 0.1 * torch.randn(shape, generator=drawn) for n, shape in network.param_spec.shapes.items()}
        bodies.append(compressor.compress(network, update, generator=drawn).body)
        assert not refusal(compressor, network, bodies[-1])
    refusals = [refusal(compressor, network, data) for data in mutations(bodies)]
    assert any(refusals)
    assert not [line for line in refusals if "\n" in line or len(line) > 1000]


def network() -> ReferenceModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    return ReferenceModel(model, ImageShape(1, 4, 4, 4))


@pytest.mark.parametrize("kind", ["weights", "step"])
def test_a_mutated_downlink_is_refused_in_one_line_or_read(kind: str) -> None:
    server, client = network(), network()
    initial = network().model.state_dict()
    compressor = make_compressor("topk", server, ratio=4.0, options=CompressorOptions())
    steps = WeightSteps(server, compressor, 0)
    steps.begin(1, whole=False)
    with torch.no_grad():
        server.model[1].weight += 0.1
    steps.begin(2, whole=False)
    whole, parts = steps.parts("a", whole=True).payload, steps.parts("b").steps
    assert len(parts) == 1
    original = {"weights": whole, "step": parts[0]}[kind]
    refusals = []
    for data in (original, *mutations([original])):
        payload, sent = (data, ()) if kind == "weights" else (b"", (data,))
        given = TrainRequest("compressed", -1, client.shape, payload, steps.identity, sent, steps.sketch)
        client.model.load_state_dict(initial)
        try:
            receive_weights(given, 2, client, None, compressor)
        except (PayloadError, ResyncError) as error:
            refusals.append(str(error))
            assert data is not original
    assert len(refusals) > 1000
    assert not [line for line in refusals if "\n" in line or len(line) > 1000]


def test_a_mutated_broadcast_of_plugins_is_refused_in_one_line_or_read() -> None:
    plugins = make_plugins("gpm,ood", "")
    original = state_to_bytes({"gpm/basis": torch.ones(2, 3), "ood/moments": 0.5}, max_bytes=4096)
    plugins.load(broadcast=original, max_bytes=4096)
    refusals = []
    for data in mutations([original]):
        try:
            plugins.load(broadcast=data, max_bytes=4096)
        except PayloadError as error:
            refusals.append(str(error))
    assert len(refusals) > 1000
    assert not [line for line in refusals if "\n" in line or len(line) > 1000]


ARRAYS = {"w": np.zeros((20, 30), np.float32), "b": np.zeros(20, np.float32)}
CODEC = UpdateCodec(compressor="topk", ratio=4, downlink=4.0)
OPTIONS = SecureOptions()
PART = SecurePart(EncodingConfig(4, 48, 100.0, (0.5, 0.25)).to_bytes(), b"shares").to_bytes()

REQUEST = {"version": VERSION, "round": 3, "acknowledged": -1, "digest": CODEC.digest, "key": "arrays", "outputs": b""}
STEPS = {"identity": bytes(8), "sketch": bytes(32), "steps": [b"one", b"two"]}
SUM_REQUEST = {
    "version": SECURE_VERSION, "round": 3, "acknowledged": -1, "digest": joint_digest(OPTIONS, None),
    "weight-key": "num-examples", "part": PART, "clip-norm": 1.0,
}  # fmt: skip


def message_with(key: str, record: Mapping[str, Any], *, arrays: bool = True) -> Message:
    content = RecordDict({key: ConfigRecord(dict(record))})
    if arrays:
        content["arrays"] = ArrayRecord({name: Array(value) for name, value in ARRAYS.items()})
    return Message(content, 1, "train", group_id="3")


def read_request(record: Mapping[str, Any]) -> object:
    return _Request.of(message_with(COMPRESSED_RECORD, record, arrays="steps" not in record), CODEC)


def read_payload_of(record: Mapping[str, Any]) -> object:
    return CODEC.decode(MODEL.reference, record.get("payload"), 3, b"")


MODEL: ArrayModel = CODEC.reference({name: torch.from_numpy(value) for name, value in ARRAYS.items()})
UPDATE = {name: torch.randn(shape) for name, shape in MODEL.reference.param_spec.shapes.items()}
TOPK = CODEC.compressor(MODEL.reference)
BODY = TOPK.compress(MODEL.reference, UPDATE, generator=torch.Generator().manual_seed(0)).body
SENT = CODEC.payload(TOPK, MODEL.reference, BODY, 3, b"")

RECORDS: dict[str, tuple[list[dict[str, Any]], Callable[[Mapping[str, Any]], object]]] = {
    "hello": (
        [{"client": "7", "examples": 9, "unreadable": 1, "classes": '["a", "b"]'}, {"client": "7", "examples": 9}],
        lambda record: _introduced(1, Message(RecordDict({RECORD: ConfigRecord(dict(record))}), 1, "query")),
    ),
    "request of tofu.compress": ([REQUEST | STEPS, REQUEST | {**STEPS, "steps": []}], read_request),
    "reply of tofu.compress": ([{"payload": SENT}], read_payload_of),
    "request of tofu.secure": (
        [SUM_REQUEST], lambda record: _SecureRequest.of(message_with(SECURE_RECORD, record), OPTIONS, None)
    ),
    "metrics of tofu.secure": (
        [{"metrics": '[["loss", -1], ["pair", 2]]'}], lambda record: _layout(str(record.get("metrics")), 4)
    ),
}  # fmt: skip


@pytest.fixture
def identity() -> Iterator[None]:
    with task_identity():
        yield


@pytest.mark.parametrize("name", RECORDS)
def test_a_mutated_record_is_refused_in_one_line_or_read(name: str, identity: None) -> None:
    originals, read = RECORDS[name]
    for original in originals:
        assert read(original)
    refusals = []
    for record in mutated_records(originals):
        try:
            if not read(record):
                refusals.append("")
        except PayloadError as error:
            refusals.append(str(error))
    assert len(refusals) > 1000
    assert not [line for line in refusals if "\n" in line or len(line) > 1000]
