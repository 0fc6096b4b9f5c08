"""The declaration, checks and description of one setting."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from tofu.errors import SettingError

Value = bool | int | float | str

M = TypeVar("M", bound=BaseModel)

AUTO = "auto"
"""Alias of 0 in settings whose value the program can choose."""
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def setting(
    default: Value,
    help_: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    section: str = "",
    repeated: str = "",
    auto: bool = False,
) -> Any:
    """Declare one setting as a pydantic field.

    Args:
        help_: one line for `--help` and the JSON schema.
        ge, gt, le, lt: bounds of a number.
        section: heading of `--help`, if it is not that of the group.
        repeated: separator of several values; such an option may be given several times.
        auto: whether 0 lets the program choose; users may then write "auto", too.
    """
    extra: dict[str, Any] = {"section": section, "repeated": repeated, "auto": auto}
    finite = False if isinstance(default, float) else None
    return Field(default, description=help_, ge=ge, gt=gt, le=le, lt=lt, allow_inf_nan=finite, json_schema_extra=extra)


class Group(BaseModel):
    """Settings that one component reads. Immutable; values must have the declared type (an int may be a float)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def replace(self, **changes: Value) -> Self:
        """Return a checked copy with other values. Raises SettingError as `Settings.of` does."""
        return build(type(self), self.model_dump() | changes)


def build(group: type[M], values: Mapping[str, Any]) -> M:
    """Build a group, with pydantic's first error as a SettingError.

    Raises:
        SettingError: a name is unknown, or a value has the wrong type or is out of range.
    """
    fields = group.model_fields
    if unknown := sorted(values.keys() - fields.keys()):
        raise SettingError(unknown[0], values[unknown[0]], f"a field of {group.__name__}")
    automatic = {name for name, value in values.items() if value == AUTO and has_auto(fields[name])}
    given = {name: kind_of(fields[name])(0) if name in automatic else value for name, value in values.items()}
    try:
        return group(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0])
        raise SettingError(name, values[name], expected(group.model_fields[name])) from None


def comma_list(text: str) -> tuple[str, ...]:
    """Return the names in a text, separated by commas, without white space around them.

    >>> comma_list(" cat, dog,")
    ('cat', 'dog')
    """
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def names_of(text: str) -> tuple[str, ...]:
    """Return the class names in a text, as those of `comma_list`; a name that contains commas is in double quotes.

    >>> names_of('cat, "dog, big"')
    ('cat', 'dog, big')
    """
    rows = csv.reader([text], skipinitialspace=True)
    return tuple(filter(None, (name.strip() for row in rows for name in row)))


def names_to_text(names: Iterable[str]) -> str:
    """Return the text from which `names_of` reads these names."""
    file = io.StringIO()
    csv.writer(file, lineterminator="").writerow(names)
    return file.getvalue()


def kind_of(field: FieldInfo) -> type:
    """Return the Python type of a setting: bool, int, float or str."""
    return type(field.default)


def has_auto(field: FieldInfo) -> bool:
    """Return whether the program can choose the value, by 0 or "auto"."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("auto"))


def shown_default(field: FieldInfo) -> str:
    """Return the default as text for help and reference: "auto" if the program chooses."""
    if has_auto(field) and not field.default:
        return AUTO
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def choices_of(field: FieldInfo) -> tuple[Value, ...]:
    """Return the accepted values of a setting with a fixed choice, else an empty tuple."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def bounds_of(field: FieldInfo) -> dict[str, float]:
    """Bounds of a number by pydantic's names: ge, gt, le, lt."""
    return {
        name: getattr(constraint, name)
        for constraint in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(constraint, name, None) is not None
    }


def expected(field: FieldInfo) -> str:
    """Return the accepted values of a setting, as text that completes "expected ..."."""
    if choices := choices_of(field):
        return f"one of {', '.join(map(str, choices))}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = ", ".join(f"{words[name]} {bound:g}" for name, bound in bounds_of(field).items())
    return f"{_TYPES[kind_of(field)]} {bounds}".strip() + (", or auto" if has_auto(field) else "")


def parse_text(name: str, field: FieldInfo, text: str) -> Value:
    """Return the value of a setting from the text of a command line.

    Raises:
        SettingError: the text is not of the setting's type. Bounds are checked by `build`.
    """
    kind = kind_of(field)
    try:
        if text == AUTO and has_auto(field):
            text = "0"
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        result: Value = kind(text)
        return result
    except (KeyError, ValueError):
        raise SettingError(name, text, expected(field)) from None


__all__ = [
    "AUTO", "Group", "Value", "bounds_of", "build", "choices_of", "comma_list", "expected", "has_auto", "kind_of",
    "parse_text", "setting", "shown_default",
]  # fmt: skip
