"""What a client remembers between rounds, kept in its Flower context: error feedback and the codec's memory.

State that is absent, or from another model (a restarted client), counts as none: the client then begins afresh.
"""

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Context

from tofu.compression import ErrorFeedback
from tofu.weights import Layout, Weights

_RESIDUAL, _SENT, _NUMBERS = "tofu.residual", "tofu.sent", "tofu.numbers"
_VERSION = 1


@dataclass(frozen=True)
class ClientState:
    """Error feedback, and what the compressor wanted back (its last proxies)."""

    feedback: ErrorFeedback
    memory: bytes


def load_state(context: Context, layout: Layout) -> ClientState:
    """The state that `save_state` left, or an empty one."""
    numbers = context.state.config_records.get(_NUMBERS)
    if numbers is None or numbers.get("version") != _VERSION:
        return ClientState(ErrorFeedback(), b"")
    memory = numbers.get("memory", b"")
    residual, sent = _weights(context, _RESIDUAL, layout), _weights(context, _SENT, layout)
    sent_round = numbers.get("sent-round")
    feedback = ErrorFeedback()
    if residual and sent and isinstance(sent_round, int):
        feedback = ErrorFeedback(residual, sent, sent_round)
    return ClientState(feedback, memory if isinstance(memory, bytes) else b"")


def save_state(context: Context, *, feedback: ErrorFeedback | None, memory: bytes) -> None:
    """Keep the state in `context` for this client's next round; without feedback, none is kept."""
    numbers: dict[str, int | bytes] = {"version": _VERSION, "memory": memory}
    if feedback is not None:
        context.state[_RESIDUAL] = ArrayRecord(feedback.residual)
        context.state[_SENT] = ArrayRecord(feedback.sent)
        numbers["sent-round"] = feedback.sent_round
    context.state[_NUMBERS] = ConfigRecord(dict(numbers))


def _weights(context: Context, key: str, layout: Layout) -> Weights | None:
    record = context.state.array_records.get(key)
    if record is None:
        return None
    weights: Weights = {name: value.clone() for name, value in record.to_torch_state_dict().items()}
    return weights if {name: w.shape for name, w in weights.items()} == layout.shapes else None
