"""The steps from a client's local update to its message: error feedback, clipping, noise, compression or masking.

    AddResidual -> Clip -> AddNoise -> Compress | EncodeInRing -> KeepResidual

With server-optimizer=ef21, SubtractDirection and KeepDirection replace the first and the last.
Every step takes an `Outgoing` and returns a new one, which also has the state that outlives the round (error feedback,
the compressor's memory). A step itself holds only settings.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tofu.compression.base import Compressor
from tofu.compression.error_feedback import ErrorFeedback
from tofu.errors import PayloadError
from tofu.privacy import Noise, check_param_spec, clip
from tofu.reference_model import ReferenceModel
from tofu.secagg.encoding import RingEncoder
from tofu.secagg.masks import RingVector
from tofu.weights import ParamSpec, Weights


@dataclass(frozen=True)
class Outgoing:
    """An update, and the results of the steps so far.

    Attributes:
        update: the update to send, float32 by name.
        feedback: the error-feedback state of this round; after the chain, of the next one.
        memory: the compressor's memory after the client's last payload; after the chain, after this one.
        decoded: the update that the server will decode; empty before `Compress` or `EncodeInRing`.
        body: the compressed bytes of an open round.
        vector: the ring elements of a secure round, before masking.
        clipped: whether `Clip` made the update shorter.
        sums: of plugins, that `AddNoise` gave noise.
    """

    update: Weights
    feedback: ErrorFeedback = field(default_factory=ErrorFeedback)
    memory: bytes = b""
    decoded: Weights = field(default_factory=dict)
    body: bytes = b""
    vector: RingVector | None = None
    clipped: bool = False
    sums: Weights = field(default_factory=dict)

    def replace(self, **changes: object) -> "Outgoing":
        """Return a copy with other values for the named fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


class UpdateStep(Protocol):
    """One step of the chain."""

    def apply(self, outgoing: Outgoing) -> Outgoing:
        """Return the next state of the update."""


def apply_steps(steps: Sequence[UpdateStep], outgoing: Outgoing) -> Outgoing:
    """Apply the steps in order."""
    for step in steps:
        outgoing = step.apply(outgoing)
    return outgoing


@dataclass(frozen=True)
class AddResidual:
    """Add the residual of earlier rounds (error feedback, Seide et al. 2014).

    Attributes:
        acknowledged: the last round whose reply of this client the server added, or -1.
        fraction: fraction of the residual to add; 0 drops it, and lost replies too.
    """

    acknowledged: int
    fraction: float = 1.0

    def apply(self, outgoing: Outgoing) -> Outgoing:
        if not self.fraction:
            return outgoing.replace(feedback=ErrorFeedback())
        return outgoing.replace(
            update=outgoing.feedback.target(outgoing.update, self.acknowledged, fraction=self.fraction)
        )


@dataclass(frozen=True)
class SubtractDirection:
    """Send the change of the client's direction (EF21-SGDM, Fatkhullin et al., NeurIPS 2023, algorithm 1).

    The server has a sum g of all that this client delivered, and adds the mean of these sums in every round. The client
    keeps a moving average v of its local progress and sends C(v - g), so g approaches v although C is lossy. Buffers
    are statistics, so they have an ordinary residual.

    Attributes:
        acknowledged: as in `AddResidual`.
        momentum: weight of this round's progress in v; 1 is EF21 (Richtarik et al., NeurIPS 2021).
    """

    acknowledged: int
    momentum: float
    parameters: Collection[str]

    def apply(self, outgoing: Outgoing) -> Outgoing:
        update, old = outgoing.update, outgoing.feedback.velocity
        nothing = {name: torch.zeros_like(value) for name, value in update.items()}
        missing = outgoing.feedback.target(nothing, self.acknowledged)  # of parameters: minus g
        velocity = nothing | {
            name: torch.lerp(old[name], update[name], self.momentum) if old else update[name]
            for name in self.parameters
        }
        target = {
            name: value + missing[name] for name, value in (update | {n: velocity[n] for n in self.parameters}).items()
        }
        return outgoing.replace(update=target, feedback=ErrorFeedback(missing, velocity=velocity))


@dataclass(frozen=True)
class KeepDirection:
    """Keep the sum of the decoded updates, after `SubtractDirection`.

    Attributes:
        round: this round.
    """

    round: int
    parameters: Collection[str]

    def apply(self, outgoing: Outgoing) -> Outgoing:
        before = outgoing.update | {name: outgoing.feedback.residual[name] for name in self.parameters}
        kept = ErrorFeedback.after(before, outgoing.decoded, self.round)
        return outgoing.replace(feedback=dataclasses.replace(kept, velocity=outgoing.feedback.velocity))


@dataclass(frozen=True)
class Clip:
    """Clip the update to an L2 norm, which bounds the influence of one client (differential privacy).

    Raises:
        SettingError: the model has batch counters, which would dominate the norm.
    """

    norm: float
    param_spec: ParamSpec

    def apply(self, outgoing: Outgoing) -> Outgoing:
        check_param_spec(self.param_spec)
        update, norm = clip(outgoing.update, self.norm)
        return outgoing.replace(update=update, clipped=norm > self.norm)


@dataclass(frozen=True)
class AddNoise:
    """Add the noise of a round whose updates the server sees.

    Attributes:
        sums: of plugins, which are further values of the update.
    """

    noise: Noise
    sums: Weights = field(default_factory=dict)

    def apply(self, outgoing: Outgoing) -> Outgoing:
        noised = self.noise.add(outgoing.update | self.sums)
        sums = {name: noised.pop(name).double() for name in self.sums}
        return outgoing.replace(update=noised, sums=sums)


@dataclass(frozen=True)
class Compress:
    """Compress the update to the bytes of an open round's payload.

    Attributes:
        generator: the only source of randomness.
        uses_memory: whether the memory was written by this compressor.
    """

    compressor: Compressor
    reference: ReferenceModel
    generator: torch.Generator
    uses_memory: bool = True

    def apply(self, outgoing: Outgoing) -> Outgoing:
        memory = outgoing.memory if self.uses_memory else b""
        made = self.compressor.compress(self.reference, outgoing.update, generator=self.generator, memory=memory)
        return outgoing.replace(decoded=made.decoded, body=made.body, memory=made.memory or outgoing.memory)


@dataclass(frozen=True)
class EncodeInRing:
    """Encode the update as the ring vector of a secure round; the client's session masks it afterwards.

    Attributes:
        examples, loss: reported inside the sum.
        seed: seed of the stochastic rounding.
        sums: the plugins' sums.
        noise: the client's part of the noise in the sum, or None. With noise, the update has weight 1, and neither the
            loss nor the number of clipped values is reported.
    """

    encoder: RingEncoder
    examples: int
    loss: float
    seed: bytes
    sums: Mapping[str, Tensor]
    noise: Noise | None = None

    def apply(self, outgoing: Outgoing) -> Outgoing:
        if self.noise is None:
            encoded = self.encoder.encode(outgoing.update, self.examples, self.loss, self.seed, self.sums)
            return outgoing.replace(decoded=encoded.decoded, vector=encoded.vector)
        encoded = self.encoder.encode_noised(outgoing.update, self.sums, self.noise.steps)
        return outgoing.replace(update=encoded.decoded, decoded=encoded.decoded, vector=encoded.vector)


@dataclass(frozen=True)
class KeepResidual:
    """Keep the compression error as the residual of the next round.

    Attributes:
        round: this round.
        fraction: as in `AddResidual`; with 0 nothing is kept.
    """

    round: int
    fraction: float = 1.0

    def apply(self, outgoing: Outgoing) -> Outgoing:
        if not self.fraction:
            return outgoing.replace(feedback=ErrorFeedback())
        return outgoing.replace(feedback=ErrorFeedback.after(outgoing.update, outgoing.decoded, self.round))


def check_noise_grid(noise: Noise | None, levels: int, unit_weight: float, ranges: Sequence[float]) -> None:
    """Check that a secure round's ranges are those that the run's noise needs.

    Raises:
        PayloadError: the server proposes other ranges.
    """
    if noise is None:
        return
    range_ = noise.grid * levels
    if unit_weight != 1 or any(not math.isclose(given, range_, rel_tol=1e-6) for given in ranges):
        raise PayloadError("the encoding config has ranges that do not match the noise of this run")
