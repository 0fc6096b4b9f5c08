"""Compares what a model computes on two machines, including state that is in none of its tensors.

Python attributes, files, environment variables and the version of the user's code may differ between machines although
all weights are equal. What the forward pass reads of them shows in its outputs, whatever it is. What it does not read,
such as a path, a device or a time, does not matter.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tofu.errors import SettingError
from tofu.models.checks import tensors_of
from tofu.rng import GlobalGenerators, reseed_own
from tofu.training import SeededDropout
from tofu.weights import SKETCH_BYTES, Weights, constant_buffers, drift, load_weights, sketch, weights_of

MAX_OUTPUT_DRIFT, MAX_COARSE_DRIFT = 1e-3, 3e-2
"""Maximum difference between the outputs on two machines due to rounding, relative to their norm: in float32, and in
models that compute in 16 bits (processors without vector instructions differed by 6e-6 and 8e-3 in the deepest)."""

OUTPUT_BYTES = 2 * SKETCH_BYTES
_NONE = b"\xff" * SKETCH_BYTES
_COARSE = (torch.bfloat16, torch.float16)
_PERIOD = 4093


def output_sketch(model: nn.Module, outputs: Callable[[nn.Module], object]) -> bytes:
    """Sketches (`tofu.weights.sketch`) of a model's outputs at fixed weights, in evaluation and in training mode.

    Args:
        outputs: calls a model on the same examples each time, and returns what it returns.

    Returns:
        `OUTPUT_BYTES`. The sketch of a mode without usable outputs is `_NONE`: values that are not finite, or random
        numbers, other than those of dropout, that may differ between processors.
    """
    sketches = []
    for found in _outputs(model, outputs)[0]:
        finite = found and all(bool(torch.isfinite(part).all()) for part in found.values())
        sketches.append(sketch(found) if finite else _NONE)
    return b"".join(sketches)


def check_outputs(model: nn.Module, outputs: Callable[[nn.Module], object], expected: bytes, name: str) -> None:
    """Compare the outputs with those of another machine, whose `output_sketch` is `expected`; b"" compares nothing.

    Raises:
        SettingError: they differ by more than rounding.
    """
    if not expected:
        return
    modes, limit = _outputs(model, outputs)
    for number, found in enumerate(modes):
        theirs = expected[number * SKETCH_BYTES : (number + 1) * SKETCH_BYTES]
        away = drift(found, theirs) if found and theirs != _NONE else 0.0
        if not away <= limit:  # NaN, too
            accepted = (
                f"a model that computes the same on server and client (outputs differ by {away:.2g} of their norm): "
                "its code differs, or what it reads besides the weights that are sent, such as frozen weights or "
                "attributes"
            )
            raise SettingError("model", name, accepted)


@torch.no_grad()
def _outputs(model: nn.Module, outputs: Callable[[nn.Module], object]) -> tuple[list[Weights], float]:
    """Return the outputs at fixed weights in evaluation and in training mode, and how much rounding may change them.

    At initial weights, zeros at the end of a branch would hide what is before them. Dropout draws the same numbers on
    every machine; if anything else draws numbers, the outputs of the mode are left out. The model's own weights and
    its mode are restored.
    """
    before, mode = weights_of(model) | constant_buffers(model), model.training
    load_weights(model, {key: _wave(p) for key, p in model.named_parameters() if p.requires_grad})
    calls, modes = _Calls(torch.Generator().manual_seed(0)), []
    try:
        for training in (False, True):
            model.train(training)
            with GlobalGenerators(0) as generators, calls:
                if training:
                    reseed_own(model, 0)
                parts = tensors_of(outputs(model))
                modes.append({str(n): part.detach() for n, part in enumerate(parts) if generators.unused})
    finally:
        load_weights(model, before)
        model.train(mode)
    return modes, MAX_COARSE_DRIFT if calls.coarse else MAX_OUTPUT_DRIFT


class _Calls(SeededDropout):
    """Notices whether a function of torch returns values of 16 bits."""

    coarse = False

    def __torch_function__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__torch_function__(*args, **kwargs)
        self.coarse |= isinstance(result, Tensor) and result.dtype in _COARSE
        return result


def _wave(parameter: Tensor) -> Tensor:
    """Fixed values in place of a parameter, of the size of usual initial weights."""
    count, several = parameter.numel(), parameter.dim() > 1
    size = 0.5 / math.sqrt(max(1.0, count / max(1, parameter.shape[0]))) if several else 0.25
    period = size * torch.sin(1.7 * torch.arange(1, _PERIOD + 1))
    return period.repeat(count // _PERIOD + 1)[:count].view(parameter.shape)
