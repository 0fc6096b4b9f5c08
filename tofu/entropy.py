"""Small integers in as few bits as their distribution needs: a range variant of asymmetric numeral systems.

Duda, "Asymmetric numeral systems", arXiv 1311.2540 (rANS), with 8-bit probabilities, a state of 16 to 32 bits and words
of 16. Few-bit pixels are bell-shaped, so much of what a fixed number of bits could say hardly ever occurs.

A block, little-endian, holds integers q with |q| <= top:

    bytes    field
    top + 1  how many of 256 slots each magnitude has
    2        number of words
    4        final state of the coder
    2 each   the coder's words, in the order that they are read
    -        one bit for each q that is not 0: its sign (1 is negative), padded to a whole byte

Whoever knows how many integers there are knows where it ends.
"""

import struct

import numpy as np
import numpy.typing as npt

from tofu.errors import PayloadError

Integers = npt.NDArray[np.int64]

SLOTS = 256
_SLOT_BITS = 8
_LOW = 1 << 16
"""The state is kept between this and 2^16 times as much. The encoder starts here, so the decoder must end here."""
_FIXED = struct.Struct("<HI")
MOST_INTEGERS = 65_535
"""Of one block: what its number of words can count."""


def write_integers(values: Integers, top: int) -> bytes:
    """A block of whole numbers [n] from -top to top, where top is 1 to 127 and n at most `MOST_INTEGERS`."""
    magnitudes = np.abs(values)
    sizes = _slots(np.bincount(magnitudes, minlength=top + 1))
    starts = _starts(sizes)
    state, words = _LOW, []
    for magnitude in reversed(magnitudes.tolist()):
        size = sizes[magnitude]
        if state >= size << 24:
            words.append(state & 0xFFFF)
            state >>= 16
        state = (state // size << _SLOT_BITS) + state % size + starts[magnitude]
    signs = np.packbits(values[values != 0] < 0, bitorder="little").tobytes()
    return bytes(sizes) + _FIXED.pack(len(words), state) + np.array(words[::-1], "<u2").tobytes() + signs


def read_integers(data: bytes, count: int, top: int, what: str) -> tuple[Integers, int]:
    """The `count` integers of the block that `data` begins with, and the block's length in bytes.

    Raises:
        PayloadError: the block cannot have been written by `write_integers`.
    """
    head = top + 1 + _FIXED.size
    if len(data) < head:
        raise PayloadError(f"{what} take {len(data)} bytes, expected at least {head}")
    sizes = list(data[: top + 1])
    if sum(sizes) != SLOTS:
        raise PayloadError(f"{what} have a table of {sum(sizes)} slots, expected {SLOTS}")
    length, state = _FIXED.unpack_from(data, top + 1)
    end = head + 2 * length
    if length > count or len(data) < end:
        raise PayloadError(f"{what} take {len(data)} bytes and {length} words, more than there are")
    words = iter(np.frombuffer(data[head:end], "<u2").tolist())
    starts = _starts(sizes)
    owner = [magnitude for magnitude, size in enumerate(sizes) for _ in range(size)]
    found = []
    for _ in range(count):
        slot = state & (SLOTS - 1)
        magnitude = owner[slot]
        state = sizes[magnitude] * (state >> _SLOT_BITS) + slot - starts[magnitude]
        if state < _LOW:
            state = state << 16 | next(words, 0)
        found.append(magnitude)
    if state != _LOW or next(words, None) is not None:
        raise PayloadError(f"{what} do not end where their encoder began: they were not written by one")
    values = np.array(found, np.int64)
    signed = values != 0
    flags = np.frombuffer(data[end : end + (int(signed.sum()) + 7) // 8], np.uint8)
    if 8 * flags.size < int(signed.sum()):
        raise PayloadError(f"{what} end before their signs do")
    values[signed] *= 1 - 2 * np.unpackbits(flags, bitorder="little")[: int(signed.sum())].astype(np.int64)
    return values, end + flags.size


def _slots(counts: Integers) -> list[int]:
    """Slots for each magnitude, about in proportion to the counts: 1 to 255 for each that occurs, 256 in all."""
    total = max(1, int(counts.sum()))
    sizes = [min(SLOTS - 1, max(1, round(SLOTS * int(n) / total))) if n else 0 for n in counts]
    while (excess := sum(sizes) - SLOTS) > 0:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[largest] -= min(excess, sizes[largest] - 1)
    for magnitude in sorted(range(len(sizes)), key=lambda m: -sizes[m]):
        sizes[magnitude] += min(SLOTS - sum(sizes), SLOTS - 1 - sizes[magnitude])
    return sizes


def _starts(sizes: list[int]) -> list[int]:
    """First slot of each magnitude."""
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += size
    return starts
