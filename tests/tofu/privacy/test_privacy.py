import doctest
import json
import math
import statistics
from types import ModuleType

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.conftest import Case
from tofu.errors import RunError, SettingError
from tofu.models import build_model
from tofu.privacy import (
    Accountant,
    Noise,
    accounting,
    check_param_spec,
    clip,
    epsilon_of,
    noise,
    noise_multiplier_for,
    normals,
    rounded_norm,
)
from tofu.secagg.encoding import EncodingConfig, RingEncoder
from tofu.secagg.fixed_point import FixedPoint
from tofu.secagg.masks import Stream, add, new_seed
from tofu.weights import ParamSpec, Weights, layout_of


def norm_of(update: Weights) -> float:
    return math.sqrt(sum(value.double().square().sum().item() for value in update.values()))


def flat(update: Weights) -> np.ndarray:
    return torch.cat([value.flatten() for value in update.values()]).double().numpy()


entries = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(entries, entries, st.floats(1e-6, 1e6))
def test_clipping_bounds_the_norm_and_keeps_the_direction(first, second, norm) -> None:  # type: ignore[no-untyped-def]
    update = {"a": torch.tensor(first), "b": torch.tensor(second)}
    clipped, true = clip(update, norm)
    assert true == pytest.approx(norm_of(update))
    assert norm_of(clipped) <= norm
    if true <= norm:
        assert all(torch.equal(clipped[name], update[name]) for name in update)
    else:
        assert norm_of(clipped) == pytest.approx(norm, rel=1e-5)
        assert np.allclose(flat(clipped) * true / norm, flat(update), rtol=1e-5, atol=1e-30)


def test_clipping_a_real_update_covers_its_buffers(every_layer_update: Case) -> None:
    _, update = every_layer_update
    clipped, true = clip(update, 0.01)
    assert true == pytest.approx(norm_of(update))
    assert norm_of(clipped) <= 0.01
    assert clipped.keys() == update.keys()


def test_what_cannot_be_clipped_is_refused() -> None:
    with pytest.raises(RunError, match="update of a has 1 of 2 values that are not finite"):
        clip({"a": torch.tensor([1.0, math.nan])}, 1.0)
    for norm in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(SettingError, match="clip-norm"):
            clip({"a": torch.ones(2)}, norm)


def test_a_model_with_batch_counters_is_refused(digits) -> None:  # type: ignore[no-untyped-def]
    check_param_spec(layout_of(build_model("cnn", digits.shape, norm="group")))
    with pytest.raises(SettingError, match=r"with BatchNorm \(norm1, norm2, norm3\).* e.g. by GroupNorm"):
        check_param_spec(layout_of(build_model("cnn", digits.shape, norm="batch")))
    with pytest.raises(SettingError, match=r"\(1, 2, 3 and 1 more\)"):
        check_param_spec(layout_of(torch.nn.Sequential(torch.nn.Linear(4, 4), *map(torch.nn.BatchNorm1d, [4] * 4))))


def test_samples_are_normal() -> None:
    samples = normals(400_001, Stream(new_seed()))
    assert samples.shape == (400_001,)
    assert stats.kstest(samples, "norm").pvalue > 1e-7
    assert stats.kstest(np.abs(samples[:200_000]), np.abs(samples[200_000:])).pvalue > 1e-7
    assert abs(np.corrcoef(samples[:200_000], samples[200_001:])[0, 1]) < 0.015
    tail = (np.abs(samples) > 3).sum()
    assert stats.binomtest(int(tail), samples.size, 2 * stats.norm.sf(3)).pvalue > 1e-7


def test_samples_depend_on_the_stream_only() -> None:
    seed = new_seed()
    assert np.array_equal(normals(1000, Stream(seed)), normals(1000, Stream(seed)))
    assert not np.array_equal(normals(1000, Stream(seed)), normals(1000, Stream(new_seed())))


def test_noise_has_its_deviation_and_comes_fresh(mlp_update: Case) -> None:
    update, _ = clip(mlp_update[1], 0.5)
    noise = Noise(0.5, 1.3)
    noisy = noise.add(update)
    assert {name: value.shape for name, value in noisy.items()} == {name: value.shape for name, value in update.items()}
    added = flat(noisy) - flat(update)
    deviation = noise.deviation(added.size)
    assert deviation == pytest.approx(0.65, rel=1e-4)
    assert stats.kstest(added / deviation, "norm").pvalue > 1e-7
    assert abs(np.corrcoef(added, flat(noise.add(update)) - flat(update))[0, 1]) < 0.05


def test_values_lie_on_the_grid_whatever_the_update_was(mlp_update: Case) -> None:
    update, _ = clip(mlp_update[1], 1.0)
    noise = Noise(1.0, 1.0, 4, grid=2.0**-10)
    for each in (update, {name: torch.zeros_like(value) for name, value in update.items()}):
        steps = flat(noise.add(each)) / noise.grid
        assert np.array_equal(steps, np.rint(steps))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.floats(0.01, 10), st.integers(-12, -1), st.integers(0, 2**32 - 1))
def test_rounding_to_the_grid_keeps_within_its_norm_and_is_near(values, norm, exponent, seed) -> None:  # type: ignore[no-untyped-def]
    grid = 2.0**exponent * norm
    grid = 2.0 ** math.floor(math.log2(grid))
    noise = Noise(norm, 2.0, grid=grid)
    exact = np.random.default_rng(seed).normal(size=values)
    exact *= norm / np.linalg.norm(exact)
    steps = noise._rounded(exact / grid, Stream(new_seed()))
    assert np.linalg.norm(steps * grid) <= rounded_norm(norm, grid, values)
    assert np.abs(steps * grid - exact).max() < grid


def test_rounding_is_unbiased() -> None:
    noise = Noise(1.0, 2.0, grid=2.0**-4)
    exact = np.full(200_000, 0.9 / math.sqrt(200_000))
    steps = noise._rounded(exact / noise.grid, Stream(new_seed()))
    mean = exact[0] / noise.grid
    assert abs(steps.mean() - mean) < 6 * math.sqrt(mean * (1 - mean) / exact.size)


def test_parts_add_up_to_the_whole_through_a_secure_sum(mlp_update: Case) -> None:
    """Parts on the ring's own grid: the sum is that of the noisy updates to the last bit, and noisy by z C or more."""
    clients, norm, multiplier, bits = 8, 1.0, 1.0, 18
    values = flat(mlp_update[1]).size
    levels = FixedPoint(clients, bits, 1.0).levels
    noise = Noise(norm, multiplier, clients).on_ring(levels=levels, values=values)
    update, _ = clip(mlp_update[1], norm)
    spec = ParamSpec({name: value.shape for name, value in update.items()}, {})
    config = EncodingConfig(clients, bits, 1.0, (noise.grid * levels,) * len(update))
    encoder = RingEncoder(spec, config)
    encoded = [encoder.encode_noised(update, {}, noise.steps) for _ in range(clients)]
    total = np.zeros(encoder.length, dtype=np.uint64)
    for one in encoded:
        total = add(total, one.vector, bits)
    mean = encoder.decode(total, clients)
    assert (mean.examples, mean.loss, mean.clipped, mean.largest_clipped) == (clients, 0.0, 0, 1.0)
    exact = sum(flat(one.decoded) / noise.grid for one in encoded)
    assert np.allclose(flat(mean.update) * clients / noise.grid, exact, atol=0.01)
    added = (exact * noise.grid) - clients * flat(update)
    expected = math.hypot(noise.deviation(values) * math.sqrt(clients), noise.grid * math.sqrt(clients) / 2)
    assert 0.97 * multiplier * norm < statistics.pstdev(added.tolist())
    assert statistics.pstdev(added.tolist()) == pytest.approx(expected, rel=0.04)
    assert stats.kstest(added / added.std(), "norm").pvalue > 1e-7


def test_noise_that_cannot_be_is_refused() -> None:
    for field, values in (("clip-norm", (0.0, 1.0)), ("noise-multiplier", (1.0, 0.0)), ("sharers", (1.0, 1.0, 0))):
        with pytest.raises(SettingError, match=field):
            Noise(*values)  # type: ignore[arg-type]
    for grid in (-0.5, 0.3, 1.0):
        with pytest.raises(SettingError, match="power of 2"):
            Noise(1.0, 1.0, grid=grid)
    with pytest.raises(SettingError, match="more for 1000000 values"):
        Noise(1.0, 1.0, 6).on_ring(levels=200, values=1_000_000)
    with pytest.raises(RunError, match="clip it first"):
        Noise(1.0, 1.0).add({"a": torch.ones(2)})


@pytest.mark.parametrize(("multiplier", "rounds"), [(1.0, 1), (4.0, 10), (12.0, 200)])
def test_epsilon_agrees_with_dp_accounting(multiplier: float, rounds: int) -> None:
    accountant = Accountant(1e-5)
    for _ in range(rounds):
        spent = accountant.spend(multiplier, "secure")
    event = SelfComposedDpEvent(GaussianDpEvent(multiplier), rounds)
    assert spent == pytest.approx(PLDAccountant().compose(event).get_epsilon(1e-5), rel=1e-3)
    # Renyi accounting is an upper bound, and not a wild one.
    upper = RdpAccountant().compose(event).get_epsilon(1e-5)
    assert upper / 1.35 < spent <= upper


def test_rounds_of_different_noise_compose_exactly() -> None:
    accountant = Accountant(1e-6)
    accountant.spend(2.0, "secure")
    accountant.spend(3.0, "compressed")
    mixed = accountant.spend(3.0, "compressed")
    pld = PLDAccountant()
    pld.compose(GaussianDpEvent(2.0)).compose(GaussianDpEvent(3.0), 2)
    assert mixed == pytest.approx(pld.get_epsilon(1e-6), rel=1e-3)
    assert accountant.to_dict()["spent"] == [["compressed", 3.0, 2], ["secure", 2.0, 1]]


@pytest.mark.parametrize("module", [accounting, noise])
def test_the_examples_run(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 40), st.floats(1e-10, 1e-2))
def test_epsilon_meets_its_delta_by_the_closed_form(epsilon, delta) -> None:  # type: ignore[no-untyped-def]
    z = noise_multiplier_for(epsilon, delta, 1)
    there = stats.norm.cdf(0.5 / z - epsilon * z) - math.exp(epsilon) * stats.norm.cdf(-0.5 / z - epsilon * z)
    assert there == pytest.approx(delta, rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 40), st.floats(1e-9, 1e-2), st.integers(1, 60))
def test_the_multiplier_for_a_budget_lasts_its_rounds_and_no_more(epsilon, delta, rounds) -> None:  # type: ignore[no-untyped-def]
    multiplier = noise_multiplier_for(epsilon, delta, rounds)
    accountant = Accountant(delta)
    for _ in range(rounds):
        assert accountant.allows(multiplier, epsilon)
        accountant.spend(multiplier, "secure")
    assert accountant.epsilon == pytest.approx(epsilon, rel=1e-6)
    assert accountant.epsilon <= epsilon
    assert not accountant.allows(multiplier, epsilon)


def test_a_round_without_noise_spends_everything() -> None:
    accountant = Accountant(1e-5)
    assert accountant.epsilon == 0.0
    assert not accountant.allows(0.0, 1e9)
    assert accountant.spend(0.0, "compressed") == math.inf
    assert not accountant.allows(100.0, 1e9)
    assert epsilon_of(0.0, 1e-5) == math.inf


def test_the_account_survives_a_checkpoint() -> None:
    accountant = Accountant(1e-5)
    for multiplier, kind in ((2.0, "secure"), (2.0, "compressed"), (2.0, "secure"), (0.7, "secure")):
        accountant.spend(multiplier, kind)
    again = Accountant.from_dict(json.loads(json.dumps(accountant.to_dict())))
    assert again.epsilon == accountant.epsilon
    assert again.to_dict() == accountant.to_dict()
    assert again.spend(1.0, "compressed") == accountant.spend(1.0, "compressed")


def test_an_account_of_an_earlier_version_has_its_rounds_by_their_present_kind() -> None:
    accountant = Accountant(1e-5)
    accountant.spend(2.0, "compressed")
    earlier = json.loads(json.dumps(accountant.to_dict()).replace("compressed", "proxy"))
    assert Accountant.from_dict(earlier).to_dict() == accountant.to_dict()


def test_an_account_that_was_not_written_by_us_is_refused() -> None:
    for state in (None, {}, {"delta": 2.0, "spent": []}, {"delta": 1e-5, "spent": [["secure", -1.0, 1]]}):
        with pytest.raises(RunError, match="privacy account"):
            Accountant.from_dict(state)
    for spent in ([["secure", 1.0]], [["secure", "x", 1]], [["secure", 1.0, 0]], [[1, 1.0, 1]], 3):
        with pytest.raises(RunError, match="privacy account"):
            Accountant.from_dict({"delta": 1e-5, "spent": spent})


def test_settings_of_the_account_are_checked() -> None:
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(SettingError, match="delta"):
            Accountant(delta)
    with pytest.raises(SettingError, match="noise-multiplier"):
        Accountant(1e-5).spend(-1.0, "compressed")
    with pytest.raises(SettingError, match="epsilon"):
        noise_multiplier_for(0.0, 1e-5, 1)
    with pytest.raises(SettingError, match="rounds"):
        noise_multiplier_for(1.0, 1e-5, 0)


# Amplification by secret sampling


@pytest.mark.parametrize(("sampled", "multiplier", "rounds"), [(100, 1.0, 10), (100, 2.0, 100), (10, 1.0, 1000)])
def test_secret_sampling_agrees_with_dp_accounting(sampled: int, multiplier: float, rounds: int) -> None:
    accountant = Accountant(1e-5)
    for _ in range(rounds):
        accountant.spend(multiplier, "secure", sampled, 1000)
    # Neighbors of a fixed sample differ by the update of one client, up to 2 C: multiplier z / 2.
    event = SampledWithoutReplacementDpEvent(1000, sampled, GaussianDpEvent(multiplier / 2))
    orders = [float(order) for order in (*range(2, 30), 40, 60)]
    oracle = RdpAccountant(orders, NeighboringRelation.REPLACE_ONE).compose(event, rounds).get_epsilon(1e-5)
    assert accountant.model_epsilon == pytest.approx(oracle, rel=0.02)
    assert accountant.model_epsilon < accountant.epsilon


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 99), st.floats(0.3, 20), st.integers(1, 30))
def test_secret_sampling_never_costs_and_never_gains_more_than_one_round_shows(sampled, multiplier, rounds) -> None:  # type: ignore[no-untyped-def]
    accountant, fewer = Accountant(1e-5), Accountant(1e-5)
    for _ in range(rounds):
        accountant.spend(multiplier, "secure", sampled, 100)
        fewer.spend(multiplier, "secure", max(1, sampled - 1), 100)
    assert 0 <= fewer.model_epsilon <= accountant.model_epsilon <= accountant.epsilon
    # A client that sends C or zero, with a probability of q: the exact delta of one round, at this epsilon.
    q, shift, epsilon = sampled / 100, 1 / multiplier, accountant.model_epsilon
    where = np.linspace(-12, 12 + shift, 40_001)
    still = stats.norm.pdf(where)
    moved = (1 - q) * still + q * stats.norm.pdf(where - shift)
    for one, other in ((moved, still), (still, moved)):
        assert np.trapezoid(np.maximum(one - math.exp(min(epsilon, 700)) * other, 0), where) <= 1e-5 + 1e-9


def test_an_account_with_secret_samples_survives_a_checkpoint() -> None:
    accountant = Accountant(1e-5)
    accountant.spend(2.0, "secure", 5, 100)
    accountant.spend(2.0, "secure")
    again = Accountant.from_dict(json.loads(json.dumps(accountant.to_dict())))
    assert again.to_dict() == accountant.to_dict()
    assert 0 < again.model_epsilon == accountant.model_epsilon <= again.epsilon
    assert accountant.spend(0.0, "secure", 5, 100) == accountant.model_epsilon == math.inf
    for sample in ([5], [0, 10], [11, 10], ["x", 10]):
        with pytest.raises(RunError, match="privacy account"):
            Accountant.from_dict({"delta": 1e-5, "spent": [["secure", 1.0, 1, *sample]]})
    with pytest.raises(SettingError, match="sampled=11"):
        accountant.spend(1.0, "secure", 11, 10)
