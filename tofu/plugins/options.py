"""Options of a swappable part as fields of its dataclass: default, help and bounds, and values checked on the way in.

@dataclass
class Mix(Plugin):
    share: float = option(0.5, "share of a batch that is mixed", least=0, most=1)

read_options(Mix, {"share": "0.3"}, prefix="mix")  # {"share": 0.3}
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tofu.errors import SettingError

Value = bool | int | float | str


@dataclass(frozen=True)
class Accepted:
    """What an option is for and which values it takes: one of `choices`, or a number within the bounds."""

    help: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None


def option(default: Value, help_: str, *, choices: tuple[str, ...] = (), least: float | None = None,
           above: float | None = None, most: float | None = None) -> Any:  # fmt: skip
    """A dataclass field that a user may set; its annotation must be bool, int, float or str."""
    accepted = Accepted(help_, choices, least, above, most)
    return dataclasses.field(default=default, kw_only=True, metadata={"option": accepted})


def options_of(kind: type) -> "dict[str, dataclasses.Field[Any]]":
    """The options of a class as the user writes them (dashes for underscores) -> field.

    Raises:
        SettingError: the class has options but is no dataclass.
    """
    undecorated = [n for n, v in vars(kind).items() if isinstance(v, dataclasses.Field) and "option" in v.metadata]
    if undecorated:
        raise SettingError("plugins", kind.__name__, f"a class decorated with @dataclass (option {undecorated[0]})")
    if not dataclasses.is_dataclass(kind):
        return {}
    return {f.name.replace("_", "-"): f for f in dataclasses.fields(kind) if "option" in f.metadata}


def read_options(kind: type, texts: Mapping[str, str], *, prefix: str) -> dict[str, Any]:
    """Keyword arguments for `kind` from option name -> text.

    Raises:
        SettingError: names `prefix.option`: it is unknown, of the wrong type or out of range.
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
    if field.type is bool:
        if text not in ("true", "false"):
            raise SettingError(label, text, "true or false")
        return text == "true"
    if field.type is str:
        if accepted.choices and text not in accepted.choices:
            raise SettingError(label, text, f"one of {', '.join(accepted.choices)}")
        return text
    try:
        value = int(text) if field.type is int else float(text)
    except ValueError:
        raise SettingError(label, text, "a whole number" if field.type is int else "a number") from None
    low = (accepted.least is None or value >= accepted.least) and (accepted.above is None or value > accepted.above)
    if not (low and (accepted.most is None or value <= accepted.most) and abs(value) < float("inf")):
        bounds = (("at least", accepted.least), ("above", accepted.above), ("at most", accepted.most))
        said = ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        raise SettingError(label, text, f"a finite number {said}".rstrip())
    return value
