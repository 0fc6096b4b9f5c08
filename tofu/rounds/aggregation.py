"""The weighted mean of updates, added up as they arrive.

Sums of floats depend on their order, and replies arrive in any order. So each update, times its number of examples, is
rounded to a multiple of 2^-34 and added as a 64-bit integer: such sums are exact, hence the same in every order, and
the memory is that of one model however many clients there are. The rounding is far below float32's own.
"""

import math

from torch import Tensor

from tofu.errors import PayloadError
from tofu.weights import Weights

_FRACTION_BITS = 34
_LIMIT = 2.0 ** (62 - _FRACTION_BITS)


class RunningMean:
    """The weighted mean of the updates added so far.

    Attributes:
        examples: the sum of the weights.
    """

    def __init__(self) -> None:
        self.examples = 0
        self._sums: dict[str, Tensor] = {}
        self._largest = 0.0

    def add(self, update: Weights, examples: int) -> None:
        """Add an update with its number of examples.

        Raises:
            PayloadError: the numbers are not finite or so large that they could overflow the sum. Nothing is added.
        """
        sizes = [float(value.abs().max()) * examples for value in update.values() if value.numel()]
        largest = max(sizes, default=0.0)
        # Python's max may pass over a NaN, so look at each.
        if not all(map(math.isfinite, sizes)) or not self._largest + largest < _LIMIT:
            raise PayloadError(
                f"update times its {examples} examples reaches {largest:.3g}, more than can be added: training diverged"
            )
        self._largest += largest
        self.examples += examples
        for name, value in update.items():
            term = (value.double() * (examples * 2.0**_FRACTION_BITS)).round().long()
            if name in self._sums:
                self._sums[name] += term
            else:
                self._sums[name] = term

    def mean(self) -> Weights:
        """The mean as float32, by name; call it only after an `add`."""
        scale = self.examples * 2.0**_FRACTION_BITS
        return {name: (total.double() / scale).float() for name, total in self._sums.items()}
