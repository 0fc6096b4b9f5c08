"""A client's update as the vector of ring elements that a secure round sums, and the mean update from that sum.

Each tensor has its own range, agreed for the round: its values are divided by it, so that one fixed-point code of range
1 (`tofu.secagg.fixed_point`) serves weights, biases and BatchNorm statistics. The update is followed by a few elements
for the other numbers that the server needs, which it also receives as sums only: the loss, and for each tensor how far
the client's values exceeded the range. The sums of plugins come last, as digits whose sum is exact, to 2^-39 of a
bound.

Under differential privacy, values are integers with noise (`tofu.privacy.noise`), which are added to the ring as they
are and may wrap around: the sum is a function of the exact sum of the clients' integers. Loss and excess are zero.

With many levels the range is wide enough that almost nothing is clipped, and rounding is stochastic and unbiased. With
few levels, stochastic rounding adds more noise than signal. If error feedback keeps the rounding error, values are then
rounded to the nearest step (`EncodingConfig.nearest_rounding`), and the range is `nearest_range` times their root mean
square, whose square the clients sum. The largest values are clipped and counted; error feedback sends the rest later.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu.bytes_io import MAX_BITS
from tofu.errors import PayloadError, RunError, SettingError
from tofu.secagg import coordinates
from tofu.secagg.fixed_point import HEADROOM, Clipped, FixedPoint
from tofu.secagg.masks import RingVector, SignedVector, centered, from_signed
from tofu.weights import ParamSpec, SumSpec, Weights, displacement_levels, weights_sha256

FIRST_RANGE = 0.25
"""Range of every tensor in a run's first secure round; larger than the values of usual updates."""

FEW_LEVELS = 64
"""Number of levels below which values are rounded to the nearest step, if error feedback allows it."""

MAX_GROWTH = 8.0
"""Maximum factor by which one round widens a range, regardless of what clients report."""

MIN_RANGE, MAX_RANGE = 1e-12, 1e12

_TAILS = 1.5
"""Correction of `nearest_range`: an update's values have heavier tails than a Laplace distribution (benchmarks)."""


def first_ranges(param_spec: ParamSpec, known: Mapping[str, float]) -> tuple[float, ...]:
    """Ranges of the first secure round: those `known` from the updates of earlier rounds, else `FIRST_RANGE`."""
    usable = {name: range_ for name, range_ in known.items() if range_ > 0 and math.isfinite(range_)}
    return tuple(min(max(usable.get(name, FIRST_RANGE), MIN_RANGE), MAX_RANGE) for name in param_spec.shapes)


def next_range(range_: float, excess: float, peak: float) -> float:
    """Return a tensor's range for the next round.

    If a value exceeded the range, it is widened by the excess, by a factor of 2 to 8. Otherwise it stays above
    `HEADROOM` times the peak and shrinks towards it by at most half per round.

    Args:
        range_: of this round.
        excess: sum over the clients of how far their largest value exceeded the range, in units of it; 0.0 for none.
        peak: largest |sum of weighted values| / clients in the sum, in units of the values.
    """
    if excess > 0:
        return min(range_ * min(max(1.0 + excess, 2.0), MAX_GROWTH), MAX_RANGE)
    return max(min(range_, max(range_ / 2, HEADROOM * peak)), MIN_RANGE)


def nearest_range(levels: int) -> float:
    """Return the range for nearest rounding, in units of the values' root mean square,
    with M `levels` on each side of zero.

    For Laplace-distributed values of variance 1, a range R has a mean squared error of R^2 / (12 M^2) from rounding
    and exp(-sqrt(2) R) from clipping. The sum is minimal at R = W(12 M^2) / sqrt(2), where W is Lambert's function.
    """
    from scipy.special import lambertw  # only the server needs it; a client should start quickly

    return _TAILS * float(lambertw(12 * levels**2).real) / math.sqrt(2)


_HEAD = struct.Struct(f"<HBfHfI{coordinates.DIGEST_BYTES}sB")


@dataclass(frozen=True)
class EncodingConfig:
    """The parameters of a round's encoding.

    Attributes:
        clients: maximum number of clients in the sum.
        bits: bits of a ring element.
        unit_weight: number of examples that counts as weight 1.
        ranges: of each tensor, in the order of the ParamSpec: |value * weight| up to which nothing is clipped.
        fraction: fraction of the entries that are sent (`tofu.secagg.coordinates`).
        turn: number of secure rounds before this one.
        digest: digest of the coordinates that are sent, if that is not all of them.
        nearest_rounding: values are rounded to the nearest step, within ranges that clip the largest ones.
    """

    clients: int
    bits: int
    unit_weight: float
    ranges: tuple[float, ...]
    fraction: float = 1.0
    turn: int = 0
    digest: bytes = bytes(coordinates.DIGEST_BYTES)
    nearest_rounding: bool = False

    def to_bytes(self) -> bytes:
        numbers = (self.clients, self.bits, self.unit_weight, len(self.ranges), self.fraction, self.turn)
        head = _HEAD.pack(*numbers, self.digest, self.nearest_rounding)
        return head + np.array(self.ranges, "<f4").tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> "EncodingConfig":
        """Raises PayloadError if the bytes are malformed or a value is not usable."""
        if len(data) < _HEAD.size:
            raise PayloadError(f"encoding config has {len(data)} bytes, expected at least {_HEAD.size}")
        clients, bits, unit_weight, count, fraction, turn, digest, nearest = _HEAD.unpack_from(data)
        if len(data) != _HEAD.size + 4 * count:
            raise PayloadError(f"encoding config has {len(data)} bytes, expected {_HEAD.size + 4 * count}")
        ranges = tuple(float(value) for value in np.frombuffer(data, "<f4", offset=_HEAD.size))
        if not all(MIN_RANGE / 2 < value < 2 * MAX_RANGE for value in (*ranges, unit_weight)):
            raise PayloadError(f"encoding config has a range or weight outside {MIN_RANGE:g} to {MAX_RANGE:g}")
        if not 1 <= bits <= MAX_BITS:
            raise PayloadError(f"encoding config has {bits} bits, expected 1 to {MAX_BITS}")
        if not 0 < fraction <= 1:
            raise PayloadError(f"encoding config has fraction {fraction:g}, expected above 0 and up to 1")
        if nearest > 1:
            raise PayloadError(f"encoding config has nearest_rounding {nearest}, expected 0 or 1")
        return EncodingConfig(clients, bits, unit_weight, ranges, fraction, turn, digest, bool(nearest))


def purpose_of(config: EncodingConfig, weights: Weights, broadcast: bytes, *more: bytes) -> bytes:
    """Return the digest (32 bytes) of the inputs that determine a client's vector:
    config, global weights, plugin state.

    It enters all keys and masks, so the masks of clients with other inputs do not cancel. Otherwise a server could send
    all clients but one huge ranges, a learning rate of almost 0, or weights that yield zero updates, so that the sum is
    almost the update of that one client (Pasquini, Francati, Ateniese, "Eluding Secure Aggregation in Federated
    Learning via Model Inconsistency", CCS 2022).

    Args:
        more: other inputs, such as the settings and the round (`Settings.meaning`).
    """
    meaning = hashlib.sha256(b"tofu secure round 1")
    for part in (config.to_bytes(), weights_sha256(weights).encode(), hashlib.sha256(broadcast).digest(), *more):
        meaning.update(len(part).to_bytes(4, "little") + part)
    return meaning.digest()


_BITS = 40
SUM_STEPS = 2 ** (_BITS - 1) - 1
"""Number of steps from zero to a sum's bound in `DigitSums`."""


class DigitSums:
    """Encodes tensors so that their sum over the clients has no error but the rounding to 2^-39 of each tensor's bound.

    Args:
        declared: name -> shape and finite bound of each tensor, in the order of the vector.
        digit_bits: bits per digit, so that the clients' digits cannot overflow the ring.
    """

    def __init__(self, declared: Mapping[str, SumSpec], digit_bits: int) -> None:
        self._declared = dict(declared)
        self._digit_bits = digit_bits
        self._digits = -(-_BITS // digit_bits)

    @property
    def length(self) -> int:
        """Ring elements of all tensors."""
        return self._digits * sum(math.prod(spec.shape) for spec in self._declared.values())

    def encode(self, values: Mapping[str, Tensor]) -> RingVector:
        """Return the tensors within their bounds -> ring vector [length]:
        for each tensor one row per digit, lowest first.
        """
        rows = [np.zeros(0, dtype=np.uint64)]
        shifts = np.arange(self._digits, dtype=np.uint64)[:, None] * np.uint64(self._digit_bits)
        for name, spec in self._declared.items():
            whole = np.rint(values[name].numpy().ravel() / spec.bound * SUM_STEPS).astype(np.int64) + SUM_STEPS
            digits: RingVector = whole.astype(np.uint64) >> shifts & np.uint64(2**self._digit_bits - 1)
            rows.append(digits.ravel())
        return np.concatenate(rows)

    def decode(self, total: RingVector, clients: int) -> dict[str, Tensor]:
        """Return the sum of the vectors [length] of `clients` clients -> float64 tensors by name."""
        at, sums = 0, {}
        powers = 2.0 ** (np.arange(self._digits) * self._digit_bits)
        for name, spec in self._declared.items():
            count = math.prod(spec.shape)
            digits = total[at : at + self._digits * count].reshape(self._digits, count).astype(np.float64)
            whole = (digits * powers[:, None]).sum(0) - clients * SUM_STEPS  # exact up to 8,192 clients
            sums[name] = torch.from_numpy(whole / SUM_STEPS * spec.bound).reshape(spec.shape)
            at += self._digits * count
        return sums


MAX_REPORTED = 32.0
"""Maximum loss, and maximum excess over a range in units of it, that the sums can represent."""

_LOSS_ELEMENTS = 16
"""Number of elements that encode the loss; the mean of several stochastic roundings is more precise."""

_POWER = ""
"""Name of the sum of mean squares; sums of plugins have longer names."""


@dataclass(frozen=True)
class Encoded:
    """A client's contribution to the sum.

    Attributes:
        vector: ring elements [length].
        decoded: the update that the vector represents: the client's update after clipping and rounding.
        clipped: the number of clipped values, and the largest in units of its range.
    """

    vector: RingVector
    decoded: Weights
    clipped: Clipped


@dataclass(frozen=True)
class SecureMean:
    """What the server learns from the sum.

    Attributes:
        update: mean weighted by examples, float32 by name.
        examples: number of examples of all clients in the sum.
        loss: mean training loss, weighted by examples.
        clipped: number of clipped values, of all clients together.
        largest_clipped: upper bound of all values in units of their tensor's range; 1.0 if none was clipped.
        ranges: for the next round (`tofu.secagg.encoding`).
        sums: the plugins' sums, float64 by name.
    """

    update: Weights
    examples: int
    loss: float
    clipped: int
    largest_clipped: float
    ranges: tuple[float, ...]
    sums: dict[str, Tensor]


class RingEncoder:
    """Encodes the updates of one round, and decodes their sum.

    Args:
        param_spec: names and shapes of the model's tensors.
        config: the round's encoding.
        declared: the sums of plugins, with finite bounds.
        displacement: the round's global weights minus the initial ones, float [d] in the ParamSpec's order; None if all
            entries are sent.

    Raises:
        PayloadError: the config is for another model, or the ring is too small for the number of clients.
    """

    def __init__(
        self,
        param_spec: ParamSpec,
        config: EncodingConfig,
        declared: Mapping[str, SumSpec] | None = None,
        displacement: Tensor | None = None,
    ) -> None:
        if len(config.ranges) != len(param_spec.shapes):
            raise PayloadError(f"encoding config has {len(config.ranges)} ranges, expected {len(param_spec.shapes)}")
        self._param_spec, self._config = param_spec, config
        try:
            self._fixed = FixedPoint(config.clients, config.bits, 1.0, config.unit_weight)
        except SettingError as error:
            raise PayloadError(f"encoding config is not usable: {error}") from error
        self._sizes = [shape.numel() for shape in param_spec.shapes.values()]
        self._all = sum(self._sizes)
        self._coordinates = None if displacement is None else self._select(displacement)
        self._count = self._all if self._coordinates is None else len(self._coordinates)
        power = {_POWER: SumSpec((len(self._sizes),), 1.0)} if config.nearest_rounding else {}
        self._noised = {name: spec for name, spec in (declared or {}).items() if spec.noised}
        own = {name: spec for name, spec in (declared or {}).items() if not spec.noised}
        self._sums = DigitSums({**own, **power}, self._fixed.digit_bits)

    @property
    def levels(self) -> int:
        """Steps on each side of zero."""
        return self._fixed.levels

    @property
    def values(self) -> int:
        """Number of values that get noise under differential privacy: the entries that are sent, and noised sums."""
        return self._count + self._noised_count

    @property
    def digest(self) -> bytes:
        """Digest of the coordinates that are sent; zeros if these are all."""
        none = bytes(coordinates.DIGEST_BYTES)
        return none if self._coordinates is None else coordinates.digest(self._coordinates)

    @property
    def length(self) -> int:
        """Ring elements of a client's vector."""
        return self._fixed.length(self._count + self._reports + self._noised_count) + self._sums.length

    @property
    def _reports(self) -> int:
        """Elements of the loss and of the excess over the ranges."""
        return _LOSS_ELEMENTS + len(self._sizes)

    @property
    def _noised_count(self) -> int:
        return sum(math.prod(spec.shape) for spec in self._noised.values())

    def encode(
        self,
        update: Weights,
        examples: int,
        loss: float,
        seed: bytes = b"",
        sums: Mapping[str, Tensor] | None = None,
    ) -> Encoded:
        """Encode an update as a ring vector.

        Args:
            update: by name, of the ParamSpec's shapes.
            examples: weight of the update.
            loss: the client's training loss.
            seed: seed of the stochastic rounding (`FixedPoint.encode`).
            sums: the plugins' tensors, by the declared names, within their bounds.

        Raises:
            RunError: the update is not finite.
        """
        weight = examples / self._config.unit_weight
        values = flat({name: update[name] for name in self._param_spec.shapes}).numpy().astype(np.float64)
        values /= self._ranges
        sums = dict(sums or {})
        if self._config.nearest_rounding:
            power = [float(np.square(part).mean()) * weight**2 if part.size else 0.0 for part in self._split(values)]
            sums[_POWER] = torch.tensor(power, dtype=torch.float64).clamp(max=1)
        if self._coordinates is not None:
            values = coordinates.encode(torch.from_numpy(values), self._coordinates).numpy()
        largest = [float(np.abs(part).max(initial=0.0)) * weight for part in self._split(self._expand(values))]
        # `FixedPoint` multiplies by the weight, hence the divisions. A smaller excess than one level could be rounded
        # to zero.
        min_excess = MAX_REPORTED / self._fixed.levels
        excess = [min(max(far - 1.0, min_excess), MAX_REPORTED) if far > 1 else 0.0 for far in largest]
        reports = [min(max(loss, 0.0) / MAX_REPORTED, 1.0 / weight)] * _LOSS_ELEMENTS
        elements = np.concatenate([values, reports, np.array(excess) / MAX_REPORTED / weight])
        nearest = self._count if self._config.nearest_rounding else 0
        vector, clipped = self._fixed.encode(elements, examples, seed, nearest=nearest)
        steps = centered(vector[: self._count], self._config.bits).astype(np.float64)
        own = self._expand(steps * (self._fixed.step / weight)) * self._ranges
        return Encoded(np.concatenate([vector, self._sums.encode(sums)]), self._weights(own), clipped)

    def encode_noised(
        self, update: Weights, sums: Mapping[str, Tensor], add_noise: Callable[[npt.NDArray[np.float64]], SignedVector]
    ) -> Encoded:
        """Encode a clipped update of weight 1 with noise, which wraps around the ring; neither loss nor clipping.

        Args:
            update: by name, of the ParamSpec's shapes.
            sums: the plugins' tensors, by the declared names; those that are noised are further values of the update.
            add_noise: values [n] -> whole numbers of the ranges' step, with noise (`tofu.privacy.Noise.steps`).
        """
        values = flat({name: update[name] for name in self._param_spec.shapes}).double()
        sent = values if self._coordinates is None else coordinates.encode(values, self._coordinates)
        extra = [sums[name].numpy().ravel() for name in self._noised]
        steps = add_noise(np.concatenate([sent.numpy(), *extra]))
        empty = np.zeros(self._count + self._reports + self._noised_count)
        vector, clipped = self._fixed.encode(empty, 1)
        elements = from_signed(steps, self._config.bits)
        vector[: self._count] = elements[: self._count]
        vector[self._count + self._reports : empty.size] = elements[self._count :]
        own = self._expand(steps[: self._count].astype(np.float64) * self._fixed.step) * self._ranges
        return Encoded(np.concatenate([vector, self._sums.encode(sums)]), self._weights(own), clipped)

    def decode(self, total: RingVector, clients: int) -> SecureMean:
        """Decode the mean from the sum of the vectors of `clients` clients.

        Raises:
            PayloadError: the sum has another length.
            RunError: the sum has fewer examples than clients, or is out of range for this number of clients.
        """
        if total.size != self.length:
            raise PayloadError(f"sum has {total.size} elements, expected {self.length}")
        end = total.size - self._sums.length
        self._check_possible(total[:end], clients)
        decoded = self._fixed.decode(total[:end])
        if decoded.examples < clients:
            raise RunError(
                f"the sum has {decoded.examples} examples of {clients} clients, expected at least 1 per client"
            )
        weights = decoded.examples / self._config.unit_weight
        ends = np.cumsum([self._count, _LOSS_ELEMENTS, len(self._sizes)])
        sent, losses, reported, noised = np.split(decoded.mean, ends)
        values = self._expand(sent)
        # Stochastic rounding can make a zero mean slightly negative.
        excess = np.maximum(reported, 0.0) * weights * MAX_REPORTED
        sums = self._sums.decode(total[end:], clients) | self._noised_sums(noised * weights)
        if self._config.nearest_rounding:
            ranges = self._nearest_ranges((sums.pop(_POWER) / clients).clamp(min=0))
        else:
            peaks = [float(np.abs(part).max(initial=0.0)) * weights / clients for part in self._split(values)]
            known = zip(self._config.ranges, excess.tolist(), peaks, strict=True)
            ranges = [next_range(range_, out, peak * range_) for range_, out, peak in known]
        return SecureMean(
            update=self._weights(values * self._ranges),
            examples=decoded.examples,
            loss=float(losses.mean()) * MAX_REPORTED,
            clipped=decoded.clipped,
            largest_clipped=1.0 + float(excess.max(initial=0.0)),
            ranges=tuple(min(range_, MAX_RANGE) for range_ in ranges),
            sums=sums,
        )

    def _noised_sums(self, totals: npt.NDArray[np.float64]) -> dict[str, Tensor]:
        """Return the sums that are further values of the update, from their elements in units of the first range."""
        sums, at = {}, 0
        for name, spec in self._noised.items():
            part = totals[at : at + math.prod(spec.shape)] * float(np.float32(self._config.ranges[0]))
            sums[name], at = torch.from_numpy(part).reshape(spec.shape), at + part.size
        return sums

    def _check_possible(self, total: RingVector, clients: int) -> None:
        """Raises RunError if valid vectors of this number of clients cannot have this sum."""
        values = centered(total[: total.size - 2 * self._fixed.digits], self._config.bits)
        limit = clients * self._fixed.levels
        if (values > limit).any() or (values < -limit).any():
            raise RunError(f"the sum exceeds what {clients} clients can send: one of them sent an impossible vector")
        counts = total[total.size - 2 * self._fixed.digits :]
        if (counts > clients * (2**self._fixed.digit_bits - 1)).any():
            raise RunError(f"the counts exceed what {clients} clients can send: one of them sent an impossible vector")

    def _select(self, displacement: Tensor) -> Tensor:
        """Return the coordinates that are sent (`tofu.secagg.coordinates`)."""
        tensors = zip(torch.split(displacement, self._sizes), self._param_spec.shapes.values(), strict=True)
        levels = np.concatenate([displacement_levels(part.reshape(shape)) for part, shape in tensors])
        return coordinates.select(displacement, self._config.fraction, self._config.turn, levels=levels)

    def _nearest_ranges(self, powers: Tensor) -> list[float]:
        """Next ranges from the clients' mean squares, in units of the squared ranges [tensors]."""
        factor = nearest_range(self.levels)
        known = zip(self._config.ranges, powers.tolist(), strict=True)
        return [max(range_ * max(factor * power**0.5, 1 / 8), MIN_RANGE) for range_, power in known]

    @property
    def _ranges(self) -> npt.NDArray[np.float64]:
        """Each entry's range [d]."""
        return np.repeat(np.array(self._config.ranges, np.float32).astype(np.float64), self._sizes)

    def _expand(self, sent: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the entries that are sent [m], with zeros for all others [d]."""
        if self._coordinates is None:
            return sent
        return coordinates.decode(torch.from_numpy(sent), self._coordinates, self._all).numpy()

    def _split(self, values: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
        """Split one vector [d] into one per tensor."""
        return np.split(values, np.cumsum(self._sizes)[:-1])

    def _weights(self, values: npt.NDArray[np.float64]) -> Weights:
        parts = zip(self._param_spec.shapes.items(), self._split(values), strict=True)
        return {name: torch.from_numpy(part).float().reshape(shape) for (name, shape), part in parts}


def flat(weights: Weights) -> Tensor:
    """Concatenate all tensors to one float32 vector, in their order."""
    return torch.cat([value.detach().float().flatten() for value in weights.values()])
