"""How far the weights have moved since the run began, by rows and columns: what both ends know of the next update.

Where the weights have moved, they go on moving: the rows and columns of a weight matrix (units, and the inputs that
they see) that gathered most of the movement since the initial weights hold most of the next update's largest entries
too. The movement of one entry says less than that of its row and its column. So with M = (W - W_0)^2, the energy of
a tensor's movement seen as a matrix [outputs, the rest],

    level(i, j) = 2 log2(mean_j M) + 2 log2(mean_i M) - 2 log2(mean M), each rounded to an integer,

and a tensor that has not moved at all has a level below all others, the lower the more entries it has. It is ours, in
no paper that we know. The sums are of whole numbers, so that processors that add up in other orders find the same.
"""

import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

Integers = npt.NDArray[np.int64]

_STILL = 1_000_000
_NEVER = 10_000
"""How far below others the levels of tensors, and of rows and columns, are that have not moved."""

_BITS = 16
"""To which movements are rounded, against the furthest of their tensor: sums of 2^31 squares still fit 64 bits."""


def levels(moved: Tensor) -> Integers:
    """The level of each entry of one tensor's movement, flat."""
    distance = moved.detach().abs().double().numpy()
    if not distance.any():
        return np.full(distance.size, -_STILL - int(_log(np.array(float(distance.size)))))
    exponent = math.frexp(float(distance.max()))[1] - _BITS
    energy = np.rint(np.ldexp(distance, -exponent)).astype(np.int64) ** 2
    energy = energy.reshape(energy.shape[0] if energy.ndim else 1, -1)
    rows, columns = energy.shape
    by_row, by_column = energy.sum(1, keepdims=True) / columns, energy.sum(0, keepdims=True) / rows
    found = _log(by_row) + _log(by_column) - _log(energy.sum() / energy.size)
    return found.ravel() + 4 * exponent


def _log(values: npt.NDArray[np.float64]) -> Integers:
    """2 log2, rounded."""
    with np.errstate(divide="ignore"):
        logs = np.round(2 * np.log2(values))
    return np.where(np.isfinite(logs), logs, -_NEVER).astype(np.int64)
