"""Clipping of the L2 norm of a client's update, which bounds the sensitivity of a sum of updates."""

import math

from tofu.errors import SettingError
from tofu.weights import ParamSpec, Weights, check_finite, dot

_NAMED = 3
"""Number of layers that an error names."""

_ROUND_DOWN = 1 - 2.0**-22  # float32 products may be rounded up


def check_param_spec(param_spec: ParamSpec) -> None:
    """Raises SettingError if the model has batch counters, which would dominate the norm of every update."""
    if param_spec.integers:
        layers = sorted(name.rpartition(".")[0] or name for name in param_spec.integers)
        more = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
        found = f"with BatchNorm ({', '.join(layers[:_NAMED])}{more})"
        accepted = "no batch counters with privacy, which would dominate the norm of an update: replace BatchNorm, "
        raise SettingError("model", found, accepted + "e.g. by GroupNorm (norm=group for built-in models)")


def clip(update: Weights, norm: float) -> tuple[Weights, float]:
    """Scale an update down to L2 norm `norm`, over all of its tensors as one vector -> (update, its original norm).

    Raises:
        RunError: the update contains a value that is not finite.
        SettingError: the norm is not a finite number above 0.
    """
    check_positive("clip_norm", norm)
    original = math.sqrt(dot(update, update))
    if not math.isfinite(original):
        check_finite(update)
    if original <= norm:
        return dict(update), original
    factor = norm / original * _ROUND_DOWN
    return {name: value * factor for name, value in update.items()}, original


def check_positive(field: str, value: float) -> None:
    """Raises SettingError unless the value is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise SettingError(field, value, "a finite number above 0")
