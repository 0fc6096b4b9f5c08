"""Deprecated names and values of settings, which are accepted for one release with a warning."""

import sys
from collections.abc import Mapping

from tofu.errors import SettingError

Scalar = bool | int | float | str

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

PLUGIN_OPTIONS: Mapping[str, str] = {
    "gpm.longest": "gpm.max-norm",
    "gpm.most": "gpm.max-fraction",
    "ood.share": "ood.fraction",
    "rank.longest": "rank.max-norm",
    "spatio-temporal.longest": "spatio-temporal.max-potential",
}
"""The same for options of plugins."""

VALUES: Mapping[str, Mapping[object, str]] = {
    "compressor": {"full": "none"},
    "downlink": {"full": "full-weights"},
    "recovery": {"full": "fedavg"},
    "schedule": {"full": "fedavg", "proxy": "compressed"},
    "server-optimizer": {"plain": "sgd"},
}
"""Present name -> old value -> present value."""

_warned: set[str] = set()


def dashed(name: str) -> str:
    """Return a setting's name as users write it."""
    return name.replace("_", "-")


def present_names(values: Mapping[str, object], *, warn: bool = True) -> dict[str, object]:
    """Return the settings by their present names, with dashes; old values become the present ones.

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
        result[name] = present_value(name, value, warn=warn) if isinstance(value, str) else value
    return result


def present_value(name: str, value: str, *, warn: bool = True) -> str:
    """Return the present form of a setting's value.

    Args:
        name: present name of the setting, with dashes.
    """
    present = VALUES.get(name, {}).get(value, value)
    if present != value and warn:
        warn_once(f"{name}={value} is deprecated: use {name}={present}")
    return present


def present_option(key: str) -> str:
    """Return the present name of a plugin's option, `plugin.option`."""
    name = PLUGIN_OPTIONS.get(key, key)
    if name != key:
        warn_once(f"plugin option {key} is deprecated: use {name}")
    return name


def present_kind(kind: str) -> str:
    """Return the present name of a kind of round in a file of an earlier version."""
    return present_value("schedule", kind, warn=False)


def present_node_config(config: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return a client's node config with present names. Old names must not be ignored: they restrict the server.

    Raises:
        SettingError: an entry is given by its old and by its present name.
    """
    result: dict[str, Scalar] = {}
    for old, value in config.items():
        name = NODE_NAMES.get(old, old)
        if name in result:
            raise SettingError(old, value, f"{name} once (it is given by two names)")
        if name != old:
            warn_once(f"node config {old} is deprecated: use {name}")
        result[name] = value
    if isinstance(allowed := result.get("allowed-rounds"), str):
        kinds = [present_kind(kind.strip()) for kind in allowed.split(",")]
        result["allowed-rounds"] = ", ".join(kinds)
    return result


def warn_once(line: str) -> None:
    """Print a warning on standard error, once per process."""
    if line not in _warned:
        _warned.add(line)
        print(f"warning: {line}", file=sys.stderr)
