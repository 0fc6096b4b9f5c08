"""The byte format of plugin exports in open rounds; secure rounds sum them in the ring."""

import math
from collections.abc import Mapping

from torch import Tensor

from tofu.errors import PayloadError
from tofu.plugins.base import Export
from tofu.plugins.state import state_from_bytes, state_to_bytes
from tofu.weights import SumSpec

MAX_STATE_BYTES = 2**30
"""Maximum size of the private states of all plugins on a client, and of their broadcasts."""

_MAX_METRICS_BYTES = 2**16

MAX_METRIC = 1e30
"""Maximum magnitude of a reported metric, so that sums over many clients stay finite."""


def export_to_bytes(export: Export) -> bytes:
    """Serialize a client's export for an open round, in which the server may see its sums."""
    sums = {f"sum/{name}": value for name, value in export.sums.items()}
    return state_to_bytes(
        sums | {f"metric/{name}": value for name, value in export.metrics.items()}, max_bytes=MAX_STATE_BYTES
    )


def export_from_bytes(data: bytes, declared: Mapping[str, SumSpec]) -> Export:
    """Parse an export.

    Raises:
        PayloadError: the bytes are not an export, or exceed the declared sums plus 64 KiB of metrics.
    """
    budget = sum(8 * math.prod(spec.shape) + 4 * len(spec.shape) + len(name) + 64 for name, spec in declared.items())
    state = state_from_bytes(data, max_bytes=budget + _MAX_METRICS_BYTES)
    sums: dict[str, Tensor] = {}
    metrics: dict[str, float] = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        if kind == "sum" and isinstance(value, Tensor):
            sums[name] = value
        elif kind == "metric" and isinstance(value, float):
            if abs(value) > MAX_METRIC:
                raise PayloadError(f"metric {name!r} is {value:g}, expected at most {MAX_METRIC:g}")
            metrics[name] = value
        else:
            raise PayloadError(f"export holds {key[:40]!r}, expected sums and metrics")
    return Export(sums, metrics)
