"""Noise of the server, correlated over rounds: a banded matrix factorization of the sums over rounds.

The server keeps the exact sums x of the last rounds and releases y = C x + z, with independent noise z and a banded
lower triangular matrix C. Its estimate of x is a function of what was released: it solves C x' = y, so x' = x + w with
noise w = C^-1 z, whose terms nearly cancel in the sum over rounds, that is, in the model. The bands are the first
coefficients of the square root of the matrix of prefix sums: Kalinin, Lampert, "Banded Square Root Matrix Factorization
for Differentially Private Model Training", NeurIPS 2024. That a client takes part at most once in as many rounds as
there are bands is the participation of Choquette-Choo et al., "(Amplified) Banded Matrix Factorization", NeurIPS 2023.
docs/privacy-accounting.md has the argument for epsilon.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tofu.errors import RunError
from tofu.privacy.discrete import discrete_gaussian
from tofu.privacy.noise import Noise
from tofu.secagg.masks import SignedVector, Stream, new_seed

Reals = npt.NDArray[np.float64]

_SCALE = 256
"""Coefficients are integers in units of 1 / 256, so that C x is exact."""


def banded_square_root(bands: int) -> SignedVector:
    """Return the bands of C from the diagonal on: round(256 binom(2 i, i) / 4^i) for i below `bands`.

    Example:
        >>> banded_square_root(4).tolist()
        [256, 128, 96, 80]
    """
    ratios = [(2 * i - 1) / (2 * i) for i in range(1, bands)]
    coefficients: SignedVector = np.rint(_SCALE * np.cumprod([1.0, *ratios])).astype(np.int64)
    return coefficients


class CorrelatedSums:
    """Adds correlated noise to the sums of rounds.

    A client that takes part in rounds which are at least `bands` apart changes C x by at most sqrt(k) times the norm of
    a column and the norm of its values, if k is the number of these rounds: their columns have no row in common. With
    the noise of z times a column's norm, its epsilon is therefore that of k Gaussian mechanisms of multiplier z.

    The exact sums are in memory only. Rounds before a restart are missing in later rows of C x, so their columns get
    shorter, which costs no privacy; their noise then no longer cancels.

    Args:
        noise: of one round with independent noise: its grid, norm and multiplier z.
        bands: number of bands; 1 gives independent noise.
        values: length of the sums.

    Example:
        >>> sums = CorrelatedSums(Noise(norm=1.0, multiplier=0.5), bands=3, values=2)
        >>> estimate = sums.release(1, np.zeros(2, np.int64))
        >>> bool(np.abs(estimate * sums.noise.grid).max() < 5)
        True
    """

    def __init__(self, noise: Noise, bands: int, values: int) -> None:
        self.noise, self.coefficients = noise, banded_square_root(bands)
        whole = replace(noise, multiplier=noise.multiplier * float(np.linalg.norm(self.coefficients)))
        self._deviation = whole.deviation(values) / noise.grid
        self._history: dict[int, tuple[SignedVector, Reals]] = {}
        self._last = 0

    def release(self, row: int, total: SignedVector) -> Reals:
        """Return the noisy estimate of a round's sum [values], in steps of the grid.

        Args:
            row: number of the round among all that were begun, also those that failed; higher than in earlier calls.
            total: exact sum [values] of vectors from `Noise.rounded`.

        Raises:
            RunError: a sum of this round or of a later one was released before.
        """
        if row <= self._last:
            raise RunError(f"row {row} of the correlated noise was released before: a second time would reveal more")
        self._last, first = row, int(self.coefficients[0])
        bands = self.coefficients.tolist()
        self._history = {old: kept for old, kept in self._history.items() if row - old < len(bands)}
        released = first * total + discrete_gaussian(self._deviation, total.size, Stream(new_seed()))
        for old, (exact, _) in self._history.items():
            released += bands[row - old] * exact
        estimate = released.astype(np.float64)  # from here on a function of what is released
        for old, (_, earlier) in self._history.items():
            estimate -= bands[row - old] * earlier
        estimate /= first
        self._history[row] = (total.copy(), estimate)
        return estimate


class Participation:
    """Which client took part in which round, so that none takes part twice in `separation` rounds in succession.

    Every round that is begun counts, and every client that is asked in it, whatever comes of it.

    Attributes:
        separation: number of rounds.
        rows: rounds begun so far.

    Example:
        >>> rule = Participation(separation=2)
        >>> rule.begin(["a"])
        1
        >>> rule.eligible(["a", "b"])
        ['b']
    """

    def __init__(self, separation: int) -> None:
        self.separation, self.rows = separation, 0
        self._last: dict[str, int] = {}

    def eligible(self, names: Iterable[str]) -> list[str]:
        """Return those that may take part in the next round."""
        next_row = self.rows + 1
        return [name for name in names if next_row - self._last.get(name, -self.separation) >= self.separation]

    @property
    def may_return(self) -> bool:
        """Whether a client may take part in the next round that has done so as often as the rounds before allow."""
        return self.rows % self.separation == 0

    def begin(self, names: Iterable[str]) -> int:
        """Begin a round with these clients and return its number, counted from 1.

        Raises:
            RunError: one of them may not take part.
        """
        names = list(names)
        if refused := set(names) - set(self.eligible(names)):
            raise RunError(f"client {min(refused)} took part less than min-separation={self.separation} rounds ago")
        self.rows += 1
        self._last |= dict.fromkeys(names, self.rows)
        self._last = {name: row for name, row in self._last.items() if self.rows + 1 - row < self.separation}
        return self.rows

    def to_dict(self) -> dict[str, object]:
        """Return the state as plain JSON values."""
        return {"rows": self.rows, "last": self._last}

    @staticmethod
    def from_dict(separation: int, state: object) -> "Participation":
        """Restore the state that `to_dict` returned. Raises RunError if it is malformed."""
        rule = Participation(separation)
        try:
            rule.rows, rule._last = int(state["rows"]), {str(n): int(r) for n, r in state["last"].items()}  # type: ignore[index]
            if rule.rows < 0 or any(not 0 < row <= rule.rows for row in rule._last.values()):
                raise ValueError("rows are out of order")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"participation of clients cannot be read: {error}") from error
        return rule
