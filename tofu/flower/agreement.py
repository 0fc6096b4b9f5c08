"""Names the arguments in which a client's mod and the server's strategy differ.

The strategy's record holds a digest of all arguments, which decides, and a text of those that are not defaults, which
only serves to name the difference to the user.
"""

import json
from collections.abc import Mapping

_MAX_CHARACTERS = 4096
_MAX_VALUE = 60


def arguments_text(arguments: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """Return the arguments that are not defaults as JSON, name -> text.

    Example:
        >>> arguments_text({"ratio": 20, "downlink": 0.0}, {"ratio": 50.0, "downlink": 0.0})
        '{"ratio": "20"}'
    """
    return json.dumps({name: _text(value) for name, value in arguments.items() if value != defaults.get(name)})


def joined_texts(text: str, other: str) -> str:
    """Return two texts with different names as one."""
    return json.dumps(json.loads(text) | json.loads(other))


def named_differences(own: str, servers: object, defaults: Mapping[str, object]) -> str:
    """Return the arguments that differ between this client's text and the server's, for an error message.

    Example:
        >>> named_differences('{"ratio": "20"}', '{"ratio": "21", "downlink": "10"}', {"downlink": 0.0})
        'downlink: 0 (the default) at this client, 10 at the server; ratio: 20 at this client, 21 at the server'
    """
    here, there = _read(own) or {}, _read(servers)
    if there is None or here == there:
        return "none is named: use one version of tofu-fl"

    def value(given: Mapping[str, str], name: str) -> str:
        default = f"{_text(defaults[name])} (the default)" if name in defaults else "not given"
        return given.get(name, default)

    return "; ".join(
        f"{name}: {value(here, name)} at this client, {value(there, name)} at the server"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    )


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read(text: object) -> dict[str, str] | None:
    """Return the arguments of a text; None if it is none, as it comes from the network."""
    if not isinstance(text, str) or len(text) > _MAX_CHARACTERS:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        return None
    return {_printable(name): _printable(value) for name, value in values.items()}


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_VALUE])
