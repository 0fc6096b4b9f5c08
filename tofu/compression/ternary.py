"""The largest entries of a vector, all with one magnitude, at positions coded by class.

The values are those of sparse ternary compression (`tofu.compression.stc`). The positions are Golomb-Rice-coded gaps as
there, but counted among the entries of one class (`tofu.compression.classes`), whose parameter follows from how many
entries of it are sent:

    b = floor(log2(2 ln(phi) * entries of the class / entries sent)), at least 0,

with phi the golden ratio: Rice's best parameter for gaps of that mean (Kiely, IPN Progress Report 42-159, 2004).

Body, little-endian:

    bytes  field
    2      checksum of the classes
    2      the magnitude, bfloat16
    -      bits: width w of a count (5 bits), entries sent of each class (w bits each), quotients of all gaps in
           unary, remainders of all gaps (b bits each), signs (1 is negative); gaps and signs in the order of slots
"""

import struct

import numpy as np
import torch
from torch import Tensor

from tofu.compression.bitstream import BitReader, Integers, fixed, packed, unary
from tofu.compression.classes import CLASSES, Classes
from tofu.compression.flat import checked_length, checked_scales
from tofu.compression.positions import by_magnitude, most_that_fit
from tofu.compression.stc import best_count
from tofu.errors import PayloadError
from tofu.quantise import bfloat16_bytes, bfloat16_from

_CHECK = struct.Struct("<H")
_HEAD_BYTES = _CHECK.size + 2
_WIDTH_BITS = 5
_SHARE = 63073
"""2 ln(phi) in units of 2^-16: parameters are whole-number arithmetic, so that both ends get the same."""


def least_room(length: int) -> int:
    """Bytes into which one entry of a vector of this length always fits."""
    gap = 2 + length.bit_length()
    return _HEAD_BYTES + (_WIDTH_BITS + CLASSES + gap + 1 + 7) // 8


def write_ternary(vector: Tensor, room: int, classes: Classes) -> bytes:
    """As many of the largest entries of a float vector [d] as explain most of it in at most `room` bytes."""
    order = by_magnitude(vector)
    slots = classes.slots[order]
    bits = 8 * (room - _HEAD_BYTES)
    most = most_that_fit(slots, value_bits=1, room=bits, length=lambda chosen: slots_length(chosen, classes))
    count, magnitude = best_count(vector[torch.from_numpy(order[:most])].abs())
    chosen = np.sort(slots[:count])
    values = vector[torch.from_numpy(classes.positions[chosen])]
    counts, widths, gaps = _parts(chosen, classes)
    fields = [
        fixed(np.array([_digits(counts)]), _WIDTH_BITS),
        fixed(counts, _digits(counts)),
        unary(gaps >> np.repeat(widths, counts)),
        *(fixed(part, int(width)) for part, width in zip(_split(gaps, counts), widths, strict=True)),
        fixed((values < 0).numpy().astype(np.int64), 1),
    ]
    return _CHECK.pack(classes.checksum) + bfloat16_bytes(torch.tensor([magnitude])) + packed(*fields)


def read_ternary(data: bytes, classes: Classes) -> Tensor:
    """The inverse of `write_ternary`: a float32 vector [d], zero elsewhere.

    Raises:
        PayloadError: the bytes cannot have been written for these classes.
    """
    what = "correction's entries"
    checked_length(data, _HEAD_BYTES + 1, what, exactly=False)
    (checksum,) = _CHECK.unpack_from(data)
    if checksum != classes.checksum:
        raise PayloadError(f"{what} are of classes {checksum:04x}, this end's are {classes.checksum:04x}: "
                           "the weights, or the initial ones, are not the same at both ends")  # fmt: skip
    magnitude = checked_scales(bfloat16_from(data[_CHECK.size : _HEAD_BYTES], "magnitude"), what)
    bits = BitReader(data[_HEAD_BYTES:], what)
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
    signs = torch.from_numpy(1.0 - 2.0 * bits.fixed(slots.size, 1)).float()
    bits.finish()
    vector = torch.zeros(classes.numbers.size)
    vector[torch.from_numpy(classes.positions[slots])] = magnitude * signs
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


def _split(gaps: Integers, counts: Integers) -> list[Integers]:
    """The remainders' gaps class by class; `fixed` takes the lowest digits."""
    return np.split(gaps, np.cumsum(counts)[:-1])
