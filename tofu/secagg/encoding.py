"""A client's update as the vector of ring elements that a secure round sums, and the mean update from that sum.

Every tensor has a range of its own, agreed by all for the round: its entries are divided by it, so that one fixed
point of range 1 (`tofu.secagg.fixed_point`) serves weights, biases and BatchNorm statistics alike. After the update
come a few entries more, so that what the server would otherwise ask of each client is a sum as well: the loss, and for
each tensor how far beyond its range the client's values were. What plugins sum goes last, each value in digits that add
up exactly, to 2^-39 of its bound.

With many levels the range is so wide that hardly anything is clipped, and rounding is unbiased. *Coarse* terms are for
few levels, where that would round nearly all values to nothing, and where error feedback keeps what a client could not
deliver: values are rounded to the nearest step, and the range is `reach` times their root mean square, of which the
clients sum the square. The furthest values are clipped then, counted as ever, and what is over goes with later rounds.
"""

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu import displacement
from tofu.errors import PayloadError, SettingError
from tofu.plugins import SumSpec
from tofu.secagg import coordinates
from tofu.secagg.fixed_point import HEADROOM, LARGEST_GROWTH, Clipped, FixedPoint
from tofu.secagg.ring import MAX_BITS, RingVector, centred
from tofu.weights import ParamSpec, Weights, weights_sha256

LARGEST = 32.0
"""Losses, and distances beyond a range, up to which the sums say them."""

_LOSS_ENTRIES = 16
"""The loss is rounded so many times, since one rounding among few levels says little of it."""

FIRST_RANGE = 0.25
"""Of every tensor as long as nothing is known of the updates: wide for any usual one."""

FEW_LEVELS = 64
"""Below which terms are coarse, where error feedback allows it."""

_TAILS = 1.5
"""How much further an update's values reach than a Laplace distribution's (benchmarks/README.md)."""

_POWER = ""
"""Name of the sum of mean squares, which no plugin's sum has."""

_SUM_BITS = 40

_SMALLEST, _WIDEST = 1e-12, 1e12
_HEAD = struct.Struct(f"<HBfHfI{coordinates.DIGEST_BYTES}sB")


@dataclass(frozen=True)
class EncodingConfig:
    """What all clients of one secure round, and the server, agree on.

    Attributes:
        clients: most clients in the sum.
        bits: of the ring.
        unit_weight: examples that count as weight 1.
        ranges: of each tensor of the param_spec, in its order: |value * weight| up to which nothing is clipped.
        share: of the entries that travel (`tofu.secagg.coordinates`).
        turn: secure rounds before this one.
        digest: of the places that travel, where that is not all of them.
        coarse: values are rounded to the nearest step, within ranges that clip the furthest.
    """

    clients: int
    bits: int
    unit_weight: float
    ranges: tuple[float, ...]
    share: float = 1.0
    turn: int = 0
    digest: bytes = bytes(coordinates.DIGEST_BYTES)
    coarse: bool = False

    def to_bytes(self) -> bytes:
        numbers = (self.clients, self.bits, self.unit_weight, len(self.ranges), self.share, self.turn)
        head = _HEAD.pack(*numbers, self.digest, self.coarse)
        return head + np.array(self.ranges, "<f4").tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> "EncodingConfig":
        """Raises PayloadError for bytes that are no terms, or terms that nobody could work by."""
        if len(data) < _HEAD.size:
            raise PayloadError(f"secure terms have {len(data)} bytes, expected at least {_HEAD.size}")
        clients, bits, unit_weight, count, share, turn, digest, coarse = _HEAD.unpack_from(data)
        if len(data) != _HEAD.size + 4 * count:
            raise PayloadError(f"secure terms have {len(data)} bytes, expected {_HEAD.size + 4 * count}")
        ranges = tuple(float(value) for value in np.frombuffer(data, "<f4", offset=_HEAD.size))
        if not all(_SMALLEST / 2 < value < 2 * _WIDEST for value in (*ranges, unit_weight)):
            raise PayloadError("secure terms hold a range or a weight that is not a usual positive number")
        if not 1 <= bits <= MAX_BITS:
            raise PayloadError(f"secure terms have {bits} bits, expected 1 to {MAX_BITS}")
        if not 0 < share <= 1:
            raise PayloadError(f"secure terms have share {share:g}, expected above 0 and up to 1")
        if coarse > 1:
            raise PayloadError(f"secure terms have coarse {coarse}, expected 0 or 1")
        return EncodingConfig(clients, bits, unit_weight, ranges, share, turn, digest, bool(coarse))


def purpose_of(terms: EncodingConfig, weights: Weights, broadcast: bytes) -> bytes:
    """What the clients' vectors mean, in 32 bytes: their code, the weights that they update, the plugins' state.

    All clients of a sum must have the same. A server that gives most of them huge ranges, or weights at which nothing
    can be learnt, would otherwise get the one that it left out of this nearly alone (Pasquini, Francati, Ateniese,
    "Eluding Secure Aggregation in Federated Learning via Model Inconsistency", CCS 2022).
    """
    meaning = hashlib.sha256(b"tofu secure round 1")
    for part in (terms.to_bytes(), weights_sha256(weights).encode(), hashlib.sha256(broadcast).digest()):
        meaning.update(len(part).to_bytes(4, "little") + part)
    return meaning.digest()


@dataclass(frozen=True)
class Encoded:
    """What a client puts into the sum.

    Attributes:
        vector: ring elements [length].
        decoded: the update that these stand for: the client's own, rounded and clipped.
        clipped: how many values were beyond their ranges, and the furthest in units of its range.
    """

    vector: RingVector
    decoded: Weights
    clipped: Clipped


@dataclass(frozen=True)
class SecureMean:
    """What the server learns from the sum.

    Attributes:
        update: the mean weighted by examples, float32 by name.
        examples: of all clients in the sum.
        loss: mean training loss, weighted by examples.
        clipped: values beyond their ranges, all clients together.
        furthest: no client's value was further out than this, in units of its tensor's range; 1.0 where none was out.
        ranges: for the next round, by `next_range`.
        sums: of the plugins, float64 by name.
    """

    update: Weights
    examples: int
    loss: float
    clipped: int
    furthest: float
    ranges: tuple[float, ...]
    sums: dict[str, Tensor]


class RingEncoder:
    """The two directions of one round.

    Args:
        declared: what the plugins sum beside the update, with finite bounds.
        moved: the round's weights less the initial ones, one vector in the param_spec's order; where a share travels.

    Raises:
        PayloadError: terms for another model, or a ring that is too small for that many clients.
    """

    def __init__(
        self,
        param_spec: ParamSpec,
        terms: EncodingConfig,
        declared: Mapping[str, SumSpec] | None = None,
        moved: Tensor | None = None,
    ) -> None:
        if len(terms.ranges) != len(param_spec.shapes):
            raise PayloadError(f"secure terms have {len(terms.ranges)} ranges, expected {len(param_spec.shapes)}")
        self._param_spec, self._terms = param_spec, terms
        try:
            self._fixed = FixedPoint(terms.clients, terms.bits, 1.0, terms.unit_weight)
        except SettingError as error:
            raise PayloadError(f"secure terms cannot be used: {error}") from error
        self._sizes = [shape.numel() for shape in param_spec.shapes.values()]
        self._all = sum(self._sizes)
        self._places = None if moved is None else self._taken(moved)
        self._count = self._all if self._places is None else len(self._places)
        self._declared = dict(declared or {})
        if terms.coarse:
            self._declared[_POWER] = SumSpec((len(self._sizes),), 1.0)
        self._digits = -(-_SUM_BITS // self._fixed.digit_bits)

    @property
    def levels(self) -> int:
        """Steps on either side of zero."""
        return self._fixed.levels

    @property
    def values(self) -> int:
        """Entries of the update that travel."""
        return self._count

    @property
    def digest(self) -> bytes:
        """Names the places that travel; zeros where that is all."""
        return bytes(coordinates.DIGEST_BYTES) if self._places is None else coordinates.digest(self._places)

    @property
    def length(self) -> int:
        """Ring elements of a client's vector."""
        sums = sum(math.prod(spec.shape) for spec in self._declared.values())
        return self._fixed.length(self._count + _LOSS_ENTRIES + len(self._sizes)) + self._digits * sums

    def encode(
        self,
        update: Weights,
        examples: int,
        loss: float,
        seed: bytes = b"",
        sums: Mapping[str, Tensor] | None = None,
        *,
        silent: bool = False,
    ) -> Encoded:
        """An update as a vector.

        Args:
            seed: of the rounding (`FixedPoint.encode`).
            sums: the plugins', by the names that were declared, within their bounds.
            silent: say nothing beside the update: neither a loss nor that anything was clipped. Not in coarse terms.

        Raises:
            RunError: an update that is not finite.
        """
        weight = examples / self._terms.unit_weight
        entries = flat({name: update[name] for name in self._param_spec.shapes}).numpy()
        values = entries.astype(np.float64) / self._spread
        sums = dict(sums or {})
        if self._terms.coarse:
            power = [float(np.square(part).mean()) * weight**2 if part.size else 0.0 for part in self._parts(values)]
            sums[_POWER] = torch.tensor(power, dtype=torch.float64).clamp(max=1)
        if self._places is not None:
            values = coordinates.encode(torch.from_numpy(values), self._places).numpy()
        if silent:
            values, loss = np.clip(values, -1 / weight, 1 / weight), 0.0
        furthest = [float(np.abs(part).max(initial=0.0)) * weight for part in self._parts(self._spaced(values))]
        # Divided by the weight, which `FixedPoint` multiplies by; at least one whole level, which is not rounded away.
        least = LARGEST / self._fixed.levels
        beyond = [min(max(far - 1.0, least), LARGEST) if far > 1 else 0.0 for far in furthest]
        excess = np.array(beyond) / LARGEST / weight
        losses = np.full(_LOSS_ENTRIES, min(max(loss, 0.0) / LARGEST, 1.0 / weight))
        vector, clipped = self._fixed.encode(
            np.concatenate([values, losses, excess]), examples, seed, nearest=self._count if self._terms.coarse else 0
        )
        steps = centred(vector[: self._count], self._terms.bits).astype(np.float64)
        own = self._spaced(steps * (self._fixed.step / weight)) * self._spread
        digits = [self._digits_of(sums[name], spec) for name, spec in self._declared.items()]
        return Encoded(np.concatenate([vector, *digits]), self._weights(own), clipped)

    def decode(self, total: RingVector, survivors: int) -> SecureMean:
        """The mean from the sum of so many clients' vectors.

        Raises:
            PayloadError: a sum of another length.
            RunError: a sum that says 0 examples.
        """
        if total.size != self.length:
            raise PayloadError(f"sum has {total.size} elements, expected {self.length}")
        end = total.size - self._digits * sum(math.prod(spec.shape) for spec in self._declared.values())
        decoded = self._fixed.decode(total[:end], survivors)
        weights = decoded.examples / self._terms.unit_weight
        sent, losses, excess = np.split(decoded.mean, [self._count, self._count + _LOSS_ENTRIES])
        values = self._spaced(sent)
        # A mean is stochastically rounded, so what is nothing may come out a little below.
        beyond = np.maximum(excess, 0.0) * weights * LARGEST
        peaks = [float(np.abs(part).max(initial=0.0)) * weights / survivors for part in self._parts(values)]
        sums = self._sums_from(total[end:], survivors)
        if self._terms.coarse:
            powers = (sums.pop(_POWER) / survivors).clamp(min=0).tolist()
            mean_squares = zip(self._terms.ranges, powers, strict=True)
            ranges = [max(range_ * max(self._reach * power**0.5, 1 / 8), _SMALLEST) for range_, power in mean_squares]
        else:
            known = zip(self._terms.ranges, beyond.tolist(), peaks, strict=True)
            ranges = [next_range(range_, out, peak * range_) for range_, out, peak in known]
        return SecureMean(
            self._weights(values * self._spread),
            decoded.examples,
            float(losses.mean()) * LARGEST,
            decoded.clipped,
            1.0 + float(beyond.max(initial=0.0)),
            tuple(min(range_, _WIDEST) for range_ in ranges),
            sums,
        )

    def _taken(self, moved: Tensor) -> Tensor:
        """The places that travel (`tofu.secagg.coordinates`)."""
        tensors = zip(torch.split(moved, self._sizes), self._param_spec.shapes.values(), strict=True)
        of_all = np.concatenate([displacement.levels(part.reshape(shape)) for part, shape in tensors])
        return coordinates.places(moved, self._terms.share, self._terms.turn, levels=of_all)

    def _digits_of(self, value: Tensor, spec: SumSpec) -> RingVector:
        """A sum's values as whole numbers from 0 to 2^b - 1, one row for each of their digits, lowest first."""
        top = 2 ** (_SUM_BITS - 1) - 1
        whole = np.rint(value.numpy().ravel() / spec.bound * top).astype(np.int64) + top
        places = np.arange(self._digits, dtype=np.uint64)[:, None] * np.uint64(self._fixed.digit_bits)
        digits: RingVector = whole.astype(np.uint64) >> places & np.uint64(2**self._fixed.digit_bits - 1)
        return digits.ravel()

    def _sums_from(self, total: RingVector, survivors: int) -> dict[str, Tensor]:
        top, at, sums = 2 ** (_SUM_BITS - 1) - 1, 0, {}
        places = 2.0 ** (np.arange(self._digits) * self._fixed.digit_bits)
        for name, spec in self._declared.items():
            count = math.prod(spec.shape)
            digits = total[at : at + self._digits * count].reshape(self._digits, count).astype(np.float64)
            whole = (digits * places[:, None]).sum(0) - survivors * top  # exact to 8,192 clients
            sums[name] = torch.from_numpy(whole / top * spec.bound).reshape(spec.shape)
            at += self._digits * count
        return sums

    @property
    def _reach(self) -> float:
        return reach(self.levels)

    @property
    def _spread(self) -> npt.NDArray[np.float64]:
        """Each entry's range [values]."""
        return np.repeat(np.array(self._terms.ranges, np.float32).astype(np.float64), self._sizes)

    def _spaced(self, sent: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What travels, with zeros in all other places."""
        if self._places is None:
            return sent
        return coordinates.decode(torch.from_numpy(sent), self._places, self._all).numpy()

    def _parts(self, values: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
        return np.split(values, np.cumsum(self._sizes)[:-1])

    def _weights(self, values: npt.NDArray[np.float64]) -> Weights:
        parts = zip(self._param_spec.shapes.items(), self._parts(values), strict=True)
        return {name: torch.from_numpy(part).float().reshape(shape) for (name, shape), part in parts}


def next_range(range_: float, beyond: float, peak: float) -> float:
    """A tensor's range for the next round; the same numbers give the same range.

    Where a value was out of the range it widens by as much, within 2 to 8 times; otherwise it stays above `HEADROOM`
    times the peak, and shrinks to it by at most half a round.

    Args:
        beyond: how far out the clients' furthest values were together, in units of the range; 0.0 where all fit.
        peak: largest |sum of weighted values| / clients in the sum, in units of the values.
    """
    if beyond > 0:
        wider = range_ * min(max(1.0 + beyond, 2.0), LARGEST_GROWTH)
        return min(wider, _WIDEST)
    return max(min(range_, max(range_ / 2, HEADROOM * peak)), _SMALLEST)


def reach(levels: int) -> float:
    """The range of coarse terms in units of the values' root mean square, with so many levels M on either side of zero.

    For Laplace-distributed values of variance 1 a range R has the mean squared error R^2 / (12 M^2) of rounding and
    exp(-sqrt(2) R) of clipping; their sum is least at R = W(12 M^2) / sqrt(2), W being Lambert's function.
    """
    from scipy.special import lambertw  # the server's alone; a client that starts for one message need not wait for it

    return _TAILS * float(lambertw(12 * levels**2).real) / math.sqrt(2)


def first_ranges(param_spec: ParamSpec, known: Mapping[str, float]) -> tuple[float, ...]:
    """Ranges of a first secure round, where earlier rounds' updates say what they should be, and else wide ones."""
    usable = {name: range_ for name, range_ in known.items() if range_ > 0 and math.isfinite(range_)}
    return tuple(min(max(usable.get(name, FIRST_RANGE), _SMALLEST), _WIDEST) for name in param_spec.shapes)


def flat(weights: Weights) -> Tensor:
    """All tensors as one float32 vector, in their order."""
    return torch.cat([value.detach().float().flatten() for value in weights.values()])
