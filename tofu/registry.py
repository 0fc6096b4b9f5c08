"""Registries of classes that users can extend, by a decorator or as `package.module:Class`.

A registry finds its built-in names without importing the modules: it searches their source files for
`@NAME.register("...")`. So the names can be listed before torch is loaded, and a new entry changes one file.
"""

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from tofu.errors import SettingError, user_code
from tofu.hooks import check_overrides
from tofu.imports import import_object

_DECORATOR = re.compile(r"^@[\w.]*\.register\(\s*[\"']([^\"']+)[\"']", re.MULTILINE)

T = TypeVar("T")
E = TypeVar("E")


class Registry(Generic[T]):
    """Entries of type T (a class such as `type[Compressor]`, or another callable) by name.

    Args:
        setting: the setting that selects an entry; errors name it.
        base: the class that every entry must subclass, itself or as "module:Class"; None accepts any callable.
        sources: packages (their modules, without subpackages) and modules that register the built-in entries.

    Example:
        >>> from tofu.compression import compressors
        >>> "stc" in compressors.names()
        True
        >>> compressors.get("stc")
        <class 'tofu.compression.stc.Stc'>
        >>> compressors.get("tofu.compression.stc:Stc").code
        4
    """

    def __init__(self, setting: str, base: type | str | None, *sources: str) -> None:
        self._setting, self._base, self._sources = setting, base, sources
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """Return a decorator that registers a class or a callable; it sets the `name` of a class.

        Raises:
            ValueError: another entry has that name.
        """

        def decorate(entry: E) -> E:
            if name in self._entries:
                raise ValueError(f"{self._setting} {name!r} is registered twice")
            self._entries[name] = self._checked(name, entry)
            if inspect.isclass(entry):
                entry.name = name  # type: ignore[attr-defined]
            return entry

        return decorate

    def names(self) -> tuple[str, ...]:
        """Return the built-in names by file, then what was registered elsewhere."""
        return tuple(dict.fromkeys((*self._modules, *self._entries)))

    def get(self, name: str) -> T:
        """Return the entry with a registered name, or the object at `package.module:attribute`.

        Raises:
            SettingError: the name is unknown, the module cannot be imported, or the base class is another one.
        """
        if name not in self._entries and name in self._modules:
            importlib.import_module(self._modules[name])
        if name in self._entries:
            return self._entries[name]
        module, colon, attribute = name.partition(":")
        if not (module and colon and attribute):
            raise SettingError(self._setting, name, f"one of {', '.join(self.names())}, or package.module:Class")
        with user_code(self._setting, name, "a package.module:Class that can be imported"):
            entry = import_object(name)
        return self._checked(name, entry)

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Built-in name -> the module that registers it."""
        found = {}
        for module, path in (pair for source in self._sources for pair in _files(source)):
            found.update(dict.fromkeys(_DECORATOR.findall(path.read_text(encoding="utf-8")), module))
        return found

    def _checked(self, name: str, entry: Any) -> T:
        base = self._base
        if isinstance(base, str):
            module, _, attribute = base.partition(":")
            base = getattr(importlib.import_module(module), attribute)
        if base is None:
            if not callable(entry):
                raise SettingError(self._setting, name, "a class or another callable")
        elif not (inspect.isclass(entry) and issubclass(entry, base)):
            raise SettingError(self._setting, name, f"a subclass of {base.__module__}.{base.__name__}")
        elif missing := sorted(getattr(entry, "__abstractmethods__", ())):
            raise SettingError(self._setting, name, f"a class that also defines {', '.join(missing)}")
        else:
            check_overrides(self._setting, entry, base)
        result: T = entry
        return result


def _files(source: str) -> list[tuple[str, Path]]:
    """Modules of a package in alphabetical order, or one module, each with its file; none if it is not installed.

    No package is imported for this, because that would run a user's own `client.py`.
    """
    top, *rest = source.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return []
    places = [Path(place).joinpath(*rest) for place in spec.submodule_search_locations or ()]
    if not places:
        return [] if rest else [(source, Path(spec.origin))]
    files = [place.with_suffix(".py") for place in places if rest and place.with_suffix(".py").is_file()]
    if files:
        return [(source, files[0])]
    paths = sorted(path for place in places for path in place.glob("*.py"))
    return [(source if path.stem == "__init__" else f"{source}.{path.stem}", path) for path in paths]
