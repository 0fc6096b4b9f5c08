"""Checks of Python arguments, before anything is computed: one line names the argument, its value and what is accepted.

A function is checked by its signature, and not called, because a user's function may have side effects.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from numbers import Real
from typing import Any

from tofu.errors import SettingError


@dataclass(frozen=True)
class Call:
    """How an argument that is a function is called.

    Attributes:
        positional: names of the positional parameters.
        returns: description of the returned value.
        example: a function that is accepted.
        keywords: names of the parameters that are given by name.
        open: whether further positional arguments may follow.
        other: description of what is accepted beside a function.
    """

    positional: tuple[str, ...]
    returns: str
    example: str
    keywords: tuple[str, ...] = ()
    open: bool = False
    other: str = ""

    @property
    def accepted(self) -> str:
        """What is accepted, as it is told to users."""
        parameters = ", ".join((*self.positional, *(f"{name}=" for name in self.keywords)))
        return f"{self.other}a function ({parameters}) -> {self.returns}, such as {self.example}"


CALLS = {
    "loss": Call(("outputs", "targets"), "scalar tensor", "torch.nn.functional.cross_entropy"),
    "optimizer": Call(("parameters",), "optimizer", "torch.optim.Adam", ("lr",)),
    "metric": Call(
        ("outputs", "targets"), "number", "lambda outputs, targets: float(outputs.sub(targets).abs().mean())"
    ),
    "train": Call(("model", "dataset", "context"), "mean loss or None", "def train(model, dataset, context): ..."),
    "collate": Call(("samples",), "batch", "torch.utils.data.default_collate"),
    "forward": Call(("model", "inputs"), "outputs", "tofu.at_embedding('embedding')", open=True),
    "model": Call((), "torch.nn.Module", "lambda: torch.nn.Linear(4, 2)", other="a torch.nn.Module, or "),
    "step": Call((), "anything", "that of torch.optim.Adam"),
}
"""The functions that users pass, by argument."""


def check_call(name: str, value: object, call: Call) -> None:
    """Raise SettingError unless a value can be called in this way."""
    if not callable(value):
        raise SettingError(name, shown(value), call.accepted)
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # as of functions written in C
        return
    bind = signature.bind_partial if call.open else signature.bind
    try:
        bind(*call.positional, **dict.fromkeys(call.keywords))
    except TypeError as error:
        raise SettingError(name, shown(value), f"{call.accepted} ({error})") from error


def check_kind(name: str, value: object, kinds: Any, accepted: str) -> None:
    """Raise SettingError unless a value is an instance of a type or of one of several types."""
    if not isinstance(value, kinds):
        raise SettingError(name, shown(value), accepted)


def check_calls(given: Mapping[str, object]) -> None:
    """Raise SettingError unless each of these arguments is None or can be called as `CALLS` says."""
    for name, value in given.items():
        if value is not None:
            check_call(name, value, CALLS[name])


def check_metrics(metrics: object) -> None:
    """Raise SettingError unless this is a mapping of names to metrics."""
    accepted = "a mapping of names to functions (outputs, targets) -> number, such as {'rmse': rmse}"
    check_kind("metrics", metrics, Mapping, accepted)
    assert isinstance(metrics, Mapping)
    for key, metric in metrics.items():
        check_kind("metrics", key, str, accepted)
        check_call(f"metrics[{key!r}]", metric, CALLS["metric"])


def check_elements(name: str, values: object, kind: type, accepted: str) -> None:
    """Raise SettingError unless this is a list or tuple of instances of a type."""
    check_kind(name, values, list | tuple, f"a list of {accepted}")
    assert isinstance(values, list | tuple)
    for number, value in enumerate(values):
        check_kind(f"{name}[{number}]", value, kind, accepted)


def check_dataset(name: str, data: object, *, empty: bool = False) -> None:
    """Raise SettingError unless this is a dataset whose samples have numbers.

    Args:
        empty: whether it may have no samples.
    """
    some = "" if empty else " and at least one sample"
    accepted = f"a dataset with __len__, __getitem__{some}, such as torch.utils.data.TensorDataset(inputs, targets)"
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__") or not (empty or len(data)):
        raise SettingError(name, shown(data), accepted)


def check_names(given: Mapping[str, object], known: Iterable[str], arguments: Sequence[str], other: str = "") -> None:
    """Raise SettingError for a name that is not known and is nearly that of an argument.

    Args:
        other: what else is accepted, as a text that follows that argument.
    """
    for name in given.keys() - set(known):
        near = difflib.get_close_matches(name, arguments, n=1, cutoff=0.75)
        if near:
            raise SettingError(name, shown(given[name]), f"the argument {near[0]}{other}")


def check_options(given: Mapping[str, object], kind: type, function: Callable[..., object]) -> None:
    """Raise SettingError for a name that is no argument of `kind`, to which a function passes its further arguments."""
    known, arguments = inspect.signature(kind).parameters, inspect.signature(function).parameters
    check_names(given, known, [*known, *(name for name, each in arguments.items() if each.kind is each.KEYWORD_ONLY)])
    for name in given.keys() - set(known):
        raise SettingError(name, shown(given[name]), f"one of the arguments {', '.join(known)}")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise SettingError unless a value is a number in a range."""
    if not isinstance(value, Real) or not low <= float(value) <= high:
        raise SettingError(name, shown(value), f"a number from {low} to {high:g}")


def shown(value: object) -> object:
    """Return a value for an error: text and numbers as they are, others as the name of the function or type."""
    if value is None or isinstance(value, str | int | float):
        return value
    return getattr(value, "__name__", type(value).__name__)
