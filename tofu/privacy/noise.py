"""Gaussian noise on a grid, from the operating system's cryptographic generator.

The noise does not depend on a run's seed, which all participants know, so two runs with one seed differ in it. Value
and noise are rounded to integer multiples of one grid before they are added, because the lowest bits of a
floating-point sum reveal its addends (Mironov, CCS 2012). docs/privacy.md has the argument.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from tofu.bytes_io import CHUNK
from tofu.errors import RunError, SettingError
from tofu.privacy.clipping import check_positive
from tofu.secagg.graph import Topology
from tofu.secagg.masks import Stream, new_seed
from tofu.settings.groups import PrivacySettings, SecureSettings
from tofu.weights import Weights

Reals = npt.NDArray[np.float64]

RANGE_DEVIATIONS = 6.0
"""Minimum range of a value in standard deviations of its noise; one value in 5e8 exceeds it."""

_FINE = 2.0**-20
"""The default grid, in units of a client's standard deviation; secure rounds have a grid of their own."""

_MIN_STEPS = 2.0  # minimum standard deviation in steps of the grid
_ROUNDING_FAILS = 0.01  # beta of Kairouz et al.: probability that a rounding must be repeated


@dataclass(frozen=True)
class Noise:
    """The Gaussian noise that a client adds to its clipped update.

    Attributes:
        norm: C, the clipping norm of the update.
        multiplier: z; the noise of the sum has a standard deviation of z C, or slightly more (`deviation`).
        sharers: number of clients that share the noise of one sum: the minimum number of honest clients in any sum,
            which is the session's threshold minus the colluding clients. 1 if each client adds the full noise.
        grid: power of 2 of which value and noise are integer multiples; 0 selects a negligibly fine grid.
        count_fraction: fraction of the budget 1 / z^2 for the number of clipped clients. The update then has the noise
            multiplier z / sqrt(1 - count_fraction), so that both together are as private as z.

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
    count_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_positive("clip_norm", self.norm)
        check_positive("noise_multiplier", self.multiplier)
        if self.sharers < 1:
            raise SettingError("sharers", self.sharers, "at least 1")
        if not 0 <= self.count_fraction < 1:
            raise SettingError("clip_budget", self.count_fraction, "a number of at least 0 and below 1")
        part = self._update_multiplier * self.norm / math.sqrt(self.sharers)
        if not self.grid:
            object.__setattr__(self, "grid", 2.0 ** math.floor(math.log2(part * _FINE)))
        if self.grid < 0 or math.frexp(self.grid)[0] != 0.5 or part < _MIN_STEPS * self.grid:
            raise SettingError("grid", self.grid, f"a power of 2 up to {part / _MIN_STEPS:g}")

    @property
    def _update_multiplier(self) -> float:
        """The noise multiplier of the update alone."""
        return self.multiplier / math.sqrt(1 - self.count_fraction)

    @staticmethod
    def alone(privacy: PrivacySettings, norm: float) -> "Noise":
        """The full noise of a client whose update, clipped to `norm`, is not in a secure sum."""
        return Noise(norm, privacy.noise_multiplier, count_fraction=privacy.count_fraction)

    def on_ring(self, *, levels: int, values: int) -> "Noise":
        """The same noise on the grid of a secure round, so that its fixed-point encoding does not round again.

        The round's `FixedPoint` must have clip = `grid` * levels and unit_weight 1, and every client 1 example.

        Args:
            levels: `FixedPoint.levels`.
            values: length of the vector that is sent.

        Raises:
            SettingError: there are too few levels for the range that the noise needs.
        """
        part = self._update_multiplier * self.norm / math.sqrt(self.sharers)
        grid = 2.0 ** math.ceil(math.log2((self.norm + RANGE_DEVIATIONS * part) / levels))
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
        """A client's part of the noise of a secure sum over at least `topology.threshold` of `clients` clients.

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
            whole = Noise(norm, privacy.noise_multiplier, honest, count_fraction=privacy.count_fraction)
            return whole.on_ring(levels=levels, values=values)
        except SettingError as error:
            wanted = f"less with noise-multiplier {privacy.noise_multiplier:g}, whose noise needs more bits per entry"
            raise SettingError("secure-ratio", secure.secure_ratio, wanted) from error

    def deviation(self, values: int) -> float:
        """Standard deviation of one client's noise, for an update of `values` values."""
        return self._update_multiplier * rounded_norm(self.norm, self.grid, values) / math.sqrt(self.sharers)

    def value_bound(self, values: int) -> float:
        """Magnitude that noisy values of any update exceed with negligible probability."""
        return self.norm + RANGE_DEVIATIONS * self.deviation(values)

    def add(self, update: Weights) -> Weights:
        """Round a clipped update to the grid and add this client's noise -> float32 tensors of the same shapes.

        Raises:
            RunError: the norm of the update is above C.
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

    def add_to_count(self, value: float, unit: float) -> float:
        """Add this client's noise to a number of -1/2 to 1/2, so of sensitivity 1/2 -> a multiple of `unit`.

        With the count's deviation of z / (2 sqrt(count_fraction)), count and update together are one Gaussian mechanism
        of multiplier z: (1/2 / deviation)^2 + (1 - count_fraction) / z^2 = 1 / z^2.
        """
        deviation = self.multiplier / (2 * math.sqrt(self.count_fraction * self.sharers))
        drawn = float(normals(1, Stream(new_seed()))[0])
        return (round(value / unit) + round(drawn * deviation / unit)) * unit

    def _rounded(self, relative: Reals, stream: Stream) -> Reals:
        """Stochastic rounding to integers, repeated while the norm exceeds `rounded_norm`."""
        max_norm, down = rounded_norm(self.norm, self.grid, relative.size) / self.grid, np.floor(relative)
        while True:
            steps = down + (_uniforms(relative.size, stream) < relative - down)
            if float(np.linalg.norm(steps)) <= max_norm:
                return steps


def rounded_norm(norm: float, grid: float, values: int) -> float:
    """Maximum norm after stochastic rounding to a grid of an update with a norm of up to `norm` and `values` values.

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
