"""State that the mods keep in a client's Flower context between rounds: error feedback, and the global arrays.

Arrays are stored as plain bytes, because Flower parses its own arrays with `ast.literal_eval`, which sometimes fails in
CPython 3.11 when two threads call it at the same time, as the clients of one process do.
"""

import hashlib
import json

import safetensors
import safetensors.torch
from flwr.app import ConfigRecord, Context
from torch import Tensor

from tofu.compression.error_feedback import ErrorFeedback
from tofu.errors import PayloadError
from tofu.weights import ParamSpec, Weights
from tofu.wire import float32_bytes, float32_from

_FEEDBACK, _FEEDBACK_VERSION = "tofu.compress", 2
_ARRAYS, _ARRAYS_VERSION = "tofu.downlink", 1


def load_feedback(context: Context, spec: ParamSpec) -> tuple[ErrorFeedback, bytes]:
    """Error feedback and the compressor's memory, empty if there are none or they are of another model."""
    record = context.state.config_records.get(_FEEDBACK)
    if record is None or record.get("version") != _FEEDBACK_VERSION or record.get("model") != _identity(spec):
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
        {"version": _FEEDBACK_VERSION, "model": _identity(spec), "memory": memory, "round": feedback.sent_round}
    )
    if feedback.residual:
        record["residual"] = float32_bytes(feedback.residual, spec)
        record["sent"] = float32_bytes(feedback.sent, spec)
    context.state[_FEEDBACK] = record


def _identity(spec: ParamSpec) -> bytes:
    """Digest of the names, their order and their shapes, 8 bytes."""
    return hashlib.sha256(repr([(name, tuple(shape)) for name, shape in spec.shapes.items()]).encode()).digest()[:8]


def load_arrays(context: Context) -> tuple[dict[str, Tensor], bytes] | None:
    """The arrays in their order, and their identity (`tofu.weights`); None if there are none."""
    record = context.state.config_records.get(_ARRAYS)
    if record is None or record.get("version") != _ARRAYS_VERSION:
        return None
    data, names, identity = record.get("arrays"), record.get("names"), record.get("identity")
    if not (isinstance(data, bytes) and isinstance(names, str) and isinstance(identity, bytes)):
        return None
    try:
        arrays = safetensors.torch.load(data)
        return {name: arrays[name] for name in json.loads(names)}, identity
    except (ValueError, KeyError, safetensors.SafetensorError):
        return None


def save_arrays(context: Context, arrays: dict[str, Tensor], identity: bytes) -> None:
    """Keep the arrays for this client's next round."""
    data = safetensors.torch.save({name: value.clone().contiguous() for name, value in arrays.items()})
    context.state[_ARRAYS] = ConfigRecord(
        {"version": _ARRAYS_VERSION, "arrays": data, "names": json.dumps(list(arrays)), "identity": identity}
    )
