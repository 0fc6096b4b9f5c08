"""The largest entries of a vector at positions coded by class: the correction of the proxy codec.

As many of the largest as there is room for, in steps of three times the smallest of them, s: level 1 is from s on,
level 2 from 4s, level 3 from 7s. For a level the mean of its entries is sent. Few entries reach a level and fewer the
next, so levels are sent as positions too: which of the entries reach level 2, which of these level 3, and so on.

All positions are Golomb-Rice-coded gaps, those of entries counted among the entries of one class
(`tofu.compression.classes`). The parameter follows from how many of how many places are taken, and is Rice's best for
gaps of that mean (Kiely, IPN Progress Report 42-159, 2004):

    b = floor(log2(2 ln(phi) * places / taken)), at least 0, with phi the golden ratio.

Body, little-endian:

    bytes  field
    2      checksum of the classes
    1      number of levels, L
    2 each L magnitudes, bfloat16
    -      bits: width w of a count (5 bits), entries sent of each class (w bits each), quotients of all gaps in
           unary, remainders of all gaps (b bits each), signs (1 is negative), then for each level from 2 to L: how many
           of the n entries of the level before reach it (as many bits as n has digits), quotients, remainders;
           gaps and signs in the order of slots
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu.compression.bitstream import BitReader, Bits, Integers, fixed, packed, unary
from tofu.compression.classes import CLASSES, Classes
from tofu.compression.flat import checked_length, checked_scales
from tofu.compression.positions import by_magnitude
from tofu.errors import PayloadError
from tofu.quantise import bfloat16_bytes, bfloat16_from

MOST_LEVELS = 31
"""The highest level has no end: what would reach further ones belongs to it."""

_HEAD = struct.Struct("<HB")
_WIDTH_BITS = 5
_SHARE = 63073
"""2 ln(phi) in units of 2^-16: parameters are whole-number arithmetic, so that both ends get the same."""


Floats = npt.NDArray[np.float32]


def least_room(length: int) -> int:
    """Bytes into which one entry of a vector of this length always fits."""
    gap = 2 + length.bit_length()
    return _head(1) + (_WIDTH_BITS + CLASSES + gap + 1 + 7) // 8


def write_entries(vector: Tensor, room: int, classes: Classes) -> bytes:
    """As many of the largest entries of a float vector [d] as fit into `room` bytes."""
    ranking = _Ranking.of(vector, classes)
    fits, too_many = 0, min(ranking.falling.size, 4 * room) + 1  # an entry takes two bits at least
    # Now and then one entry more takes fewer bits; then this ends with a few fewer than would fit.
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        if ranking.largest(count).nbytes <= room:
            fits = count
        else:
            too_many = count
    return ranking.largest(fits).to_bytes()


def read_entries(data: bytes, classes: Classes) -> Tensor:
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
    if top > MOST_LEVELS:
        raise PayloadError(f"{what} have {top} levels, expected at most {MOST_LEVELS}")
    split = _head(top)
    checked_length(data, split + 1, what, exactly=False)
    magnitudes = checked_scales(bfloat16_from(data[_HEAD.size : split], "magnitudes"), what)
    bits = BitReader(data[split:], what)
    counts = bits.fixed(CLASSES, int(bits.fixed(1, _WIDTH_BITS)[0]))
    if bool((counts > classes.sizes).any()):
        raise PayloadError(f"{what} are {counts.tolist()} of the classes, which have {classes.sizes.tolist()}")
    if counts.any() and not top:
        raise PayloadError(f"{what} are {int(counts.sum())} of no level")
    slots = _read_slots(bits, counts, classes)
    signs = torch.from_numpy(1 - 2 * bits.fixed(slots.size, 1))
    levels = _read_levels(bits, slots.size, top)
    bits.finish()
    vector = torch.zeros(classes.numbers.size)
    vector[torch.from_numpy(classes.positions[slots])] = magnitudes[torch.from_numpy(levels - 1)] * signs
    return vector


def slots_length(slots: Integers, classes: Classes) -> int:
    """Bits that rising slots take, the counts included."""
    counts, widths, gaps = _parts(slots, classes)
    quotients = int((gaps >> np.repeat(widths, counts)).sum())
    return _WIDTH_BITS + CLASSES * _digits(counts) + quotients + int((counts * (widths + 1)).sum())


@dataclass(frozen=True)
class _Ranking:
    """All entries in the order of slots, and by magnitude.

    Attributes:
        values: float32 [d], in the order of slots.
        ranks: of these, 0 for the largest; d for those that are zero.
        falling: magnitudes of those that are not zero, the largest first.
    """

    classes: Classes
    values: Floats
    ranks: Integers
    falling: Floats

    @staticmethod
    def of(vector: Tensor, classes: Classes) -> "_Ranking":
        values, order = vector.detach().numpy(), by_magnitude(vector)
        ranks = np.full(values.size, values.size)
        ranks[classes.slots[order]] = np.arange(order.size)
        return _Ranking(classes, values[classes.positions], ranks, np.abs(values[order]))

    def largest(self, count: int) -> "_Entries":
        """The first `count` by magnitude."""
        slots = np.flatnonzero(self.ranks < count)
        values = self.values[slots]
        smallest = np.float64(self.falling[count - 1]) if count else 1.0
        levels = np.clip((np.abs(values) / smallest + 2) // 3, 1, MOST_LEVELS).astype(np.int64)
        return _Entries(self.classes, slots, values, levels)


@dataclass(frozen=True)
class _Entries:
    """Chosen entries: their rising slots, values, and levels from 1."""

    classes: Classes
    slots: Integers
    values: Floats
    levels: Integers

    @cached_property
    def top(self) -> int:
        return int(self.levels.max(initial=0))

    @property
    def nbytes(self) -> int:
        """Length of `to_bytes`."""
        bits = slots_length(self.slots, self.classes) + self.slots.size + sum(step.length for step in self._steps())
        return _head(self.top) + (bits + 7) // 8

    def to_bytes(self) -> bytes:
        counts, widths, gaps = _parts(self.slots, self.classes)
        remainders = np.split(gaps, np.cumsum(counts)[:-1])
        bits = packed(
            fixed(np.array([_digits(counts)]), _WIDTH_BITS),
            fixed(counts, _digits(counts)),
            unary(gaps >> np.repeat(widths, counts)),
            *(fixed(part, int(width)) for part, width in zip(remainders, widths, strict=True)),
            fixed((self.values < 0).astype(np.int64), 1),
            *(field for step in self._steps() for field in step.fields()),
        )
        return _HEAD.pack(self.classes.checksum, self.top) + self._magnitudes() + bits

    def _magnitudes(self) -> bytes:
        """The mean magnitude of each level, 0 for one that no entry has."""
        sums = np.bincount(self.levels, weights=np.abs(self.values), minlength=self.top + 1)[1:]
        counts = np.bincount(self.levels, minlength=self.top + 1)[1:]
        return bfloat16_bytes(torch.from_numpy(sums / np.maximum(counts, 1)))

    def _steps(self) -> Iterator["_Subset"]:
        """For each level from 2 on, which entries of the level before reach it."""
        levels = self.levels
        for level in range(2, self.top + 1):
            reach = levels >= level
            yield _Subset(levels.size, np.flatnonzero(reach))
            levels = levels[reach]


@dataclass(frozen=True)
class _Subset:
    """Some of n places: how many, then their gaps."""

    places: int
    taken: Integers

    @cached_property
    def gaps(self) -> Integers:
        return np.diff(self.taken, prepend=-1) - 1

    @property
    def width(self) -> int:
        return int(_widths(np.array([self.taken.size]), np.array([self.places]))[0])

    @property
    def length(self) -> int:
        """Bits of `fields`."""
        return self.places.bit_length() + int((self.gaps >> self.width).sum()) + self.taken.size * (self.width + 1)

    def fields(self) -> tuple[Bits, Bits, Bits]:
        count = fixed(np.array([self.taken.size]), self.places.bit_length())
        return count, unary(self.gaps >> self.width), fixed(self.gaps & ((1 << self.width) - 1), self.width)

    @staticmethod
    def read(bits: BitReader, places: int) -> Integers:
        """The places that are taken.

        Raises:
            PayloadError: there are not so many places, or the stream ends early.
        """
        taken = int(bits.fixed(1, places.bit_length())[0])
        width = int(_widths(np.array([taken]), np.array([places]))[0])
        quotients = bits.unary(taken)
        if taken > places or int(quotients.sum()) > places >> width:
            raise PayloadError(f"correction's entries of a level are {taken} of {places}, or lie outside them")
        found: Integers = np.cumsum((quotients << width) + bits.fixed(taken, width) + 1) - 1
        if taken and int(found[-1]) >= places:
            raise PayloadError(f"correction's entries of a level lie outside the {places} of the level before")
        return found


def _read_slots(bits: BitReader, counts: Integers, classes: Classes) -> Integers:
    """Rising slots, so many of each class.

    Raises:
        PayloadError: the stream ends early, or a slot lies outside its class.
    """
    widths = _widths(counts, classes.sizes)
    quotients = bits.unary(int(counts.sum()))
    gaps = np.empty_like(quotients)
    end = 0
    for number, (count, width) in enumerate(zip(counts.tolist(), widths.tolist(), strict=True)):
        begin, end = end, end + count
        if int(quotients[begin:end].sum()) > int(classes.sizes[number]) >> width:
            raise PayloadError(f"correction's entries lie outside their class of {classes.sizes[number]} entries")
        gaps[begin:end] = (quotients[begin:end] << width) + bits.fixed(count, width)
    slots: Integers = np.cumsum(gaps + 1) - 1
    firsts = np.cumsum(counts) - counts
    before = np.concatenate([[-1], slots])[firsts]  # the running sum before each class
    slots += np.repeat(classes.starts - before - 1, counts)
    if bool((slots >= np.repeat(classes.starts + classes.sizes, counts)).any()):
        raise PayloadError("correction's entries lie outside their classes")
    return slots


def _read_levels(bits: BitReader, count: int, top: int) -> Integers:
    """The level of each of `count` entries."""
    levels = np.ones(count, dtype=np.int64)
    reach = np.arange(count)
    for _ in range(2, top + 1):
        reach = reach[_Subset.read(bits, reach.size)]
        levels[reach] += 1
    return levels


def _parts(slots: Integers, classes: Classes) -> tuple[Integers, Integers, Integers]:
    """Rising slots as how many are sent of each class, its parameter b, and the gaps."""
    ends = np.searchsorted(slots, [*classes.starts, classes.numbers.size])
    counts = np.diff(ends)
    gaps = np.diff(slots, prepend=-1) - 1
    sent = counts > 0
    gaps[ends[:-1][sent]] = slots[ends[:-1][sent]] - classes.starts[sent]
    return counts, _widths(counts, classes.sizes), gaps


def _widths(taken: Integers, places: Integers) -> Integers:
    """b where so many of so many places are taken, elementwise."""
    means = (places * _SHARE) // (np.maximum(taken, 1) << 16)
    return np.maximum(np.frexp(means)[1].astype(np.int64) - 1, 0)


def _digits(counts: Integers) -> int:
    return int(counts.max(initial=0)).bit_length()


def _head(levels: int) -> int:
    """Bytes ahead of the bits."""
    return _HEAD.size + 2 * levels
