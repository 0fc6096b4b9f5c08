"""Checks of arguments that clipping, noise and accounting share."""

import math

from tofu.errors import SettingError


def check_positive(field: str, value: float) -> None:
    """Raises SettingError unless the value is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise SettingError(field, value, "a finite number above 0")
