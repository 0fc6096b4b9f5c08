"""A random rotation in d log d operations: random signs, then Walsh-Hadamard transforms.

A transform takes a power of two. Filling up a vector of d entries with zeros to the next one could double what is to be
sent, so it is cut into powers of two instead, one for each 1 in the binary digits of d, and only the last, shortest
piece is filled up.
"""

import math
from functools import cache

import torch
from torch import Tensor

SHORTEST = 256
"""Entries of the shortest piece. A scale of 2 bytes for each halving below would cost more than the filling saves, and
the rotated entries of a short piece are not close to normal."""


@cache
def pieces(length: int) -> tuple[int, ...]:
    """Powers of two, falling, whose sum is `length` rounded up to a multiple of `SHORTEST`."""
    units = -(-length // SHORTEST)
    return tuple(SHORTEST << bit for bit in range(units.bit_length() - 1, -1, -1) if units >> bit & 1)


def random_signs(length: int, generator: torch.Generator) -> Tensor:
    """float32 [length] of 1 and -1."""
    return torch.randint(0, 2, (length,), generator=generator).float() * 2 - 1


def rotated(vector: Tensor, signs: Tensor) -> Tensor:
    """Signs, then the transform of each piece; the vector's length is the sum of `pieces`."""
    return _each(vector * signs)


def rotated_back(vector: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `rotated`."""
    return _each(vector) * signs


def _each(vector: Tensor) -> Tensor:
    parts = torch.split(vector, list(pieces(vector.numel())))
    return torch.cat([hadamard(part) for part in parts])


def hadamard(vector: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of float [2^n]; it is its own inverse.

    H_1 = [1], H_2h = [[H_h, H_h], [H_h, -H_h]] / sqrt(2).
    """
    length, half = vector.numel(), 1
    while half < length:
        pairs = vector.view(-1, 2, half)
        first, second = pairs[:, 0], pairs[:, 1]
        vector = torch.stack([first + second, first - second], dim=1).flatten()
        half *= 2
    return vector / math.sqrt(length)
