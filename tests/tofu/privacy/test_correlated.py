"""The server's correlated noise: the sensitivity by brute force, its distribution, and who may take part when."""

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from server.client_registry import Client
from server.server_noise import ServerNoise
from tofu.errors import PayloadError, RunError, SettingError
from tofu.privacy import Accountant, Noise, correlated, rounded_norm
from tofu.privacy.correlated import CorrelatedSums, Participation, banded_square_root
from tofu.settings import Settings
from tofu.weights import ParamSpec

GIVEN = {
    "server-noise": "correlated", "min-separation": 2, "noise-multiplier": 0.01, "clip-norm": 0.5, "schedule": "fedavg",
    "clients": 20, "client-fraction": 0.1,
}  # fmt: skip
SPEC = ParamSpec({"a": torch.Size([3, 2])}, {"b": torch.Size([2])})


def matrix(rows: int, bands: int) -> np.ndarray:
    """C, [rows, rows]."""
    found = np.zeros((rows, rows))
    for offset, value in enumerate(banded_square_root(bands)):
        found += value * np.eye(rows, k=-offset)
    return found


def sensitivity_squared(rows: int, bands: int, separation: int) -> float:
    """The largest change of C x by vectors of norm 1 in rounds at least `separation` apart, over all such patterns.

    The entries of C are not negative, so equal vectors in all rounds change C x most.
    """
    gram, largest = matrix(rows, bands).T @ matrix(rows, bands), 0.0
    for count in range(1, rows + 1):
        for pattern in itertools.combinations(range(rows), count):
            if all(late - early >= separation for early, late in itertools.pairwise(pattern)):
                largest = max(largest, float(gram[np.ix_(pattern, pattern)].sum()))
    return largest


@pytest.mark.parametrize(
    ("rows", "bands", "oracle"),
    # toeplitz.minsep_sensitivity_squared of jax-privacy 2.0.0 for these coefficients
    [(9, 3, 273408.0), (12, 4, 292608.0), (7, 3, 247808.0), (12, 1, 12 * 65536.0)],
)
def test_no_participation_that_is_allowed_changes_more_than_is_accounted_for(
    rows: int, bands: int, oracle: float
) -> None:
    column = float((banded_square_root(bands) ** 2).sum())
    found = sensitivity_squared(rows, bands, bands)
    assert found == oracle
    assert found <= math.ceil(rows / bands) * column  # what Participation lets the runner account for
    if rows % bands == 0:
        assert found == math.ceil(rows / bands) * column
    if bands > 1:  # one round less between two participations, and the bound is wrong
        assert sensitivity_squared(rows, bands, bands - 1) > math.ceil(rows / (bands - 1)) * column


def test_the_coefficients_are_the_square_root_of_prefix_sums() -> None:
    coefficients = banded_square_root(40) / 256
    assert np.allclose(np.convolve(coefficients, coefficients)[:40], 1, atol=0.02)
    assert coefficients[:6] == pytest.approx([1, 0.5, 0.375, 0.3125, 0.2734, 0.2461], abs=2e-3)  # also jax-privacy's


def test_what_is_released_is_c_x_with_independent_discrete_noise() -> None:
    rows, bands, values = 12, 4, 4000
    noise = Noise(1.0, 0.5)
    sums, generator = CorrelatedSums(noise, bands, values), np.random.default_rng(0)
    exact = generator.integers(-(2**20), 2**20, size=(rows, values))
    estimates = np.array([sums.release(row + 1, exact[row]) for row in range(rows)])
    drawn = matrix(rows, bands) @ (estimates - exact)
    assert np.allclose(drawn, np.rint(drawn), atol=1e-3)  # integers: nothing but what is accounted for is released
    wanted = 0.5 * np.linalg.norm(banded_square_root(bands)) / noise.grid
    assert stats.kstest(drawn.ravel() / wanted, "norm").pvalue > 1e-6
    between = np.corrcoef(drawn)[np.triu_indices(rows, 1)]
    assert np.abs(between).max() < 0.1
    # In the sum over rounds, the noise is that of the paper's factorization, and less than independent noise.
    whole = (estimates - exact).sum(0).std() * noise.grid
    factor = np.linalg.norm(np.linalg.inv(matrix(rows, bands)).sum(0)) * np.linalg.norm(banded_square_root(bands))
    assert whole == pytest.approx(0.5 * factor, rel=0.06)
    assert factor < 0.75 * math.sqrt(rows)


def test_rounds_that_were_lost_only_shorten_columns() -> None:
    """Row 2 was begun and its sum was lost with a process: row 3 has no term of it, and the others as before."""
    values, bands = 3000, 3
    sums = CorrelatedSums(Noise(1.0, 1.0), bands, values)
    exact = np.random.default_rng(1).integers(-(2**18), 2**18, size=(4, values))
    exact[1] = 0
    estimates = np.zeros((4, values))
    for row in (0, 2, 3):
        estimates[row] = sums.release(row + 1, exact[row])
    drawn = (matrix(4, bands) @ (estimates - exact))[[0, 2, 3]]
    assert np.allclose(drawn, np.rint(drawn), atol=1e-3)
    assert np.abs(np.corrcoef(drawn)[np.triu_indices(3, 1)]).max() < 0.1


def test_epsilon_is_that_of_dp_accounting_for_the_noise_that_is_drawn() -> None:
    privacy = Settings.of(
        {
            "server-noise": "correlated", "noise-multiplier": 2.0, "min-separation": 5, "schedule": "fedavg",
            "clients": 50, "client-fraction": 0.2, "clip-norm": 0.3,
        }
    ).privacy  # fmt: skip
    server = ServerNoise(privacy, SPEC)
    account = Accountant(1e-5)
    for row in range(17):
        if server.participation.may_return:
            account.spend(privacy.noise_multiplier, "fedavg")
        server.participation.begin([f"{row % 5}"])
    sums = server._sums
    norm = rounded_norm(0.3, sums.noise.grid, 8) / sums.noise.grid * np.linalg.norm(sums.coefficients)
    event = SelfComposedDpEvent(GaussianDpEvent(math.sqrt(sums._deviation**2 - 4) / norm), math.ceil(17 / 5))
    oracle = PLDAccountant().compose(event).get_epsilon(1e-5)
    assert account.epsilon == pytest.approx(oracle, rel=1e-3)


def test_a_sum_is_released_once() -> None:
    sums = CorrelatedSums(Noise(1.0, 1.0), 2, 3)
    sums.release(4, np.zeros(3, np.int64))
    for row in (4, 3):
        with pytest.raises(RunError, match=f"row {row} of the correlated noise was released before"):
            sums.release(row, np.ones(3, np.int64))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.lists(st.sets(st.sampled_from("abcdefgh")), max_size=30), st.integers(0, 30))
def test_no_client_takes_part_twice_within_the_separation(separation, wanted, restart) -> None:  # type: ignore[no-untyped-def]
    rule, rows, returns = Participation(separation), {}, 0
    for number, names in enumerate(wanted):
        if number == restart:
            rule = Participation.from_dict(separation, rule.to_dict())
        returns += rule.may_return
        taking_part = rule.eligible(names)
        row = rule.begin(taking_part)
        assert row == number + 1
        for name in taking_part:
            rows.setdefault(name, []).append(row)
        if blocked := sorted(name for name, taken in rows.items() if row + 1 - taken[-1] < separation):
            before = rule.rows
            with pytest.raises(RunError, match=f"client {blocked[0]} took part less than min-separation"):
                rule.begin(blocked)
            assert rule.rows == before
    assert returns == math.ceil(len(wanted) / separation)
    for taken in rows.values():
        assert all(late - early >= separation for early, late in itertools.pairwise(taken))
        assert len(taken) <= returns


def test_a_round_takes_as_many_clients_as_it_must_have() -> None:
    server = ServerNoise(Settings.of(GIVEN).privacy, SPEC)
    clients = [Client(number, str(number), 1) for number in range(4)]
    server.participation.begin(["1", "3"])
    assert server.eligible(clients, 2) == clients[::2]
    with pytest.raises(RunError, match=r"2 of 4 connected clients may take part, of 3 .* in the last 1 round \(min"):
        server.eligible(clients, 3)


@pytest.mark.parametrize(
    "state", [None, {}, {"rows": -1, "last": {}}, {"rows": 2, "last": {"a": 3}}, {"rows": 2, "last": []}]
)
def test_a_damaged_participation_is_refused(state: object) -> None:
    with pytest.raises(RunError, match="participation of clients cannot be read"):
        Participation.from_dict(3, state)


def test_the_server_limits_each_client_and_releases_each_mean_once() -> None:
    server = ServerNoise(Settings.of(GIVEN).privacy, SPEC)
    server.participation.begin(["a", "b"])
    mean = server.begin_mean()
    mean.add({"a": torch.full((3, 2), 1e6), "b": torch.zeros(2)}, 10**9)  # far too long, and far too heavy
    mean.add({"a": torch.zeros(3, 2), "b": torch.tensor([0.3, 0.4])}, 1)
    with pytest.raises(PayloadError, match="not finite"):
        mean.add({"a": torch.full((3, 2), math.nan), "b": torch.zeros(2)}, 1)
    found = mean.mean()
    assert mean.examples == 2
    assert {name: value.shape for name, value in found.items()} == SPEC.shapes
    assert found["a"].flatten().tolist() == pytest.approx([0.25 / math.sqrt(6)] * 6, abs=0.02)
    assert found["b"].tolist() == pytest.approx([0.15, 0.2], abs=0.02)
    with pytest.raises(RunError, match="released before"):
        mean.mean()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"noise-multiplier": 0.0}, "noise-multiplier"),
        ({"noise-multiplier": 0.001}, "noise-multiplier"),
        ({"schedule": "compressed"}, "schedule"),
        ({"schedule": "secure"}, "schedule"),
        ({"clip-quantile": 0.5}, "clip-quantile"),
        ({"secret-sampling": True}, "secret-sampling"),
        ({"record-clients": "0"}, "record-clients"),
        ({"over-sampling": 1.5}, "over-sampling"),
        ({"client-fraction": 0.5}, "client-fraction"),
        ({"server-noise": "none"}, "min-separation"),
    ],
)
def test_what_the_guarantee_does_not_cover_is_refused(changes: dict[str, object], field: str) -> None:
    usable = {
        "server-noise": "correlated", "min-separation": 4, "noise-multiplier": 1.0, "schedule": "fedavg",
        "clients": 20, "client-fraction": 0.25,
    }  # fmt: skip
    Settings.of(usable)
    with pytest.raises(SettingError, match=f"^{field}="):
        Settings.of(usable | changes)


def test_the_examples_run() -> None:
    result = doctest.testmod(correlated)
    assert result.attempted
    assert not result.failed
