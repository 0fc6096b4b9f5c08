"""Which entries of an update are likely to be among its largest, from what both ends know before it is sent.

The weights go on moving where they have moved, by the row and the column of each entry: its level (`tofu.displacement`).
Cut at fixed shares of all entries, levels are classes, inside which positions are coded as if all were equally likely.
What that saves, the benchmark `classes` says. It is ours, in no paper that we know.

Both ends build W_0 from the run's seed. They must come to the same classes, so a checksum of these travels. Where W
differs by rounding (another processor, a compressed downlink), the coarse levels hardly ever do.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tofu.compression.bitstream import Integers
from tofu.displacement import levels
from tofu.reference_model import ReferenceModel

LADDER = (0.0005, 0.002, 0.006, 0.02, 0.06, 0.2, 0.5)
"""Shares of all entries at which one class ends and the next begins, the likeliest first."""

CLASSES = len(LADDER) + 1


@dataclass(frozen=True)
class Strata:
    """A class for each entry of the vector of all trainable parameters, in the param_spec's order.

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


def strata_of(network: ReferenceModel) -> Strata:
    """The classes at a network's base weights, from how far they are from its initial ones."""
    moved = network.moved()
    found = np.concatenate([levels(moved[name]) for name in network.param_spec.parameters])
    found -= found.min()
    counts = np.bincount(found)  # levels are whole numbers that span a million at most: no need to sort
    above = np.cumsum(counts[::-1])[::-1]
    centres = (above - counts / 2) / found.size
    return Strata(np.searchsorted(LADDER, centres).astype(np.int8)[found])
