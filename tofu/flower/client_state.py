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

_FEEDBACK, _FEEDBACK_VERSION = "tofu.compress", 5
_ARRAYS, _ARRAYS_VERSION = "tofu.downlink", 2

MAX_TRAININGS = 4
"""Number of trainings (calls of a strategy's `start`) whose state a client keeps: strategies may take turns."""


def read_weights(record: ConfigRecord, name: str, spec: ParamSpec) -> Weights | None:
    """Weights that a record stores as float32 bytes; None if they are missing or of another model."""
    data = record.get(name)
    try:
        return float32_from(data, spec) if isinstance(data, bytes) else None
    except PayloadError:
        return None


def read_feedback(record: ConfigRecord, spec: ParamSpec) -> ErrorFeedback:
    """Return the state that `write_feedback` added to a record; an empty one if it is missing or of another model."""
    residual, sent, velocity = (read_weights(record, name, spec) for name in ("residual", "sent", "velocity"))
    sent_round = record.get("sent-round")
    if residual is None or sent is None or not isinstance(sent_round, int):
        return ErrorFeedback()
    return ErrorFeedback(residual, sent, sent_round, velocity or {})


def write_feedback(record: ConfigRecord, feedback: ErrorFeedback, spec: ParamSpec) -> None:
    """Add the state of error feedback to a record."""
    record["sent-round"] = feedback.sent_round
    for name in ("residual", "sent", "velocity"):
        if weights := getattr(feedback, name):
            record[name] = float32_bytes(weights, spec)


def _keep(context: Context, kind: str, training: bytes, record: ConfigRecord) -> None:
    """Store the record of a training, and delete that which was not used for longest if there are too many."""
    records = context.state.config_records
    used = {key: int(other.get("used", 0)) for key, other in records.items() if key.startswith(f"{kind}.")}  # type: ignore[arg-type]
    key = f"{kind}.{training.hex()}"
    record["used"] = 1 + max(used.values(), default=0)
    if key not in used and len(used) >= MAX_TRAININGS:
        del context.state[min(used, key=lambda other: used[other])]
    context.state[key] = record


def load_feedback(context: Context, spec: ParamSpec, training: bytes) -> tuple[ErrorFeedback, bytes]:
    """Error feedback and the compressor's memory, empty if there are none or they are of another model or training.

    Args:
        training: identifies one call of a strategy's `start`. What an earlier one left out is not of these weights.
    """
    record = context.state.config_records.get(f"{_FEEDBACK}.{training.hex()}")
    expected = {"version": _FEEDBACK_VERSION, "model": _identity(spec)}
    if record is None or any(record.get(name) != value for name, value in expected.items()):
        return ErrorFeedback(), b""
    memory = record.get("memory")
    return read_feedback(record, spec), memory if isinstance(memory, bytes) else b""


def save_feedback(context: Context, spec: ParamSpec, training: bytes, feedback: ErrorFeedback, memory: bytes) -> None:
    """Keep error feedback and the compressor's memory in the client's context for its next round."""
    record = ConfigRecord({"version": _FEEDBACK_VERSION, "model": _identity(spec), "memory": memory})
    write_feedback(record, feedback, spec)
    _keep(context, _FEEDBACK, training, record)


def _identity(spec: ParamSpec) -> bytes:
    """Return the digest of the names, their order and their shapes, 8 bytes."""
    return hashlib.sha256(repr([(name, tuple(shape)) for name, shape in spec.shapes.items()]).encode()).digest()[:8]


def load_arrays(context: Context, training: bytes) -> tuple[dict[str, Tensor], bytes] | None:
    """Return a training's arrays in their order, and their identity (`tofu.weights`); None if there are none."""
    record = context.state.config_records.get(f"{_ARRAYS}.{training.hex()}")
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


def save_arrays(context: Context, training: bytes, arrays: dict[str, Tensor], identity: bytes) -> None:
    """Keep the arrays for this client's next round."""
    data = safetensors.torch.save({name: value.clone().contiguous() for name, value in arrays.items()})
    names = json.dumps(list(arrays))
    record = ConfigRecord({"version": _ARRAYS_VERSION, "arrays": data, "names": names, "identity": identity})
    _keep(context, _ARRAYS, training, record)
