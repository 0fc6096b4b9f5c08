"""The audit of differential privacy agrees with the account, and finds noise that is missing."""

import math

import pytest
from scipy import stats

from benchmarks.audit import audit, lower_bound


@pytest.mark.parametrize("kind", ["secure", "compressed"])
def test_the_noise_that_is_accounted_for_is_not_refuted_and_too_little_is(kind: str) -> None:
    """By chance alone, a bound exceeds the true epsilon in one of twenty audits; these are far from it."""
    rows = {drawn: audit(kind, 4.0, 4, 300, drawn, 7) for drawn in (1.0, 0.2, 0.0)}
    epsilon = rows[1.0]["epsilon"]
    assert 1.5 < epsilon < 2.5
    assert rows[1.0]["bound"] < epsilon < rows[0.2]["bound"] <= rows[0.0]["bound"]
    assert rows[0.0]["right"] == rows[0.0]["guesses"]


def test_the_bound_is_that_of_the_binomial_without_delta() -> None:
    for right, guesses in ((60, 80), (80, 80), (41, 80)):
        # Clopper and Pearson: the smallest probability of a right guess that is compatible with these.
        chance = stats.binomtest(right, guesses, alternative="greater").proportion_ci(0.95).low
        expected = max(0.0, math.log(chance / (1 - chance)))
        assert lower_bound(right, guesses, 1000, 0.0) == pytest.approx(expected, abs=1e-3)
    assert lower_bound(70, 80, 1000, 1e-5) < lower_bound(70, 80, 1000, 0.0)
    assert lower_bound(70, 80, 1000, 1e-2) == 0
