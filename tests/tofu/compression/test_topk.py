import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Case
from tests.tofu.compression.common import bare, flat, generator, missed, update_of
from tofu.compression.topk import TopK, lloyd_magnitudes, read_largest, write_largest
from tofu.errors import PayloadError


def plain_lloyd(values: list[float], levels: list[float], steps: int) -> list[float]:
    for _ in range(steps):
        cells: list[list[float]] = [[] for _ in levels]
        for value in values:
            cells[min(range(len(levels)), key=lambda j: abs(value - levels[j]))].append(value)
        levels = [sum(cell) / len(cell) if cell else level for cell, level in zip(cells, levels, strict=True)]
    return levels


def test_magnitudes_are_those_of_a_plain_lloyd() -> None:
    values = torch.rand(101, generator=generator(), dtype=torch.float64).pow(3)
    start = [float(values.sort().values[int((j + 0.5) / 4 * 101)]) for j in range(4)]
    assert lloyd_magnitudes(values, 4).tolist() == pytest.approx(plain_lloyd(values.tolist(), start, 50))
    assert lloyd_magnitudes(torch.zeros(0), 2).tolist() == [0.0, 0.0]


def test_four_magnitudes_are_kept_as_they_are() -> None:
    network = bare((40, 10))
    x = torch.zeros(40, 10)
    x[3, 1], x[3, 2], x[17, 0], x[39, 9] = 1.0, -2.0, 4.0, -8.0
    compressed = TopK(network, ratio=20).compress(network, update_of(network, x), generator=generator())
    assert torch.equal(flat(compressed.decoded, network), x.double().flatten())
    assert compressed.body[:13] == b"\x04\0\0\0\x02" + b"\x80\x3f\0\x40\x80\x40\0\x41"  # 4, 2 bits, 1, 2, 4, 8
    with pytest.raises(PayloadError, match="have 9 bits per magnitude, expected 1 to 8"):
        TopK(network, ratio=20).decompress(network, b"\x04\0\0\0\x09" + compressed.body[5:])


@pytest.mark.parametrize("ratio", [20, 100, 400])
def test_keeps_exactly_the_largest_and_contracts_as_top_k_does(mlp_update: Case, ratio: float) -> None:
    network, update = mlp_update
    decoded = TopK(network, ratio=ratio).compress(network, update, generator=generator()).decoded
    x, c = flat(update, network), flat(decoded, network)
    count = int(c.count_nonzero())
    assert set(c.nonzero().flatten().tolist()) == set(x.abs().topk(count).indices.tolist())
    assert torch.equal(c.sign(), torch.where(c != 0, x.sign(), 0.0))
    share = float(x.abs().topk(count).values.square().sum() / x.square().sum())
    assert missed(update, decoded, network) <= 1 - count / x.numel()
    assert 1 - missed(update, decoded, network) > 0.9 * share  # rounding costs little of what the entries hold


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(500, 5000), budget=st.integers(60, 2000), tail=st.floats(0, 3))
def test_the_budget_is_used_unless_all_entries_are_sent(seed: int, length: int, budget: int, tail: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    vector = torch.randn(length, generator=draw) * (tail * torch.randn(length, generator=draw)).exp()
    data = write_largest(vector, budget)
    assert len(data) <= budget
    if read_largest(data, length).count_nonzero() < length:
        assert len(data) >= min(0.97 * budget, budget - 4)  # an entry more would not fit
