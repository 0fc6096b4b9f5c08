import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.errors import PayloadError, SettingError
from tofu.secagg.ring import (
    CHUNK,
    RingVector,
    add,
    centered,
    check_bits,
    from_signed,
    largest,
    pack,
    packed_bytes,
    unpack,
)


def elements(count: int, bits: int, seed: int = 0) -> RingVector:
    values = np.random.default_rng(seed).integers(0, int(largest(bits)), count, dtype=np.uint64, endpoint=True)
    values[:2] = [largest(bits), 0][: len(values[:2])]
    return values


@pytest.mark.parametrize("bits", range(1, 65))
def test_pack_and_unpack_are_inverse_for_every_ring_and_length(bits: int) -> None:
    for count in (0, 1, 2, 7, 8, 9, 15, 16, 63, 65, 1000):
        values = elements(count, bits, count)
        data = pack(values, bits)
        assert len(data) == packed_bytes(count, bits) == -(-count * bits // 8)
        assert (unpack(data, count, bits, "vector") == values).all()


@pytest.mark.parametrize("bits", [1, 5, 12, 17, 33, 63, 64])
def test_pack_is_one_stream_of_bits_also_across_chunks(bits: int) -> None:
    values = elements(2 * CHUNK + 13, bits)
    data = pack(values, bits)
    assert (unpack(data, values.size, bits, "vector") == values).all()
    whole = int.from_bytes(data, "little")
    for place in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, values.size - 1):
        assert whole >> (place * bits) & int(largest(bits)) == values[place]


def test_pack_matches_bits_written_out_by_hand() -> None:
    assert pack(np.array([1, 2, 3, 7], dtype=np.uint64), 3) == bytes([0b11010001, 0b1110])
    assert pack(np.array([0xABC, 0x123], dtype=np.uint64), 12) == bytes([0xBC, 0x3A, 0x12])


@settings(deadline=None)
@given(st.integers(1, 64), st.data())
def test_ring_laws(bits: int, data: st.DataObject) -> None:
    numbers = st.lists(st.integers(0, 2**bits - 1), min_size=3, max_size=3)
    a, b, c = (np.array(data.draw(numbers), dtype=np.uint64) for _ in range(3))
    exact = [(int(x) + int(y)) % 2**bits for x, y in zip(a, b, strict=True)]
    assert add(a, b, bits).tolist() == exact
    assert (add(a, b, bits) == add(b, a, bits)).all()
    assert (add(add(a, b, bits), c, bits) == add(a, add(b, c, bits), bits)).all()


@settings(deadline=None)
@given(st.integers(1, 64), st.data())
def test_the_centred_lift_is_the_inverse_of_reduction(bits: int, data: st.DataObject) -> None:
    half = 2 ** (bits - 1)
    numbers = [*data.draw(st.lists(st.integers(-half, half - 1), max_size=5)), -half, half - 1, 0]
    signed = np.array(numbers, dtype=np.int64)
    assert (centered(from_signed(signed, bits), bits) == signed).all()
    assert from_signed(signed, bits).tolist() == [n % 2**bits for n in numbers]


def test_unpack_refuses_other_lengths_and_bits_beyond_the_end() -> None:
    for size in (0, 1, 3):
        with pytest.raises(PayloadError, match=f"vector has {size} bytes, expected 2"):
            unpack(bytes(size), 3, 5, "vector")
    with pytest.raises(PayloadError, match="a bit set after its last element"):
        unpack(bytes([0, 0x80]), 3, 5, "vector")
    assert unpack(bytes([0, 0x7F]), 3, 5, "vector").tolist() == [0, 24, 31]


@pytest.mark.parametrize("bits", [-1, 0, 65])
def test_other_rings_are_refused(bits: int) -> None:
    with pytest.raises(SettingError, match="expected 1 to 64"):
        check_bits(bits)
