"""Aggregation of the updates of an open round: the weighted mean, or a rule that bounds what malicious clients can do.

The mean adds up updates as they arrive, in the memory of one model. The robust rules keep all updates of a round.
Norms and distances are over the trainable parameters; buffers (BatchNorm's statistics) are aggregated by their median
over clients. Robust rules need single updates, so they cannot be used in secure rounds.
"""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from tofu.errors import PayloadError
from tofu.rounds import aggregators
from tofu.weights import ParamSpec, Weights, norm, split_vector

_FRACTION_BITS = 34
_LIMIT = 2.0 ** (62 - _FRACTION_BITS)
_CARRY_BITS = 32


def gradient_diversity(squares: Sequence[float], weights: Sequence[float], square: float) -> float | None:
    """Return the diversity of updates: the mean squared norm over that of their mean.

    It is 1 if all updates are equal, and the number of clients if they are orthogonal and equally long: n times the
    gradient diversity of Yin et al., AISTATS 2018, which has sums in place of means.

    Args:
        squares: squared norms of the updates.
        weights: their weights.
        square: squared norm of their mean; 0 has no diversity (None).
    """
    total = math.fsum(weight * own for weight, own in zip(weights, squares, strict=True))
    return total / math.fsum(weights) / square if square else None


class RunningMean:
    """The weighted mean of the updates added so far, independent of the order in which they arrived.

    Sums of floats depend on their order. Therefore each update, times its number of examples, is rounded to a multiple
    of 2^-34 (far below the precision of float32) and added as a 64-bit integer, which is exact. Before a sum could
    overflow, its upper 32 bits move to a second integer, so the range of one client does not depend on the others.

    Attributes:
        examples: the sum of the weights.
    """

    def __init__(self) -> None:
        self.examples = 0
        self._sums: dict[str, Tensor] = {}
        self._carries: dict[str, Tensor] = {}
        self._largest = 0.0

    def add(self, update: Weights, examples: int) -> None:
        """Add an update with its number of examples.

        Raises:
            PayloadError: a value is not finite or too large. Nothing is added.
        """
        sizes = [float(value.abs().max()) * examples for value in update.values() if value.numel()]
        largest = max(sizes, default=0.0)
        # max() may skip a NaN, so check each value.
        if not all(map(math.isfinite, sizes)) or not largest < _LIMIT:
            raise PayloadError(
                f"update times its {examples} examples reaches {largest:.3g}, more than can be added: "
                "training diverged, and a smaller lr may help"
            )
        if not self._largest + largest < _LIMIT:
            self._carry()
        self._largest += largest
        self.examples += examples
        for name, value in update.items():
            term = (value.double() * (examples * 2.0**_FRACTION_BITS)).round().long()
            if name in self._sums:
                self._sums[name] += term
            else:
                self._sums[name] = term

    def mean(self) -> Weights:
        """Return the mean as float32, by name; call it only after an `add`."""
        scale = self.examples * 2.0**_FRACTION_BITS
        if self._carries:
            self._carry()
        # Carries are exact in float64, so that all sums are rounded once.
        totals = {
            name: self._carries[name].double() * 2.0**_CARRY_BITS + low.double() if self._carries else low.double()
            for name, low in self._sums.items()
        }
        return {name: (total / scale).float() for name, total in totals.items()}

    def _carry(self) -> None:
        """Move the upper bits of the sums to the carries."""
        for name, low in self._sums.items():
            self._carries[name] = self._carries.get(name, torch.zeros_like(low)) + (low >> _CARRY_BITS)
            low.bitwise_and_(2**_CARRY_BITS - 1)
        self._largest = 2.0 ** (_CARRY_BITS - _FRACTION_BITS)


class Aggregator(ABC):
    """Combines the updates of one round.

    Args:
        param_spec: names and shapes of the tensors of an update.
        malicious: the fraction of the clients that the rule must tolerate, below 0.5.

    Attributes:
        examples: the sum of the examples of the updates added so far.
    """

    name: str

    def __init__(self, param_spec: ParamSpec, malicious: float) -> None:
        self.examples = 0
        self._parameters, self._malicious = tuple(param_spec.parameters), malicious

    @abstractmethod
    def add(self, update: Weights, examples: int) -> None:
        """Add a client's update, name -> float32 tensor. Raises PayloadError, and adds nothing, if it is unusable."""

    @abstractmethod
    def mean(self) -> Weights:
        """Return the aggregate as float32, by name; call it only after an `add`.

        It does not depend on the order of `add`.
        """

    def diversity(self, mean: Weights) -> float | None:
        """Return the `gradient_diversity` of the updates, whose mean is `mean`; None where the rule has none."""
        return None


@aggregators.register("mean")
class Mean(Aggregator):
    """The mean weighted by examples. It is not robust, and takes the memory of one model."""

    def __init__(self, param_spec: ParamSpec, malicious: float) -> None:
        super().__init__(param_spec, malicious)
        self._mean = RunningMean()
        self._param_spec = param_spec
        self._squares: list[float] = []
        self._weights: list[int] = []

    def add(self, update: Weights, examples: int) -> None:
        self._mean.add(update, examples)
        self.examples = self._mean.examples
        self._squares.append(norm(update, self._param_spec) ** 2)
        self._weights.append(examples)

    def mean(self) -> Weights:
        return self._mean.mean()

    def diversity(self, mean: Weights) -> float | None:
        return gradient_diversity(self._squares, self._weights, norm(mean, self._param_spec) ** 2)


class StoredUpdates(Aggregator):
    """Base of rules that keep all updates of a round and combine them as rows of a matrix."""

    def __init__(self, param_spec: ParamSpec, malicious: float) -> None:
        super().__init__(param_spec, malicious)
        self._updates: list[tuple[Weights, int]] = []

    def add(self, update: Weights, examples: int) -> None:
        for name, value in update.items():
            if not math.isfinite(float(value.double().square().sum())):
                raise PayloadError(f"update of {name} holds a value that is not finite")
        self.examples += examples
        self._updates.append((update, examples))

    def mean(self) -> Weights:
        rows = torch.stack([_flat(update, self._parameters) for update, _ in self._updates])
        order = sorted(range(len(rows)), key=lambda row: (self._updates[row][1], rows[row].numpy().tobytes()))
        weights = torch.tensor([self._updates[row][1] for row in order], dtype=torch.float64)
        combined = self.combine(rows[order], weights).float()
        first = self._updates[0][0]
        result = split_vector(combined, {name: first[name].shape for name in self._parameters})
        for name in first.keys() - result.keys():
            result[name] = _median(torch.stack([update[name].double() for update, _ in self._updates])).float()
        return {name: result[name] for name in first}

    @abstractmethod
    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return the aggregate [values] of updates [clients, values] with their examples [clients], all float64."""

    def tolerated(self, clients: int) -> int:
        """Return the number of malicious clients to tolerate: the configured fraction, but always a minority."""
        return min(math.ceil(self._malicious * clients), (clients - 1) // 2)


@aggregators.register("norm-clip")
class NormClip(StoredUpdates):
    """The weighted mean of updates whose norms are clipped to the median norm.

    Sun et al. 2019, arXiv 1911.07963, clip to a given norm.
    """

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        return _weighted_mean(_clipped(rows), weights)


@aggregators.register("median")
class Median(StoredUpdates):
    """The median of each coordinate (Yin et al. 2018, arXiv 1803.01498, definition 1); unweighted."""

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        return _median(rows)


@aggregators.register("trimmed-mean")
class TrimmedMean(StoredUpdates):
    """The mean of each coordinate without its extremes (Yin et al. 2018, definition 2), unweighted."""

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        cut = self.tolerated(len(rows))
        return rows.sort(dim=0).values[cut : len(rows) - cut].mean(0)


@aggregators.register("multi-krum")
class MultiKrum(StoredUpdates):
    """The weighted mean of the n - f updates that are closest to their neighbors.

    Blanchard et al. 2017 (NeurIPS), section 4: a score is the sum of the squared distances to the n - f - 2 closest
    others.
    """

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        clients, malicious = len(rows), self.tolerated(len(rows))
        distances = torch.cdist(rows, rows).square()
        neighbors = max(1, clients - malicious - 2)
        scores = distances.sort(dim=1).values[:, 1 : neighbors + 1].sum(1)
        chosen = scores.argsort(stable=True)[: clients - malicious].sort().values
        return _weighted_mean(rows[chosen], weights[chosen])


@aggregators.register("centered-clip")
class CenteredClip(StoredUpdates):
    """Iterated clipping of the distances from a center (Karimireddy et al. 2021, arXiv 2012.10333, algorithm 1).

    The center starts at the coordinatewise median, and the radius is the median distance from it.
    """

    ITERATIONS = 3

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        center = _median(rows)
        for _ in range(self.ITERATIONS):
            center = center + _weighted_mean(_clipped(rows - center), weights)
        return center


def limit_norm(update: Weights, param_spec: ParamSpec, largest: float) -> Weights:
    """Return an update whose trainable parameters are scaled to an L2 norm of at most `largest`; 0 is no limit."""
    length = norm(update, param_spec)
    if not largest or not length > largest:
        return update
    return {
        name: value * (largest / length) if name in param_spec.parameters else value for name, value in update.items()
    }


def example_cap(examples: Sequence[int], ratio: float) -> int:
    """Return the largest weight of a client: `ratio` times the median number of examples,
    at least 1; 0 means no limit.
    """
    return max(1, int(ratio * statistics.median(examples))) if ratio else max(examples)


def _flat(update: Weights, parameters: tuple[str, ...]) -> Tensor:
    return torch.cat([update[name].double().flatten() for name in parameters])


def _clipped(rows: Tensor) -> Tensor:
    """Return the rows whose norms are at most the median norm."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows * (_median(lengths) / lengths.clamp_min(1e-30)).clamp_max(1.0)


def _weighted_mean(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("nv,n->v", rows, weights / weights.sum())


def _median(rows: Tensor) -> Tensor:
    """Return the median of each column; the mean of the middle two for an even number of rows."""
    ordered, count = rows.sort(dim=0).values, len(rows)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
