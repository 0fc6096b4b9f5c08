"""The sampler of discrete Gaussians has their distribution, and a sum of them is as private as the account says."""

import doctest
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_mechanism import DiscreteGaussianPrivacyLoss
from scipy import stats

from tofu.privacy import Noise, discrete, epsilon_of, rounded_norm
from tofu.privacy.discrete import discrete_gaussian
from tofu.privacy.noise import _SMOOTHING
from tofu.secagg.encoding import EncodingConfig, RingEncoder
from tofu.secagg.masks import Stream, new_seed
from tofu.weights import ParamSpec

Density = tuple[np.ndarray, np.ndarray]


def density(deviation: float) -> Density:
    """The integers within 40 deviations, and their probabilities."""
    edge = math.ceil(40 * deviation) + 2
    cells = np.arange(-edge, edge + 1)
    mass = np.exp(-(cells**2) / (2 * deviation**2))
    return cells, mass / mass.sum()


def chi_square(samples: np.ndarray, deviation: float) -> float:
    """p of Pearson's test; cells that are expected less than 10 times are merged to two."""
    cells, mass = density(deviation)
    common = mass * samples.size >= 10
    low, high = cells[common][0], cells[common][-1]
    observed = [(samples < low).sum(), *((samples == cell).sum() for cell in cells[common]), (samples > high).sum()]
    expected = [mass[cells < low].sum(), *mass[common], mass[cells > high].sum()]
    return float(stats.chisquare(observed, np.array(expected) * samples.size, sum_check=False).pvalue)


@pytest.mark.parametrize("deviation", [0.4, 1.0, 2.5, 3.0, 7.99, 8.0, 100.3])
def test_samples_have_the_probabilities_of_the_discrete_gaussian(deviation: float) -> None:
    samples = discrete_gaussian(deviation, 300_000, Stream(new_seed()))
    assert chi_square(samples, deviation) > 1e-7
    # Independent: neighbors are as often equal as chance has it.
    equal = int((samples[:-1] == samples[1:])[::2].sum())
    assert stats.binomtest(equal, samples.size // 2, float((density(deviation)[1] ** 2).sum())).pvalue > 1e-7


@pytest.mark.parametrize("deviation", [2.0**20 + 0.5, 2.0**40, 2.0**50])
def test_wide_samples_are_normal_to_their_lowest_bits(deviation: float) -> None:
    samples = discrete_gaussian(deviation, 200_000, Stream(new_seed()))
    assert stats.kstest(samples / deviation, "norm").pvalue > 1e-7
    for bits in (1, 4):
        assert stats.chisquare(np.bincount(samples & (2**bits - 1), minlength=2**bits)).pvalue > 1e-7


def test_coins_that_floats_cannot_decide_are_decided_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every coin tossed by exact arithmetic, float64 and exact arithmetic agree, and so do the probabilities."""
    exact, tossed = discrete._is_below, []

    def check(word: int, gamma: Fraction, stream: Stream) -> bool:
        result = exact(word, gamma, stream)
        assert result == (word * 2.0**-64 < math.exp(-gamma))
        tossed.append(word)
        return result

    monkeypatch.setattr(discrete, "_is_below", check)
    monkeypatch.setattr(discrete, "_DOUBT", 2.0)
    assert chi_square(discrete_gaussian(3.0, 1000, Stream(new_seed())), 3.0) > 1e-7
    assert len(tossed) > 1000
    # 64 bits that are those of exp(-1): what follows them decides, with the probability of the bits that follow.
    series = sum((Fraction((-1) ** n, math.factorial(n)) for n in range(100)), start=Fraction(0)) * 2**64
    word, share = int(series), float(series - int(series))
    below = sum(exact(word, Fraction(1), Stream(new_seed())) for _ in range(1000))
    assert stats.binomtest(below, 1000, share).pvalue > 1e-7
    assert exact(word - 1, Fraction(1), Stream(new_seed()))
    assert not exact(word + 1, Fraction(1), Stream(new_seed()))


def deltas(parts: list[Density], shift: int) -> Callable[[float], float]:
    """The exact delta, by epsilon, of a sum of integers with these densities that one client shifts."""
    total = np.ones(1)
    for _, mass in parts:
        total = np.convolve(total, mass)
    moved, still = np.pad(total, (shift, 0)), np.pad(total, (0, shift))
    return lambda epsilon: float(np.maximum(moved - math.exp(epsilon) * still, 0).sum())


def gaussian_delta(ratio: float, epsilon: float) -> float:
    """Of a Gaussian mechanism with this sensitivity over deviation: Balle & Wang 2018, theorem 8."""
    away, scale = epsilon / ratio, math.exp(epsilon)
    return float(stats.norm.cdf(ratio / 2 - away) - scale * stats.norm.cdf(-ratio / 2 - away))


EPSILONS = np.linspace(0.01, 6, 400)


@pytest.mark.parametrize("sharers", [1, 3, 10])
@pytest.mark.parametrize("steps", [3.0, 3.7, 10.0])
@pytest.mark.parametrize("shift", [1, 2, 5, 11])
def test_a_sum_of_discrete_gaussians_is_as_private_as_the_gaussian_of_the_account(
    sharers: int, steps: float, shift: int
) -> None:
    """At every epsilon; `_SMOOTHING` is the difference between the two variances."""
    exact = deltas([density(steps)] * sharers, shift)
    ratio = shift / math.sqrt(sharers * steps**2 - _SMOOTHING**2)
    assert all(exact(epsilon) <= gaussian_delta(ratio, epsilon) + 1e-12 for epsilon in EPSILONS)


def test_without_the_additional_variance_a_discrete_gaussian_is_less_private_than_a_gaussian() -> None:
    exact = deltas([density(3.0)], 5)
    assert any(exact(epsilon) > 1.01 * gaussian_delta(5 / 3.0, epsilon) for epsilon in EPSILONS)


@pytest.mark.parametrize(("sharers", "multiplier", "rounds"), [(1, 1.0, 1), (1, 3.0, 10), (4, 2.0, 5)])
def test_epsilon_bounds_what_dp_accounting_finds_for_the_noise_that_is_drawn(
    sharers: int, multiplier: float, rounds: int
) -> None:
    """The noise of a secure round with few bits, for an update of one value that is rounded to the largest norm."""
    noise = Noise(1.0, multiplier, sharers).on_ring(levels=60, values=1)
    deviation = noise.deviation(1) / noise.grid * math.sqrt(sharers)
    sensitivity = math.floor(rounded_norm(1.0, noise.grid, 1) / noise.grid)
    assert sensitivity * multiplier < deviation
    oracle = privacy_loss_distribution.from_discrete_gaussian_mechanism(deviation, sensitivity=sensitivity)
    found = oracle.self_compose(rounds).get_epsilon_for_delta(1e-5)
    assert 0.6 * epsilon_of(multiplier / rounds**0.5, 1e-5) < found < epsilon_of(multiplier / rounds**0.5, 1e-5)


def test_our_delta_of_one_sample_is_that_of_dp_accounting() -> None:
    exact, oracle = deltas([density(4.0)], 3), DiscreteGaussianPrivacyLoss(4.0, sensitivity=3)
    for epsilon in (0.1, 0.5, 1.0, 2.0):
        assert exact(epsilon) == pytest.approx(oracle.get_delta_for_epsilon(epsilon), rel=1e-3, abs=1e-9)


def test_a_sum_that_wraps_around_is_the_exact_sum_modulo_the_ring() -> None:
    """Noise far beyond the ring: nothing is limited, as that would not be a function of the sum alone."""
    noise = Noise(1.0, 100.0, 3, grid=2.0**-4)
    encoder = RingEncoder(ParamSpec({"a": torch.Size([1000])}, {}), EncodingConfig(3, 8, 1.0, (1.0,)))
    parts = list[np.ndarray]()

    def steps(values: np.ndarray) -> np.ndarray:
        parts.append(noise.steps(values))
        return parts[-1]

    vectors = [encoder.encode_noised({"a": torch.full((1000,), 0.01)}, {}, steps).vector for _ in range(3)]
    assert min(int(np.abs(part).max()) for part in parts) > 2**11  # 1.4 deviations of 1,000 values each
    assert np.array_equal(sum(vectors)[:1000] % 2**8, np.sum(parts, axis=0) % 2**8)


def test_the_example_runs() -> None:
    result = doctest.testmod(discrete)
    assert result.attempted
    assert not result.failed
