"""One hook of several objects as one method."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec

Arguments = ParamSpec("Arguments")


def for_each(
    hook: Callable[Concatenate[Any, Arguments], None],
) -> Callable[Concatenate[Iterable[Any], Arguments], None]:
    """Return a method, with the signature of `hook`, that calls the hook of each object in `self`, in order."""

    @functools.wraps(hook)
    def call(self: Iterable[Any], /, *arguments: Arguments.args, **options: Arguments.kwargs) -> None:
        for each in self:
            getattr(each, hook.__name__)(*arguments, **options)

    return call
