"""JSON objects from files that others may have written, read one typed value at a time; every refusal is one line."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tofu.errors import RunError


def finite(value: float) -> float | None:
    """The value, or None where it is no number or beyond what a float holds."""
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Fields:
    """Typed access to one JSON object; `where` is the file and line that an error names."""

    values: dict[str, Any]
    where: str

    def number(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number or null")
        return finite(value)

    def count(self, name: str) -> int:
        value = self.values.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(name, "a whole number from 0")
        return value

    def count_or_none(self, name: str) -> int | None:
        return None if self.values.get(name) is None else self.count(name)

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def objects(self, name: str) -> list[dict[str, Any]]:
        value = self.values.get(name, [])
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self._wrong(name, "a list of objects")
        return value

    def text_or_empty(self, name: str) -> str:
        return "" if self.values.get(name) is None else self.text(name)

    def numbers(self, name: str) -> tuple[float | None, ...]:
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self._wrong(name, "a list of numbers")
        entries = Fields({f"{index}": entry for index, entry in enumerate(value)}, f"{self.where} {name}")
        return tuple(entries.number(index) for index in entries.values)

    def numbers_by_name(self, name: str) -> dict[str, float | None]:
        value = self.values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(name, "an object of numbers")
        entries = Fields(value, f"{self.where} {name}")
        return {key: entries.number(key) for key in value}

    def _wrong(self, name: str, accepted: str) -> RunError:
        found = repr(self.values[name])[:60] if name in self.values else "nothing"
        return RunError(f"{self.where}: {name!r} must be {accepted}, found {found}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing: is {path.parent} the folder of a run?") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} does not read: {error}") from error


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise RunError(f"{where} is not JSON: {reason}") from error
    if not isinstance(value, dict):
        raise RunError(f"{where} must hold a JSON object, found {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        return _object(text, f"{path}")
    except RunError as error:
        # A whole file has lines too: say which one, as for the line files.
        cause = error.__cause__
        if isinstance(cause, json.JSONDecodeError):
            raise RunError(f"{path} line {cause.lineno} is not JSON: {cause.msg}") from cause
        raise


def read_lines(path: Path) -> Iterator[Fields]:
    # Split at "\n" only: str.splitlines would also cut at characters that JSON allows inside a string.
    *lines, unfinished = _read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield Fields(_object(line, where), where)
    if unfinished.strip():
        where = f"{path} line {len(lines) + 1}"
        try:
            last = _object(unfinished, where)
        except RunError:
            return
        yield Fields(last, where)
