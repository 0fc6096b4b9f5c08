"""Tensors as few-bit integers with one scale per row, packed into bytes without padding between values.

Symmetric uniform quantization: q = round(v / s) with s = max|row| / (2^(bits-1) - 1), s stored as bfloat16 (the rounded
scale is the one used, so its rounding only costs range). 32 bits means raw float32 and no scale.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tofu.bit_packing import pack, packed_bytes, unpack
from tofu.errors import PayloadError


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
    """The byte format of a float matrix [rows, columns]: `bits` per value, one bfloat16 scale per row (none at 32)."""

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
        """The inverse of `write`, as float32 [rows, columns]; `what` names the field in errors.

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
