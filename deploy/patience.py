"""Time limits that a machine busy with other work does not reach early."""

import math
import os
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

_LONGEST_HEARTBEAT = 4.0


def load_factor() -> float:
    """Return how many processes share each core of the machine, over the last minute; at least 1.

    A limit in seconds is multiplied by it: with four processes on a core, a start takes four times as long. All cores
    count, because the load is that of all of them, also in a container or a process that may use only a few.
    """
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def extend_tokens(module: ModuleType, state: type) -> None:
    """Let Flower's task tokens last longer on a busy machine, by `load_factor`.

    An app that was started has 30 s to use its token, or another one is started in its place; one that runs has 60 s
    for each heartbeat, or it counts as failed. Where all processes are slow, no app ever comes up. An app that was
    killed is missed only when its token has ended, so the token of an app that runs lasts at most four times as long.

    Args:
        module: the module of `state`, from which it reads HEARTBEAT_DEFAULT_INTERVAL.
        state: a class of Flower that stores tasks: `SqlCoreState` or `InMemoryCoreState`.
    """
    seconds = module.HEARTBEAT_DEFAULT_INTERVAL

    def extended(method: Callable[..., Any], limit: float) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, task_id: int) -> Any:
            module.HEARTBEAT_DEFAULT_INTERVAL = seconds * min(load_factor(), limit)  # type: ignore[attr-defined]
            return method(self, task_id)

        return call

    for name, limit in (
        ("claim_task", math.inf),
        ("activate_task", _LONGEST_HEARTBEAT),
        ("acknowledge_task_heartbeat", _LONGEST_HEARTBEAT),
    ):
        setattr(state, name, extended(getattr(state, name), limit))
