"""Error feedback of the mods, in the client's Flower context between rounds."""

import hashlib

from flwr.app import ConfigRecord, Context

from tofu.compression.error_feedback import ErrorFeedback
from tofu.errors import PayloadError
from tofu.weights import ParamSpec, Weights
from tofu.wire import float32_bytes, float32_from

_STATE = "tofu.compress"
_VERSION = 2


def load_feedback(context: Context, spec: ParamSpec) -> tuple[ErrorFeedback, bytes]:
    """Error feedback and the compressor's memory, empty if there are none or they are of another model."""
    record = context.state.config_records.get(_STATE)
    if record is None or record.get("version") != _VERSION or record.get("model") != _identity(spec):
        return ErrorFeedback(), b""

    def weights(name: str) -> Weights | None:
        data = record.get(name)
        try:
            return float32_from(data, spec) if isinstance(data, bytes) else None
        except PayloadError:
            return None

    residual, sent, round_, memory = weights("residual"), weights("sent"), record.get("round"), record.get("memory")
    if residual is None or sent is None or not isinstance(round_, int):
        return ErrorFeedback(), b""
    return ErrorFeedback(residual, sent, round_), memory if isinstance(memory, bytes) else b""


def save_feedback(context: Context, spec: ParamSpec, feedback: ErrorFeedback, memory: bytes) -> None:
    """Keep error feedback and the compressor's memory in the client's context for its next round."""
    record = ConfigRecord(
        {"version": _VERSION, "model": _identity(spec), "memory": memory, "round": feedback.sent_round}
    )
    if feedback.residual:
        record["residual"] = float32_bytes(feedback.residual, spec)
        record["sent"] = float32_bytes(feedback.sent, spec)
    context.state[_STATE] = record


def _identity(spec: ParamSpec) -> bytes:
    """Digest of the names, their order and their shapes, 8 bytes."""
    return hashlib.sha256(repr([(name, tuple(shape)) for name, shape in spec.shapes.items()]).encode()).digest()[:8]
