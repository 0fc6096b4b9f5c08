"""The benchmark of central privacy has the published network, and the noise of its epsilon."""

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant

from benchmarks.central_dp import DELTA, EPSILON, FEDERATION, NOISE_COHORT, POPULATION, noise_multiplier, simple_cnn


def test_the_noise_is_that_of_the_epsilon_by_another_accountant() -> None:
    rounds, multiplier = FEDERATION["rounds"], noise_multiplier(FEDERATION["rounds"])
    drawn = dp_accounting.PoissonSampledDpEvent(NOISE_COHORT / POPULATION, dp_accounting.GaussianDpEvent(multiplier))
    bound = RdpAccountant().compose(dp_accounting.SelfComposedDpEvent(drawn, rounds)).get_epsilon(DELTA)
    assert EPSILON <= bound <= 1.5 * EPSILON  # Renyi orders give a looser bound
    assert multiplier == pytest.approx(0.633, abs=1e-3)


def test_the_network_is_theirs_and_follows_from_the_seed() -> None:
    first, again, other = (simple_cnn(seed) for seed in (0, 0, 1))
    assert sum(p.numel() for p in first.parameters()) == 1_626_442
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not any(a.equal(b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
