"""A random rotation in d log d operations: random signs, then Walsh-Hadamard transforms.

The length of a transform is a power of two. Padding a vector of d entries with zeros to the next one could double its
size, so it is split into powers of two instead, one for each 1 in the binary digits of d, and only the last, shortest
piece is padded.
"""

import math
from functools import cache

import torch
from torch import Tensor

MIN_PIECE = 256
"""Minimum number of entries of a piece. For shorter pieces, the 2 bytes of a scale would cost more than the padding,
and rotated entries are not nearly normal."""


@cache
def pieces(length: int) -> tuple[int, ...]:
    """Descending powers of two whose sum is `length` rounded up to a multiple of `MIN_PIECE`."""
    units = -(-length // MIN_PIECE)
    return tuple(MIN_PIECE << bit for bit in range(units.bit_length() - 1, -1, -1) if units >> bit & 1)


def random_signs(length: int, generator: torch.Generator) -> Tensor:
    """float32 [length] of 1 and -1."""
    return torch.randint(0, 2, (length,), generator=generator).float() * 2 - 1


def rotate(vector: Tensor, signs: Tensor) -> Tensor:
    """Return random signs, then the transform of each piece; the vector's length is the sum of `pieces`."""
    return _each(vector * signs)


def rotate_back(vector: Tensor, signs: Tensor) -> Tensor:
    """Invert `rotate`."""
    return _each(vector) * signs


def _each(vector: Tensor) -> Tensor:
    parts = torch.split(vector, list(pieces(vector.numel())))
    return torch.cat([hadamard(part) for part in parts])


def hadamard(vector: Tensor) -> Tensor:
    """Return the orthonormal Walsh-Hadamard transform of float [2^n]; it is its own inverse.

    H_1 = [1], H_2h = [[H_h, H_h], [H_h, -H_h]] / sqrt(2).
    """
    length, half = vector.numel(), 1
    while half < length:
        pairs = vector.view(-1, 2, half)
        first, second = pairs[:, 0], pairs[:, 1]
        vector = torch.stack([first + second, first - second], dim=1).flatten()
        half *= 2
    return vector / math.sqrt(length)
