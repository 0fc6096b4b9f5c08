"""Names the arguments in which a client's mod and the server's strategy differ.

The strategy's record holds a digest of all arguments, which decides, and a text of those that are not defaults, which
only serves to name the difference to the user.
"""

import json
from collections.abc import Mapping

_MAX_CHARACTERS = 4096
_MAX_VALUE = 60
_NOT_GIVEN = (None, (), "")


def arguments_text(arguments: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """Return the arguments that are not defaults as JSON, name -> text.

    Example:
        >>> arguments_text({"ratio": 20, "downlink": 0.0}, {"ratio": 50.0, "downlink": 0.0})
        '{"ratio": "20"}'
    """
    return json.dumps({name: _text(value) for name, value in arguments.items() if value != defaults.get(name)})


def under(prefix: str, arguments: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments with a prefix and a dot before their names: those of `secure={...}`."""
    return {f"{prefix}.{name}": value for name, value in arguments.items()}


def plain_number(value: float) -> int | float:
    """Return a number of any type as the int that it equals, otherwise as a float: 100.0 and True as 100 and 1.

    Equal arguments at the two ends then have equal digests and texts.
    """
    return int(value) if float(value).is_integer() else float(value)


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
        default = defaults.get(name)
        return _printable(given.get(name, "not given" if default in _NOT_GIVEN else f"{_text(default)} (the default)"))

    return "; ".join(
        f"{_printable(name)}: {value(here, name)} at this client, {value(there, name)} at the server"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
        and (_parent(name) == name or here.get(_parent(name)) == there.get(_parent(name)))
    )


def _parent(name: str) -> str:
    return name.partition(".")[0]


def _text(value: object) -> str:
    """Return a value as text: numbers as short as they are exact."""
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)


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
    return values


def _printable(text: str) -> str:
    """Return at most `_MAX_VALUE` printable characters, without the middle of a longer text."""
    half = _MAX_VALUE // 2
    kept = text if len(text) <= _MAX_VALUE else f"{text[: half - 1]}...{text[2 - half :]}"
    return "".join(c if c.isprintable() else "?" for c in kept)
