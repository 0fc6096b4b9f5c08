"""A client's copy of the global arrays between rounds, in its Flower context, for steps from the server.

Arrays are stored as plain bytes, because Flower parses its own arrays with `ast.literal_eval`, which sometimes fails in
CPython 3.11 when two threads call it at the same time, as the clients of one process do.
"""

import json

import safetensors
import safetensors.torch
from flwr.app import ConfigRecord, Context
from torch import Tensor

_STATE = "tofu.downlink"
_VERSION = 1


def load_arrays(context: Context) -> tuple[dict[str, Tensor], bytes] | None:
    """The arrays in their order, and their identity (`tofu.weights`); None if there are none."""
    record = context.state.config_records.get(_STATE)
    if record is None or record.get("version") != _VERSION:
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
    context.state[_STATE] = ConfigRecord(
        {"version": _VERSION, "arrays": data, "names": json.dumps(list(arrays)), "identity": identity}
    )
