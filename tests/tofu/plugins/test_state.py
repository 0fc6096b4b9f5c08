import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tofu.errors import PayloadError
from tofu.plugins.state import PluginState, state_from_bytes, state_to_bytes

MOST = 1 << 16
DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return (100 * torch.randn(shape, generator=generator)).abs().clamp(max=200).to(draw(st.sampled_from(DTYPES)))


values = st.one_of(
    tensors(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.binary(max_size=20),
)
states = st.dictionaries(st.text(min_size=1, max_size=20), values, max_size=5)


def same(a: PluginState, b: PluginState) -> bool:
    def equal(x: object, y: object) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and x == y

    return list(a) == list(b) and all(equal(a[name], b[name]) for name in a)


@given(states)
def test_state_survives_the_way_to_bytes_and_back(state: PluginState) -> None:
    assert same(state_from_bytes(state_to_bytes(state, max_bytes=MOST), max_bytes=MOST), state)


@given(states, st.data())
def test_damaged_bytes_are_refused_or_another_state_but_never_another_error(state: PluginState, data: st.DataObject) -> None:  # noqa: E501  # fmt: skip
    content = bytearray(state_to_bytes(state, max_bytes=MOST))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    try:
        read = state_from_bytes(bytes(content), max_bytes=MOST)
    except PayloadError:
        return
    assert bytes(content) == state_to_bytes(read, max_bytes=MOST)


@given(states, st.integers(1, 30))
def test_cut_or_lengthened_bytes_are_refused(state: PluginState, count: int) -> None:
    content = state_to_bytes(state, max_bytes=MOST)
    for bad in (content[:-count], content + bytes(count)):
        with pytest.raises(PayloadError, match="plugin state"):
            state_from_bytes(bad, max_bytes=MOST)


def entry(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<H", len(name)) + name + bytes([kind]) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"TPSX" + bytes(5), "starts with b'TPSX', expected b'TPST'"),
        (b"TPST\x02" + bytes(4), "has version 2, this program reads version 1"),
        (b"TPST\x01" + struct.pack("<I", 1) + entry(b"a", 9, b""), "a is of kind 9, expected 1 to 5"),
        (b"TPST\x01" + struct.pack("<I", 2) + 2 * entry(b"a", 1, bytes(8)), "'a' is empty or occurs twice"),
        (b"TPST\x01" + struct.pack("<I", 1) + entry(b"", 1, bytes(8)), "'' is empty or occurs twice"),
        (b"TPST\x01" + struct.pack("<I", 1) + entry(b"\xff", 1, bytes(8)), "not UTF-8"),
        (b"TPST\x01" + struct.pack("<I", 1) + entry(b"a", 2, struct.pack("<d", float("nan"))), "expected a finite"),
        (b"TPST\x01" + struct.pack("<I", 1) + entry(b"a", 5, b"\x09\x00"), "a tensor of type 9 with 0 dimensions"),
        (b"TPST\x01" + struct.pack("<I", 1) + entry(b"a", 5, b"\x00\x08" + 8 * b"\xff\xff\xff\xff"), "fewer than"),
        (
            b"TPST\x01" + struct.pack("<I", 1) + entry(b"a", 5, struct.pack("<BB4I", 0, 4, 0, 1 << 31, 1 << 31, 2)),
            "2.40",
        ),
        (b"TPST\x01" + struct.pack("<I", 1) + entry(b"a", 5, struct.pack("<BB2I", 0, 2, 1000, 1000)), "ends early"),
        (b"TPST\x01" + struct.pack("<I", 1) + entry(b"a", 5, b"\x00\x00" + struct.pack("<f", float("inf"))), "finite"),
        (b"TPST\x01" + struct.pack("<I", 1) + entry(b"a", 5, b"\x05\x00\x02"), "neither 0 nor 1"),
        (b"TPST\x01" + struct.pack("<I", 1 << 31), "ends early"),
    ],
)
def test_every_field_is_checked(content: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=message) as error:
        state_from_bytes(content, max_bytes=MOST)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), 1 << 63, True, None, [1], torch.tensor(float("inf")), torch.zeros(1).half()])  # noqa: E501  # fmt: skip
def test_what_cannot_be_kept_is_refused_when_written(value: object) -> None:
    with pytest.raises(PayloadError, match="plugin state's a "):
        state_to_bytes({"a": value}, max_bytes=MOST)  # type: ignore[dict-item]


def test_size_is_capped_both_ways() -> None:
    content = state_to_bytes({"a": torch.zeros(100)}, max_bytes=MOST)
    with pytest.raises(PayloadError, match="at most 100"):
        state_to_bytes({"a": torch.zeros(100)}, max_bytes=100)
    with pytest.raises(PayloadError, match="expected 9 to 100"):
        state_from_bytes(content, max_bytes=100)
    with pytest.raises(PayloadError, match="is str, expected bytes"):
        state_from_bytes("TPST", max_bytes=100)
