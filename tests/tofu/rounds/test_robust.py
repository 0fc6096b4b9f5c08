"""Robust aggregation against published attacks, and against values computed by hand."""

from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tofu.errors import PayloadError
from tofu.rounds import aggregators
from tofu.rounds.aggregation import Aggregator, limit_norm
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
    with pytest.raises(PayloadError, match=r"update of w holds|more than can be added"):
        rule.add(update(torch.full((VALUES,), value)), 1)
    rule.add(update(torch.ones(VALUES)), 1)
    assert rule.mean()["w"][0] == 1


def attacked(attack: str, seed: int) -> list[Tensor]:
    """Eight honest updates and two of one attack, float64."""
    rows = honest(8, seed).double()
    bad = ATTACKS[attack](rows).double()
    return [*rows, bad, 1.1 * bad]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_rules_agree_with_those_of_flower(attack: str) -> None:
    rows = attacked(attack, 3)
    results = [([row.float().numpy()], 10) for row in rows]
    for name, theirs in (
        ("median", aggregate_median(results)),
        ("trimmed-mean", aggregate_trimmed_avg(results, 0.2)),
        ("multi-krum", aggregate_krum(results, 2, 8)),
    ):
        assert aggregate(name, rows)["w"].numpy() == pytest.approx(theirs[0], abs=1e-5), name


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_rules_agree_with_those_of_byzfl(attack: str) -> None:
    """ByzFL (Gonzalez et al. 2025), a public suite of robust aggregation: pip install byzfl."""
    if find_spec("byzfl") is None:
        pytest.skip("byzfl is not installed: pip install byzfl")
    import_module("tofu.models.torchvision_compat")  # byzfl imports torchvision
    byzfl = import_module("byzfl")
    rows = attacked(attack, 4)
    vectors = np.stack([row.float().numpy() for row in rows]).astype(np.float64)
    typical = float(np.median(np.linalg.norm(vectors, axis=1)))
    centered = byzfl.CenteredClipping()
    centered.m = np.median(vectors, axis=0)
    for _ in range(3):
        centered.tau = float(np.median(np.linalg.norm(vectors - centered.m, axis=1)))
        center = centered(vectors)
    for name, theirs in (
        ("mean", byzfl.Average()(vectors)),
        ("median", byzfl.Median()(vectors)),
        ("trimmed-mean", byzfl.TrMean(f=2)(vectors)),
        ("multi-krum", byzfl.MultiKrum(f=2)(vectors)),
        ("norm-clip", byzfl.Average()(byzfl.Clipping(c=typical)(vectors))),
        ("centered-clip", center),
    ):
        assert aggregate(name, rows)["w"].numpy() == pytest.approx(theirs, rel=1e-4, abs=1e-4), name


@given(scale=st.floats(0, 1e6), largest=st.floats(0.01, 100))
def test_an_update_is_scaled_to_the_largest_norm_and_keeps_its_direction(scale: float, largest: float) -> None:
    given_ = update(scale * honest(1)[0], buffer=7.0)
    found = limit_norm(given_, SPEC, largest)
    length, true = float(found["w"].norm()), float(given_["w"].norm())
    assert length == pytest.approx(min(true, largest), rel=1e-4)
    assert torch.allclose(found["w"] * true, given_["w"] * length, rtol=1e-3, atol=1e-6 * true * length)
    assert torch.equal(found["mean"], given_["mean"])
    assert limit_norm(given_, SPEC, 0.0) is given_
