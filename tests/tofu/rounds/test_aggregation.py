import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.data import ImageShape
from tofu.errors import PayloadError
from tofu.reference_model import ReferenceModel
from tofu.rounds.aggregation import Mean, RunningMean


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.integers(1, 100_000), min_size=1, max_size=20),
    seed=st.integers(0, 2**31),
    spread=st.floats(1e-6, 10) | st.floats(1e2, 5e2),  # with 100,000 examples, most of what a sum can hold
    order=st.randoms(),
)
def test_the_mean_is_right_and_the_same_to_the_bit_in_every_order(weights, seed, spread, order) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    updates = [({"a": spread * torch.randn(5, generator=generator)}, weight) for weight in weights]
    exact = sum(u["a"].double() * w for u, w in updates) / sum(weights)
    means = []
    for _ in range(2):
        mean = RunningMean()
        for update, weight in updates:
            mean.add(update, weight)
        means.append(mean.mean()["a"])
        order.shuffle(updates)
    assert torch.equal(means[0], means[1])
    assert torch.allclose(means[0].double(), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_numbers_that_would_spoil_the_sum_are_refused_and_leave_it_as_it_was(value: float) -> None:
    mean = RunningMean()
    mean.add({"a": torch.ones(2)}, 3)
    with pytest.raises(PayloadError, match="more than can be added"):
        mean.add({"a": torch.tensor([0.0, value])}, 3)
    assert mean.examples == 3
    assert torch.equal(mean.mean()["a"], torch.ones(2))


def test_a_client_just_below_the_limit_leaves_the_sum_to_the_others() -> None:
    """2^28 is the limit of a value times its examples, whoever sent what before."""
    large, honest = {"a": torch.tensor([2.0**27, -(2.0**27)])}, {"a": torch.tensor([1e5, -1e5])}
    mean = RunningMean()
    for _ in range(5):
        mean.add(large, 1)
        mean.add(honest, 2000)
    assert torch.allclose(mean.mean()["a"], torch.tensor([1.0, -1.0]) * (2**27 + 2e8) / 2001)
    with pytest.raises(PayloadError, match="more than can be added"):
        mean.add(large, 2)


def test_a_sum_with_carries_equals_one_without() -> None:
    """Large values that cancel each other leave what the small ones come to."""
    small = [{"a": torch.randn(50, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    large = {"a": torch.full((50,), 2.0**27)}
    plain, carried = RunningMean(), RunningMean()
    for update in small:
        plain.add(update, 7)
        carried.add(large, 1)
        carried.add(update, 7)
        carried.add({"a": -large["a"]}, 1)
    carried.examples = plain.examples
    assert torch.equal(carried.mean()["a"], plain.mean()["a"])


SPEC = ReferenceModel(torch.nn.Linear(3, 2).eval(), ImageShape(1, 1, 3, 2)).param_spec


@settings(max_examples=50, deadline=None)
@given(
    examples=st.lists(st.integers(1, 1000), min_size=1, max_size=8),
    common=st.floats(0, 3),
    seed=st.integers(0, 2**31),
    order=st.randoms(),
)
def test_the_diversity_is_the_mean_square_over_the_square_of_the_mean(examples, common, seed, order) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(len(examples), 8, generator=generator) + common
    weights = torch.tensor(examples) / sum(examples)
    expected = (weights @ vectors.square().sum(1)) / (weights @ vectors).square().sum()
    updates = [({"weight": row[:6].view(2, 3), "bias": row[6:]}, n) for row, n in zip(vectors, examples, strict=True)]
    found = []
    for _ in range(2):
        mean = Mean(SPEC, 0.0)
        for update, n in updates:
            mean.add(update, n)
        found.append(mean.diversity(mean.mean()))
        order.shuffle(updates)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(float(expected), rel=1e-3)


def test_the_diversity_of_equal_and_of_orthogonal_updates() -> None:
    eye = torch.eye(6).view(6, 2, 3)
    for rows, expected in (([eye[0]] * 6, 1.0), (list(eye), 6.0)):
        mean = Mean(SPEC, 0.0)
        for row in rows:
            mean.add({"weight": row, "bias": torch.zeros(2)}, 7)
        assert mean.diversity(mean.mean()) == pytest.approx(expected, rel=1e-5)
    nothing = Mean(SPEC, 0.0)
    nothing.add({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, 7)
    assert nothing.diversity(nothing.mean()) is None
