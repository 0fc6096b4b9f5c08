"""Accounting: the epsilon that the rounds of a run have spent."""

import math

from tofu.errors import RunError, SettingError
from tofu.imports import from_extra
from tofu.privacy.clipping import check_positive


class Accountant:
    """The privacy loss (epsilon at a fixed delta) of a client that took part in all rounds of a run.

    Gaussian mechanisms compose exactly: rounds with noise multipliers z_i equal one Gaussian mechanism with
    1 / z^2 = sum 1 / z_i^2 (Dong, Roth, Su, "Gaussian Differential Privacy", JRSS B 2022, corollary 3.3). Its epsilon
    for delta is tight (Balle & Wang, ICML 2018, theorem 8). Secure and proxy rounds are composed with each other.

    There is no amplification by sampling, which requires that the sample is secret: here the server knows which
    clients take part. The bound therefore holds for any choice of clients.

    Args:
        delta: probability, above 0 and below 1, that the bound fails; it should be well below 1 / clients.

    Raises:
        SettingError: delta is outside (0, 1).

    Example:
        >>> accountant = Accountant(delta=1e-5)
        >>> for _ in range(10):
        ...     epsilon = accountant.spend(noise_multiplier=8.0, kind="secure")
        >>> round(epsilon, 2)
        1.53
    """

    def __init__(self, delta: float) -> None:
        _check_delta(delta)
        self.delta = delta
        self._spent: dict[tuple[str, float], int] = {}

    def spend(self, noise_multiplier: float, kind: str) -> float:
        """Add a round and return epsilon so far, which is infinite after a round without noise (multiplier 0).

        Args:
            noise_multiplier: of the round.
            kind: of the round; it is stored with the account.

        Raises:
            SettingError: the multiplier is negative.
        """
        if not noise_multiplier >= 0:
            raise SettingError("noise_multiplier", noise_multiplier, "a number of at least 0")
        self._spent[kind, noise_multiplier] = self._spent.get((kind, noise_multiplier), 0) + 1
        return self.epsilon

    @property
    def epsilon(self) -> float:
        """Epsilon so far; 0 before the first round."""
        return self._epsilon_at(self._precision())

    def allows(self, noise_multiplier: float, max_epsilon: float) -> bool:
        """Whether epsilon stays within `max_epsilon` after one more round; if not, the run must stop before it."""
        return noise_multiplier > 0 and self._epsilon_at(self._precision() + noise_multiplier**-2) <= max_epsilon

    def to_dict(self) -> dict[str, object]:
        """The state as plain JSON values, for checkpoints."""
        return {"delta": self.delta, "spent": [[*key, rounds] for key, rounds in sorted(self._spent.items())]}

    @staticmethod
    def from_dict(state: object) -> "Accountant":
        """Restore the state that `to_dict` returned. Raises RunError if it is malformed."""
        try:
            accountant = Accountant(state["delta"])  # type: ignore[index]
            for kind, multiplier, rounds in state["spent"]:  # type: ignore[index]
                if not (isinstance(kind, str) and multiplier >= 0 and isinstance(rounds, int) and rounds > 0):
                    raise ValueError("expected [kind, noise multiplier, rounds]")
                accountant._spent[kind, float(multiplier)] = rounds
        except (KeyError, TypeError, ValueError, SettingError) as error:
            raise RunError(f"privacy account cannot be read: {error}") from error
        return accountant

    def _precision(self) -> float:
        """1 / z^2 of all rounds together."""
        spent = self._spent.items()
        return math.fsum(rounds / z**2 if z else math.inf for (_, z), rounds in spent)

    def _epsilon_at(self, precision: float) -> float:
        return epsilon_of(precision**-0.5, self.delta) if precision else 0.0


def epsilon_of(noise_multiplier: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism, infinite without noise. Raises SettingError if delta is outside (0, 1)."""
    _check_delta(delta)
    if noise_multiplier <= 0:
        return math.inf
    with from_extra("privacy"):
        from dp_accounting import get_epsilon_gaussian  # the import takes most of a second

    return float(get_epsilon_gaussian(noise_multiplier, delta))


def noise_multiplier_for(epsilon: float, delta: float, rounds: int) -> float:
    """The smallest noise multiplier with which `rounds` rounds are (epsilon, delta)-private.

    Raises:
        SettingError: epsilon is not above 0, delta is outside (0, 1), or there is less than 1 round.
    """
    check_positive("epsilon", epsilon)
    _check_delta(delta)
    if rounds < 1:
        raise SettingError("rounds", rounds, "at least 1")
    with from_extra("privacy"):
        from dp_accounting import get_sigma_gaussian

    # Rounded up, because the root may have been approached from below.
    return float(get_sigma_gaussian(epsilon, delta)) * (1 + 1e-9) * math.sqrt(rounds)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise SettingError("delta", delta, "a number above 0 and below 1")
