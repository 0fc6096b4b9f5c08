"""The encoder of one secure round: update -> ring vector, and sum of ring vectors -> mean update."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu.errors import PayloadError, SettingError
from tofu.plugins import SumSpec
from tofu.secagg import coordinates
from tofu.secagg.encoding.config import EncodingConfig
from tofu.secagg.encoding.ranges import MAX_RANGE, MIN_RANGE, nearest_range, next_range
from tofu.secagg.encoding.sums import DigitSums
from tofu.secagg.fixed_point import Clipped, FixedPoint
from tofu.secagg.ring import RingVector, centered
from tofu.weights import ParamSpec, Weights, displacement_levels

MAX_REPORTED = 32.0
"""Maximum loss, and maximum excess over a range in units of it, that the sums can represent."""

_LOSS_ELEMENTS = 16
"""The loss is encoded this many times, because one rounding to few levels is imprecise."""

_POWER = ""
"""Name of the sum of mean squares, which no plugin's sum has."""


@dataclass(frozen=True)
class Encoded:
    """A client's contribution to the sum.

    Attributes:
        vector: ring elements [length].
        decoded: the update that they represent: the client's update after clipping and rounding.
        clipped: the number of clipped values, and the largest in units of its range.
    """

    vector: RingVector
    decoded: Weights
    clipped: Clipped


@dataclass(frozen=True)
class SecureMean:
    """What the server learns from the sum.

    Attributes:
        update: mean weighted by examples, float32 by name.
        examples: of all clients in the sum.
        loss: mean training loss, weighted by examples.
        clipped: number of clipped values, of all clients together.
        furthest: upper bound of any client's values, in units of their tensor's range; 1.0 if nothing was clipped.
        ranges: for the next round (`tofu.secagg.encoding.ranges`).
        sums: of the plugins, float64 by name.
    """

    update: Weights
    examples: int
    loss: float
    clipped: int
    furthest: float
    ranges: tuple[float, ...]
    sums: dict[str, Tensor]


class RingEncoder:
    """Encodes the updates of one round, and decodes their sum.

    Args:
        param_spec: names and shapes of the model's tensors.
        config: of the round.
        declared: the sums of plugins, with finite bounds.
        displacement: the round's global weights minus the initial ones, float [d] in the ParamSpec's order; None if all
            entries are sent.

    Raises:
        PayloadError: the config is for another model, or the ring is too small for the number of clients.
    """

    def __init__(
        self,
        param_spec: ParamSpec,
        config: EncodingConfig,
        declared: Mapping[str, SumSpec] | None = None,
        displacement: Tensor | None = None,
    ) -> None:
        if len(config.ranges) != len(param_spec.shapes):
            raise PayloadError(f"encoding config has {len(config.ranges)} ranges, expected {len(param_spec.shapes)}")
        self._param_spec, self._config = param_spec, config
        try:
            self._fixed = FixedPoint(config.clients, config.bits, 1.0, config.unit_weight)
        except SettingError as error:
            raise PayloadError(f"encoding config is not usable: {error}") from error
        self._sizes = [shape.numel() for shape in param_spec.shapes.values()]
        self._all = sum(self._sizes)
        self._coordinates = None if displacement is None else self._select(displacement)
        self._count = self._all if self._coordinates is None else len(self._coordinates)
        power = {_POWER: SumSpec((len(self._sizes),), 1.0)} if config.nearest_rounding else {}
        self._sums = DigitSums({**(declared or {}), **power}, self._fixed.digit_bits)

    @property
    def levels(self) -> int:
        """Steps on each side of zero."""
        return self._fixed.levels

    @property
    def values(self) -> int:
        """Number of the update's entries that are sent."""
        return self._count

    @property
    def digest(self) -> bytes:
        """Digest of the coordinates that are sent; zeros if these are all."""
        none = bytes(coordinates.DIGEST_BYTES)
        return none if self._coordinates is None else coordinates.digest(self._coordinates)

    @property
    def length(self) -> int:
        """Ring elements of a client's vector."""
        return self._fixed.length(self._count + _LOSS_ELEMENTS + len(self._sizes)) + self._sums.length

    def encode(
        self,
        update: Weights,
        examples: int,
        loss: float,
        seed: bytes = b"",
        sums: Mapping[str, Tensor] | None = None,
        *,
        silent: bool = False,
    ) -> Encoded:
        """Encode an update as a ring vector.

        Args:
            update: by name, of the ParamSpec's shapes.
            examples: weight of the update.
            loss: the client's training loss.
            seed: of the stochastic rounding (`FixedPoint.encode`).
            sums: the plugins' tensors, by the declared names, within their bounds.
            silent: report neither the loss nor clipping. Not with nearest rounding.

        Raises:
            RunError: the update is not finite.
        """
        weight = examples / self._config.unit_weight
        values = flat({name: update[name] for name in self._param_spec.shapes}).numpy().astype(np.float64)
        values /= self._ranges
        sums = dict(sums or {})
        if self._config.nearest_rounding:
            power = [float(np.square(part).mean()) * weight**2 if part.size else 0.0 for part in self._split(values)]
            sums[_POWER] = torch.tensor(power, dtype=torch.float64).clamp(max=1)
        if self._coordinates is not None:
            values = coordinates.encode(torch.from_numpy(values), self._coordinates).numpy()
        if silent:
            values, loss = np.clip(values, -1 / weight, 1 / weight), 0.0
        furthest = [float(np.abs(part).max(initial=0.0)) * weight for part in self._split(self._expand(values))]
        # `FixedPoint` multiplies by the weight, hence the divisions. An excess is at least one whole level, because a
        # smaller one could be rounded to zero.
        min_excess = MAX_REPORTED / self._fixed.levels
        excess = [min(max(far - 1.0, min_excess), MAX_REPORTED) if far > 1 else 0.0 for far in furthest]
        reports = [min(max(loss, 0.0) / MAX_REPORTED, 1.0 / weight)] * _LOSS_ELEMENTS
        elements = np.concatenate([values, reports, np.array(excess) / MAX_REPORTED / weight])
        nearest = self._count if self._config.nearest_rounding else 0
        vector, clipped = self._fixed.encode(elements, examples, seed, nearest=nearest)
        steps = centered(vector[: self._count], self._config.bits).astype(np.float64)
        own = self._expand(steps * (self._fixed.step / weight)) * self._ranges
        return Encoded(np.concatenate([vector, self._sums.encode(sums)]), self._weights(own), clipped)

    def decode(self, total: RingVector, clients: int) -> SecureMean:
        """Decode the mean from the sum of the vectors of `clients` clients.

        Raises:
            PayloadError: the sum has another length.
            RunError: the sum has 0 examples.
        """
        if total.size != self.length:
            raise PayloadError(f"sum has {total.size} elements, expected {self.length}")
        end = total.size - self._sums.length
        decoded = self._fixed.decode(total[:end])
        weights = decoded.examples / self._config.unit_weight
        sent, losses, reported = np.split(decoded.mean, [self._count, self._count + _LOSS_ELEMENTS])
        values = self._expand(sent)
        # Stochastic rounding can make a zero mean slightly negative.
        excess = np.maximum(reported, 0.0) * weights * MAX_REPORTED
        sums = self._sums.decode(total[end:], clients)
        if self._config.nearest_rounding:
            ranges = self._nearest_ranges((sums.pop(_POWER) / clients).clamp(min=0))
        else:
            peaks = [float(np.abs(part).max(initial=0.0)) * weights / clients for part in self._split(values)]
            known = zip(self._config.ranges, excess.tolist(), peaks, strict=True)
            ranges = [next_range(range_, out, peak * range_) for range_, out, peak in known]
        return SecureMean(
            update=self._weights(values * self._ranges),
            examples=decoded.examples,
            loss=float(losses.mean()) * MAX_REPORTED,
            clipped=decoded.clipped,
            furthest=1.0 + float(excess.max(initial=0.0)),
            ranges=tuple(min(range_, MAX_RANGE) for range_ in ranges),
            sums=sums,
        )

    def _select(self, displacement: Tensor) -> Tensor:
        """The coordinates that are sent (`tofu.secagg.coordinates`)."""
        tensors = zip(torch.split(displacement, self._sizes), self._param_spec.shapes.values(), strict=True)
        levels = np.concatenate([displacement_levels(part.reshape(shape)) for part, shape in tensors])
        return coordinates.select(displacement, self._config.fraction, self._config.turn, levels=levels)

    def _nearest_ranges(self, powers: Tensor) -> list[float]:
        """Next ranges from the clients' mean squares, in units of the squared ranges [tensors]."""
        factor = nearest_range(self.levels)
        known = zip(self._config.ranges, powers.tolist(), strict=True)
        return [max(range_ * max(factor * power**0.5, 1 / 8), MIN_RANGE) for range_, power in known]

    @property
    def _ranges(self) -> npt.NDArray[np.float64]:
        """Each entry's range [d]."""
        return np.repeat(np.array(self._config.ranges, np.float32).astype(np.float64), self._sizes)

    def _expand(self, sent: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The entries that are sent [m], with zeros for all others [d]."""
        if self._coordinates is None:
            return sent
        return coordinates.decode(torch.from_numpy(sent), self._coordinates, self._all).numpy()

    def _split(self, values: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
        """One vector [d] -> one per tensor."""
        return np.split(values, np.cumsum(self._sizes)[:-1])

    def _weights(self, values: npt.NDArray[np.float64]) -> Weights:
        parts = zip(self._param_spec.shapes.items(), self._split(values), strict=True)
        return {name: torch.from_numpy(part).float().reshape(shape) for (name, shape), part in parts}


def flat(weights: Weights) -> Tensor:
    """Concatenate all tensors to one float32 vector, in their order."""
    return torch.cat([value.detach().float().flatten() for value in weights.values()])
