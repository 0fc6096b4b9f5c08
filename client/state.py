"""A client's state between rounds, in its Flower context: error feedback, the codec's memory, the plugins' states, and
the global weights if the downlink is compressed.

State that is missing or belongs to another architecture (a plugin changed the model) is ignored. Only the plugins'
states and their broadcast, which determine the architecture, survive such a change.
Weights are stored as plain bytes, because Flower parses its arrays with `ast.literal_eval`, which sometimes fails in
CPython 3.11 when two threads call it at the same time, as the clients of one process do.
"""

from dataclasses import dataclass
from typing import Literal

from flwr.app import ConfigRecord, Context

from tofu.compression.error_feedback import ErrorFeedback
from tofu.flower.client_state import read_feedback, read_weights, write_feedback
from tofu.local_layers import LocalLayers
from tofu.reference_model import ReferenceModel
from tofu.rounds.downlink import KeptWeights
from tofu.weights import Weights
from tofu.wire import FIELD, class_names_from, class_names_to_text, float32_bytes

_RECORD = "tofu"
_LOCAL = "tofu-local"
_CLASSES = "tofu-classes"
_VERSION = 4


@dataclass(frozen=True)
class SavedState:
    """A client's state.

    Attributes:
        memory: the compressor's memory, such as its last proxies.
        kept: the global weights; None if they are not kept.
        plugins: the plugins' private states (`tofu.plugins.Plugins.state_bytes`).
    """

    feedback: ErrorFeedback
    memory: bytes
    kept: KeptWeights | None = None
    plugins: bytes = b""


def load_bytes(context: Context, name: Literal["broadcast", "plugins"]) -> bytes:
    """Return the plugins' broadcast that this client keeps, or their own states; b"" if there is none.

    Both are needed before the model exists.
    """
    record = context.state.config_records.get(_RECORD)
    value = record.get(name) if record is not None and record.get("version") == _VERSION else None
    return value if isinstance(value, bytes) else b""


def has_class_names(context: Context) -> bool:
    """Return whether the server could send the classes of the run, and the state since then is kept."""
    return _CLASSES in context.state.config_records


def load_class_names(context: Context) -> tuple[str, ...]:
    """Return the classes of the run, in the order in which the server numbers them;
    () if the server has not sent them.
    """
    record = context.state.config_records.get(_CLASSES)
    return class_names_from(record.get(FIELD)) if record is not None else ()


def save_class_names(context: Context, names: tuple[str, ...]) -> None:
    """Keep the classes of the run for all its rounds."""
    context.state[_CLASSES] = ConfigRecord({FIELD: class_names_to_text(names)})


def load_local(context: Context, local: LocalLayers) -> Weights:
    """Return the values of this client's own layers; empty before its first round."""
    record = context.state.config_records.get(_LOCAL)
    return local.read(record.get("values")) if record is not None else {}


def save_local(context: Context, values: Weights) -> None:
    """Keep the values of this client's own layers."""
    context.state[_LOCAL] = ConfigRecord({"values": LocalLayers.write(values)})


def load_state(context: Context, reference: ReferenceModel) -> SavedState:
    """Return the state that `save_state` left, or an empty one if it belongs to another architecture."""
    record, param_spec = context.state.config_records.get(_RECORD), reference.param_spec
    if record is None or record.get("version") != _VERSION or record.get("architecture") != reference.architecture:
        return SavedState(ErrorFeedback(), b"", plugins=load_bytes(context, "plugins"))

    memory, identity = record.get("memory"), record.get("identity")
    kept = read_weights(record, "kept", param_spec)
    return SavedState(
        read_feedback(record, param_spec),
        memory if isinstance(memory, bytes) else b"",
        KeptWeights(kept, identity) if kept is not None and isinstance(identity, bytes) else None,
        load_bytes(context, "plugins"),
    )


def save_state(
    context: Context,
    reference: ReferenceModel,
    *,
    feedback: ErrorFeedback | None,
    memory: bytes,
    kept: KeptWeights | None = None,
    plugins: bytes = b"",
    broadcast: bytes = b"",
) -> None:
    """Store the state in `context` for this client's next round; values that are None are not stored."""
    param_spec = reference.param_spec
    record = ConfigRecord(
        {
            "version": _VERSION, "architecture": reference.architecture, "memory": memory, "plugins": plugins,
            "broadcast": broadcast,
        }
    )  # fmt: skip
    if feedback is not None:
        write_feedback(record, feedback, param_spec)
    if kept is not None:
        record["kept"] = float32_bytes(kept.weights, param_spec)
        record["identity"] = kept.identity
    context.state[_RECORD] = record
