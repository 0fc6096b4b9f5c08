import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tofu.bytes_io import CHUNK, pack, packed_bytes, unpack
from tofu.errors import PayloadError


@given(st.integers(1, 64), st.data())
def test_the_same_bytes_as_one_large_integer(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack(np.array(values, dtype=np.uint64), bits)
    whole = sum(value << (place * bits) for place, value in enumerate(values))
    assert packed == whole.to_bytes(packed_bytes(len(values), bits), "little")
    assert unpack(packed, len(values), bits, "vector").tolist() == values


@pytest.mark.parametrize("bits", [1, 5, 12, 33, 64])
def test_a_vector_of_several_chunks_is_one_stream(bits: int) -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2**bits - 1, 2 * CHUNK + 13, dtype=np.uint64, endpoint=True)
    data = pack(values, bits)
    assert (unpack(data, values.size, bits, "vector") == values).all()
    whole = int.from_bytes(data, "little")
    for place in (CHUNK - 1, CHUNK, 2 * CHUNK, values.size - 1):
        assert whole >> (place * bits) & (2**bits - 1) == values[place]


def test_other_lengths_and_bits_after_the_last_element_are_refused() -> None:
    for size in (1, 3):
        with pytest.raises(PayloadError, match=f"vector has {size} bytes, expected 2"):
            unpack(bytes(size), 3, 5, "vector")
    with pytest.raises(PayloadError, match="bit set after its last element"):
        unpack(bytes([0, 0x80]), 3, 5, "vector")
