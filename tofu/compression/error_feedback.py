"""Error feedback: what compression lost this time is added to the next update (Seide et al. 2014; Karimireddy et al.,
ICML 2019), kept right when a client sits out rounds or a reply never reaches the server.

A reply can be lost after the client sent it: it was late, or the connection broke. Its content must then not be taken
as delivered. So the client keeps both what was lost in rounding (the residual) and what it last sent, and the server
names, with its next message, the last round whose reply of this client it added. Unless that is the round of what was
last sent, the sent part returns into the residual.
"""

from dataclasses import dataclass, field

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

    @staticmethod
    def after(target: Weights, decoded: Weights, round_: int) -> "ErrorFeedback":
        """The memory after sending what decodes to `decoded` in round `round_`."""
        return ErrorFeedback({name: target[name] - decoded[name] for name in target}, decoded, round_)
