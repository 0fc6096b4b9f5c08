"""The displacement of the weights since the run began, by rows and columns: a predictor of the next update.

Weights tend to keep moving where they have moved: the rows and columns of a weight matrix (units, and their inputs)
with the largest displacement since the initial weights also contain most of the largest entries of the next update. The
displacement of a single entry predicts less than that of its row and column. So with M = (W - W_0)^2, the energy of the
displacement of a tensor seen as a matrix [outputs, the rest],

    level(i, j) = 2 log2(mean_j M) + 2 log2(mean_i M) - 2 log2(mean M), each rounded to an integer,

and a tensor without any displacement has a level below all others, lower for more entries. This is ours; we know of no
paper. The sums are over integers, so processors that add in different orders compute the same levels.
"""

import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

Integers = npt.NDArray[np.int64]

_UNMOVED_TENSOR = 1_000_000
_UNMOVED_ROW = 10_000
"""Distance below all other levels of tensors, and of rows and columns, that have not moved."""

_BITS = 16
"""Bits of the largest displacement of a tensor after rounding; sums of 2^31 squares still fit into 64 bits."""


def levels(displacement: Tensor) -> Integers:
    """The level of each entry of one tensor's displacement, flattened."""
    distance = displacement.detach().abs().double().numpy()
    if not distance.any():
        return np.full(distance.size, -_UNMOVED_TENSOR - int(_log(np.array(float(distance.size)))))
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
    return np.where(np.isfinite(logs), logs, -_UNMOVED_ROW).astype(np.int64)
