import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tofu.errors import PayloadError
from tofu.weights import layout_of, weights_of
from tofu.wire import HEADER_BYTES, Payload, float32_bytes, float32_from, read_payload

BASE = bytes(range(8))


@settings(max_examples=100, deadline=None)
@given(codec=st.integers(0, 255), round_=st.integers(0, 2**32 - 1), body=st.binary(max_size=200))
def test_round_trip(codec: int, round_: int, body: bytes) -> None:
    payload = Payload(codec, round_, BASE, body)
    data = payload.to_bytes()
    assert len(data) == HEADER_BYTES + len(body)
    assert read_payload(data, codec=codec, round_=round_, fingerprint=BASE, max_bytes=len(data)) == payload


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    good = bytearray(Payload(2, 7, BASE, b"some body").to_bytes())
    place = data.draw(st.integers(0, len(good) - 1))
    good[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PayloadError):
        read_payload(bytes(good), codec=2, round_=7, fingerprint=BASE, max_bytes=1000)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=100))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(PayloadError):
        read_payload(data, codec=2, round_=7, fingerprint=BASE, max_bytes=1000)


def test_each_refusal_names_what_is_wrong() -> None:
    good = Payload(2, 7, BASE, b"body").to_bytes()

    def incompatibility(data: object, **changes: object) -> str:
        expected = {"codec": 2, "round_": 7, "fingerprint": BASE, "max_bytes": 1000} | changes
        with pytest.raises(PayloadError) as error:
            read_payload(data, **expected)  # type: ignore[arg-type]
        return str(error.value)

    assert "expected bytes" in incompatibility("text")
    assert "expected 22 to 1000" in incompatibility(good[:10])
    assert "expected 22 to 23" in incompatibility(good, max_bytes=23)
    assert "starts with b'GOFU'" in incompatibility(b"G" + good[1:])
    assert "version 9" in incompatibility(good[:4] + b"\x09" + good[5:])
    assert "codec 2, expected 1" in incompatibility(good, codec=1)
    assert "round 7, expected 8" in incompatibility(good, round_=8)
    assert "relative to weights" in incompatibility(good, fingerprint=bytes(8))
    assert "checksum" in incompatibility(good[:-1])


def test_float32_body() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    param_spec, weights = layout_of(model), weights_of(model)
    body = float32_bytes(weights, param_spec)
    assert len(body) == param_spec.float32_bytes == 4 * (12 + 4 + 4 + 4 + 4 + 4 + 1)
    back = float32_from(body, param_spec)
    assert all(torch.equal(back[name], weights[name].float()) for name in weights)
    with pytest.raises(PayloadError, match="this model takes"):
        float32_from(body[4:], param_spec)
    with pytest.raises(PayloadError, match="not finite"):
        float32_from(b"\x00\x00\x80\x7f" + body[4:], param_spec)
