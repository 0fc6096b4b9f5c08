"""Robust aggregation against published attacks, and against values computed by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tofu.errors import PayloadError
from tofu.rounds import aggregators
from tofu.rounds.aggregation import Aggregator
from tofu.weights import ParamSpec, Weights

VALUES = 40
SPEC = ParamSpec({"w": torch.Size([VALUES])}, {"mean": torch.Size([2])})
ROBUST = [name for name in aggregators.names() if name != "mean"]


def update(values: Tensor, buffer: float = 0.0) -> Weights:
    return {"w": values.float(), "mean": torch.full((2,), buffer)}


def aggregate(name: str, rows: list[Tensor], malicious: float = 0.2, buffers: list[float] | None = None) -> Weights:
    rule: Aggregator = aggregators.get(name)(SPEC, malicious)
    for number, row in enumerate(rows):
        rule.add(update(row, buffers[number] if buffers else 0.0), 10)
    return rule.mean()


def honest(count: int, seed: int = 0) -> Tensor:
    """Updates around (1, 1, ...) with a standard deviation of 0.5."""
    return 1 + 0.5 * torch.randn(count, VALUES, generator=torch.Generator().manual_seed(seed))


ATTACKS = {
    "sign flip": lambda rows: -4 * rows.mean(0),
    "one huge value": lambda rows: torch.full((VALUES,), 1e6),
    "inner product manipulation": lambda rows: -2 * rows.mean(0),  # Xie et al. 2019, arXiv 1903.03936
    "a little is enough": lambda rows: rows.mean(0) - 1.0 * rows.std(0),  # Baruch et al. 2019, arXiv 1902.06156
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ROBUST)
def test_two_of_ten_malicious_clients_do_not_turn_the_update(name: str, attack: str) -> None:
    rows = honest(8)
    bad = ATTACKS[attack](rows)
    found = aggregate(name, [*rows, bad, bad])["w"]
    mean = rows.mean(0)
    assert float(torch.nn.functional.cosine_similarity(found, mean, dim=0)) > 0.9
    assert float((found - mean).norm() / mean.norm()) < 0.65


@pytest.mark.parametrize("attack", ["sign flip", "one huge value"])
def test_the_plain_mean_is_turned_by_them(attack: str) -> None:
    rows = honest(8)
    bad = ATTACKS[attack](rows)
    found = aggregate("mean", [*rows, bad, bad])["w"]
    assert float((found - rows.mean(0)).norm() / rows.mean(0).norm()) > 0.9


@pytest.mark.parametrize("name", ROBUST)
def test_a_buffer_of_one_client_does_not_count(name: str) -> None:
    found = aggregate(name, list(honest(5)), buffers=[0.1, 0.2, 0.3, 0.2, 1e6])
    assert found["mean"].tolist() == pytest.approx([0.2, 0.2])


def test_each_rule_on_numbers_that_can_be_checked_by_hand() -> None:
    rows = [torch.full((VALUES,), value) for value in (1.0, 2.0, 3.0, 4.0, 100.0)]
    first = {name: float(aggregate(name, rows)["w"][0]) for name in aggregators.names()}
    assert first["mean"] == pytest.approx(22)
    assert first["median"] == pytest.approx(3)
    assert first["trimmed-mean"] == pytest.approx(3)  # of 2, 3 and 4
    assert first["norm-clip"] == pytest.approx((1 + 2 + 3 + 3 + 3) / 5)
    assert first["multi-krum"] == pytest.approx(2.5)  # without 100
    # Distances from the median 3 are 2, 1, 0, 1, 97, clipped to 1: the mean step is (-1 - 1 + 0 + 1 + 1) / 5 = 0.
    assert first["centered-clip"] == pytest.approx(3)


@pytest.mark.parametrize("name", aggregators.names())
@given(order=st.permutations(range(5)), seed=st.integers(0, 100))
def test_the_order_of_arrival_does_not_matter(name: str, order: list[int], seed: int) -> None:
    rows = honest(5, seed)
    assert torch.equal(aggregate(name, list(rows))["w"], aggregate(name, [rows[row] for row in order])["w"])


@pytest.mark.parametrize("name", aggregators.names())
def test_equal_updates_are_their_own_aggregate(name: str) -> None:
    row = honest(1)[0]
    assert torch.allclose(aggregate(name, [row] * 4)["w"], row, atol=1e-6)


@pytest.mark.parametrize("name", aggregators.names())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_added(name: str, value: float) -> None:
    rule = aggregators.get(name)(SPEC, 0.2)
    with pytest.raises(PayloadError):
        rule.add(update(torch.full((VALUES,), value)), 1)
    rule.add(update(torch.ones(VALUES)), 1)
    assert rule.mean()["w"][0] == 1
