"""The largest entries of a vector at positions coded by class: the correction of the proxy codec.

Values are those of sparse ternary compression (`tofu.compression.stc`), a sign and one magnitude for all. Where that
leaves bytes unused, because more entries would only pull the magnitude away from the others, there are two magnitudes,
or four, and so on (as in `tofu.compression.topk`). Positions are Golomb-Rice-coded gaps, counted among the entries of
one class (`tofu.compression.classes`), whose parameter follows from how many entries of it are sent:

    b = floor(log2(2 ln(phi) * entries of the class / entries sent)), at least 0,

with phi the golden ratio: Rice's best parameter for gaps of that mean (Kiely, IPN Progress Report 42-159, 2004).

Body, little-endian:

    bytes  field
    2      checksum of the classes
    1      bits of a magnitude's number, l
    2 each 2^l magnitudes, bfloat16
    -      bits: width w of a count (5 bits), entries sent of each class (w bits each), quotients of all gaps in
           unary, remainders of all gaps (b bits each), signs (1 is negative), numbers of magnitudes (l bits each);
           gaps, signs and numbers in the order of slots
"""

import struct
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tofu.compression.bitstream import BitReader, Integers, fixed, packed, unary
from tofu.compression.classes import CLASSES, Classes
from tofu.compression.flat import checked_length, checked_scales
from tofu.compression.positions import by_magnitude, most_that_fit
from tofu.compression.stc import best_count
from tofu.compression.topk import MOST_LEVEL_BITS, rounded_values
from tofu.errors import PayloadError
from tofu.quantise import bfloat16_from

_HEAD = struct.Struct("<HB")
_WIDTH_BITS = 5
_SHARE = 63073
"""2 ln(phi) in units of 2^-16: parameters are whole-number arithmetic, so that both ends get the same."""


def least_room(length: int) -> int:
    """Bytes into which one entry of a vector of this length always fits."""
    gap = 2 + length.bit_length()
    return _head(0) + (_WIDTH_BITS + CLASSES + gap + 1 + 7) // 8


def write_entries(vector: Tensor, room: int, classes: Classes) -> bytes:
    """As many of the largest entries of a float vector [d] as explain most of it in at most `room` bytes."""
    order = by_magnitude(vector)
    slots = classes.slots[order]
    best = _Entries.of(vector, slots, 0, room, classes)
    for level_bits in range(1, MOST_LEVEL_BITS + 1):
        if best.all_that_fit:
            break
        more = _Entries.of(vector, slots, level_bits, room, classes)
        if more.explained <= best.explained:
            break
        best = more
    return best.to_bytes(classes)


@dataclass(frozen=True)
class _Entries:
    """Chosen entries as they are sent: rising slots, signs, numbers of magnitudes, and 2^level_bits magnitudes.

    `explained` is |x|^2 - |x - C(x)|^2; with `all_that_fit` there is no room for one more entry.
    """

    slots: Integers
    negative: Integers
    codes: Integers
    magnitudes: bytes
    level_bits: int
    explained: float
    all_that_fit: bool

    @staticmethod
    def of(vector: Tensor, slots: Integers, level_bits: int, room: int, classes: Classes) -> "_Entries":
        """The first of `slots`, largest entry first: of one magnitude the best number of them, of more all that fit."""
        bits = 8 * (room - _head(level_bits))
        length = partial(slots_length, classes=classes)
        most = count = most_that_fit(slots, value_bits=1 + level_bits, room=bits, length=length)
        if not level_bits:
            count, _ = best_count(vector[torch.from_numpy(classes.positions[slots[:most]])].abs())
        chosen = np.sort(slots[:count])
        values = vector[torch.from_numpy(classes.positions[chosen])]
        return _Entries(chosen, *rounded_values(values, level_bits), count == most)

    def to_bytes(self, classes: Classes) -> bytes:
        counts, widths, gaps = _parts(self.slots, classes)
        remainders = np.split(gaps, np.cumsum(counts)[:-1])
        bits = packed(
            fixed(np.array([_digits(counts)]), _WIDTH_BITS),
            fixed(counts, _digits(counts)),
            unary(gaps >> np.repeat(widths, counts)),
            *(fixed(part, int(width)) for part, width in zip(remainders, widths, strict=True)),
            fixed(self.negative, 1),
            fixed(self.codes, self.level_bits),
        )
        return _HEAD.pack(classes.checksum, self.level_bits) + self.magnitudes + bits


def read_entries(data: bytes, classes: Classes) -> Tensor:
    """The inverse of `write_entries`: a float32 vector [d], zero elsewhere.

    Raises:
        PayloadError: the bytes cannot have been written for these classes.
    """
    what = "correction's entries"
    checked_length(data, _HEAD.size, what, exactly=False)
    checksum, level_bits = _HEAD.unpack_from(data)
    if checksum != classes.checksum:
        raise PayloadError(f"{what} are of classes {checksum:04x}, this end's are {classes.checksum:04x}: "
                           "the weights, or the initial ones, are not the same at both ends")  # fmt: skip
    if level_bits > MOST_LEVEL_BITS:
        raise PayloadError(f"{what} have {level_bits} bits a magnitude, expected at most {MOST_LEVEL_BITS}")
    split = _head(level_bits)
    checked_length(data, split + 1, what, exactly=False)
    magnitudes = checked_scales(bfloat16_from(data[_HEAD.size : split], "magnitudes"), what)
    bits = BitReader(data[split:], what)
    counts = bits.fixed(CLASSES, int(bits.fixed(1, _WIDTH_BITS)[0]))
    if bool((counts > classes.sizes).any()):
        raise PayloadError(f"{what} are {counts.tolist()} of the classes, which have {classes.sizes.tolist()}")
    widths = _widths(counts, classes)
    quotients = bits.unary(int(counts.sum()))
    gaps = np.empty_like(quotients)
    end = 0
    for number, (count, width) in enumerate(zip(counts.tolist(), widths.tolist(), strict=True)):
        begin, end = end, end + count
        if int(quotients[begin:end].sum()) > int(classes.sizes[number]) >> width:
            raise PayloadError(f"{what} lie outside their class of {classes.sizes[number]} entries")
        gaps[begin:end] = (quotients[begin:end] << width) + bits.fixed(count, width)
    slots = np.cumsum(gaps + 1) - 1
    firsts = np.cumsum(counts) - counts
    before = np.concatenate([[-1], slots])[firsts]  # the running sum before each class
    slots += np.repeat(classes.starts - before - 1, counts)
    if bool((slots >= np.repeat(classes.starts + classes.sizes, counts)).any()):
        raise PayloadError(f"{what} lie outside their classes")
    signs = torch.from_numpy(1 - 2 * bits.fixed(slots.size, 1))
    codes = torch.from_numpy(bits.fixed(slots.size, level_bits))
    bits.finish()
    vector = torch.zeros(classes.numbers.size)
    vector[torch.from_numpy(classes.positions[slots])] = magnitudes[codes] * signs
    return vector


def slots_length(slots: Integers, classes: Classes) -> int:
    """Bits that rising slots take, the counts included."""
    counts, widths, gaps = _parts(slots, classes)
    quotients = int((gaps >> np.repeat(widths, counts)).sum())
    return _WIDTH_BITS + CLASSES * _digits(counts) + quotients + int((counts * (widths + 1)).sum())


def _parts(slots: Integers, classes: Classes) -> tuple[Integers, Integers, Integers]:
    """Rising slots as how many are sent of each class, its parameter b, and the gaps."""
    ends = np.searchsorted(slots, [*classes.starts, classes.numbers.size])
    counts = np.diff(ends)
    gaps = np.diff(slots, prepend=-1) - 1
    sent = counts > 0
    gaps[ends[:-1][sent]] = slots[ends[:-1][sent]] - classes.starts[sent]
    return counts, _widths(counts, classes), gaps


def _widths(counts: Integers, classes: Classes) -> Integers:
    """b of each class."""
    means = (classes.sizes * _SHARE) // (np.maximum(counts, 1) << 16)
    return np.maximum(np.frexp(means)[1].astype(np.int64) - 1, 0)


def _digits(counts: Integers) -> int:
    return int(counts.max(initial=0)).bit_length()


def _head(level_bits: int) -> int:
    """Bytes ahead of the bits."""
    return _HEAD.size + 2 * (1 << level_bits)
