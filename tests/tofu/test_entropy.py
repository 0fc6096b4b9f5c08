import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.entropy import SLOTS, read_integers, write_integers
from tofu.errors import PayloadError

tops = st.integers(1, 127)


@st.composite
def integers(draw: st.DrawFn) -> tuple[list[int], int]:
    top = draw(tops)
    return draw(st.lists(st.integers(-top, top), max_size=300)), top


@settings(max_examples=300, deadline=None)
@given(integers(), st.binary(max_size=9))
def test_round_trip_and_a_block_knows_its_end(case: tuple[list[int], int], rest: bytes) -> None:
    values, top = case
    block = write_integers(np.array(values, np.int64), top)
    read, end = read_integers(block + rest, len(values), top, "pixels")
    assert read.tolist() == values
    assert end == len(block)


@pytest.mark.parametrize("sigma", [0.5, 1.2, 2.5])
def test_bell_shaped_integers_take_little_more_than_their_entropy(sigma: float) -> None:
    values = np.clip(np.random.default_rng(0).normal(0, sigma, 5000).round(), -7, 7).astype(np.int64)
    shares = np.unique(values, return_counts=True)[1] / values.size
    entropy = -float((shares * np.log2(shares)).sum())
    bits = 8 * len(write_integers(values, 7)) / values.size
    assert entropy < bits < 1.03 * entropy + 0.03


@pytest.mark.parametrize("value", [0, 1, -3])
def test_equal_integers_take_next_to_nothing(value: int) -> None:
    block = write_integers(np.full(4000, value), 3)
    assert len(block) < 30 + (4000 // 8 if value else 0)
    assert read_integers(block, 4000, 3, "pixels")[0].tolist() == [value] * 4000


@settings(max_examples=500, deadline=None)
@given(integers(), st.data())
def test_damage_is_found_or_decodes_to_integers_in_range(case: tuple[list[int], int], data: st.DataObject) -> None:
    values, top = case
    block = bytearray(write_integers(np.array(values, np.int64), top))
    place = data.draw(st.integers(0, len(block) - 1))
    block[place] ^= data.draw(st.integers(1, 255))
    with suppress(PayloadError):  # any other exception fails the test
        read, end = read_integers(bytes(block), len(values), top, "pixels")
        assert len(read) == len(values)
        assert np.abs(read).max(initial=0) <= top
        assert end <= len(block)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 100), tops)
def test_noise_is_refused_or_decodes_to_integers_in_range(noise: bytes, count: int, top: int) -> None:
    with suppress(PayloadError):
        assert np.abs(read_integers(noise, count, top, "pixels")[0]).max(initial=0) <= top


def test_a_table_that_does_not_add_up_is_refused() -> None:
    block = bytearray(write_integers(np.array([0, 1, -1, 2]), 3))
    block[0] += 1
    with pytest.raises(PayloadError, match=f"pixels have a table of {SLOTS + 1} slots, expected {SLOTS}"):
        read_integers(bytes(block), 4, 3, "pixels")
    with pytest.raises(PayloadError, match="at least"):
        read_integers(b"", 4, 3, "pixels")


def test_a_truncated_block_is_refused_at_every_length() -> None:
    values = np.random.default_rng(1).integers(-3, 4, 200)
    block = write_integers(values, 3)
    for length in range(len(block)):
        with pytest.raises(PayloadError):
            read_integers(block[:length], 200, 3, "pixels")


def test_rare_magnitudes_among_many_are_kept() -> None:
    values = np.zeros(20_000, np.int64)
    values[:127] = range(1, 128)
    assert math.isclose(sum(write_integers(values, 127)[:128]), SLOTS)
    assert read_integers(write_integers(values, 127), values.size, 127, "pixels")[0].tolist() == values.tolist()
