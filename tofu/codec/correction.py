"""The sparse correction: the largest entries of the update minus the decoded proxies.

The correction holds as many of the largest entries as the budget allows. With s the smallest selected magnitude, level
1 starts at s, level 2 at 4 s, level 3 at 7 s, and so on. The message has the mean magnitude of each level. The levels
are coded as subsets: which entries reach level 2, which of these reach level 3, and so on.

A subset of k out of n items (the entries of one stratum, or those that reached the previous level) is written as k, in
as many bits as n has, and the gaps between its members in a Golomb-Rice code: all quotients in unary, then all
remainders of b bits. Both ends derive b from k and n; it is the optimal parameter for gaps of that mean (Kiely, IPN
Progress Report 42-159, 2004):

    b = floor(log2(2 ln(phi) n / k)), at least 0, with phi the golden ratio.

Strata are groups of entries that are about equally likely to be among the largest. Both ends compute them from the
displacement of the weights since the run began: entries are sorted by level (`weights.displacement_levels`) and cut at
fixed fractions. Positions within a stratum are coded as if they were equally likely. The benchmark `classes` measures
the saving. This method is ours; we know of no paper. The message has a checksum of the strata, because both ends must
compute the same ones. Rounding differences of the weights (another processor, a compressed downlink) rarely change
them.

Layout, little-endian:

    bytes  field
    2      checksum of the strata
    1      number of levels, L
    2 each L magnitudes, bfloat16
    -      bits: the subset of each stratum, signs (1 is negative), the subset that reaches each level from 2 to L;
           entries in the order of slots
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu.compression import compressors
from tofu.compression.base import FlatCompressor, checked_length, checked_scales
from tofu.compression.coding import (
    BitReader,
    Bits,
    Integers,
    bfloat16_bytes,
    bfloat16_from,
    by_magnitude,
    fixed,
    packed,
    unary,
)
from tofu.errors import PayloadError
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, displacement_levels

BOUNDARIES = (0.0005, 0.002, 0.006, 0.02, 0.06, 0.2, 0.5)
"""Boundaries between strata, as fractions of all entries; the likeliest entries come first."""

STRATA = len(BOUNDARIES) + 1


@dataclass(frozen=True)
class Strata:
    """The stratum of each entry of the vector of all trainable parameters, in the order of the param spec.

    A *slot* is an index into the entries, sorted by stratum and then by position.

    Attributes:
        numbers: int8 [d], the stratum of each entry; 0 is the likeliest.
    """

    numbers: npt.NDArray[np.int8]

    @cached_property
    def sizes(self) -> Integers:
        """Number of entries of each stratum [STRATA]."""
        return np.array([np.count_nonzero(self.numbers == stratum) for stratum in range(STRATA)])

    @cached_property
    def starts(self) -> Integers:
        """The first slot of each stratum [STRATA]."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def positions(self) -> npt.NDArray[np.int32]:
        """The position of the entry in each slot [d]."""
        return np.concatenate([np.flatnonzero(self.numbers == one).astype(np.int32) for one in range(STRATA)])

    @cached_property
    def slots(self) -> Integers:
        """The slot of each entry [d]."""
        slots = np.empty(self.numbers.size, dtype=np.int64)
        slots[self.positions] = np.arange(self.numbers.size)
        return slots

    @cached_property
    def checksum(self) -> int:
        """A checksum of 16 bits."""
        return zlib.crc32(self.numbers.tobytes()) & 0xFFFF


def strata_of(reference: ReferenceModel) -> Strata:
    """Return the strata at a reference's base weights, from their displacement since its initial weights."""
    levels = [displacement_levels(tensor).astype(np.int32) for tensor in reference.displacements()]
    lowest, highest = min(map(np.min, levels)), max(map(np.max, levels))
    # Levels are integers with a range of at most a million, so counting beats sorting.
    counts = np.zeros(highest - lowest + 1, dtype=np.int64)
    for found in levels:
        counts += np.bincount(found - lowest, minlength=counts.size)
    above = np.cumsum(counts[::-1])[::-1]
    centers = (above - counts / 2) / sum(found.size for found in levels)
    strata = np.searchsorted(BOUNDARIES, centers).astype(np.int8)
    return Strata(np.concatenate([strata[found - lowest] for found in levels]))


MAX_LEVELS = 31
"""Maximum number of levels; the highest one has no upper bound."""

_HEAD = struct.Struct("<HB")
_TWO_LN_PHI = 63073
"""2 ln(phi) in units of 2^-16: integer arithmetic gives both ends the same parameter."""

Floats = npt.NDArray[np.float32]


def min_bytes(length: int) -> int:
    """Return the number of bytes in which a correction of one entry always fits, for a vector of this length."""
    counts, gap, sign = STRATA * length.bit_length(), 2 + length.bit_length(), 1
    return _head(1) + (counts + gap + sign + 7) // 8


def write_correction(vector: Tensor, budget: int, strata: Strata) -> bytes:
    """Encode the largest entries of a float vector [d]: as many as fit, or fewer if that explains more.

    Args:
        budget: maximum number of bytes, at least `min_bytes(d)`.
    """
    ranking = _Ranking.of(vector, strata, count=4 * budget)  # an entry takes at least two bits
    fits, too_many = 0, ranking.descending.size + 1
    # The size is not strictly monotonic in the count, so the bisection may find slightly fewer entries than would fit.
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        if ranking.largest(count).nbytes <= budget:
            fits = count
        else:
            too_many, ranking = count, ranking.first(count)
    best = ranking.best([fits >> halvings for halvings in range(max(1, fits.bit_length()))], budget)
    if best.slots.size and ranking.largest(fits).top == MAX_LEVELS:
        # If nearly all entries fit, s may be so small that many belong to the highest level; then fewer explain more.
        near = {round(best.slots.size * 2 ** (eighths / 8)) for eighths in range(-8, 8)}
        best = ranking.best([best.slots.size, *(count for count in sorted(near) if 0 < count <= fits)], budget)
    return best.to_bytes()


def scale_correction(data: bytes, factor: float) -> bytes:
    """Return a correction from `write_correction` with all magnitudes multiplied by a factor."""
    split = _head(data[_HEAD.size - 1])
    magnitudes = bfloat16_from(data[_HEAD.size : split], "magnitudes")
    return data[: _HEAD.size] + bfloat16_bytes(factor * magnitudes) + data[split:]


def read_correction(data: bytes, strata: Strata) -> Tensor:
    """Invert `write_correction`: a float32 vector [d], zero elsewhere.

    Raises:
        PayloadError: the bytes are malformed, or were written for other strata.
    """
    what = "correction"
    checked_length(data, _HEAD.size, what, exactly=False)
    checksum, top = _HEAD.unpack_from(data)
    if checksum != strata.checksum:
        raise PayloadError(f"{what} has the strata {checksum:04x}, this end has {strata.checksum:04x}: "
                           "the weights, or the initial weights, differ between the two ends")  # fmt: skip
    if top > MAX_LEVELS:
        raise PayloadError(f"{what} has {top} levels, expected at most {MAX_LEVELS}")
    split = _head(top)
    checked_length(data, split, what, exactly=False)
    magnitudes = checked_scales(bfloat16_from(data[_HEAD.size : split], "magnitudes"), what)
    bits = BitReader(data[split:], what)
    slots = _read_slots(bits, strata)
    if slots.size and not top:
        raise PayloadError(f"{what} has {slots.size} entries and no levels")
    signs = torch.from_numpy(1 - 2 * bits.fixed(slots.size, 1))
    levels = _read_levels(bits, slots.size, top)
    bits.finish()
    vector = torch.zeros(strata.numbers.size)
    positions = torch.from_numpy(strata.positions[slots].astype(np.int64))
    vector[positions] = magnitudes[torch.from_numpy(levels - 1)] * signs
    return vector


def slots_length(slots: Integers, strata: Strata) -> int:
    """Return the number of bits of the code of increasing slots."""
    return sum(subset.length for subset in _by_stratum(slots, strata))


@dataclass(frozen=True)
class _Ranking:
    """The largest entries in the order of slots, with their ranks by magnitude.

    Attributes:
        slots: slots of these entries, increasing.
        values: their values.
        ranks: their ranks, 0 for the largest.
        descending: their magnitudes, the largest first.
    """

    strata: Strata
    slots: Integers
    values: Floats
    ranks: npt.NDArray[np.int32]
    descending: Floats

    @staticmethod
    def of(vector: Tensor, strata: Strata, count: int) -> "_Ranking":
        values, order = vector.detach().numpy(), by_magnitude(vector, count)
        ranked = np.zeros(values.size, dtype=bool)
        ranked[order] = True
        slots = np.flatnonzero(ranked[strata.positions])
        positions, increasing = strata.positions[slots], np.argsort(order).astype(np.int32)
        ranks = increasing[np.searchsorted(order[increasing], positions)]
        return _Ranking(strata, slots, values[positions], ranks, np.abs(values[order]))

    def first(self, count: int) -> "_Ranking":
        """Return the ranking of the `count` largest entries alone."""
        chosen = self.ranks < count
        return _Ranking(
            self.strata, self.slots[chosen], self.values[chosen], self.ranks[chosen], self.descending[:count]
        )

    def largest(self, count: int) -> "_Correction":
        """Return the `count` largest entries."""
        chosen = self.ranks < count
        slots, values = self.slots[chosen], self.values[chosen]
        smallest = np.float64(self.descending[count - 1]) if count else 1.0
        levels = np.clip((np.abs(values) / smallest + 2) // 3, 1, MAX_LEVELS).astype(np.int64)
        return _Correction(self.strata, slots, values, levels)

    def best(self, counts: Sequence[int], budget: int) -> "_Correction":
        """Return the largest entries, as many as explain most of those numbers that fit; the highest if several do."""
        choices, ranking = [], self
        for count in sorted(counts, reverse=True):
            ranking = ranking.first(count) if count < ranking.ranks.size // 2 else ranking
            choices.append(ranking.largest(count))
        return max((one for one in choices if one.nbytes <= budget), key=lambda one: one.explained)


@dataclass(frozen=True)
class _Correction:
    """Selected entries: their slots in increasing order, their values, and their levels, counted from 1."""

    strata: Strata
    slots: Integers
    values: Floats
    levels: Integers

    @cached_property
    def top(self) -> int:
        return int(self.levels.max(initial=0))

    @property
    def nbytes(self) -> int:
        """Length of `to_bytes`."""
        levels = sum(subset.length for subset in self._by_level())
        return _head(self.top) + (slots_length(self.slots, self.strata) + self.slots.size + levels + 7) // 8

    def to_bytes(self) -> bytes:
        bits = packed(
            *(field for subset in _by_stratum(self.slots, self.strata) for field in subset.fields()),
            fixed((self.values < 0).astype(np.int64), 1),
            *(field for subset in self._by_level() for field in subset.fields()),
        )
        return _HEAD.pack(self.strata.checksum, self.top) + self._magnitudes() + bits

    @property
    def explained(self) -> float:
        """The explained power, |x|^2 - |x - C(x)|^2."""
        sums, counts = self._sums_and_counts()
        return float((sums**2 / counts).sum())

    def _magnitudes(self) -> bytes:
        """Return the mean magnitude of each level; 0 for a level without entries."""
        sums, counts = self._sums_and_counts()
        return bfloat16_bytes(torch.from_numpy(sums / counts))

    def _sums_and_counts(self) -> tuple[npt.NDArray[np.float64], Integers]:
        """Return for each level the sum of its entries' magnitudes, and their number or 1 if there are none."""
        sums = np.bincount(self.levels, np.abs(self.values), self.top + 1)[1:].astype(np.float64)
        counts: Integers = np.maximum(np.bincount(self.levels, minlength=self.top + 1)[1:], 1)
        return sums, counts

    def _by_level(self) -> Iterator["_Subset"]:
        """Yield for each level from 2 on which entries of the previous level reach it."""
        levels = self.levels
        for level in range(2, self.top + 1):
            reach = levels >= level
            yield _Subset(levels.size, np.flatnonzero(reach))
            levels = levels[reach]


@dataclass(frozen=True)
class _Subset:
    """A subset of the integers below `size`: its members, increasing."""

    size: int
    members: Integers

    @cached_property
    def gaps(self) -> Integers:
        gaps = self.members.copy()
        gaps[1:] -= self.members[:-1] + 1
        return gaps

    @cached_property
    def width(self) -> int:
        return _width(self.members.size, self.size)

    @property
    def length(self) -> int:
        """Number of bits of `fields`."""
        return self.size.bit_length() + int((self.gaps >> self.width).sum()) + self.members.size * (1 + self.width)

    def fields(self) -> tuple[Bits, Bits, Bits]:
        count = fixed(np.array([self.members.size]), self.size.bit_length())
        return count, unary(self.gaps >> self.width), fixed(self.gaps, self.width)

    @staticmethod
    def read(bits: BitReader, size: int) -> Integers:
        """Return the members of a subset of the integers below `size`.

        Raises:
            PayloadError: a member is out of range, or the stream ends early.
        """
        count = int(bits.fixed(1, size.bit_length())[0])
        width = _width(count, size)
        quotients = bits.unary(count)
        if count > size or int(quotients.sum()) > size >> width:  # before the shift below could overflow
            raise PayloadError(f"correction has {count} entries of {size}, or one out of range")
        members: Integers = np.cumsum((quotients << width) + bits.fixed(count, width) + 1) - 1
        if count and int(members[-1]) >= size:
            raise PayloadError(f"correction has an entry outside {size}")
        return members


def _by_stratum(slots: Integers, strata: Strata) -> Iterator[_Subset]:
    """Yield the subset of each stratum that is among increasing slots."""
    parts = np.split(slots, np.searchsorted(slots, strata.starts[1:]))
    for start, size, part in zip(strata.starts, strata.sizes, parts, strict=True):
        yield _Subset(int(size), part - start)


def _read_slots(bits: BitReader, strata: Strata) -> Integers:
    parts = [start + _Subset.read(bits, int(size)) for start, size in zip(strata.starts, strata.sizes, strict=True)]
    return np.concatenate(parts)


def _read_levels(bits: BitReader, count: int, top: int) -> Integers:
    """Return the level of each of `count` entries."""
    levels = np.ones(count, dtype=np.int64)
    reach = np.arange(count)
    for _ in range(2, top + 1):
        reach = reach[_Subset.read(bits, reach.size)]
        levels[reach] += 1
    return levels


def _width(count: int, size: int) -> int:
    """Return the Rice parameter b for a subset of `count` of `size` integers."""
    mean = (size * _TWO_LN_PHI) // (max(count, 1) << 16)
    return max(mean.bit_length() - 1, 0)


def _head(levels: int) -> int:
    """Return the number of bytes before the bits."""
    return _HEAD.size + 2 * levels


@compressors.register("sparse")
class SparseCorrection(FlatCompressor):
    """The sparse correction as a compressor without proxies.

    It needs only the names and shapes of the parameters, and no forward pass, so it works for every model and input.
    All entries are in one stratum.
    """

    code = 11

    def _min_bytes(self, param_spec: ParamSpec) -> int:
        return min_bytes(param_spec.parameter_count)

    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        return write_correction(vector, self._budget(param_spec), _one_stratum(param_spec))

    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        return read_correction(data, _one_stratum(param_spec))


def _one_stratum(param_spec: ParamSpec) -> Strata:
    return Strata(np.zeros(param_spec.parameter_count, np.int8))
