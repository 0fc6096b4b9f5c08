"""Time limits that a machine busy with other work does not reach early."""

import os
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any


def load_factor() -> float:
    """How many processes share each core that this one may use, over the last minute; at least 1.

    A limit in seconds is multiplied by it: with four processes on a core, a start takes four times as long.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1.0, os.getloadavg()[0] / cores)


def extend_tokens(module: ModuleType, state: type) -> None:
    """Let Flower's task tokens last longer on a busy machine, by `load_factor`.

    An app that was started has 30 s to use its token, or another one is started in its place; one that runs has 60 s
    for each heartbeat, or it counts as failed. Where all processes are slow, no app ever comes up.

    Args:
        module: the module of `state`, from which it reads HEARTBEAT_DEFAULT_INTERVAL.
        state: a class of Flower that stores tasks: `SqlCoreState` or `InMemoryCoreState`.
    """
    seconds = module.HEARTBEAT_DEFAULT_INTERVAL

    def extended(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, task_id: int) -> Any:
            module.HEARTBEAT_DEFAULT_INTERVAL = seconds * load_factor()  # type: ignore[attr-defined]
            return method(self, task_id)

        return call

    for name in ("claim_task", "activate_task", "acknowledge_task_heartbeat"):
        setattr(state, name, extended(getattr(state, name)))
