"""Errors that a user can act on, each with a message of one line.

The command line prints the text of a `TofuError` and exits with status 2; it never shows a traceback for one.
"""

import os
import re
import sysconfig
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

_DASHED = re.compile(r"""(?<![\w./'"-])(?:--(?=[a-z]))?([a-z0-9]+(?:-[a-z0-9]+)*)(?![\w/'"-])""")
"""A name, with the dashes of an option or without, that is no part of a path, of a longer name or of a quoted value."""

_OWN = tuple(f"{Path(__file__).parents[1] / package}{os.sep}" for package in ("tofu", "client", "server"))
_STANDARD = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib"))
_SITE = re.compile(r"[\\/](?:site|dist)-packages[\\/](\w+)")
_INSTALLED = {"flwr", "numpy", "ray", "torch", "torchvision"}
"""Packages that the user's code calls, and that call it."""


class TofuError(Exception):
    """Base of errors that are caused by the user's input or the network, and not by a bug.

    Line breaks in the message, as in names of files and in errors of the user's code, become spaces.

    Attributes:
        shown: whether it was printed, so that logs need not repeat it.
    """

    shown = False

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(str(message).splitlines()))

    def show_python_names(self, settings: Collection[str]) -> None:
        """Change the message to the names of a Python call: underscores, where a command line has dashes.

        Args:
            settings: names of settings that the message may contain, with underscores.
        """
        self.args = (_in_python(str(self), settings),)


class SettingError(TofuError):
    """A setting is not usable. The message names the field as users write it, its value, and what is accepted.

    A command line has dashes in names, which is the default. `python_names` changes the field and the message.
    """

    def __init__(self, field: str, value: object, accepted: str) -> None:
        self._given = field
        self.field = field.replace("_", "-")
        self.value = value
        self.accepted = accepted
        super().__init__(self._text())

    def show_python_names(self, settings: Collection[str]) -> None:
        """See `TofuError`."""
        self.field = self._given if "_" in self._given else _in_python(self._given, settings)
        self.accepted = _in_python(self.accepted, settings)
        self.args = (self._text(),)

    def _text(self) -> str:
        return " ".join(f"{self.field}={self.value!r} is not usable: expected {self.accepted}".splitlines())


class ModelError(SettingError):
    """A model that a user wrote is not usable. The message names its class, and what is accepted."""

    def __init__(self, model: object, accepted: str) -> None:
        super().__init__("model", type(model).__name__, accepted)


@contextmanager
def user_code(field: str, value: object, accepted: str) -> Iterator[None]:
    """Raise SettingError for whatever the user's code in this block raises, with its type, message and place.

    Args:
        field, value, accepted: as of SettingError. A SettingError of the block itself is not changed.
    """
    try:
        yield
    except SettingError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise SettingError(field, value, f"{accepted} ({described(error)})") from error


@contextmanager
def python_names(settings: Collection[str]) -> Iterator[None]:
    """Show the names of arguments and settings as in Python calls in the errors of this block or decorated function."""
    try:
        yield
    except TofuError as error:
        error.show_python_names(settings)
        raise


def _in_python(text: str, settings: Collection[str]) -> str:
    """Return a text in which the names of settings have underscores."""

    def name(found: re.Match[str]) -> str:
        own = found[1].replace("-", "_")
        return own if own in settings else found[0]

    return _DASHED.sub(name, text)


class DataError(TofuError):
    """Data cannot be loaded, or does not have the required form (no labels, mixed sizes, unknown dataset)."""


class NoneReadableError(DataError):
    """None of a client's images can be read."""


class PolicyError(TofuError):
    """A client's policy refuses a request. The message names the rule and reveals nothing about the client's data.

    Args:
        rule: name of the rule in the policy's file.
        found: description of the request.
        accepted: the values that the rule accepts.
    """

    def __init__(self, rule: str, found: str, accepted: str) -> None:
        super().__init__(f"{found} is refused by this client's policy: rule {rule} accepts {accepted}")
        self.rule = rule


class PayloadError(TofuError):
    """Bytes from the network failed validation: wrong magic, size, range or base weights."""


class RunError(TofuError):
    """A run cannot continue, for example because no client sent a valid reply."""


class Interrupted(Exception):  # noqa: N818 (the user's wish, not an error)
    """Ctrl-C during a run; the message says where the results are and how to resume."""


class MissingExtraError(TofuError):
    """A package of an optional extra is not installed. The message says how to install it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package.partition('.')[0]} is not installed: pip install 'tofu-fl[{extra}]'")


_WHERE = "in plugin "


@contextmanager
def in_hook(plugin: str, hook: str) -> Iterator[None]:
    """Let `described` name the plugin and the hook in which an exception was raised."""
    try:
        yield
    except Exception as error:
        if not any(note.startswith(_WHERE) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{_WHERE}{plugin}, {hook}")
        raise


def described(error: BaseException) -> str:
    """Return an error's type and message, the plugin's hook, and the file and line of the user's code that raised it.

    That is the innermost frame outside this project, the standard library, torch and Flower, if there is one.
    """
    text = f"{type(error).__name__}: {error}"
    text += "".join(f", {note}" for note in getattr(error, "__notes__", ()) if note.startswith(_WHERE))
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    places = [f", at {Path(file).name} line {line}" for file, line in frames if _is_users(file)]
    return text + (places[-1] if places else "")


def _is_users(file: str) -> bool:
    """Return whether a file of a traceback has the user's code."""
    if file.startswith(_OWN) or file.startswith("<frozen "):
        return False
    installed = _SITE.search(file)
    return installed[1] not in _INSTALLED if installed else not file.startswith(_STANDARD)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without closing punctuation; the name of its type if it has none."""
    return (str(error).strip().splitlines() or [""])[0].rstrip(".:") or type(error).__name__
