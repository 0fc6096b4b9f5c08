"""Error feedback: the compression error of a round is added to the next update.

Seide et al. 2014; Karimireddy et al., ICML 2019. This implementation stays correct if a client misses rounds or if a
reply does not reach the server.

A reply can be lost after the client sent it. The client therefore keeps the residual and the decoded content of its
last reply, and the server's next request names the last round whose reply it added. If that is another round, the
content of the last reply returns to the residual. docs/error-feedback.md explains over-relaxation and step-ahead.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from tofu.weights import Weights

NEVER = -1


@dataclass(frozen=True)
class ErrorFeedback:
    """The error-feedback state of one client.

    Attributes:
        residual: compression error, by name; empty before the first round.
        sent: decoded content of the last reply, by name; empty before the first round.
        sent_round: the round of that reply, or -1.
        velocity: moving average of the client's local progress (`steps.SubtractDirection`); otherwise empty.
    """

    residual: Weights = field(default_factory=dict)
    sent: Weights = field(default_factory=dict)
    sent_round: int = NEVER
    velocity: Weights = field(default_factory=dict)

    def aged(self, round_: int, half_life: float) -> "ErrorFeedback":
        """Return the state with a residual that halves with every `half_life` rounds
        that the client missed; 0 keeps all.

        A client that took part in the last round has missed none. The content of the last reply does not age.
        """
        missed = round_ - 1 - self.sent_round
        if not half_life or missed <= 0:
            return self
        factor = 0.5 ** (missed / half_life)
        return replace(self, residual={name: factor * value for name, value in self.residual.items()})

    def target(self, update: Weights, acknowledged: int, *, fraction: float = 1.0) -> Weights:
        """Return the update to compress: this round's update plus the residual and lost replies.

        Args:
            acknowledged: the last round whose reply of this client the server added, or -1.
            fraction: fraction of the residual to keep. A lost reply returns in full.
        """
        total = dict(update)
        for name, value in self.residual.items():
            total[name] = total[name] + fraction * value
        if self.sent_round != acknowledged:
            for name, value in self.sent.items():
                total[name] = total[name] + value
        return total

    def ahead(
        self,
        weights: Weights,
        acknowledged: int,
        step_ahead: float,
        parameters: Iterable[str],
        *,
        fraction: float = 1.0,
    ) -> Weights:
        """Return the weights that local training starts from (SA-PEF, Redie et al., TMLR 2026).

        These are the global weights plus `step_ahead` times the residual and lost replies. The update is then the
        difference from these weights, because `target` adds the residual and lost replies in full.

        Args:
            weights: the global weights.
            step_ahead: 0 is plain error feedback, which starts from `weights`.
            parameters: the names that this applies to. Buffers are statistics, so they start from `weights`.
        """
        if not step_ahead or not (self.residual or self.sent):
            return weights
        missing = self.target(
            {name: torch.zeros_like(weights[name]) for name in weights}, acknowledged, fraction=fraction
        )
        return weights | {name: weights[name] + step_ahead * missing[name] for name in parameters}

    @staticmethod
    def after(target: Weights, decoded: Weights, round_: int) -> "ErrorFeedback":
        """Return the state after sending a reply that decodes to `decoded` in round `round_`."""
        return ErrorFeedback({name: target[name] - decoded[name] for name in target}, decoded, round_)
