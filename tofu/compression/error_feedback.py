"""Error feedback: what compression lost this time is added to the next update (Seide et al. 2014; Karimireddy et al.,
ICML 2019), kept right when a client sits out rounds or a reply never reaches the server.

A reply can be lost after the client sent it: it was late, or the connection broke. Its content must then not be taken
as delivered. So the client keeps both what was lost in rounding (the residual) and what it last sent, and the server
names, with its next message, the last round whose reply of this client it added. Unless that is the round of what was
last sent, the sent part returns into the residual.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from tofu.weights import Weights

NEVER = -1


@dataclass(frozen=True)
class ErrorFeedback:
    """One client's memory of what the server has not received.

    Attributes:
        residual: update not yet sent, by name; empty before the first round.
        sent: what the last reply decodes to, by name; empty before the first round.
        sent_round: the round of that reply, or -1.
    """

    residual: Weights = field(default_factory=dict)
    sent: Weights = field(default_factory=dict)
    sent_round: int = NEVER

    def target(self, update: Weights, acknowledged: int, *, share: float = 1.0) -> Weights:
        """What to compress now: the update plus what the server has not received.

        Args:
            acknowledged: the last round whose reply of this client the server added, or -1.
            share: of the residual that is kept. A reply that was lost on the way returns whole.
        """
        total = dict(update)
        for name, value in self.residual.items():
            total[name] = total[name] + share * value
        if self.sent_round != acknowledged:
            for name, value in self.sent.items():
                total[name] = total[name] + value
        return total

    def ahead(
        self, weights: Weights, acknowledged: int, step_ahead: float, parameters: Iterable[str], *, share: float = 1.0
    ) -> Weights:
        """The weights that local training starts from (SA-PEF, Redie et al., TMLR 2026).

        These are the global weights plus `step_ahead` times what the server has not received. The update is then the
        difference from these weights, because `target` adds what the server has not received in full.

        Args:
            weights: the global weights.
            step_ahead: 0 is plain error feedback, which starts from `weights`.
            parameters: the names that this applies to. Buffers are statistics, so they start from `weights`.
        """
        if not step_ahead or not (self.residual or self.sent):
            return weights
        missing = self.target({name: torch.zeros_like(weights[name]) for name in weights}, acknowledged, share=share)
        return weights | {name: weights[name] + step_ahead * missing[name] for name in parameters}

    @staticmethod
    def after(target: Weights, decoded: Weights, round_: int) -> "ErrorFeedback":
        """The memory after sending what decodes to `decoded` in round `round_`."""
        return ErrorFeedback({name: target[name] - decoded[name] for name in target}, decoded, round_)
