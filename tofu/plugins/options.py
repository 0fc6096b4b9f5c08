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
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tofu.errors import SettingError
from tofu.settings.fields import expected, parse_text, setting

Value = bool | int | float | str | list[Any] | dict[str, Any]

_NEXT_OPTION = re.compile(r"\s+(?=[\w-]+\.[\w-]+=)")
_STRUCTURES: Mapping[type, str] = {list: "a JSON list", dict: "a JSON object"}


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
    is_structure = isinstance(default, list | dict)
    kind: Any = Literal[choices] if choices else float if is_structure else type(default)
    accepted = setting(0.0 if is_structure else default, help_, ge=ge, gt=gt, le=le, lt=lt)
    annotated: Any = Annotated[kind, accepted]
    metadata = {"option": FieldInfo.from_annotation(annotated)}
    if is_structure:
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
    accepted: FieldInfo = field.metadata["option"]
    kind: Any = get_origin(field.type) or field.type
    if kind not in _STRUCTURES:
        value = parse_text(label, accepted, text)
        _check(value, accepted, label, text)
        return value
    try:
        structure: Any = _from_file(text, label) if text.startswith("@") else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingError(label, text, f"{_STRUCTURES[kind]}, or @FILE with one ({error})") from None
    if not isinstance(structure, kind):
        raise SettingError(label, text, f"{_STRUCTURES[kind]}, or @FILE with one")
    for entry in structure if isinstance(structure, list) else ():
        if isinstance(entry, int | float):
            _check(entry, accepted, label, text, each="a JSON list with entries that are each ")
    return structure  # type: ignore[no-any-return]


def _check(value: object, accepted: FieldInfo, label: str, text: str, *, each: str = "") -> None:
    annotated: Any = Annotated[accepted.annotation, accepted]
    try:
        TypeAdapter(annotated).validate_python(value)
    except ValidationError:
        raise SettingError(label, text, f"{each}{expected(accepted)}") from None


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
