import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import Case
from tofu.errors import SettingError
from tofu.secagg.coordinates import LEADING_FRACTION, MIN_LEVELS, decode, digest, encode, select, settings_for
from tofu.secagg.fixed_point import FixedPoint

shares = st.floats(0.01, 1.0)
turns = st.integers(0, 60)


@st.composite
def movements(draw: st.DrawFn) -> Tensor:
    """How far weights moved: some not at all, some equally far."""
    values, seed = draw(st.integers(1, 600)), draw(st.integers(0, 2**31))
    moved = torch.randn(values, generator=torch.Generator().manual_seed(seed))
    return moved.mul(draw(st.sampled_from((1.0, 2.0, 1000.0)))).round()


def flat(case: Case) -> Tensor:
    return torch.cat([value.flatten() for value in case[1].values()])


@settings(max_examples=150, deadline=None)
@given(movements(), shares, turns, st.integers(0, 1000), st.floats(-3, 3))
def test_the_code_of_a_sum_is_the_sum_of_the_codes(
    moved: Tensor, share: float, turn: int, seed: int, by: float
) -> None:
    taken, values = select(moved, share, turn), moved.numel()
    one, other = torch.randn(2, values, generator=torch.Generator().manual_seed(seed)).double()
    codes = encode(one, taken) + by * encode(other, taken)
    assert torch.equal(encode(one + by * other, taken), codes)
    decoded = decode(encode(one, taken), taken, values) + by * decode(encode(other, taken), taken, values)
    assert torch.equal(decode(codes, taken, values), decoded)


@settings(max_examples=150, deadline=None)
@given(movements(), shares, turns)
def test_places_are_as_many_as_asked_and_in_order(moved: Tensor, share: float, turn: int) -> None:
    taken = select(moved, share, turn)
    assert taken.numel() == math.ceil(share * moved.numel())
    assert torch.equal(taken, taken.unique())
    assert 0 <= int(taken[0]) <= int(taken[-1]) < moved.numel()
    update = torch.arange(1.0, moved.numel() + 1)
    left = update - decode(encode(update, taken), taken, moved.numel())
    assert int((left == 0).sum()) == taken.numel()


@settings(max_examples=100, deadline=None)
@given(movements(), shares, turns)
def test_what_moved_furthest_is_sent(moved: Tensor, share: float, turn: int) -> None:
    """Every entry that is among the led by a plain sort, whatever the turn."""
    taken = set(select(moved, share, turn).tolist())
    order = sorted(range(moved.numel()), key=lambda place: (-abs(float(moved[place])), place))
    led = [place for place in order[: int(LEADING_FRACTION * len(taken))] if moved[place] != 0]
    assert taken.issuperset(led)


@settings(max_examples=100, deadline=None)
@given(movements(), shares, turns, st.integers(0, 1000))
def test_higher_levels_lead(moved: Tensor, share: float, turn: int, seed: int) -> None:
    """By a plain sort, first by level, then by distance."""
    levels = torch.randint(-3, 4, moved.shape, generator=torch.Generator().manual_seed(seed))
    taken = set(select(moved, share, turn, levels=levels.numpy()).tolist())
    order = sorted(range(moved.numel()), key=lambda p: (-int(levels[p]), -abs(float(moved[p])), p))
    led = min(int(LEADING_FRACTION * len(taken)), int((moved != 0).sum()))
    if len(taken) < moved.numel():
        assert taken.issuperset(order[:led])
    assert len(taken) == math.ceil(share * moved.numel())


@settings(max_examples=60, deadline=None)
@given(movements(), st.floats(0.05, 1.0), turns)
def test_every_entry_has_its_turn(moved: Tensor, share: float, first: int) -> None:
    count = math.ceil(share * moved.numel())
    led = min(int(LEADING_FRACTION * count), int((moved != 0).sum()))
    rest, window = moved.numel() - led, count - led
    seen: set[int] = set()
    for turn in range(first, first + math.ceil(rest / window)):
        assert len(seen) < moved.numel()
        seen |= set(select(moved, share, turn).tolist())
    assert len(seen) == moved.numel()


@pytest.mark.parametrize("moving", [False, True])
def test_a_turn_is_spread_evenly(moving: bool) -> None:
    """Where nothing leads, any stretch of the update sends about its share, so that no layer waits."""
    moved = torch.zeros(100_000)
    moved[0] = float(moving)
    for turn in range(12):
        taken = select(moved, 0.1, turn)
        counts = decode(torch.ones(taken.numel()), taken, moved.numel()).view(100, 1000).sum(1)
        assert counts.min() >= 97
        assert counts.max() <= 103


def test_both_ends_take_the_same_and_notice_where_not(mlp_update: Case) -> None:
    moved = flat(mlp_update)
    taken = select(moved, 0.25, 3)
    assert digest(taken) == digest(select(moved.clone(), 0.25, 3))
    others = [select(moved, 0.25, 4), select(moved, 0.26, 3), select(moved.roll(1), 0.25, 3)]
    assert len({digest(other) for other in [taken, *others]}) == 4


def test_entries_that_moved_carry_most_of_a_real_update(every_layer_update: Case, mlp_update: Case) -> None:
    """A quarter of the places, led by the update itself, holds far more of it than a quarter drawn evenly."""
    update = flat(mlp_update)
    led, even = (select(update, 0.25, 0, leading_fraction=led) for led in (LEADING_FRACTION, 0.0))
    parts = [float(encode(update, taken).square().sum() / update.square().sum()) for taken in (led, even)]
    assert parts[0] > 0.7
    assert parts[1] == pytest.approx(0.25, abs=0.05)


def test_error_feedback_delivers_a_real_update(mlp_update: Case) -> None:
    """Evenly by eighths: an entry last sent s rounds ago misses s of 8 updates, and nothing else is missing."""
    update = flat(mlp_update)
    residual, arrived = torch.zeros_like(update), torch.zeros_like(update)
    for turn in range(8):
        taken = select(torch.zeros_like(update), 1 / 8, turn)
        target = update + residual
        sent = decode(encode(target, taken), taken, update.numel())
        arrived += sent
        residual = target - sent
    assert torch.allclose(arrived + residual, 8 * update, atol=1e-5)
    missing = float(residual.norm() / (8 * update.norm()))
    assert missing == pytest.approx(math.sqrt(sum((s / 8) ** 2 for s in range(8)) / 8), rel=0.1)


@settings(max_examples=200, deadline=None)
@given(st.floats(1, 200), st.integers(1, 2000))
def test_settings_keep_the_ratio_and_enough_levels(ratio: float, clients: int) -> None:
    share, bits = settings_for(ratio, clients)
    assert 0 < share <= 1
    assert 32 / (share * bits) >= ratio * (1 - 1e-9)
    assert FixedPoint(clients, bits, 1.0).levels >= MIN_LEVELS
    if share < 1:
        assert 32 / (share * bits) == pytest.approx(ratio)
        assert (2 * clients * MIN_LEVELS).bit_length() == bits


def test_settings_for_ten_clients() -> None:
    assert settings_for(4.0, 10) == (1.0, 8)
    assert settings_for(16.0, 10) == (pytest.approx(2 / 7), 7)
    assert settings_for(1.0, 10) == (1.0, 32)


def test_what_cannot_be_compacted_is_refused() -> None:
    for share in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(SettingError, match="fraction"):
            select(torch.ones(10), share, 0)
    for ratio in (0.5, math.inf, math.nan):
        with pytest.raises(SettingError, match="ratio"):
            settings_for(ratio, 10)
    with pytest.raises(SettingError, match="clients"):
        settings_for(4.0, 0)
