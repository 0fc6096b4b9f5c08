"""Options that several commands share: one for every setting, and the reading of settings from options and files."""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from pydantic.fields import FieldInfo

from tofu.errors import SettingError, user_code
from tofu.formatting import printable
from tofu.imports import check_module
from tofu.settings import (
    FIELDS,
    Settings,
    Value,
    accepted_values,
    dashed,
    has_auto,
    is_extensible,
    kind_of,
    parse_setting,
    read_toml,
    section_of,
    separator_of,
    shown_default,
)
from tofu.settings.deprecated import NAMES, present_names, present_value, warn_once
from tofu.settings.groups import MODELS

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with settings", rich_help_panel="Run")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object at the end, and no progress")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress view")]

_REPEATED = {name: separator for name in FIELDS if (separator := separator_of(name))}
"""Settings that may be given several times, and the separator of their values."""


class SettingChoice(click.Choice[str]):
    """The values of one setting: help and completion list them, and an error is that of the setting, in one line.

    Settings that users can extend also accept `package.module:Class`, and values that are deprecated are accepted.
    """

    def __init__(self, setting: str, choices: Sequence[str]) -> None:
        super().__init__(choices)
        self._setting = setting

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = present_value(dashed(self._setting), str(value))
        extensible = is_extensible(self._setting)
        parsed = parse_setting(self._setting, text)
        if text in self.choices or (extensible and ":" in text):
            return parsed
        also = ", or package.module:Class" if extensible else ""
        raise SettingError(self._setting, parsed, f"one of {', '.join(self.choices)}{also}")


class NumberOrAuto(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click only
    """A number, or "auto", with which the program chooses. An error is that of the setting, in one line."""

    name = "number"

    def __init__(self, setting: str) -> None:
        self._setting = setting

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return parse_setting(self._setting, str(value))


def line_printer(*, quiet: bool) -> Callable[[str], None]:
    """Return a function that prints one line of progress on standard error, or does nothing if `quiet`."""

    def log(line: str) -> None:
        if not quiet:
            print(printable(line), file=sys.stderr, flush=True)

    return log


def with_present_flags(arguments: Sequence[str]) -> list[str]:
    """Replace deprecated names of options in arguments, such as `--fraction=0.5`, and warn of each."""
    names, result = {**NAMES, "moments": "pretrain-rounds"}, []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        prefix = "--no-" if flag.startswith("--no-") else "--"
        old = flag.removeprefix(prefix)
        if flag.startswith("--") and old in names:
            warn_once(f"setting {old} is deprecated: use {names[old]}")
            result.append(f"{prefix}{names[old]}{equals}{value}")
        else:
            result.append(argument)
    return result


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with one option per setting; it receives those that were given as `overrides`."""
    names = list(FIELDS)

    def wrapped(**given: Any) -> None:
        overrides = {name: given.pop(name) for name in names}
        if overrides["model"] is not None:
            _check_model(overrides["model"])
        for name, separator in _REPEATED.items():
            if overrides[name] is not None:
                overrides[name] = separator.join(overrides[name])
        if "@" in (overrides["plugin_options"] or ""):
            from tofu.plugins.options import inline_files

            overrides["plugin_options"] = inline_files(overrides["plugin_options"])
        command(overrides={name: value for name, value in overrides.items() if value is not None}, **given)

    own = [p for p in inspect.signature(command).parameters.values() if p.name != "overrides"]
    options = [_option(name, field) for name, field in FIELDS.items()]
    wrapped.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
    wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
    return wrapped


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = dashed(name)
    text = str(field.description)
    choices = accepted_values(name)
    if choices and not all(choice in text for choice in choices):
        text += f" ({', '.join(choices)})"
    shown = shown_default(field)
    text += f" \\[default: {shown}]" if shown else ""  # escaped: brackets are markup in a help text
    flags = [f"--{flag}/--no-{flag}" if kind_of(field) is bool else f"--{flag}"]
    kind: Any = kind_of(field)
    if name in _REPEATED:
        flags = list(dict.fromkeys((*flags, f"--{flag.removesuffix('s')}")))
        kind = list[str]
    more: dict[str, Any] = {"click_type": SettingChoice(name, choices), "metavar": "CHOICE"} if choices else {}
    if has_auto(field):
        more = {"click_type": NumberOrAuto(name), "metavar": "NUMBER|auto"}
    option = typer.Option(*flags, help=text, rich_help_panel=section_of(name), show_default=False, **more)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def settings_from(config: Path | None, overrides: dict[str, Value]) -> Settings:
    """Return the settings by precedence: options, the given file or this folder's pyproject.toml, defaults."""
    values: dict[str, object] = {}
    if config is not None:
        values = read_toml(config)
    elif _is_ours(Path("pyproject.toml")):
        values = read_toml(Path("pyproject.toml"))
    return Settings.of(present_names(values) | present_names(overrides))


def _check_model(name: str) -> None:
    """Refuse a misspelled model or module before torch is imported, which takes seconds. Raises SettingError."""
    if ":" not in name and name not in MODELS:
        raise SettingError("model", name, f"one of {', '.join(MODELS)}, or package.module:factory")
    if ":" in name:
        with user_code(
            "model", name, "package.module:factory, a callable that takes channels, height, width, classes by name"
        ):
            check_module(name)


def _is_ours(path: Path) -> bool:
    import tomllib

    if not path.is_file():
        return False
    try:
        app = tomllib.loads(path.read_text())["tool"]["flwr"]["app"]
        return bool(app["components"]["serverapp"] == "server.app:app")
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False
