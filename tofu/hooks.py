"""Hooks of a base class: checks of what a subclass overrides, and one hook of several objects as one method."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Concatenate, ParamSpec

from tofu.errors import SettingError

Arguments = ParamSpec("Arguments")


def for_each(
    hook: Callable[Concatenate[Any, Arguments], None],
    around: Callable[[Any, str], AbstractContextManager[None]] = lambda each, hook: nullcontext(),
) -> Callable[Concatenate[Iterable[Any], Arguments], None]:
    """Return a method, with the signature of `hook`, that calls the hook of each object in `self`, in order.

    Args:
        around: (object, name of the hook) -> a context for its call.
    """

    @functools.wraps(hook)
    def call(self: Iterable[Any], /, *arguments: Arguments.args, **options: Arguments.kwargs) -> None:
        for each in self:
            with around(each, hook.__name__):
                getattr(each, hook.__name__)(*arguments, **options)

    return call


_PREFIXES = ("on_", "before_", "after_")
_NEAR = 0.85


def check_overrides(field: str, kind: type, base: type) -> None:
    """Check that the public methods of a class override methods of its base, where their names look like it.

    A method with a misspelled name would never be called, and one with other parameters would fail in the middle of a
    run.

    Raises:
        SettingError: a name begins as hooks do or is nearly that of a method, and the base has none of this name; or
            an override cannot be called as the base is.
    """
    for owner in kind.__mro__:
        if owner is base or not issubclass(owner, base):
            continue
        for name, value in vars(owner).items():
            if name.startswith("_") or name in getattr(kind, "__dataclass_fields__", ()):
                continue
            if hasattr(base, name):
                _check_override(field, f"{kind.__name__}.{name}", value, inspect.getattr_static(base, name))
            else:
                public = [(known, inspect.getattr_static(base, known)) for known in dir(base) if known[0] != "_"]
                methods, values = ([known for known, own in public if inspect.isfunction(own) is is_method]
                                   for is_method in (True, False))  # fmt: skip
                _check_name(field, kind, name, methods if inspect.isfunction(value) else values)


def _check_name(field: str, kind: type, name: str, known: list[str]) -> None:
    """Raise SettingError for a name that is nearly one of the known ones, or has a prefix of hooks."""
    hooks = {each.partition("_")[2]: each for each in known if each.startswith(_PREFIXES)}
    hook = bool(hooks) and name.startswith(_PREFIXES)
    near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
    if hook and not near:
        near = [hooks[each] for each in difflib.get_close_matches(name.partition("_")[2], hooks, n=3, cutoff=0.5)]
    if hook or near:
        accepted = f"{' or '.join(near or hooks.values())}, or a name with an underscore in front for your own method"
        raise SettingError(field, f"{kind.__name__}.{name}", accepted)


def _check_override(field: str, name: str, value: object, hook: object) -> None:
    """Raise SettingError for an override that cannot be used in the place of a base's attribute."""
    if not inspect.isfunction(hook):
        if inspect.isfunction(value):
            raise SettingError(field, name, "a value or a @property, not a method")
        return
    if isinstance(value, property) or not (callable(value) or isinstance(value, staticmethod | classmethod)):
        raise SettingError(field, name, f"a method {inspect.signature(hook)}")
    own = value if inspect.isfunction(value) else getattr(value, "__func__", value)
    kinds = inspect.Parameter
    parameters = [each for each in inspect.signature(hook).parameters.values() if each.kind is not kinds.VAR_KEYWORD]
    given = [each.name for each in parameters if each.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    named = [each.name for each in parameters if each.kind is kinds.KEYWORD_ONLY]
    try:
        signature = inspect.signature(own)  # type: ignore[arg-type]
        signature.bind(*given[isinstance(value, staticmethod) :], **dict.fromkeys(named))
    except TypeError as error:
        shown = f"({', '.join([*given, *(f'{each}=' for each in named)])})"
        raise SettingError(field, name, f"a method with the parameters {shown} ({error})") from error
    except ValueError:  # it has no signature, as functions written in C
        return
