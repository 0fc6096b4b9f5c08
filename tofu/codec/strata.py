"""Strata: which entries of an update are likely to be among its largest, from what both ends know before it is sent.

The weights tend to keep moving where they have moved, by the row and the column of each entry; `tofu.displacement`
gives each entry a level. Cut at fixed fractions of all entries, levels become strata, and inside a stratum positions
are coded as if all were equally likely. The benchmark `classes` measures what that saves. This is ours; we know of no
paper.

Both ends build W_0 from the run's seed. They must compute the same strata, so a checksum of these is sent. Where the
weights differ by rounding (another processor, a compressed downlink), the coarse levels hardly ever differ.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tofu.compression.bitstream import Integers
from tofu.displacement import levels
from tofu.reference_model import ReferenceModel

BOUNDARIES = (0.0005, 0.002, 0.006, 0.02, 0.06, 0.2, 0.5)
"""Fractions of all entries at which one stratum ends and the next begins, the likeliest first."""

STRATA = len(BOUNDARIES) + 1


@dataclass(frozen=True)
class Strata:
    """The stratum of each entry of the vector of all trainable parameters, in the order of the param spec.

    A *slot* is an index into the entries sorted by stratum, and inside a stratum by position.

    Attributes:
        numbers: int8 [d], the stratum of each entry, 0 the likeliest.
    """

    numbers: npt.NDArray[np.int8]

    @cached_property
    def sizes(self) -> Integers:
        """Number of entries of each stratum [STRATA]."""
        return np.bincount(self.numbers, minlength=STRATA).astype(np.int64)

    @cached_property
    def starts(self) -> Integers:
        """The first slot of each stratum [STRATA]."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def positions(self) -> Integers:
        """The position of the entry in each slot [d]."""
        return np.argsort(self.numbers, kind="stable").astype(np.int64)

    @cached_property
    def slots(self) -> Integers:
        """The slot of each entry [d]."""
        slots = np.empty(self.numbers.size, dtype=np.int64)
        slots[self.positions] = np.arange(self.numbers.size)
        return slots

    @cached_property
    def checksum(self) -> int:
        """16 bits by which two ends check that they have the same strata."""
        return zlib.crc32(self.numbers.tobytes()) & 0xFFFF


def strata_of(reference: ReferenceModel) -> Strata:
    """The strata at a reference's base weights, from their displacement since its initial weights."""
    displacement = reference.displacement()
    found = np.concatenate([levels(displacement[name]) for name in reference.param_spec.parameters])
    found -= found.min()
    counts = np.bincount(found)  # levels are integers with a range of at most a million, so counting beats sorting
    above = np.cumsum(counts[::-1])[::-1]
    centres = (above - counts / 2) / found.size
    return Strata(np.searchsorted(BOUNDARIES, centres).astype(np.int8)[found])
