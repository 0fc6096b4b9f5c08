import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.errors import SettingError
from tofu.secagg.masks import (
    add,
    centered,
    check_bits,
    from_signed,
)


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
def test_the_centered_lift_is_the_inverse_of_reduction(bits: int, data: st.DataObject) -> None:
    half = 2 ** (bits - 1)
    numbers = [*data.draw(st.lists(st.integers(-half, half - 1), max_size=5)), -half, half - 1, 0]
    signed = np.array(numbers, dtype=np.int64)
    assert (centered(from_signed(signed, bits), bits) == signed).all()
    assert from_signed(signed, bits).tolist() == [n % 2**bits for n in numbers]


@pytest.mark.parametrize("bits", [-1, 0, 65])
def test_other_rings_are_refused(bits: int) -> None:
    with pytest.raises(SettingError, match="expected 1 to 64"):
        check_bits(bits)
