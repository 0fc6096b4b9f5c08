"""Differential privacy of whole clients: clipping, Gaussian noise, and the account of what a run has spent.

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018. Two runs are
neighbors where one client's updates are zero in one of them; a client's update has norm at most C (`clip`), so a sum
of updates changes by at most C and Gaussian noise of deviation z C (z is the noise multiplier) makes it private.

Weights. Of a weighted mean sum w_i x_i / sum w_i with weights up to w, the sum changes by w C and the mean by
w C / sum w_i, if sum w_i is public; but examples are data of the clients, and their sum is then released without noise.
So with privacy every client says 1 example: all weights are 1, the sum changes by C and the mean of n clients by C / n.

Who adds the noise:

- In a secure round each client adds its part, so that the sum has the whole (`Noise.sharers`). The server, which learns
  the sum only, learns it with deviation of at least z C: central privacy without a server that is trusted.
- In a proxy round the server sees every client's update, so each adds the whole to its own before it encodes it. That
  is local privacy at the level of clients: the same epsilon against the server, and a mean that is sqrt(n) times as
  noisy as a secure round's. Encoding is post-processing and costs nothing.

The noise of a mean of n clients over d values has length z C sqrt(d) / n after a secure round and z C sqrt(d / n) after
a proxy round, beside a signal of at most C: privacy wants clients by the hundreds, few values, or both.

Not covered: what clients say beside the update (losses, numbers of examples, how much was clipped), a range or norm
that adapts to such statistics. Error feedback must come before the clipping.

Noise comes from the operating system's cryptographic source and never from a run's seed, which is known to all: the one
thing that two runs of one seed do not have in common.

Floating point. Mironov, "On Significance of the Least Significant Bits for Differential Privacy", CCS 2012: a sum of
floats betrays its addends by its last bits, since not every float can come of every addend. So value and noise are both
whole multiples of one grid before they are added, as integers: every sum can come of every value. Rounding noise to
the grid is post-processing of a Gaussian added to values on the grid; rounding the values moves their norm, by what
`rounded_norm` says, and the deviation is taken of that norm. What remains of float arithmetic is within the sampler,
whose 53-bit uniforms cut the Gaussian off at 8.57 deviations and give every cell of the grid its probability but for
parts in 10^15 or so: we estimate less than 1e-15 of delta a value, and have not proved it.

A sum of parts that were rounded each by itself is not quite the rounded sum. Each rounding is a uniform error beside
the Gaussian, more noise and not less, but for aliasing of the order exp(-2 pi^2 s^2) with s a part's deviation in
steps of the grid: 1e-34 at s = 2, the least that is accepted. (Kairouz, Liu, Steinke, "The Distributed Discrete
Gaussian Mechanism", ICML 2021, prove the like for discrete Gaussians.)
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tofu.errors import RunError, SettingError
from tofu.secagg.masks import Stream, new_seed
from tofu.secagg.ring import CHUNK
from tofu.weights import ParamSpec, Weights, dot

Reals = npt.NDArray[np.float64]

REACH = 6.0
"""Deviations of its noise that a value's range must hold: one value in 5e8 is further out."""

_FINE = 2.0**-20
"""Of a part's deviation: the grid where no ring gives one."""

_MIN_STEPS = 2.0
_ROUNDING_FAILS = 0.01  # beta of Kairouz et al.: how often a rounding may have to be drawn again
_INSIDE = 1 - 2.0**-22  # float32 rounds up, too


def check_param_spec(param_spec: ParamSpec) -> None:
    """Raises SettingError for a model whose batch counters would take up the norm of every update."""
    if param_spec.integers:
        raise SettingError("norm", "batch", "group or none with privacy: batch counters would take up the norm")


def clip(update: Weights, norm: float) -> tuple[Weights, float]:
    """Scale an update down to L2 norm `norm`, over all of its tensors as one vector -> (update, the norm it had).

    Raises:
        RunError: the update holds a value that is not finite.
        SettingError: a norm that is not a finite number above 0.
    """
    _check_positive("clip_norm", norm)
    true = math.sqrt(dot(update, update))
    if not math.isfinite(true):
        raise RunError("the update holds a value that is not finite: local training diverged")
    if true <= norm:
        return dict(update), true
    factor = norm / true * _INSIDE
    return {name: value * factor for name, value in update.items()}, true


@dataclass(frozen=True)
class Noise:
    """What a client adds to its clipped update.

    Attributes:
        norm: C, that its update was clipped to.
        multiplier: z; the sum of all parts has deviation z times the norm, or a little more (`deviation`).
        sharers: clients that share the noise of one sum: the fewest honest ones that any sum can have, which is the
            session's threshold less the clients in league with the server. 1 where each adds the whole.
        grid: steps that value and noise are rounded to, a power of 2; 0 takes one too fine to matter.

    Raises:
        SettingError: a field that cannot be used, or a grid too coarse for the noise.
    """

    norm: float
    multiplier: float
    sharers: int = 1
    grid: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("clip_norm", self.norm)
        _check_positive("noise_multiplier", self.multiplier)
        if self.sharers < 1:
            raise SettingError("sharers", self.sharers, "at least 1")
        part = self.multiplier * self.norm / math.sqrt(self.sharers)
        if not self.grid:
            object.__setattr__(self, "grid", 2.0 ** math.floor(math.log2(part * _FINE)))
        if self.grid < 0 or math.frexp(self.grid)[0] != 0.5 or part < _MIN_STEPS * self.grid:
            raise SettingError("grid", self.grid, f"a power of 2 up to {part / _MIN_STEPS:g}")

    @staticmethod
    def on_ring(norm: float, multiplier: float, sharers: int, *, levels: int, values: int) -> "Noise":
        """Noise on the very grid of a secure round, so that its fixed point rounds nothing any more.

        The round's `FixedPoint` must have clip = `grid` * levels and unit_weight 1, and every client 1 example.

        Args:
            levels: `FixedPoint.levels`.
            values: of the vector that travels.

        Raises:
            SettingError: too few levels: rounding to so coarse a grid would need more noise than its range holds.
        """
        part = multiplier * norm / math.sqrt(sharers)
        grid = 2.0 ** math.ceil(math.log2((norm + REACH * part) / levels))
        while _MIN_STEPS * grid <= part:
            noise = Noise(norm, multiplier, sharers, grid)
            if noise.reach(values) <= grid * levels:
                return noise
            grid *= 2
        raise SettingError("levels", levels, f"more for {values} values: use more bits or fewer values")

    def deviation(self, values: int) -> float:
        """Of one client's part, for an update of so many values."""
        return self.multiplier * rounded_norm(self.norm, self.grid, values) / math.sqrt(self.sharers)

    def reach(self, values: int) -> float:
        """Magnitude that hardly a noisy value is above, whatever the update was."""
        return self.norm + REACH * self.deviation(values)

    def add(self, update: Weights) -> Weights:
        """A clipped update -> the same on the grid, with this client's part of the noise; float32.

        Raises:
            RunError: an update whose norm is above C.
        """
        flat = torch.cat([value.detach().float().flatten() for value in update.values()]).double().numpy()
        if not float(np.linalg.norm(flat)) <= self.norm * (1 + 1e-9):
            raise RunError(f"update has norm {np.linalg.norm(flat):g}, expected at most {self.norm:g}: clip it first")
        stream, deviation = Stream(new_seed()), self.deviation(flat.size) / self.grid
        steps = self._rounded(flat / self.grid, stream)
        for start in range(0, steps.size, CHUNK):
            part = steps[start : start + CHUNK]
            part += np.rint(normals(part.size, stream) * deviation)
        noisy = torch.from_numpy(steps * self.grid).float()
        pieces = torch.split(noisy, [value.numel() for value in update.values()])
        return {n: p.view(v.shape) for (n, v), p in zip(update.items(), pieces, strict=True)}

    def _rounded(self, relative: Reals, stream: Stream) -> Reals:
        """Whole numbers, up with probability of the fraction, drawn again where the norm came out too large."""
        most, down = rounded_norm(self.norm, self.grid, relative.size) / self.grid, np.floor(relative)
        while True:
            steps = down + (_uniforms(relative.size, stream) < relative - down)
            if float(np.linalg.norm(steps)) <= most:
                return steps


def rounded_norm(norm: float, grid: float, values: int) -> float:
    """Largest norm that an update of norm up to `norm` is allowed after stochastic rounding to a grid.

    Kairouz, Liu, Steinke, ICML 2021, theorem 1: more than this comes of at most one rounding in 100.
    """
    spread = grid * math.sqrt(values) / 2
    likely = norm**2 + spread**2 + math.sqrt(-2 * math.log(_ROUNDING_FAILS)) * grid * (norm + spread)
    return min(math.sqrt(likely), norm + 2 * spread)


def normals(count: int, stream: Stream) -> Reals:
    """`count` samples of N(0, 1) by Box and Muller's method, from a cryptographic stream."""
    half = (count + 1) // 2
    radius = np.sqrt(-2 * np.log1p(-_uniforms(half, stream)))  # 1 - u is never 0
    angle = 2 * np.pi * _uniforms(half, stream)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def _uniforms(count: int, stream: Stream) -> Reals:
    """Of [0, 1), in steps of 2^-53."""
    return (stream.words(count, 8) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Accountant:
    """What the rounds of a run have spent, for a client that took part in all of them.

    Gaussian mechanisms compose exactly: rounds with multipliers z_i are together one of multiplier z with
    1 / z^2 = sum 1 / z_i^2 (Dong, Roth, Su, "Gaussian Differential Privacy", JRSS B 2022, corollary 3.3), whose epsilon
    is the smallest there is for delta (Balle & Wang, ICML 2018, theorem 8). Secure and proxy rounds add up, since the
    same client is in both.

    There is no amplification by sampling: that needs a sample that nobody sees, and the server here knows who takes
    part. What is said holds for any choice of clients.

    Args:
        delta: chance, above 0 and below 1, that the bound fails; well below 1 / clients.

    Raises:
        SettingError: another delta.
    """

    def __init__(self, delta: float) -> None:
        _check_delta(delta)
        self.delta = delta
        self._spent: dict[tuple[str, float], int] = {}

    def spend(self, noise_multiplier: float, kind: str) -> float:
        """Enter a round -> epsilon so far. A multiplier of 0 is a round without noise, after which it is infinite.

        Args:
            kind: of the round, for the record.

        Raises:
            SettingError: a negative multiplier.
        """
        if not noise_multiplier >= 0:
            raise SettingError("noise_multiplier", noise_multiplier, "a number of at least 0")
        self._spent[kind, noise_multiplier] = self._spent.get((kind, noise_multiplier), 0) + 1
        return self.epsilon

    @property
    def epsilon(self) -> float:
        """Spent so far; 0 before the first round."""
        return self._epsilon_at(self._precision())

    def rounds(self, kind: str) -> int:
        """Entered, of one kind."""
        return sum(rounds for (one, _), rounds in self._spent.items() if one == kind)

    def allows(self, noise_multiplier: float, budget: float) -> bool:
        """Whether one more round keeps epsilon within `budget`: where not, the run has to stop before it."""
        return noise_multiplier > 0 and self._epsilon_at(self._precision() + noise_multiplier**-2) <= budget

    def to_dict(self) -> dict[str, object]:
        """The state as plain JSON."""
        return {"delta": self.delta, "spent": [[*key, rounds] for key, rounds in sorted(self._spent.items())]}

    @staticmethod
    def from_dict(state: object) -> "Accountant":
        """Raises RunError for what `to_dict` cannot have written."""
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
    """Epsilon of one Gaussian mechanism, or of many as `Accountant` composes them; infinite without noise."""
    _check_delta(delta)
    if noise_multiplier <= 0:
        return math.inf
    from dp_accounting import get_epsilon_gaussian  # its import takes most of a second

    return float(get_epsilon_gaussian(noise_multiplier, delta))


def noise_multiplier_for(epsilon: float, delta: float, rounds: int) -> float:
    """The smallest multiplier with which so many rounds stay within (epsilon, delta).

    Raises:
        SettingError: an epsilon that is not above 0, a delta outside (0, 1), or fewer than 1 round.
    """
    _check_positive("epsilon", epsilon)
    _check_delta(delta)
    if rounds < 1:
        raise SettingError("rounds", rounds, "at least 1")
    from dp_accounting import get_sigma_gaussian

    # A little more, since the root may be met from below.
    return float(get_sigma_gaussian(epsilon, delta)) * (1 + 1e-9) * math.sqrt(rounds)


def _check_positive(field: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise SettingError(field, value, "a finite number above 0")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise SettingError("delta", delta, "a number above 0 and below 1")
