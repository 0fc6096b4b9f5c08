import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tofu.compression.coding import BitReader, Integers, fixed, gamma, gamma_length, packed, unary
from tofu.errors import PayloadError

whole = st.lists(st.integers(0, 300), max_size=40)
positive = st.lists(st.integers(1, 2**31), max_size=40)


def integers(values: list[int]) -> Integers:
    return np.array(values, dtype=np.int64)


def test_codes_by_hand() -> None:
    assert unary(integers([0, 2, 1])).tolist() == [1, 0, 0, 1, 0, 1]
    assert fixed(integers([5, 2]), 3).tolist() == [1, 0, 1, 0, 1, 0]
    assert gamma(integers([1, 2, 7])).tolist() == [1, 0, 1, 0, 0, 1, 0, 1, 1]  # 0, 1, 2 digits; then 0; 1, 1
    assert packed(integers([1, 0, 0, 0, 0, 0, 0, 0, 1]).astype(np.uint8)) == b"\x01\x01"


@given(whole, whole, positive, st.integers(9, 31))
def test_fields_come_back_in_order(first: list[int], second: list[int], third: list[int], width: int) -> None:
    a, b, c = integers(first), integers(second), integers(third)
    assert gamma(c).size == gamma_length(c)
    reader = BitReader(packed(unary(a), fixed(b, width), gamma(c), fixed(a, width), fixed(b, 0)), "numbers")
    assert reader.unary(a.size).tolist() == first
    assert reader.fixed(b.size, width).tolist() == second
    assert reader.gamma(c.size).tolist() == third
    assert reader.fixed(a.size, width).tolist() == first
    assert reader.fixed(b.size, 0).tolist() == [0] * b.size
    reader.finish()


def test_a_short_stream_and_a_long_one_are_refused() -> None:
    with pytest.raises(PayloadError, match="numbers end after 1 of 2 entries"):
        BitReader(b"\x01", "numbers").unary(2)
    with pytest.raises(PayloadError, match="numbers end early: 8 bits are left of 9"):
        BitReader(b"\x01", "numbers").fixed(3, 3)
    with pytest.raises(PayloadError, match="hold an integer of 41 digits"):
        BitReader(bytes(5) + b"\x01" + bytes(9), "numbers").gamma(1)
    with pytest.raises(PayloadError, match="followed by 8 unexpected bits"):
        BitReader(b"\0", "numbers").finish()
    reader = BitReader(b"\x05", "numbers")
    reader.fixed(1, 1)
    with pytest.raises(PayloadError, match="followed by 7 unexpected bits"):
        reader.finish()
