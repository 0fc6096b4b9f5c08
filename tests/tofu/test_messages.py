import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.data import ImageShape
from tofu.errors import PayloadError
from tofu.messages import KINDS, TrainReply, TrainRequest

floats = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(-1, 2**31 - 1),
    st.integers(1, 65535),
    st.one_of(
        st.tuples(st.binary(max_size=50), st.just(())),
        st.tuples(st.just(b""), st.lists(st.binary(max_size=50), max_size=5).map(tuple)),
    ),
    st.binary(min_size=8, max_size=8),
    st.binary(min_size=32, max_size=32),
)
def test_request_round_trip(
    kind: str, acknowledged: int, size: int, parts: tuple[bytes, tuple[bytes, ...]], identity: bytes, sketch: bytes
) -> None:
    payload, steps = parts
    request = TrainRequest(kind, acknowledged, ImageShape(1, size, size, 10), payload, identity, steps, sketch)
    assert TrainRequest.from_bytes(request.to_bytes()) == request


def test_a_request_brings_weights_or_steps_and_not_both() -> None:
    request = TrainRequest("proxy", -1, ImageShape(1, 8, 8, 10), b"w", bytes(8), (b"s",))
    with pytest.raises(PayloadError, match="expected one of the two"):
        TrainRequest.from_bytes(request.to_bytes())
    cut = TrainRequest("proxy", -1, ImageShape(1, 8, 8, 10), b"", bytes(8), (b"step",)).to_bytes()[:-1]
    with pytest.raises(PayloadError, match="step has 3 bytes, expected 4"):
        TrainRequest.from_bytes(cut)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2**32 - 1), floats, floats, floats, floats, floats, st.binary(max_size=50))
def test_reply_round_trip(n: int, a: float, b: float, c: float, d: float, e: float, payload: bytes) -> None:
    reply = TrainReply(n, a, b, c, d, e, payload)
    assert TrainReply.from_bytes(reply.to_bytes()) == reply


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_noise_is_a_message_or_a_payload_error(data: bytes) -> None:
    for kind in (TrainRequest, TrainReply):
        with suppress(PayloadError):  # any other exception fails the test
            kind.from_bytes(data)


@pytest.mark.parametrize("data", [None, 3, "text", b"", b"short"])
def test_what_is_no_message_is_refused(data: object) -> None:
    with pytest.raises(PayloadError, match="expected at least"):
        TrainReply.from_bytes(data)
    with pytest.raises(PayloadError, match="expected at least"):
        TrainRequest.from_bytes(data)


def test_values_that_cannot_be_right_are_refused() -> None:
    with pytest.raises(PayloadError, match="round kind 9"):
        TrainRequest.from_bytes(struct.pack("<Bi4HH40x", 9, 0, 1, 8, 8, 10, 0))
    with pytest.raises(PayloadError, match="positive"):
        TrainRequest.from_bytes(struct.pack("<Bi4HH40x", 0, 0, 1, 0, 8, 10, 0))
    with pytest.raises(PayloadError, match="0 images"):
        TrainReply.from_bytes(struct.pack("<I5f", 0, 0, 0, 0, 0, 0))
    with pytest.raises(PayloadError, match="not finite"):
        TrainReply.from_bytes(struct.pack("<I5f", 1, float("nan"), 0, 0, 0, 0))
