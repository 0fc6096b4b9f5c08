"""Errors that a user can act on, each said in one line.

The command line prints the text of a `TofuError` and exits with status 2; it never shows a traceback for one.
"""


class TofuError(Exception):
    """Base of every error that is about what the user (or the network) gave us, not about our code."""


class SettingError(TofuError):
    """A setting that cannot be used: names the field as the user writes it, its value and what would be accepted."""

    def __init__(self, field: str, value: object, accepted: str) -> None:
        field = field.replace("_", "-")
        super().__init__(f"{field}={value!r} is not usable: expected {accepted}")
        self.field = field
        self.value = value
        self.accepted = accepted


class DataError(TofuError):
    """Data that cannot be loaded or has not the form we need (no labels, mixed sizes, unknown dataset)."""


class PayloadError(TofuError):
    """Bytes from the network that are not a payload we can trust: wrong magic, size, range or base weights."""


class RunError(TofuError):
    """A run that cannot go on, for example because no client gave a valid reply."""
