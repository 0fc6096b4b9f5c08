"""The largest entries of a vector at positions coded by class: the correction of the proxy codec.

As many of the largest as there is room for, in steps of three times the smallest of them, s: level 1 is from s on,
level 2 from 4s, level 3 from 7s. For a level the mean of its entries is sent. Few entries reach a level and fewer the
next, so levels are sent as positions too: which of the entries reach level 2, which of these level 3, and so on.

Each of these is a subset of n places: the places of one class (`tofu.codec.strata`) that hold an entry, and the
entries of one level that reach the next. A subset of k is written as k, in as many bits as n has digits, and the gaps
between its places by Golomb-Rice's code, quotients in unary before all remainders of b bits each. b follows from k and
n, and is Rice's best for gaps of that mean (Kiely, IPN Progress Report 42-159, 2004):

    b = floor(log2(2 ln(phi) n / k)), at least 0, with phi the golden ratio.

Body, little-endian:

    bytes  field
    2      checksum of the classes
    1      number of levels, L
    2 each L magnitudes, bfloat16
    -      bits: the subset of each class, signs (1 is negative), the subset that reaches each level from 2 to L;
           entries in the order of slots
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu.codec.strata import CLASSES, Strata
from tofu.compression.bitstream import BitReader, Bits, Integers, fixed, packed, unary
from tofu.compression.flat import checked_length, checked_scales
from tofu.compression.quantize import bfloat16_bytes, bfloat16_from
from tofu.compression.rice import by_magnitude
from tofu.errors import PayloadError

MAX_LEVELS = 31
"""The highest level has no end: what would reach further ones belongs to it."""

_HEAD = struct.Struct("<HB")
_SHARE = 63073
"""2 ln(phi) in units of 2^-16: parameters are whole-number arithmetic, so that both ends get the same."""

Floats = npt.NDArray[np.float32]


def least_room(length: int) -> int:
    """Bytes into which one entry of a vector of this length always fits."""
    counts, gap, sign = CLASSES * length.bit_length(), 2 + length.bit_length(), 1
    return _head(1) + (counts + gap + sign + 7) // 8


def write_entries(vector: Tensor, room: int, classes: Strata) -> bytes:
    """The largest entries of a float vector [d] in at most `room` bytes: as many as fit, or fewer that explain more."""
    ranking = _Ranking.of(vector, classes, most=4 * room)  # an entry takes two bits at least
    fits, too_many = 0, ranking.falling.size + 1
    # Now and then one entry more takes fewer bits; then this ends with a few fewer than would fit.
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        if ranking.largest(count).nbytes <= room:
            fits = count
        else:
            too_many = count
    # Where nearly all fit, the smallest may be so small that most belong to the highest level: then fewer say more.
    choices = (ranking.largest(fits >> halvings) for halvings in range(max(1, fits.bit_length())))
    return max((one for one in choices if one.nbytes <= room), key=lambda one: one.explained).to_bytes()


def read_entries(data: bytes, classes: Strata) -> Tensor:
    """The inverse of `write_entries`: a float32 vector [d], zero elsewhere.

    Raises:
        PayloadError: the bytes cannot have been written for these classes.
    """
    what = "correction's entries"
    checked_length(data, _HEAD.size, what, exactly=False)
    checksum, top = _HEAD.unpack_from(data)
    if checksum != classes.checksum:
        raise PayloadError(f"{what} are of classes {checksum:04x}, this end's are {classes.checksum:04x}: "
                           "the weights, or the initial ones, are not the same at both ends")  # fmt: skip
    if top > MAX_LEVELS:
        raise PayloadError(f"{what} have {top} levels, expected at most {MAX_LEVELS}")
    split = _head(top)
    checked_length(data, split, what, exactly=False)
    magnitudes = checked_scales(bfloat16_from(data[_HEAD.size : split], "magnitudes"), what)
    bits = BitReader(data[split:], what)
    slots = _read_slots(bits, classes)
    if slots.size and not top:
        raise PayloadError(f"{what} are {slots.size} of no level")
    signs = torch.from_numpy(1 - 2 * bits.fixed(slots.size, 1))
    levels = _read_levels(bits, slots.size, top)
    bits.finish()
    vector = torch.zeros(classes.numbers.size)
    vector[torch.from_numpy(classes.positions[slots])] = magnitudes[torch.from_numpy(levels - 1)] * signs
    return vector


def slots_length(slots: Integers, classes: Strata) -> int:
    """Bits that rising slots take."""
    return sum(subset.length for subset in _by_stratum(slots, classes))


@dataclass(frozen=True)
class _Ranking:
    """The largest entries in the order of slots, and by magnitude.

    Attributes:
        slots: of these entries, rising.
        values: theirs.
        ranks: theirs, 0 for the largest.
        falling: their magnitudes, the largest first.
    """

    classes: Strata
    slots: Integers
    values: Floats
    ranks: Integers
    falling: Floats

    @staticmethod
    def of(vector: Tensor, classes: Strata, most: int) -> "_Ranking":
        values, order = vector.detach().numpy(), by_magnitude(vector, most)
        ranks = np.full(values.size, order.size)
        ranks[order] = np.arange(order.size)
        by_slot = ranks[classes.positions]
        slots = np.flatnonzero(by_slot < order.size)
        return _Ranking(classes, slots, values[classes.positions[slots]], by_slot[slots], np.abs(values[order]))

    def largest(self, count: int) -> "_Entries":
        """The first `count` by magnitude."""
        chosen = self.ranks < count
        slots, values = self.slots[chosen], self.values[chosen]
        smallest = np.float64(self.falling[count - 1]) if count else 1.0
        levels = np.clip((np.abs(values) / smallest + 2) // 3, 1, MAX_LEVELS).astype(np.int64)
        return _Entries(self.classes, slots, values, levels)


@dataclass(frozen=True)
class _Entries:
    """Chosen entries: their rising slots, values, and levels from 1."""

    classes: Strata
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
        return _head(self.top) + (slots_length(self.slots, self.classes) + self.slots.size + levels + 7) // 8

    def to_bytes(self) -> bytes:
        bits = packed(
            *(field for subset in _by_stratum(self.slots, self.classes) for field in subset.fields()),
            fixed((self.values < 0).astype(np.int64), 1),
            *(field for subset in self._by_level() for field in subset.fields()),
        )
        return _HEAD.pack(self.classes.checksum, self.top) + self._magnitudes() + bits

    @property
    def explained(self) -> float:
        """|x|^2 - |x - C(x)|^2."""
        sums, counts = self._sums_and_counts()
        return float((sums**2 / counts).sum())

    def _magnitudes(self) -> bytes:
        """The mean magnitude of each level, 0 for one that no entry has."""
        sums, counts = self._sums_and_counts()
        return bfloat16_bytes(torch.from_numpy(sums / counts))

    def _sums_and_counts(self) -> tuple[npt.NDArray[np.float64], Integers]:
        """For each level, the sum of its entries' magnitudes and how many they are, at least 1."""
        sums = np.bincount(self.levels, np.abs(self.values), self.top + 1)[1:].astype(np.float64)
        counts: Integers = np.maximum(np.bincount(self.levels, minlength=self.top + 1)[1:], 1)
        return sums, counts

    def _by_level(self) -> Iterator["_Subset"]:
        """For each level from 2 on, which entries of the level before reach it."""
        levels = self.levels
        for level in range(2, self.top + 1):
            reach = levels >= level
            yield _Subset(levels.size, np.flatnonzero(reach))
            levels = levels[reach]


@dataclass(frozen=True)
class _Subset:
    """Rising places that are taken, of so many."""

    places: int
    taken: Integers

    @cached_property
    def gaps(self) -> Integers:
        return np.diff(self.taken, prepend=-1) - 1

    @cached_property
    def width(self) -> int:
        return _width(self.taken.size, self.places)

    @property
    def length(self) -> int:
        """Bits of `fields`."""
        return self.places.bit_length() + int((self.gaps >> self.width).sum()) + self.taken.size * (1 + self.width)

    def fields(self) -> tuple[Bits, Bits, Bits]:
        count = fixed(np.array([self.taken.size]), self.places.bit_length())
        return count, unary(self.gaps >> self.width), fixed(self.gaps, self.width)

    @staticmethod
    def read(bits: BitReader, places: int) -> Integers:
        """The places that are taken.

        Raises:
            PayloadError: more are taken than there are, one lies outside, or the stream ends early.
        """
        count = int(bits.fixed(1, places.bit_length())[0])
        width = _width(count, places)
        quotients = bits.unary(count)
        if count > places or int(quotients.sum()) > places >> width:  # before the shift below could overflow
            raise PayloadError(f"correction's entries are {count} of {places} places, or lie outside them")
        taken: Integers = np.cumsum((quotients << width) + bits.fixed(count, width) + 1) - 1
        if count and int(taken[-1]) >= places:
            raise PayloadError(f"correction's entries lie outside {places} places")
        return taken


def _by_stratum(slots: Integers, classes: Strata) -> Iterator[_Subset]:
    """Rising slots as the places that they take in each class."""
    parts = np.split(slots, np.searchsorted(slots, classes.starts[1:]))
    for start, size, part in zip(classes.starts, classes.sizes, parts, strict=True):
        yield _Subset(int(size), part - start)


def _read_slots(bits: BitReader, classes: Strata) -> Integers:
    parts = [start + _Subset.read(bits, int(size)) for start, size in zip(classes.starts, classes.sizes, strict=True)]
    return np.concatenate(parts)


def _read_levels(bits: BitReader, count: int, top: int) -> Integers:
    """The level of each of `count` entries."""
    levels = np.ones(count, dtype=np.int64)
    reach = np.arange(count)
    for _ in range(2, top + 1):
        reach = reach[_Subset.read(bits, reach.size)]
        levels[reach] += 1
    return levels


def _width(taken: int, places: int) -> int:
    """b where so many of so many places are taken."""
    mean = (places * _SHARE) // (max(taken, 1) << 16)
    return max(mean.bit_length() - 1, 0)


def _head(levels: int) -> int:
    """Bytes ahead of the bits."""
    return _HEAD.size + 2 * levels
