"""Sums of bounded real tensors by digits that add up exactly in the ring."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tofu.plugins import SumSpec
from tofu.secagg.ring import RingVector

_BITS = 40
_TOP = 2 ** (_BITS - 1) - 1


class DigitSums:
    """Encodes tensors so that their sum over the clients is exact, to 2^-39 of each tensor's bound.

    Args:
        declared: name -> shape and finite bound of each tensor, in the order of the vector.
        digit_bits: bits per digit, so that the clients' digits cannot overflow the ring.
    """

    def __init__(self, declared: Mapping[str, SumSpec], digit_bits: int) -> None:
        self._declared = dict(declared)
        self._digit_bits = digit_bits
        self._digits = -(-_BITS // digit_bits)

    @property
    def length(self) -> int:
        """Ring elements of all tensors."""
        return self._digits * sum(math.prod(spec.shape) for spec in self._declared.values())

    def encode(self, values: Mapping[str, Tensor]) -> RingVector:
        """Tensors within their bounds -> ring vector [length]: for each tensor one row per digit, lowest first."""
        rows = [np.zeros(0, dtype=np.uint64)]
        shifts = np.arange(self._digits, dtype=np.uint64)[:, None] * np.uint64(self._digit_bits)
        for name, spec in self._declared.items():
            whole = np.rint(values[name].numpy().ravel() / spec.bound * _TOP).astype(np.int64) + _TOP
            digits: RingVector = whole.astype(np.uint64) >> shifts & np.uint64(2**self._digit_bits - 1)
            rows.append(digits.ravel())
        return np.concatenate(rows)

    def decode(self, total: RingVector, clients: int) -> dict[str, Tensor]:
        """The sum of the vectors [length] of `clients` clients -> float64 tensors by name."""
        at, sums = 0, {}
        powers = 2.0 ** (np.arange(self._digits) * self._digit_bits)
        for name, spec in self._declared.items():
            count = math.prod(spec.shape)
            digits = total[at : at + self._digits * count].reshape(self._digits, count).astype(np.float64)
            whole = (digits * powers[:, None]).sum(0) - clients * _TOP  # exact up to 8,192 clients
            sums[name] = torch.from_numpy(whole / _TOP * spec.bound).reshape(spec.shape)
            at += self._digits * count
        return sums
