"""Tensors as few-bit integers with one scale a row, packed into bytes without padding between values.

Symmetric uniform quantisation: q = round(v / s) with s = max|row| / (2^(bits-1) - 1), s kept as bfloat16 (the rounded
scale is the one used, so its rounding costs nothing but range). 32 bits means raw float32 and no scale.

Coded matrices write their integers by `tofu.entropy`, which takes about half a bit less for each. A byte ahead of the
integers tells which it is, because packing is shorter for a few matrices.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from tofu.entropy import MOST_INTEGERS, Integers, read_integers, write_integers
from tofu.errors import PayloadError

SAVED = 0.5
"""Bits that coding is expected to save for each value of 3 bits or more."""

BITS = (2, 3, 4, 5, 6, 8, 16, 32)


def bfloat16_bytes(values: Tensor) -> bytes:
    """A float tensor as little-endian bfloat16."""
    return values.detach().to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2").tobytes()


def bfloat16_from(data: bytes, what: str) -> Tensor:
    """The inverse of `bfloat16_bytes`, as float32 [n].

    Raises:
        PayloadError: a value is not finite.
    """
    values = torch.from_numpy(np.frombuffer(data, dtype="<i2").astype(np.int16)).view(torch.bfloat16).float()
    if not bool(torch.isfinite(values).all()):
        raise PayloadError(f"{what} hold a value that is not finite")
    return values


@dataclass(frozen=True)
class RowCode:
    """How a float matrix [rows, columns] is written: `bits` a value, one bfloat16 scale a row (none at 32 bits).

    Attributes:
        coded: the integers are entropy-coded where that is shorter; only below 16 bits.
    """

    rows: int
    columns: int
    bits: int
    coded: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the written matrix; the most that it takes where it is coded."""
        if self.bits == 32:
            return 4 * self.rows * self.columns
        return 2 * self.rows + self._coded + (self.rows * self.columns * self.bits + 7) // 8

    @property
    def expected_bytes(self) -> int:
        """Bytes of the written matrix if its rows are bell-shaped: exact where it is not coded, else a little more
        than most take."""
        if not self._coded:
            return self.nbytes
        blocks = -(-self.rows * self.columns // MOST_INTEGERS)
        per_value = self.bits - (SAVED if self.bits > 2 else 0)
        return min(
            self.nbytes, 2 * self.rows + 1 + (self._top + 8) * blocks + ceil(self.rows * self.columns * per_value / 8)
        )

    def write(self, values: Tensor) -> bytes:
        """values: float [rows, columns] -> bytes."""
        if self.bits == 32:
            return values.detach().float().contiguous().numpy().astype("<f4").tobytes()
        scales, codes = self._quantised(values)
        integers = codes.numpy().ravel()
        packed = _pack(integers + self._top, self.bits)
        if not self._coded:
            return bfloat16_bytes(scales) + packed
        parts = np.array_split(integers, max(1, -(-integers.size // MOST_INTEGERS)))
        blocks = b"".join(write_integers(part, self._top) for part in parts)
        body = b"\1" + blocks if len(blocks) < len(packed) else b"\0" + packed
        return bfloat16_bytes(scales) + body

    def read(self, data: bytes, what: str) -> Tensor:
        """The inverse of `write`, as float32 [rows, columns]; `what` names the field in errors.

        Raises:
            PayloadError: wrong length, a value that is not finite, or a code outside the range of `bits`.
        """
        if not self._coded and len(data) != self.nbytes:
            raise PayloadError(f"{what} take {len(data)} bytes, expected {self.nbytes}")
        if self.bits == 32:
            values = torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
            if not bool(torch.isfinite(values).all()):
                raise PayloadError(f"{what} hold a value that is not finite")
            return values.view(self.rows, self.columns)
        scales = bfloat16_from(data[: 2 * self.rows], f"scales of {what}")
        body = data[2 * self.rows :]
        integers = self._read_coded(body, what) if self._coded else self._read_packed(body, what)
        values = torch.from_numpy(integers.astype(np.float32)).view(self.rows, self.columns)
        return torch.mul(values, scales[:, None])

    def rounded(self, values: Tensor) -> Tensor:
        """`values` as `read` gives them back after `write`."""
        if self.bits == 32:
            return values.detach().float().reshape(self.rows, self.columns)
        scales, codes = self._quantised(values)
        return torch.mul(codes.float(), scales.float()[:, None])

    @property
    def _top(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    @property
    def _coded(self) -> bool:
        return self.coded and self.bits < 16

    def _quantised(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """bfloat16 scales [rows] and whole numbers [rows, columns] from -top to top."""
        values = values.detach().reshape(self.rows, self.columns)
        scales = (values.abs().amax(1) / self._top).to(torch.bfloat16)
        safe = torch.where(scales > 0, scales.float(), torch.ones(()))
        return scales, (values / safe[:, None]).round().clamp(-self._top, self._top).to(torch.int64)

    def _read_packed(self, body: bytes, what: str) -> Integers:
        codes = _unpack(body, self.bits, self.rows * self.columns)
        if codes.size and int(codes.max()) > 2 * self._top:
            raise PayloadError(f"{what} hold a code above {2 * self._top}, the largest of {self.bits} bits")
        return codes - self._top

    def _read_coded(self, body: bytes, what: str) -> Integers:
        count = self.rows * self.columns
        if body[:1] == b"\0" and len(body) == 1 + (count * self.bits + 7) // 8:
            return self._read_packed(body[1:], what)
        if body[:1] != b"\1":
            raise PayloadError(f"{what} take {len(body)} bytes and begin with {body[:1].hex() or 'none'}")
        parts, at = [], 1
        for part in np.array_split(np.empty(count), max(1, -(-count // MOST_INTEGERS))):
            integers, length = read_integers(body[at:], part.size, self._top, what)
            parts.append(integers)
            at += length
        if at != len(body):
            raise PayloadError(f"{what} take {len(body)} bytes, of which {at} are read")
        return np.concatenate(parts)


def _pack(codes: Integers, bits: int) -> bytes:
    shifts = np.arange(bits, dtype=np.int64)
    return np.packbits(((codes[:, None] >> shifts) & 1).astype(np.uint8).ravel(), bitorder="little").tobytes()


def _unpack(data: bytes, bits: int, count: int) -> Integers:
    flags = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")[: count * bits]
    weights = 1 << np.arange(bits, dtype=np.int64)
    result: Integers = flags.reshape(count, bits).astype(np.int64) @ weights
    return result
