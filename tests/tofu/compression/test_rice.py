import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tofu.compression.coding import (
    BitReader,
    by_magnitude,
    fixed,
    max_fitting,
    packed,
    positions_length,
    read_positions,
    unary,
    write_positions,
)
from tofu.errors import PayloadError

sets = st.sets(st.integers(0, 5000), max_size=60).map(sorted)


def plain_rice(positions: list[int], parameter: int) -> tuple[list[int], list[int]]:
    """Unary quotients and binary remainders of the gaps, a bit at a time."""
    quotients, remainders, last = [], [], -1
    for position in positions:
        gap, last = position - last - 1, position
        quotients += [0] * (gap // 2**parameter) + [1]
        remainders += [(gap >> place) & 1 for place in range(parameter)]
    return quotients, remainders


@given(sets)
def test_the_same_bits_as_a_plain_coder_with_its_best_parameter(positions: list[int]) -> None:
    fields = write_positions(np.array(positions, dtype=np.int64))
    sizes = [sum(map(len, plain_rice(positions, parameter))) for parameter in range(16)]
    parameter = sizes.index(min(sizes))
    assert fields[0].tolist() == [(parameter >> place) & 1 for place in range(8)]
    assert (fields[1].tolist(), fields[2].tolist()) == plain_rice(positions, parameter)
    assert positions_length(np.array(positions, dtype=np.int64)) == 8 + min(sizes) == sum(f.size for f in fields)


@given(sets)
def test_round_trip(positions: list[int]) -> None:
    reader = BitReader(packed(*write_positions(np.array(positions, dtype=np.int64))), "positions")
    assert read_positions(reader, len(positions), 5001).tolist() == positions
    reader.finish()


@given(sets, st.integers(0, 5000))
def test_one_position_more_never_takes_fewer_bits(positions: list[int], more: int) -> None:
    larger = np.array(sorted({*positions, more}), dtype=np.int64)
    assert positions_length(larger) >= positions_length(np.array(positions, dtype=np.int64))


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-30]), max_size=30), st.integers(0, 40))
def test_the_largest_entries_in_order_of_equals_the_first(values: list[float], most: int) -> None:
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    nonzero = [i for i in order if values[i]]
    assert by_magnitude(torch.tensor(values), most).tolist() == nonzero[:most]


@given(st.integers(0, 2**31), st.integers(0, 900), st.integers(0, 4))
def test_the_largest_entries_as_many_as_fit(seed: int, budget: int, value_bits: int) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    x[::7] = 0
    order = sorted(range(200), key=lambda i: (-abs(float(x[i])), i))
    fitting = [
        k
        for k in range(int(x.count_nonzero()) + 1)
        if positions_length(np.array(sorted(order[:k]), dtype=np.int64)) + k * value_bits <= budget
    ]
    found = by_magnitude(x, count=len(x))
    assert found.tolist() == order[: found.size]
    assert max_fitting(found, value_bits=value_bits, budget=budget) == max(fitting, default=0)


def stream(parameter: int, *fields: list[int]) -> BitReader:
    bits = [np.array(field, dtype=np.uint8) for field in fields]
    return BitReader(packed(fixed(np.array([parameter]), 8), *bits), "positions")


def test_impossible_positions_are_refused() -> None:
    with pytest.raises(PayloadError, match="11 positions, the update has 10 entries"):
        read_positions(stream(0), 11, 10)
    with pytest.raises(PayloadError, match="Rice parameter 32, expected at most 31"):
        read_positions(stream(32), 1, 10)
    with pytest.raises(PayloadError, match="position 10 lies outside the update's 10 entries"):
        read_positions(stream(0, unary(np.array([9, 0])).tolist()), 2, 10)
    with pytest.raises(PayloadError, match="outside the update's 10 entries"):
        read_positions(stream(31, unary(np.array([1])).tolist()), 1, 10)
    with pytest.raises(PayloadError, match="end early"):
        read_positions(stream(20, [1]), 1, 10)
