"""Codes of compressors: bit streams of integers, Golomb-Rice codes of positions, and quantized matrices.

A stream of bits is a sequence of fields, each an array of integers in one of the codes below. A variable-length code
stores its lengths (unary) separately from its digits, so the reader finds all lengths in one pass and all digits in
another, without a loop over entries. The reader never allocates more memory than the length of the stream justifies.

If each of d entries is sent with the same probability, the gaps between them are geometrically distributed, and
Golomb's code (1966) is optimal for them; Rice's special case (1979) divides by a power of two, 2^b. The quotient of a
gap is coded in unary and its remainder in b digits, about log2(d/k) + 1.5 bits per position. A range coder would save
about 1 % (measured); this code handles whole arrays at once.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu.bytes_io import pack, packed_bytes, unpack
from tofu.errors import PayloadError

Bits = npt.NDArray[np.uint8]
"""One bit per element, 0 or 1."""

Integers = npt.NDArray[np.int64]

MAX_DIGITS = 31
"""Maximum number of digits of one integer: enough for any position and level, without overflow of sums in 64 bits."""


def unary(values: Integers) -> Bits:
    """Return the unary code of integers n >= 0: n zeros and a one."""
    bits = np.zeros(int(values.sum()) + values.size, dtype=np.uint8)
    bits[np.cumsum(values + 1) - 1] = 1
    return bits


def fixed(values: Integers, width: int) -> Bits:
    """Return the code of integers 0 <= n < 2^width as `width` binary digits, lowest first."""
    octets = values.astype("<i8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, count=width, bitorder="little").ravel()


def gamma(values: Integers) -> Bits:
    """Return the Elias gamma code (1975) of integers n >= 1:
    the number of digits after the first in unary, then these.
    """
    widths = _widths(values)
    entry, place = _places(widths)
    return np.concatenate([unary(widths), ((values[entry] >> place) & 1).astype(np.uint8)])


def gamma_length(values: Integers) -> int:
    """Return the number of bits of `gamma(values)`."""
    return 2 * int(_widths(values).sum()) + values.size


def packed(*fields: Bits) -> bytes:
    """Concatenate fields; the last byte is filled with zeros."""
    return np.packbits(np.concatenate(fields), bitorder="little").tobytes()


class BitReader:
    """Reads the fields of a stream in the order in which they were packed.

    Args:
        what: names the stream in errors.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._bits: Bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
        self._at = 0
        self._what = what

    def unary(self, count: int) -> Integers:
        """Read what `unary` wrote. Raises PayloadError if the stream ends before `count` integers."""
        ones = np.flatnonzero(self._bits[self._at :])[:count]
        if ones.size < count:
            raise PayloadError(f"{self._what} end after {ones.size} of {count} entries")
        self._at += int(ones[-1]) + 1 if count else 0
        return np.diff(ones, prepend=-1) - 1

    def fixed(self, count: int, width: int) -> Integers:
        """Read what `fixed` wrote. Raises PayloadError if the stream ends before `count` integers."""
        digits = self._take(count * width).reshape(count, width)
        octets = np.zeros((count, 8), dtype=np.uint8)
        octets[:, : (width + 7) // 8] = np.packbits(digits, axis=1, bitorder="little")
        return octets.view("<i8").ravel().astype(np.int64)

    def gamma(self, count: int) -> Integers:
        """Read what `gamma` wrote. Raises PayloadError if the stream ends early, or an integer has too many digits."""
        widths = self.unary(count)
        if count and int(widths.max()) > MAX_DIGITS:
            raise PayloadError(f"{self._what} hold an integer of {int(widths.max()) + 1} digits")
        entry, place = _places(widths)
        low = np.zeros(count, dtype=np.int64)
        np.add.at(low, entry, self._take(entry.size).astype(np.int64) << place)
        return (np.int64(1) << widths) + low

    def finish(self) -> None:
        """Raises PayloadError if anything but the padding of the last byte is left."""
        rest = self._bits[self._at :]
        if rest.size >= 8 or rest.any():
            raise PayloadError(f"{self._what} are followed by {rest.size} unexpected bits")

    def _take(self, count: int) -> Bits:
        left = self._bits.size - self._at
        if count > left:
            raise PayloadError(f"{self._what} end early: {left} bits are left of {count}")
        self._at += count
        return self._bits[self._at - count : self._at]


def _widths(values: Integers) -> Integers:
    """floor(log2 n), exactly."""
    return np.frexp(values)[1].astype(np.int64) - 1


def _places(widths: Integers) -> tuple[Integers, Integers]:
    """Return for each digit of all entries in order the index of its entry, and its place value in it."""
    entry = np.repeat(np.arange(widths.size), widths)
    return entry, np.arange(entry.size) - np.repeat(np.cumsum(widths) - widths, widths)


PARAMETER_BITS = 8


def write_positions(positions: Integers) -> list[Bits]:
    """Encode increasing positions, from 0, as fields of a stream: the Rice parameter, quotients, remainders."""
    gaps = _gaps(positions)
    parameter, _ = _best(gaps)
    remainders = gaps & ((1 << parameter) - 1)
    return [fixed(np.array([parameter]), PARAMETER_BITS), unary(gaps >> parameter), fixed(remainders, parameter)]


def positions_length(positions: Integers) -> int:
    """Return the number of bits of `write_positions`.

    It never decreases when a position is added, so it can be searched by bisection: splitting a gap g into two gaps
    with a sum of g - 1 removes at most one bit of the quotient and adds a terminating bit.
    """
    return PARAMETER_BITS + _best(_gaps(positions))[1]


def read_positions(reader: BitReader, count: int, length: int) -> Integers:
    """Decode `count` increasing positions below `length`.

    Raises:
        PayloadError: there are more positions than entries, a position is out of range, or the stream ends early.
    """
    if count > length:
        raise PayloadError(f"{count} positions, the update has {length} entries")
    parameter = int(reader.fixed(1, PARAMETER_BITS)[0])
    if parameter > MAX_DIGITS:
        raise PayloadError(f"Rice parameter {parameter}, expected at most {MAX_DIGITS}")
    quotients = reader.unary(count)
    if int(quotients.sum()) > length >> parameter:  # before the shift below could overflow
        raise PayloadError(f"a position lies outside the update's {length} entries")
    gaps = (quotients << parameter) + reader.fixed(count, parameter)
    positions: Integers = np.cumsum(gaps + 1) - 1
    if count and int(positions[-1]) >= length:
        raise PayloadError(f"position {int(positions[-1])} lies outside the update's {length} entries")
    return positions


def by_magnitude(vector: Tensor, count: int) -> Integers:
    """Positions of the `count` largest nonzero entries in magnitude, in descending order, ties by position."""
    magnitudes = vector.detach().abs().numpy()
    count = min(count, int(np.count_nonzero(magnitudes)))
    if not count:
        return np.zeros(0, dtype=np.int64)
    threshold = np.partition(magnitudes, magnitudes.size - count)[magnitudes.size - count]
    among = np.flatnonzero(magnitudes >= threshold)  # sort only these few of millions
    order: Integers = among[np.argsort(-magnitudes[among], kind="stable")]
    return order[:count]


def max_fitting(order: Integers, *, value_bits: int, budget: int) -> int:
    """Return the largest k such that the first k positions of `order`, with `value_bits` each,
    fit into `budget` bits.
    """
    limit = min(order.size, max(0, budget // (value_bits + 1)))  # a gap takes at least one bit
    by_position = np.argsort(order[:limit])
    candidates = order[by_position]

    def size(count: int) -> int:
        return positions_length(candidates[by_position < count]) + count * value_bits

    low, high, small, large = 0, limit, size(0), size(limit)
    if large <= budget:
        return limit
    interpolate = True
    while high - low > 1:  # `low` fits, `high` does not
        fraction = (budget - small) / (large - small) if interpolate else 0.5
        interpolate = not interpolate
        count = min(high - 1, low + max(1, int((high - low) * fraction)))
        bits = size(count)
        if bits <= budget:
            low, small = count, bits
        else:
            high, large = count, bits
    return low


def _gaps(positions: Integers) -> Integers:
    return np.diff(positions, prepend=-1) - 1


def _best(gaps: Integers) -> tuple[int, int]:
    """Return the Rice parameter that takes the fewest bits, and the number of bits,
    which is convex in the parameter.
    """
    quotients = gaps
    best, min_size = 0, int(gaps.sum()) + gaps.size
    for parameter in range(1, MAX_DIGITS + 1):
        quotients = quotients >> 1
        size = int(quotients.sum()) + gaps.size * (parameter + 1)
        if size >= min_size:
            break
        best, min_size = parameter, size
    return best, min_size


def bfloat16_bytes(values: Tensor) -> bytes:
    """Return a float tensor as little-endian bfloat16."""
    return values.detach().to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2").tobytes()


def bfloat16_from(data: bytes, what: str) -> Tensor:
    """Invert `bfloat16_bytes`, as float32 [n].

    Raises:
        PayloadError: a value is not finite.
    """
    values = torch.from_numpy(np.frombuffer(data, dtype="<i2").astype(np.int16)).view(torch.bfloat16).float()
    if not bool(torch.isfinite(values).all()):
        raise PayloadError(f"{what} hold a value that is not finite")
    return values


@dataclass(frozen=True)
class RowCode:
    """The byte format of a float matrix [rows, columns]: `bits` per value, one bfloat16 scale per row (none at 32).

    Symmetric uniform quantization: q = round(v / s) with s = max|row| / (2^(bits-1) - 1). The
    scale is rounded to bfloat16 before use, so its rounding only changes the range. 32 bits: raw float32 without scale.
    """

    rows: int
    columns: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes of the written matrix."""
        if self.bits == 32:
            return 4 * self.rows * self.columns
        return 2 * self.rows + packed_bytes(self.rows * self.columns, self.bits)

    def write(self, values: Tensor) -> bytes:
        """values: float [rows, columns] -> bytes of length `nbytes`."""
        values = values.detach().reshape(self.rows, self.columns)
        if self.bits == 32:
            return values.float().contiguous().numpy().astype("<f4").tobytes()
        top = 2 ** (self.bits - 1) - 1
        scales = (values.abs().amax(1) / top).to(torch.bfloat16)
        safe = torch.where(scales > 0, scales.float(), torch.ones(()))
        codes = (values / safe[:, None]).round().clamp(-top, top).to(torch.int64) + top
        return bfloat16_bytes(scales) + pack(codes.numpy().ravel().view(np.uint64), self.bits)

    def read(self, data: bytes, what: str) -> Tensor:
        """Invert `write`, as float32 [rows, columns]; `what` names the field in errors.

        Raises:
            PayloadError: wrong length, a value that is not finite, or a code outside the range of `bits`.
        """
        if len(data) != self.nbytes:
            raise PayloadError(f"{what} take {len(data)} bytes, expected {self.nbytes}")
        if self.bits == 32:
            values = torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
            if not bool(torch.isfinite(values).all()):
                raise PayloadError(f"{what} hold a value that is not finite")
            return values.view(self.rows, self.columns)
        top = 2 ** (self.bits - 1) - 1
        scales = bfloat16_from(data[: 2 * self.rows], f"scales of {what}")
        codes = unpack(data[2 * self.rows :], self.rows * self.columns, self.bits, what)
        if codes.size and int(codes.max()) > 2 * top:
            raise PayloadError(f"{what} hold a code above {2 * top}, the largest of {self.bits} bits")
        integers = torch.from_numpy(codes.astype(np.float32)).view(self.rows, self.columns) - top
        return torch.mul(integers, scales[:, None])
