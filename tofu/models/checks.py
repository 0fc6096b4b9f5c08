"""Checks of a user's model by forward passes: shapes, state outside of tensors, and buffers that training changes."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from tofu.errors import SettingError
from tofu.rng import GlobalGenerators
from tofu.weights import tensor_bits

_COMPILED = "_orig_mod"
"""Attribute in which the result of `torch.compile` stores the original module."""


def check_training(model: nn.Module, name: str, inputs: Tensor, classes: int) -> frozenset[str]:
    """Run a forward pass of two examples in training mode -> the names of the buffers that it changes.

    The model is left in training mode, with its values restored.

    Args:
        inputs: [2, ...]; floating-point inputs are replaced by random numbers, so that statistics change.

    Raises:
        SettingError: the pass fails, changes its inputs, or its result is not a tensor [2, classes].
    """
    takes, expected = list(inputs.shape), [2, classes]
    found = ""

    def forward() -> None:
        nonlocal found
        given = torch.randn(takes) if inputs.is_floating_point() else inputs.clone()
        before = given.clone()
        output = model(given)
        if not torch.equal(given, before):
            raise SettingError("model", name, "a model that does not change its inputs in place")
        found = f"{list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__

    try:
        changed = changed_buffers(model, forward)
    except SettingError:
        raise
    except Exception as error:  # the user's own code may raise anything
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if found != str(expected):
        accepted = f"a model that maps {takes} to {expected} in training mode, too (found {found})"
        raise SettingError("model", name, accepted)
    return changed


@torch.no_grad()
def changed_buffers(model: nn.Module, forward: Callable[[], object]) -> frozenset[str]:
    """The names of the buffers that a pass in training mode changes; their values are restored.

    Raises:
        SettingError: a buffer has another shape or type after the pass.
        Exception: any error of `forward`, which calls the model.
    """
    model.train()
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_lazy(tensor) and 0 in tensor.stride():  # an expanded tensor cannot be written to
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    forward()
    changed = set()
    for key, buffer in model.named_buffers():
        if buffer.shape != before[key].shape or buffer.dtype != before[key].dtype:
            accepted = f"a model whose buffers keep their shapes and types ({key} does not)"
            raise SettingError("model", type(model).__name__, accepted)
        if not torch.equal(tensor_bits(buffer), tensor_bits(before[key])):  # bits, because NaN != NaN
            changed.add(key)
            buffer.copy_(before[key])
    for prefix, module in model.named_modules():
        if isinstance(module, _NormBase):  # a running mean may stay 0 in this pass
            own = {f"{prefix}.{key}" if prefix else key for key in module._buffers}
            changed |= own if changed & own else set()
    return frozenset(changed)


@torch.no_grad()
def check_stateless(model: nn.Module, forward: Callable[[], object]) -> None:
    """Check that the model has no state in Python attributes: two equal passes must have equal outputs.

    Such a state is neither seeded nor sent, so runs would not be reproducible. The model is left in training mode, with
    its values restored.

    Args:
        forward: calls the model on two equal examples in every pass, and returns its output.

    Raises:
        SettingError: the outputs differ.
    """
    model.eval()
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    outputs = []
    for _ in range(2):
        with GlobalGenerators(0):
            output = forward()
        outputs.append(output.clone() if isinstance(output, Tensor) else output)
        for key, buffer in model.named_buffers():
            buffer.copy_(before[key])
    model.train()
    first, second = outputs
    if (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and not torch.equal(tensor_bits(first), tensor_bits(second))
    ):
        accepted = "a model without state outside its parameters and buffers (two equal passes have different outputs)"
        raise SettingError("model", type(model).__name__, accepted)


def without_wrappers(model: nn.Module) -> nn.Module:
    """Remove `torch.nn.DataParallel`, `torch.compile` and sparse gradients from a model.

    Compiled code would be compiled again for every copy of a model, and has no second derivatives. Therefore compiled
    functions of the user also run eagerly from now on in this process.

    Raises:
        SettingError: it is not a module.
    """
    if not isinstance(model, nn.Module):
        raise SettingError("model", type(model).__name__, "a torch.nn.Module, or a function that returns one")
    while isinstance(model, nn.DataParallel) or _COMPILED in model._modules:
        model = model.module if isinstance(model, nn.DataParallel) else getattr(model, _COMPILED)
    for module in list(model.modules()):
        module._compiled_call_impl = None  # by Module.compile
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # the same gradients, as dense tensors
        for name, part in module._modules.items():
            while part is not None and _COMPILED in part._modules:
                part = part._modules[_COMPILED]  # noqa: PLW2901
            module._modules[name] = part
    if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
        torch.compiler.set_stance("force_eager")
    return model


def drop_constant_buffers(model: nn.Module, changed: frozenset[str]) -> None:
    """Make the buffers that training does not change non-persistent, so that they are not sent."""
    for prefix, module in model.named_modules():
        for key in module._buffers:
            if (f"{prefix}.{key}" if prefix else key) not in changed:
                module._non_persistent_buffers_set.add(key)
