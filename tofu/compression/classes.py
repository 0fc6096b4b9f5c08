"""Which entries of an update are likely to be among its largest, from what both ends know before it is sent.

Where the weights have moved, they go on moving: the rows and columns of a weight matrix (units, and the inputs that
they see) that gathered most of the movement since the initial weights hold most of the next update's largest entries
too. The movement of one entry says less than that of its row and its column. So with M = (W - W_0)^2, the energy of
a tensor's movement seen as a matrix [outputs, the rest],

    level(i, j) = 2 log2(mean_j M) + 2 log2(mean_i M) - 2 log2(mean M), each rounded to an integer,

and a tensor that has not moved at all has a level below all others, the lower the more entries it has. Cut at fixed
shares of all entries, levels are classes, inside which positions are coded as if all were equally likely. What that
saves, the benchmark `classes` says. It is ours, in no paper that we know.

Both ends build W_0 from the run's seed. They must come to the same classes, so a checksum of these travels. Where W
differs by rounding (another processor, a compressed downlink), the coarse levels hardly ever do.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tofu.compression.bitstream import Integers
from tofu.network import Network

LADDER = (0.0005, 0.002, 0.006, 0.02, 0.06, 0.2, 0.5)
"""Shares of all entries at which one class ends and the next begins, the likeliest first."""

CLASSES = len(LADDER) + 1

_STILL = 1_000_000
_NEVER = 10_000
"""How far below others the levels of tensors, and of rows and columns, are that have not moved."""


@dataclass(frozen=True)
class Classes:
    """A class for each entry of the vector of all trainable parameters, in the layout's order.

    A *slot* is a place in the order by class, and in a class by position.

    Attributes:
        numbers: int8 [d], the class of each entry, 0 the likeliest.
    """

    numbers: npt.NDArray[np.int8]

    @cached_property
    def sizes(self) -> Integers:
        """Entries of each class [CLASSES]."""
        return np.bincount(self.numbers, minlength=CLASSES).astype(np.int64)

    @cached_property
    def starts(self) -> Integers:
        """The first slot of each class [CLASSES]."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def positions(self) -> Integers:
        """The entry in each slot [d]."""
        return np.argsort(self.numbers, kind="stable").astype(np.int64)

    @cached_property
    def slots(self) -> Integers:
        """The slot of each entry [d]."""
        slots = np.empty(self.numbers.size, dtype=np.int64)
        slots[self.positions] = np.arange(self.numbers.size)
        return slots

    @cached_property
    def checksum(self) -> int:
        """16 bits by which two ends know that they have the same classes."""
        return zlib.crc32(self.numbers.tobytes()) & 0xFFFF

    def of_slots(self, slots: Integers) -> Integers:
        """The class of each slot."""
        return np.repeat(np.arange(CLASSES), np.diff(np.searchsorted(slots, [*self.starts, self.numbers.size])))


def classes_of(network: Network) -> Classes:
    """The classes at a network's base weights, from how far they are from its initial ones."""
    moved = network.moved()
    levels = np.concatenate([_levels(moved[name].double().numpy()) for name in network.layout.parameters])
    _, which, counts = np.unique(-levels, return_inverse=True, return_counts=True)
    centres = (np.cumsum(counts) - counts / 2) / levels.size
    return Classes(np.searchsorted(LADDER, centres).astype(np.int8)[which])


def _levels(moved: npt.NDArray[np.float64]) -> Integers:
    """The level of each entry of one tensor's movement, flat."""
    energy = np.square(moved.reshape(moved.shape[0] if moved.ndim else 1, -1))
    mean = energy.mean()
    if mean == 0:
        return np.full(energy.size, -_STILL - int(_log(np.array(float(energy.size)))))
    levels = _log(energy.mean(1, keepdims=True)) + _log(energy.mean(0, keepdims=True)) - _log(mean)
    return levels.ravel()


def _log(values: "npt.NDArray[np.float64]") -> Integers:
    """2 log2, rounded."""
    with np.errstate(divide="ignore"):
        logs = np.round(2 * np.log2(values))
    return np.where(np.isfinite(logs), logs, -_NEVER).astype(np.int64)
