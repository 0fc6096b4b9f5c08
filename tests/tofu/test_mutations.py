"""10,000 mutated messages of every kind: each is refused in one line or read, and nothing else happens."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.mutations import mutations
from tests.tofu.secagg.test_messages import KINDS, MESSAGES
from tofu.codec.options import CompressorOptions, ProxySettings
from tofu.compression import compressors, make_compressor
from tofu.compression.base import Compressor
from tofu.data import ImageShape
from tofu.errors import PayloadError
from tofu.plugins import SumSpec
from tofu.plugins.export import Export, export_from_bytes, export_to_bytes
from tofu.plugins.state import state_from_bytes, state_to_bytes
from tofu.reference_model import ReferenceModel
from tofu.secagg.encoding import EncodingConfig
from tofu.wire import Payload, SecureAnswer, SecurePart, SecureQuery, TrainReply, TrainRequest, read_payload

SHAPE = ImageShape(1, 8, 8, 10)
PAYLOAD = Payload(2, 3, bytes(range(8)), b"a body of some bytes")
SUMS = {"moments": SumSpec((2, 3), 10.0)}
EXPORT = Export({"moments": torch.ones(2, 3, dtype=torch.float64)}, {"loss": 0.5})
STATE = {"count": 3, "mean": torch.ones(2, 3), "name": "x", "mask": b"\1\2"}
CONFIG = EncodingConfig(4, 12, 100.0, (0.5, 0.25), 0.5, 3)

Reader = Callable[[bytes], object]

WIRE: dict[str, tuple[list[bytes], Reader]] = {
    "request": (
        [
            TrainRequest("proxy", 3, SHAPE, b"weights", bytes(8)).to_bytes(),
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
