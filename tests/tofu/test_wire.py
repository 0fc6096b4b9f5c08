import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.data import ImageShape
from tofu.errors import PayloadError
from tofu.wire import KINDS, STAGES, SecureAnswer, SecurePart, SecureQuery, TrainReply, TrainRequest, class_names_from

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
    st.booleans(),
    st.binary(min_size=1, max_size=50),
    st.binary(max_size=50),
    st.booleans(),
    st.sampled_from([b"", bytes(range(64))]),
)
def test_request_round_trip(
    kind: str,
    acknowledged: int,
    size: int,
    parts: tuple[bytes, tuple[bytes, ...]],
    identity: bytes,
    sketch: bytes,
    advert: bool,
    secure: bytes,
    state: bytes,
    has: bool,
    outputs: bytes,
) -> None:
    payload, steps = parts
    broadcast, kept = (b"", state) if has else (state, b"")
    shape, secure = ImageShape(1, size, size, 10), secure if kind == "secure" else b""
    request = TrainRequest(
        kind, acknowledged, shape, payload, identity, steps, sketch, advert, secure, broadcast, kept, outputs
    )  # fmt: skip
    assert TrainRequest.from_bytes(request.to_bytes()) == request


def test_a_request_brings_weights_or_steps_and_not_both() -> None:
    request = TrainRequest("compressed", -1, ImageShape(1, 8, 8, 10), b"w", bytes(8), (b"s",))
    with pytest.raises(PayloadError, match="expected one of the two"):
        TrainRequest.from_bytes(request.to_bytes())
    cut = TrainRequest("compressed", -1, ImageShape(1, 8, 8, 10), b"", bytes(8), (b"step",)).to_bytes()[:-1]
    with pytest.raises(PayloadError, match="3 bytes are left, expected 4 of a step"):
        TrainRequest.from_bytes(cut)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 2**32 - 1),
    st.lists(floats, min_size=5, max_size=5),
    st.lists(st.binary(max_size=50), min_size=3, max_size=3),
)
def test_reply_round_trip(examples: int, numbers: list[float], parts: list[bytes]) -> None:
    loss, explained, cosine, train, encode = numbers
    payload, advert, exported = parts
    reply = TrainReply(examples, loss, explained, cosine, train, encode, payload, advert, exported)
    assert TrainReply.from_bytes(reply.to_bytes()) == reply


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(STAGES), st.booleans(), st.binary(max_size=50), st.binary(max_size=50))
def test_messages_of_a_secure_round_go_round(stage: str, advert: bool, one: bytes, other: bytes) -> None:
    query = SecureQuery(stage, one, advert)
    assert SecureQuery.from_bytes(query.to_bytes()) == query
    assert SecurePart.from_bytes(SecurePart(one, other).to_bytes()) == SecurePart(one, other)
    assert SecureAnswer.from_bytes(SecureAnswer(one, other).to_bytes()) == SecureAnswer(one, other)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_noise_is_a_message_or_a_payload_error(data: bytes) -> None:
    for kind in (TrainRequest, TrainReply, SecurePart, SecureQuery, SecureAnswer):
        with suppress(PayloadError):  # any other exception fails the test
            kind.from_bytes(data)


@pytest.mark.parametrize("data", [None, 3, "text", b"", b"short"])
def test_what_is_no_message_is_refused(data: object) -> None:
    with pytest.raises(PayloadError, match=r"reply .*expected"):
        TrainReply.from_bytes(data)
    with pytest.raises(PayloadError, match=r"request .*expected"):
        TrainRequest.from_bytes(data)


def test_values_that_cannot_be_right_are_refused() -> None:
    request = "<BBi4HHII40x"
    with pytest.raises(PayloadError, match="round kind 9"):
        TrainRequest.from_bytes(struct.pack(request, 9, 0, 0, 1, 8, 8, 10, 0, 0, 0))
    with pytest.raises(PayloadError, match="flags 8"):
        TrainRequest.from_bytes(struct.pack(request, 0, 8, 0, 1, 8, 8, 10, 0, 0, 0))
    with pytest.raises(PayloadError, match="positive"):
        TrainRequest.from_bytes(struct.pack(request, 0, 0, 0, 1, 0, 8, 10, 0, 0, 0))
    with pytest.raises(PayloadError, match="secure round has 0 bytes"):
        TrainRequest.from_bytes(struct.pack(request, 2, 0, 0, 1, 8, 8, 10, 0, 0, 0))
    with pytest.raises(PayloadError, match="compressed round has 5 bytes"):
        TrainRequest.from_bytes(struct.pack(request, 0, 0, 0, 1, 8, 8, 10, 0, 5, 0) + bytes(5))
    with pytest.raises(PayloadError, match="0 images"):
        TrainReply.from_bytes(struct.pack("<I5fBI", 0, 0, 0, 0, 0, 0, 0, 0))
    with pytest.raises(PayloadError, match=r"metrics train_loss=nan, expected finite ones .* diverged .* a smaller lr"):
        TrainReply.from_bytes(struct.pack("<I5fBI", 1, float("nan"), 0, 0, 0, 0, 0, 0))
    with pytest.raises(PayloadError, match="3 bytes are left, expected 4 of the advert"):
        TrainReply.from_bytes(struct.pack("<I5fBI", 1, 0, 0, 0, 0, 0, 4, 0) + b"abc")
    with pytest.raises(PayloadError, match="stage 9"):
        SecureQuery.from_bytes(b"\x09\x00")
    with pytest.raises(PayloadError, match="3 bytes are left, expected 200 of the advert"):
        SecureAnswer.from_bytes(b"\xc8abc")
    with pytest.raises(PayloadError, match="0 bytes are left, expected 9 of the terms"):
        SecurePart.from_bytes(struct.pack("<I", 9))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (7, "are int, expected a text"),
        ("x" * (2**20 + 1), "a text of 1048577 characters, expected a text of at most 1048576"),
        ('["cat", 3]', r"""are '\["cat", 3\]', expected a JSON list of texts"""),
        ('["cat", "cat"]', "have 'cat' twice"),
    ],
)
def test_class_names_that_are_no_list_of_texts_are_refused_with_their_value(value: object, why: str) -> None:
    assert class_names_from('["cat", "dog"]') == ("cat", "dog")
    with pytest.raises(PayloadError, match=why):
        class_names_from(value)
