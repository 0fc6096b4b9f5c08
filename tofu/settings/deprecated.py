"""Names and values of settings from before the renaming. They are accepted for one release, with a warning."""

import sys
from collections.abc import Mapping
from typing import TypeVar

from tofu.errors import SettingError

V = TypeVar("V")

NAMES: Mapping[str, str] = {
    "evaluations": "max-evals",
    "final-lr": "lr-final-factor",
    "fraction": "client-fraction",
    "privacy-budget": "max-epsilon",
    "record": "record-clients",
    "secure-colluding": "secagg-collusion-fraction",
    "secure-dropout": "secagg-dropout-fraction",
    "server-optimiser": "server-optimizer",
    "smooth-twin": "surrogate",
    "steepness": "surrogate-beta",
    "weight-average": "ema-decay",
}
"""Old name -> present name, as users write them."""

NODE_NAMES: Mapping[str, str] = {
    "accomplices": "max-colluding",
    "kinds": "allowed-rounds",
    "least-neighbours": "min-neighbors",
    "least-noise": "min-noise-multiplier",
}
"""The same for a client's node config."""

VALUES: Mapping[str, Mapping[object, str]] = {
    "server-optimizer": {"plain": "sgd"},
}
"""Present name -> old value -> present value."""

_warned: set[str] = set()


def dashed(name: str) -> str:
    """A setting's name as users write it."""
    return name.replace("_", "-")


def present_names(values: Mapping[str, object], *, warn: bool = True) -> dict[str, object]:
    """Settings by their present names, with dashes; old values become the present ones.

    Raises:
        SettingError: a setting is given by its old and by its present name.
    """
    result: dict[str, object] = {}
    for key, value in values.items():
        old = dashed(key)
        name = NAMES.get(old, old)
        if name in result:
            raise SettingError(key, value, f"{name} once (it is given by two names)")
        if name != old and warn:
            warn_once(f"setting {old} is deprecated: use {name}")
        present = VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
        if present is not value and warn:
            warn_once(f"{name}={value} is deprecated: use {name}={present}")
        result[name] = present
    return result


def present_node_config(config: Mapping[str, V]) -> dict[str, V]:
    """A client's node config by the present names: ignoring an old name would lift a restriction.

    Raises:
        SettingError: an entry is given by its old and by its present name.
    """
    result: dict[str, V] = {}
    for old, value in config.items():
        name = NODE_NAMES.get(old, old)
        if name in result:
            raise SettingError(old, value, f"{name} once (it is given by two names)")
        if name != old:
            warn_once(f"node config {old} is deprecated: use {name}")
        result[name] = value
    return result


def warn_once(line: str) -> None:
    """Print a warning on standard error, once per process."""
    if line not in _warned:
        _warned.add(line)
        print(f"warning: {line}", file=sys.stderr)
