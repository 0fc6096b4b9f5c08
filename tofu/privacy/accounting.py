"""Privacy accounting: epsilon of the rounds of a run."""

import math
from typing import Any

import numpy as np

from tofu.errors import RunError, SettingError
from tofu.imports import from_extra
from tofu.privacy.clipping import check_positive
from tofu.settings.deprecated import present_kind

_ORDERS = np.arange(2.0, 257.0)
"""Renyi orders; theorem 9 is for whole numbers."""

Reals = np.ndarray[tuple[int], np.dtype[np.float64]]
_Key = tuple[str, float] | tuple[str, float, int, int]


class Accountant:
    """The privacy loss (epsilon at a fixed delta) of a client that took part in all rounds of a run.

    Gaussian mechanisms compose exactly: rounds with noise multipliers z_i equal one Gaussian mechanism with
    1 / z^2 = sum 1 / z_i^2 (Dong, Roth, Su, "Gaussian Differential Privacy", JRSS B 2022, corollary 3.3). Its epsilon
    for delta is tight (Balle & Wang, ICML 2018, theorem 8). Secure and compressed rounds are composed with each other.

    `epsilon` is against the server, which knows the sampled clients, and holds for any choice of clients.
    `model_epsilon` is against observers of the models only, if each round's clients were drawn at random and in secret:
    sampling then amplifies privacy (Wang, Balle, Kasiviswanathan, "Subsampled Renyi Differential Privacy and Analytical
    Moments Accountant", AISTATS 2019, theorem 9).

    Args:
        delta: probability, above 0 and below 1, that the bound fails; it should be well below 1 / clients.

    Raises:
        SettingError: delta is outside (0, 1).
        MissingExtraError: dp-accounting is not installed; a run says so before it writes anything.

    Example:
        >>> accountant = Accountant(delta=1e-5)
        >>> for _ in range(10):
        ...     epsilon = accountant.spend(noise_multiplier=8.0, kind="secure")
        >>> round(epsilon, 2)
        1.53
    """

    def __init__(self, delta: float) -> None:
        check_delta(delta)
        with from_extra("privacy"):
            import dp_accounting  # noqa: F401
        self.delta = delta
        self._spent: dict[_Key, int] = {}

    def spend(self, noise_multiplier: float, kind: str, sampled: int = 0, available: int = 0) -> float:
        """Add a round and return epsilon so far, which is infinite after a round without noise (multiplier 0).

        Args:
            noise_multiplier: the round's noise multiplier.
            kind: the round's kind; it is stored with the account.
            sampled: number of clients that were drawn at random and in secret, without replacement; 0: not in secret.
            available: number of clients that they were drawn from.

        Raises:
            SettingError: the multiplier is negative, or more clients were sampled than were available.
        """
        if not noise_multiplier >= 0:
            raise SettingError("noise_multiplier", noise_multiplier, "a number of at least 0")
        if not 0 <= sampled <= available:
            raise SettingError("sampled", sampled, f"0 to {available}, the number of available clients")
        key = (kind, noise_multiplier, *((sampled, available) if sampled else ()))
        self._spent[key] = self._spent.get(key, 0) + 1
        return self.epsilon

    @property
    def epsilon(self) -> float:
        """Epsilon so far against the server; 0 before the first round."""
        return self._epsilon_at(self._precision())

    @property
    def model_epsilon(self) -> float:
        """Epsilon so far against observers of the models only: at most `epsilon`, and equal without secret sampling."""
        if all(len(key) == 2 for key in self._spent) or not math.isfinite(self.epsilon):
            return self.epsilon
        renyi = sum(rounds * _renyi_of(*key[1:]) for key, rounds in self._spent.items())
        # Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, proposition 12.
        found = renyi + np.log1p(-1 / _ORDERS) - (math.log(self.delta) + np.log(_ORDERS)) / (_ORDERS - 1)
        return min(self.epsilon, max(0.0, float(found.min())))

    def allows(self, noise_multiplier: float, max_epsilon: float) -> bool:
        """Return whether epsilon stays within `max_epsilon` after one more round; if not,
        the run must stop before it.
        """
        return noise_multiplier > 0 and self._epsilon_at(self._precision() + noise_multiplier**-2) <= max_epsilon

    def to_dict(self) -> dict[str, object]:
        """Return the state as plain JSON values, for checkpoints."""
        return {
            "delta": self.delta,
            "spent": [[*key[:2], rounds, *key[2:]] for key, rounds in sorted(self._spent.items())],
        }

    @staticmethod
    def from_dict(state: object) -> "Accountant":
        """Restore the state that `to_dict` returned. Raises RunError if it is malformed."""
        try:
            accountant = Accountant(state["delta"])  # type: ignore[index]
            for name, multiplier, rounds, *sample in state["spent"]:  # type: ignore[index]
                known = isinstance(name, str) and multiplier >= 0 and isinstance(rounds, int) and rounds > 0
                if not known or (sample and not (len(sample) == 2 and 0 < int(sample[0]) <= int(sample[1]))):
                    raise ValueError("expected [kind, noise multiplier, rounds] or [..., sampled, available]")
                key: Any = (present_kind(name), float(multiplier), *map(int, sample))
                accountant._spent[key] = rounds
        except (KeyError, TypeError, ValueError, SettingError) as error:
            raise RunError(f"privacy account cannot be read: {error}") from error
        return accountant

    def _precision(self) -> float:
        """Return 1 / z^2 of all rounds together."""
        spent = self._spent.items()
        return math.fsum(rounds / z**2 if z else math.inf for (_, z, *_), rounds in spent)

    def _epsilon_at(self, precision: float) -> float:
        return epsilon_of(precision**-0.5, self.delta) if precision else 0.0


def _renyi_of(
    noise_multiplier: float, sampled: int = 1, available: int = 1
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Renyi divergence of a round at each of _ORDERS.

    Wang et al. 2019, theorem 9, for a Gaussian mechanism whose clients are drawn without replacement. Its neighbors
    differ in the update of one client, by up to 2 C, of which a zero update is a case. So its mechanism has the noise
    multiplier z / 2 and the divergence e(j) = j / (2 (z / 2)^2) before sampling. The theorem's terms with e(infinity)
    are not bounded for a Gaussian and are at their other bounds. Without sampling the divergence is j / (2 z^2).
    """
    whole = _ORDERS / (2 * noise_multiplier**2)
    if sampled == available:
        return whole
    before, log_gamma = 2 * _ORDERS / noise_multiplier**2, math.log(sampled / available)
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, _ORDERS[-1] + 1)))])  # of j! as a logarithm
    alpha, j = _ORDERS.astype(int)[:, None], _ORDERS.astype(int)[None, :]
    binomial = factorial[alpha] - factorial[j] - factorial[np.maximum(alpha - j, 0)]
    last = np.where(j == 2, np.minimum(math.log(4) + _log_expm1(before[0]), before[0] + math.log(2)),
                    (j - 1) * before + math.log(2))  # fmt: skip
    terms = np.where(j <= alpha, j * log_gamma + binomial + last, -np.inf)
    amplified: Reals = np.minimum(whole, np.logaddexp(0.0, np.logaddexp.reduce(terms, axis=1)) / (_ORDERS - 1))
    return amplified


def _log_expm1(value: float) -> float:
    """log(e^value - 1) of a positive value, without overflow."""
    return value + math.log(-math.expm1(-value))


def epsilon_of(noise_multiplier: float, delta: float) -> float:
    """Return epsilon of a Gaussian mechanism, infinite without noise.

    Raises SettingError if delta is outside (0, 1).
    """
    check_delta(delta)
    if noise_multiplier <= 0:
        return math.inf
    with from_extra("privacy"):
        from dp_accounting import get_epsilon_gaussian  # the import takes most of a second

    return float(get_epsilon_gaussian(noise_multiplier, delta))


def noise_multiplier_for(epsilon: float, delta: float, rounds: int) -> float:
    """Return the smallest noise multiplier with which `rounds` rounds are (epsilon, delta)-private.

    Raises:
        SettingError: epsilon is not above 0, delta is outside (0, 1), or there is less than 1 round.
    """
    check_positive("epsilon", epsilon)
    check_delta(delta)
    if rounds < 1:
        raise SettingError("rounds", rounds, "at least 1")
    with from_extra("privacy"):
        from dp_accounting import get_sigma_gaussian

    # Rounded up, because the root may have been approached from below.
    return float(get_sigma_gaussian(epsilon, delta)) * (1 + 1e-9) * math.sqrt(rounds)


def check_delta(delta: float) -> None:
    """Raises SettingError if delta is outside (0, 1)."""
    if not 0 < delta < 1:
        raise SettingError("delta", delta, "a number above 0 and below 1")
