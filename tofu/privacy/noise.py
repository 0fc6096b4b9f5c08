"""Discrete Gaussian noise on a grid, from the operating system's cryptographic generator.

Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation",
ICML 2021: a clipped update is rounded stochastically to integer multiples of a grid, rounding is repeated while the
norm exceeds a bound, and every client adds integers drawn from a discrete Gaussian. There is no float arithmetic in
noise or sum (Mironov, CCS 2012, shows what its lowest bits reveal), and in a secure round the sum may wrap around.

The noise does not depend on a run's seed, which all participants know, so two runs with one seed differ in it.
docs/privacy-accounting.md has the argument.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from tofu.errors import RunError, SettingError
from tofu.privacy.clipping import check_positive
from tofu.privacy.discrete import discrete_gaussian
from tofu.secagg.graph import Topology
from tofu.secagg.masks import SignedVector, Stream, new_seed
from tofu.settings.groups import PrivacySettings, SecureSettings
from tofu.weights import Weights

Reals = npt.NDArray[np.float64]

_REACH = 9.0
"""Standard deviations of a sum's noise that the ring holds; one value in 4e18 wraps around, in the worst case."""

_FINE = 2.0**-20
"""The default grid, in units of a client's standard deviation; secure rounds have a grid of their own."""

_MIN_STEPS = 3.0
"""Minimum standard deviation of a client's noise in steps of the grid."""

_SMOOTHING = 2.0
"""Standard deviation, in steps, that a sum's noise has beyond what the multiplier asks for.

docs/privacy-accounting.md says why.
"""

_ROUNDING_FAILS = 0.01  # beta of Kairouz et al.: probability that a rounding must be repeated

_SLACK = 1e-8
"""Relative increase of the sensitivity, for the float arithmetic of the norms that are compared with it."""


@dataclass(frozen=True)
class Noise:
    """The discrete Gaussian noise that a client adds to its clipped update.

    Attributes:
        norm: C, the maximum norm of the values that get noise.
        multiplier: z; the noise of the sum has a standard deviation of z C, or slightly more (`deviation`).
        sharers: number of clients that share the noise of one sum: the minimum number of honest clients in any sum,
            which is the session's threshold minus the colluding clients. 1 if each client adds the full noise.
        grid: power of 2 of which value and noise are integer multiples; 0 selects a negligibly fine grid.

    Raises:
        SettingError: a field is not usable, or the grid is too coarse for the noise.

    Example:
        >>> import torch
        >>> noise = Noise(norm=1.0, multiplier=0.5)
        >>> noisy = noise.add({"weight": torch.zeros(100, 100)})["weight"]
        >>> bool((noisy.std() - 0.5).abs() < 0.05)
        True
    """

    norm: float
    multiplier: float
    sharers: int = 1
    grid: float = 0.0

    def __post_init__(self) -> None:
        check_positive("clip_norm", self.norm)
        check_positive("noise_multiplier", self.multiplier)
        if self.sharers < 1:
            raise SettingError("sharers", self.sharers, "at least 1")
        part = self.multiplier * self.norm / math.sqrt(self.sharers)
        if not self.grid:
            object.__setattr__(self, "grid", 2.0 ** math.floor(math.log2(part * _FINE)))
        if self.grid < 0 or math.frexp(self.grid)[0] != 0.5 or part < _MIN_STEPS * self.grid:
            raise SettingError("grid", self.grid, f"a power of 2 up to {part / _MIN_STEPS:g}")

    @staticmethod
    def alone(privacy: PrivacySettings, norm: float) -> "Noise":
        """Return the full noise of a client whose update, clipped to `norm`, is not in a secure sum."""
        return Noise(privacy.joint_norm(norm), privacy.noise_multiplier)

    def on_ring(self, *, levels: int, values: int) -> "Noise":
        """Return the same noise on the grid of a secure round.

        The round's `FixedPoint` must have clip = `grid` * levels and unit_weight 1, and every client 1 example.

        Args:
            levels: `FixedPoint.levels`.
            values: length of the vector that is sent.

        Raises:
            SettingError: there are too few levels for the range that the noise needs.
        """
        part = self.multiplier * self.norm / math.sqrt(self.sharers)
        grid = 2.0 ** math.ceil(math.log2((self.norm + _REACH * part / math.sqrt(self.sharers)) / levels))
        while _MIN_STEPS * grid <= part:
            noise = replace(self, grid=grid)
            if noise.value_bound(values) <= grid * levels:
                return noise
            grid *= 2
        raise SettingError("levels", levels, f"more for {values} values: use more bits or fewer values")

    @staticmethod
    def in_sum(
        privacy: PrivacySettings,
        norm: float,
        secure: SecureSettings,
        topology: Topology,
        clients: int,
        *,
        levels: int,
        values: int,
    ) -> "Noise | None":
        """Return a client's part of the noise of a secure sum over at least `topology.threshold` of `clients` clients.

        Args:
            norm: the clipping norm of the round.
            levels: `FixedPoint.levels`.
            values: length of the vector that is sent.

        Returns:
            None without differential privacy.

        Raises:
            SettingError: too few levels for this noise.
        """
        if not privacy.noise_multiplier:
            return None
        honest = topology.honest(clients, secure.secagg_collusion_fraction)
        try:
            whole = Noise(privacy.joint_norm(norm), privacy.noise_multiplier, honest)
            return whole.on_ring(levels=levels, values=values)
        except SettingError as error:
            wanted = f"less with noise-multiplier {privacy.noise_multiplier:g}, whose noise needs more bits per entry"
            raise SettingError("secure-ratio", secure.secure_ratio, wanted) from error

    def deviation(self, values: int) -> float:
        """Standard deviation of one client's noise, for `values` values."""
        needed = self.multiplier * rounded_norm(self.norm, self.grid, values) * (1 + _SLACK)
        return math.hypot(needed, _SMOOTHING * self.grid) / math.sqrt(self.sharers)

    def value_bound(self, values: int) -> float:
        """Magnitude, per client, that no value of a sum of at least `sharers` clients exceeds but once in 4e18."""
        return self.norm + _REACH * self.deviation(values) / math.sqrt(self.sharers)

    def add(self, update: Weights) -> Weights:
        """Round a clipped update to the grid and add this client's noise -> float32 tensors of the same shapes.

        Raises:
            RunError: the norm of the update is above C.
        """
        values = torch.cat([value.detach().double().flatten() for value in update.values()]).numpy()
        noisy = torch.from_numpy(self.steps(values) * self.grid).float()
        pieces = torch.split(noisy, [value.numel() for value in update.values()])
        return {n: p.view(v.shape) for (n, v), p in zip(update.items(), pieces, strict=True)}

    def steps(self, values: Reals) -> SignedVector:
        """Return the values [n] with this client's noise, as integer multiples of the grid.

        Raises:
            RunError: their norm is above C.
        """
        stream = Stream(new_seed())
        rounded = self.rounded(values, stream)
        return rounded + discrete_gaussian(self.deviation(values.size) / self.grid, values.size, stream)

    def rounded(self, values: Reals, stream: Stream) -> SignedVector:
        """Return the values [n] as integer multiples of the grid,
        with a norm of at most `rounded_norm` and without noise.

        Raises:
            RunError: their norm is above C.
        """
        if not float(np.linalg.norm(values)) <= self.norm * (1 + _SLACK / 2):
            raise RunError(f"update has norm {np.linalg.norm(values):g}, expected at most {self.norm:g}: clip it first")
        return self._rounded(values / self.grid, stream).astype(np.int64)

    def _rounded(self, relative: Reals, stream: Stream) -> Reals:
        """Stochastic rounding to integers, repeated while the norm exceeds `rounded_norm`."""
        bound = rounded_norm(self.norm, self.grid, relative.size) / self.grid * (1 + _SLACK / 2)
        down = np.floor(relative)
        while True:
            steps = down + (_uniforms(relative.size, stream) < relative - down)
            if float(np.linalg.norm(steps)) <= bound:
                return steps


def rounded_norm(norm: float, grid: float, values: int) -> float:
    """Return the maximum norm after stochastic rounding to a grid of an update with a norm of up to `norm`
    and `values` values.

    Kairouz, Liu, Steinke, ICML 2021, theorem 1: at most one rounding in 100 exceeds it and is repeated.
    """
    spread = grid * math.sqrt(values) / 2
    likely = norm**2 + spread**2 + math.sqrt(-2 * math.log(_ROUNDING_FAILS)) * grid * (norm + spread)
    return min(math.sqrt(likely), norm + 2 * spread)


def normals(count: int, stream: Stream) -> Reals:
    """Draw `count` samples of N(0, 1) from a cryptographic stream, by the Box-Muller transform."""
    half = (count + 1) // 2
    radius = np.sqrt(-2 * np.log1p(-_uniforms(half, stream)))  # 1 - u is never 0
    angle = 2 * np.pi * _uniforms(half, stream)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def _uniforms(count: int, stream: Stream) -> Reals:
    """Uniform samples of [0, 1) in steps of 2^-53."""
    return (stream.words(count, 8) >> np.uint64(11)).astype(np.float64) * 2.0**-53
