"""Checks of a user's model by forward passes: shapes, state outside of tensors, and buffers that training changes."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from tofu.errors import ModelError, SettingError, described, user_code
from tofu.rng import GlobalGenerators, reseed_own
from tofu.weights import (
    check_frozen,
    constant_buffers,
    copy_model,
    frozen_parameters,
    load_weights,
    tensor_bits,
    weights_of,
)

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
        found = described(error)
    if found != str(expected):
        accepted = f"a model that maps {takes} to {expected} in training mode, too (found {found})"
        raise SettingError("model", name, accepted)
    return changed


@torch.no_grad()
def changed_buffers(model: nn.Module, forward: Callable[[], object]) -> frozenset[str]:
    """Return the names of the buffers that a pass in training mode changes; their values are restored.

    Raises:
        SettingError: the pass changes a frozen parameter, a buffer that is not persistent, or the shape or type of a
            buffer.
        Exception: any error of `forward`, which calls the model.
    """
    model.train()
    _check_tensors(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_lazy(tensor) and 0 in tensor.stride():  # an expanded tensor cannot be written to
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    frozen = frozen_parameters(model)
    forward()
    check_frozen(model, frozen)
    changed = set()
    for key, buffer in model.named_buffers():
        if buffer.shape != before[key].shape or buffer.dtype != before[key].dtype:
            raise ModelError(model, f"a model whose buffers keep their shapes and types ({key} does not)")
        if not torch.equal(tensor_bits(buffer), tensor_bits(before[key])):  # bits, because NaN != NaN
            changed.add(key)
            buffer.copy_(before[key])
    for prefix, module in model.named_modules():
        names = {f"{prefix}.{key}" if prefix else key: key for key in module._buffers}
        for name in changed & names.keys():
            if names[name] in module._non_persistent_buffers_set:
                raise ModelError(
                    model, f"a model whose buffers are persistent if training changes them ({name} is not)"
                )
        if isinstance(module, _NormBase) and changed & names.keys():  # a running mean may stay 0 in this pass
            changed |= names.keys()
    return frozenset(changed)


def _check_tensors(model: nn.Module) -> None:
    """Raises SettingError for a parameter or buffer that cannot be copied to and compared."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = ""
        if is_lazy(tensor):
            continue
        if tensor.is_meta:
            kind = "has no values: it is on the device meta"
        elif tensor.layout != torch.strided:
            kind = f"is sparse: {tensor.layout}"
        elif tensor.is_inference():
            kind = "was made in inference mode"
        if kind:
            raise ModelError(model, f"a model of dense parameters and buffers that training can change ({name} {kind})")


@torch.no_grad()
def check_stateless(model: nn.Module, forward: Callable[[], object]) -> None:
    """Check that equal passes have equal outputs, which state in Python attributes or unseeded generators prevent.

    Such a state is neither seeded nor sent, so runs would not be reproducible. Generators that are attributes of
    modules are seeded in training mode, as training does. The model is left in training mode, with its values restored.

    Args:
        forward: calls the model on two equal examples in every pass, and returns its output.

    Raises:
        SettingError: the outputs differ, a buffer changes in evaluation mode, as those of observers do, or other
            parameters are trainable in training mode than in evaluation mode.
    """
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    trainable: dict[bool, set[str]] = {}
    for training in (False, True):
        model.train(training)
        outputs = []
        for _ in range(2):
            with GlobalGenerators(0):
                if training:
                    reseed_own(model, 0)
                outputs.append([tensor_bits(part) for part in tensors_of(forward())])
            for key, buffer in model.named_buffers():
                if not training and not torch.equal(tensor_bits(buffer), tensor_bits(before[key])):
                    raise ModelError(model, f"a model whose buffers do not change in evaluation mode ({key} does)")
                buffer.copy_(before[key])
        trainable[training] = {key for key, p in model.named_parameters() if p.requires_grad}
        if not all(map(torch.equal, *outputs)):
            mode = "training" if training else "evaluation"
            accepted = (
                "a model without state outside its parameters and buffers that draws from the global generators of "
                f"torch, numpy and Python only (two equal passes in {mode} mode have different outputs)"
            )
            raise ModelError(model, accepted)
    if others := sorted(trainable[False] ^ trainable[True]):
        raise ModelError(
            model, f"a model with the same trainable parameters in both modes ({others[0]} is trainable in one)"
        )


@torch.no_grad()
def check_builds(model: nn.Module, other: nn.Module, outputs: Callable[[nn.Module], object], name: str) -> None:
    """Check that two builds of a model are equal and independent, and that a copy of it is.

    Otherwise clients of one process would change each other's weights, or train from different ones. A copy is not
    independent if a function of the model has layers in its closure, because functions are not copied.

    Args:
        outputs: calls a model in evaluation mode on the same examples each time, and returns what it returns.

    Raises:
        SettingError: the builds share modules or parameters, or differ; or the copy does not compute what it should.
    """

    def refuse(why: str) -> None:
        raise SettingError("model", name, f"a function that builds a new, equal model in each call ({why})")

    own: dict[int, str] = {id(each): key for key, each in (*model.named_modules(), *model.named_parameters())}
    for key, each in (*other.named_modules(), *other.named_parameters()):
        if id(each) in own:
            refuse(f"two calls return the same {key or type(each).__name__}")
    first, second = (dict(each.named_parameters()) | dict(each.named_buffers()) for each in (model, other))
    if first.keys() != second.keys():
        refuse(f"only one of two has {sorted(first.keys() ^ second.keys())[0]}")
    for key, tensor in first.items():
        if tensor.shape != second[key].shape or not torch.equal(tensor_bits(tensor), tensor_bits(second[key])):
            refuse(f"{key} differs between two calls")

    def call(module: nn.Module) -> list[Tensor]:
        with GlobalGenerators(0):
            return [tensor.detach().clone() for tensor in tensors_of(outputs(module))]

    found = call(model)
    if not _close(found, call(other)):
        refuse("the outputs differ between two calls")
    copied, weights = copy_model(model), weights_of(model)
    changed_weights = {key: 0.5 * p + 0.1 for key, p in model.named_parameters() if p.requires_grad}
    load_weights(copied, changed_weights)
    with user_code("model", name, "a model that copy.deepcopy can copy: its copy fails"):  # attributes in __slots__
        of_copy = call(copied)
    unchanged = _close(found, call(model))
    load_weights(model, changed_weights)
    of_model = call(model)
    load_weights(model, weights)
    if not unchanged or not _close(of_copy, of_model):
        accepted = (
            "a model whose copy by copy.deepcopy has layers and state of its own: methods, not functions or weak "
            "references that refer to layers"
        )
        raise SettingError("model", name, accepted)


@torch.no_grad()
def check_batches(model: nn.Module, outputs: Callable[..., object], name: str) -> None:
    """Check that a model takes batches of any size. Its weights, buffers and mode are restored.

    Args:
        outputs: calls the model on `count` examples, and returns what it returns.

    Raises:
        SettingError: a batch of 3 examples or of 1 fails, or has outputs or buffers that do not fit its size.
    """
    before, mode = weights_of(model) | constant_buffers(model), model.training
    sizes = [(False, 2), (False, 3), (False, 1), (True, 3)]  # BatchNorm cannot train on one example
    found: list[list[list[int]]] = []
    for training, count in sizes:
        model.train(training)
        try:
            with GlobalGenerators(0):
                found.append([list(part.shape) for part in tensors_of(outputs(count=count))])
        except Exception as error:  # the user's own code may raise anything
            reason = described(error)
        else:
            expected = [[count, *shape[1:]] if shape[:1] == [2] else shape for shape in found[0]]
            reason = "" if len(expected) == len(found[-1]) else "its outputs are fewer or more"
            for shape, wanted in zip(found[-1], expected, strict=False):
                if wanted[:1] == [count] and shape[:1] != [count]:
                    reason = f"the output has the shape {shape}, expected {wanted}"
            for key, buffer in model.named_buffers():
                if key in before and buffer.shape != before[key].shape:
                    reason = f"buffer {key} has another shape then"
        if reason:
            accepted = f"a model that takes batches of any size (of {count}: {reason})"
            raise SettingError("model", name, accepted)
    load_weights(model, before)
    model.train(mode)


def _close(some: list[Tensor], others: list[Tensor]) -> bool:
    """Return whether tensors are equal up to rounding: copies may be at other addresses,
    which changes the order of sums.
    """
    return len(some) == len(others) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(some, others, strict=True)
    )


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, which may be nested: a mapping,
    a sequence or an object with attributes.

    Each container is read once, because objects may refer to each other; models that they refer to are not read.
    """
    found: list[Tensor] = []
    seen: dict[int, object] = {}  # holds the objects, so that no other one gets the same id
    pending = [output]
    while pending:
        part = pending.pop()
        if isinstance(part, Tensor):
            found.append(part if type(part) is Tensor else part.as_subclass(Tensor))
        elif id(part) not in seen and not isinstance(part, nn.Module):
            seen[id(part)] = part
            inner = part if isinstance(part, Mapping) else getattr(part, "__dict__", {})
            parts = part if isinstance(part, tuple | list) else inner.values()
            pending.extend(reversed(list(parts)))
    return found


def check_memory(model: nn.Module) -> None:
    """Check that each trainable parameter has memory of its own: a copy of the model would lose what is shared.

    One parameter under several names is no sharing of memory.

    Raises:
        SettingError: a buffer or another parameter shares a trainable parameter's memory, or the model's `parameters`
            or `state_dict` do not have all parameters.
    """
    own = dict(model.named_parameters())
    try:
        listed, stored = {id(p) for p in model.parameters()}, set(model.state_dict())
        lacking = [name for name, p in own.items() if id(p) not in listed or name not in stored]
        found = f"{lacking[0]} is missing" if lacking else ""
    except Exception as error:  # the user's own code may raise anything
        found = described(error)
    if found:
        raise ModelError(model, f"a model whose parameters() and state_dict() have all parameters by name ({found})")
    named = (*model.named_parameters(), *model.named_buffers())
    tensors = {name: tensor for name, tensor in named if tensor.numel() and tensor.layout == torch.strided}
    spans = sorted((*_span(tensor), name) for name, tensor in tensors.items())
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end and (tensors[name].requires_grad or tensors[other].requires_grad):
            accepted = (
                f"a model whose parameters share memory with nothing else ({name} and {other} do): one "
                "nn.Parameter may be an attribute of several modules, and a buffer may be a clone"
            )
            raise ModelError(model, accepted)


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a strided tensor, and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def without_wrappers(model: nn.Module) -> nn.Module:
    """Remove `torch.nn.DataParallel`, `torch.compile` and sparse gradients from a model.

    Compiled code would be compiled again for every copy of a model, and has no second derivatives. Therefore compiled
    functions of the user also run eagerly within `eager_code`.

    Raises:
        SettingError: it is not a module, or its `train` or `eval` fails or does not return it.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(model, "a torch.nn.Module, or a function that returns one")
    _check_modes(model)
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
    _EAGER.begin()
    return model


def _check_modes(model: nn.Module) -> None:
    modes = {module: module.training for module in model.modules()}
    try:
        found = "" if model.eval() is model and model.train() is model else "another object"
    except Exception as error:  # the user's own code may raise anything
        found = described(error)
    if found:
        raise ModelError(model, f"a model whose train(mode) and eval() return the model, as torch's do (found {found})")
    for module, training in modes.items():
        module.training = training


class _EagerCode:
    """Whether the compiler is off, and how many blocks of `eager_code` there are in all threads."""

    def __init__(self) -> None:
        self._lock, self._blocks, self._stance = threading.Lock(), 0, None

    @contextmanager
    def block(self) -> Iterator[None]:
        with self._lock:
            self._blocks += 1
        try:
            self.begin()
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if not self._blocks and self._stance is not None:
                    self._stance.__exit__(None, None, None)
                    self._stance = None

    def begin(self) -> None:
        """Turn the compiler off until the last block ends, if there is one and something may have been compiled."""
        with self._lock:
            if self._blocks and self._stance is None and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")


_EAGER = _EagerCode()


def eager_code() -> AbstractContextManager[None]:
    """Within the block, functions of models that a user has compiled with `torch.compile` run as they were written.

    torch has one such switch for a process, so other threads compile nothing meanwhile, either.
    """
    return _EAGER.block()


def drop_constant_buffers(model: nn.Module, changed: frozenset[str]) -> None:
    """Make the buffers that training does not change non-persistent, so that they are not sent."""
    for prefix, module in model.named_modules():
        for key in module._buffers:
            if (f"{prefix}.{key}" if prefix else key) not in changed:
                module._non_persistent_buffers_set.add(key)
