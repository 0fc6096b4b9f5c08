"""Options of a plugin, which are fields of its dataclass with default, help and bounds.

@dataclass
class Mix(Plugin):
    fraction: float = option(0.5, "fraction of a batch that is mixed", ge=0, le=1)
    widths: list = option((), "widths of the layers")

read_options(Mix, {"fraction": "0.3", "widths": "[16, 32]"}, prefix="mix")  # {"fraction": 0.3, "widths": [16, 32]}

This module does not import torch.
"""

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from tofu.errors import SettingError

Value = bool | int | float | str | list[Any] | dict[str, Any]

_NEXT_OPTION = re.compile(r"\s+(?=[\w-]+\.[\w-]+=)")
_WORDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_STRUCTURES: Mapping[type, str] = {list: "a JSON list", dict: "a JSON object"}


@dataclass(frozen=True)
class Accepted:
    """The help of an option and its accepted values: one of `choices`, or a number within the bounds."""

    help: str
    choices: tuple[str, ...] = ()
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def allows(self, value: float) -> bool:
        """Return whether a number is finite and within the bounds."""
        return (
            abs(value) < float("inf")
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


def option(
    default: Any,
    help_: str,
    *,
    choices: tuple[str, ...] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Return a dataclass field that users may set; its annotation is bool, int, float, str, list or dict.

    Args:
        default: an immutable value, or a list or dict, of which every instance gets a copy.
        choices: the values of a str.
        ge, gt, le, lt: bounds of a number, or of each number in a list.
    """
    metadata = {"option": Accepted(help_, choices, ge, gt, le, lt)}
    if isinstance(default, list | dict):
        text = json.dumps(default)
        return dataclasses.field(default_factory=lambda: json.loads(text), kw_only=True, metadata=metadata)
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


def options_of(kind: type) -> "dict[str, dataclasses.Field[Any]]":
    """Return the options of a class as users write them (with dashes) -> field.

    Raises:
        SettingError: the class has options but is not a dataclass.
    """
    undecorated = [n for n, v in vars(kind).items() if isinstance(v, dataclasses.Field) and "option" in v.metadata]
    if undecorated:
        raise SettingError("plugins", kind.__name__, f"a class decorated with @dataclass (option {undecorated[0]})")
    if not dataclasses.is_dataclass(kind):
        return {}
    return {f.name.replace("_", "-"): f for f in dataclasses.fields(kind) if "option" in f.metadata}


def split_options(text: str) -> list[str]:
    """Return the parts of a `plugin-options` text, one per `plugin.option=`; the JSON of a value may contain spaces."""
    return _NEXT_OPTION.split(text.strip()) if text.strip() else []


def inline_files(text: str) -> str:
    """Return a `plugin-options` text with each `plugin.option=@FILE` replaced by the file's content as JSON.

    The command line calls this, so that clients on other machines do not need the file.

    Raises:
        SettingError: a file cannot be read, or is neither JSON nor TOML.
    """
    parts = []
    for part in split_options(text):
        label, equals, value = part.partition("=")
        if value.startswith("@"):
            value = json.dumps(_from_file(value, label), separators=(",", ":"))
        parts.append(f"{label}{equals}{value}")
    return " ".join(parts)


def read_options(kind: type, texts: Mapping[str, str], *, prefix: str) -> dict[str, Any]:
    """Keyword arguments for `kind` from option name -> text.

    Raises:
        SettingError: names `prefix.option`: it is unknown, has the wrong type or is out of range.
    """
    fields = options_of(kind)
    values: dict[str, Any] = {}
    for key, text in texts.items():
        name = key.replace("_", "-")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5) or list(fields)
            raise SettingError(f"{prefix}.{key}", text, f"a known option ({', '.join(near) or 'it has none'})")
        values[fields[name].name] = _read(fields[name], text, f"{prefix}.{name}")
    return values


def _read(field: "dataclasses.Field[Any]", text: str, label: str) -> Value:
    accepted: Accepted = field.metadata["option"]
    kind: Any = get_origin(field.type) or field.type
    if kind is bool:
        if text not in ("true", "false"):
            raise SettingError(label, text, "true or false")
        return text == "true"
    if kind is str:
        if accepted.choices and text not in accepted.choices:
            raise SettingError(label, text, f"one of {', '.join(accepted.choices)}")
        return text
    if kind in _STRUCTURES:
        return _structure(kind, text, label, accepted)
    try:
        value = int(text) if kind is int else float(text)
    except ValueError:
        raise SettingError(label, text, "a whole number" if kind is int else "a number") from None
    if not accepted.allows(value):
        raise SettingError(label, text, f"a finite number{_bounds(accepted)}")
    return value


def _structure(kind: type, text: str, label: str, accepted: Accepted) -> Value:
    try:
        value: Any = _from_file(text, label) if text.startswith("@") else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingError(label, text, f"{_STRUCTURES[kind]}, or @FILE with one ({error})") from None
    if not isinstance(value, kind):
        raise SettingError(label, text, f"{_STRUCTURES[kind]}, or @FILE with one")
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, int | float) and not accepted.allows(entry):
                raise SettingError(label, text, f"finite numbers{_bounds(accepted)}")
    structure: Any = value
    return structure  # type: ignore[no-any-return]


def _from_file(text: str, label: str) -> Any:
    path = Path(text.removeprefix("@"))
    try:
        content = path.read_text(encoding="utf-8")
        return tomllib.loads(content) if path.suffix == ".toml" else json.loads(content)
    except OSError as error:
        raise SettingError(label, text, f"a readable file ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        language = "TOML" if path.suffix == ".toml" else "JSON"
        raise SettingError(label, text, f"a file of {language} ({error})") from error


def _bounds(accepted: Accepted) -> str:
    bounds = ((word, getattr(accepted, name)) for name, word in _WORDS.items())
    text = ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    return f" {text}" if text else ""
