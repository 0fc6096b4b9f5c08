"""Model weights as named tensors: names and shapes, fingerprints, sketches, norms and displacement.

Everything that is sent or averaged is a `Weights`: a dict from state-dict name to tensor. Trainable parameters come
first, in the model's order, then its buffers (BatchNorm statistics). Frozen parameters never change and are never sent.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from tofu.errors import ModelError, PayloadError, RunError, SettingError, user_code

Weights = dict[str, Tensor]
"""Name -> tensor, detached. In an update (new minus old weights) every tensor is float32, including integer buffers."""

M = TypeVar("M", bound=nn.Module)
V = TypeVar("V")

FINGERPRINT_BYTES = 8

PROJECTIONS = 8
SKETCH_BYTES = 4 * PROJECTIONS
MAX_DRIFT = 1e-3
"""Maximum difference between the weights of both ends due to rounding, relative to the norm of the weights."""

Integers = npt.NDArray[np.int64]

_UNMOVED_TENSOR = 1_000_000
_UNMOVED_ROW = 10_000
"""Offsets that put tensors, and rows and columns, without displacement below all other levels."""

_DISPLACEMENT_BITS = 16
"""Bits of the rounded displacements, with which sums of 2^31 squares fit into 64 bits."""

_MAX_INTEGER = 2**24
"""Integers up to this are exact in float32."""

_BUFFERS = "buffers that training changes with finite float32, float16 or bfloat16 values, or integers up to 2^24"


@dataclass(frozen=True)
class SumSpec:
    """Shape of an exported sum, and the largest magnitude of an entry that one client may contribute.

    The bound may depend on options, broadcast and model, but not on data: all clients and the server derive the same
    fixed-point range from it. A sum with an infinite bound cannot be added in a secure round.

    Attributes:
        noised: under differential privacy, the entries get the noise of the update, of which they are further values.
    """

    shape: tuple[int, ...]
    bound: float = float("inf")
    noised: bool = False


@dataclass(frozen=True)
class ParamSpec:
    """Names and shapes of the tensors that are sent, the same on both ends because both build the same model.

    Attributes:
        parameters: trainable parameter name -> shape, in the model's order.
        buffers: buffer name -> shape.
        integers: names of the buffers that hold integers (BatchNorm's batch counters).
    """

    parameters: dict[str, torch.Size]
    buffers: dict[str, torch.Size]
    integers: frozenset[str] = frozenset()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return self.parameters | self.buffers

    @property
    def parameter_count(self) -> int:
        return sum(shape.numel() for shape in self.parameters.values())

    @property
    def float32_bytes(self) -> int:
        """Bytes of one update as float32, parameters and buffers: the numerator of every ratio."""
        return 4 * sum(shape.numel() for shape in self.shapes.values())


def layout_of(model: nn.Module) -> ParamSpec:
    """Return the names and shapes of a model's trainable parameters and buffers.

    Raises:
        SettingError: no parameter is trainable, a trainable parameter is not float32, or a buffer cannot be sent
            exactly.
    """
    parameters = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError(model, "a network with at least one trainable parameter")
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype != torch.float32:
            raise SettingError("model", f"{name}: {p.dtype}", "float32 parameters")
    buffers = dict(_persistent_buffers(model))
    for name, b in buffers.items():
        _check_buffer(name, b)
    integers = frozenset(name for name, b in buffers.items() if not b.is_floating_point())
    return ParamSpec(parameters, {name: b.shape for name, b in buffers.items()}, integers)


def architecture_of(model: nn.Module) -> bytes:
    """Identity of a model's architecture. Updates and residuals of one architecture cannot be used with another.

    The first 8 bytes of SHA-256 over the names and shapes of the trainable parameters and of the buffers that are sent,
    and over the names and values of the buffers that are not sent, such as the positions of a mask
    (`tofu.plugins.masking`). So two masks with equally many entries are two architectures.
    """
    spec, sent = layout_of(model), model.state_dict().keys()
    digest = hashlib.sha256()
    for name, shape in spec.shapes.items():
        digest.update(f"{name}:{tuple(shape)};".encode())
    digest.update(_digest({name: b for name, b in model.named_buffers() if name not in sent}).digest())
    return digest.digest()[:FINGERPRINT_BYTES]


def _check_buffer(name: str, buffer: Tensor) -> None:
    """Raises SettingError for a buffer whose differences float32 cannot hold; `build_model` drops constant ones."""
    if buffer.is_floating_point() and buffer.dtype != torch.float64:
        if not bool(torch.isfinite(buffer).all()):
            raise SettingError("model", f"buffer {name} with a value that is not finite", _BUFFERS)
    elif buffer.is_complex() or buffer.dtype in (torch.bool, torch.float64):
        raise SettingError("model", f"buffer {name} of type {str(buffer.dtype).removeprefix('torch.')}", _BUFFERS)
    elif buffer.numel() and int(buffer.long().abs().max()) > _MAX_INTEGER:
        raise SettingError("model", f"buffer {name} with the value {int(buffer.long().abs().max())}", _BUFFERS)


def has_differences(buffer: Tensor) -> bool:
    """Return whether float32 can represent the differences of a buffer's values, as an update requires."""
    try:
        _check_buffer("", buffer)
    except SettingError:
        return False
    return True


def _persistent_buffers(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    persistent = model.state_dict().keys()
    return [(name, b) for name, b in model.named_buffers() if name in persistent]


def constant_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return a mapping: name -> copy of each non-persistent buffer."""
    persistent = model.state_dict().keys()
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name not in persistent}


def frozen_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return a mapping: name -> copy of each parameter that needs no gradient."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad and not is_lazy(p)}


def check_frozen(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Raises SettingError if training changed a frozen parameter, such as a moving average, since such are not sent."""
    for name, p in model.named_parameters():
        if name in before and not torch.equal(tensor_bits(p), tensor_bits(before[name])):
            raise ModelError(
                model, f"a model whose frozen parameters do not change in training ({name} does): buffers may"
            )


def check_constant_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Raises RunError if training changed a non-persistent buffer, because these are not sent."""
    for name, buffer in model.named_buffers():
        if name in before and not torch.equal(tensor_bits(buffer), tensor_bits(before[name])):
            raise RunError(f"training changed buffer {name} but its first pass did not: expected a buffer "
                           "that every pass in training mode changes, or none")  # fmt: skip


def tensor_bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, uint8 [n], which can be compared even if values are NaN."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def weights_of(model: nn.Module) -> Weights:
    """Return a detached copy of a model's trainable parameters and buffers."""
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return parameters | {name: b.detach().clone() for name, b in _persistent_buffers(model)}


def in_float32(model: nn.Module) -> nn.Module:
    """Return the model, or a copy in 32 bits if it has parameters of another floating-point type."""
    other = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
    return copy_model(model).float() if other else model


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy of a model; attributes that cannot be copied (locks, open files) are shared with the original.

    Raises:
        SettingError: a module of the model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (TypeError, RuntimeError):
        shared = {}
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers", "_modules") and not _can_be_copied(value):
                    shared[id(value)] = value
        with user_code("model", type(model).__name__, "a model that copy.deepcopy can copy"):
            return copy.deepcopy(model, shared)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode within the block, then restore the mode of every module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def seeing_outputs(modules: Mapping[str, M], see: Callable[[str, M, Any, Any], None]) -> AbstractContextManager[None]:
    """Within the block, call `see(name, module, inputs, output)` after each forward pass of these modules."""
    return removing([module.register_forward_hook(partial(see, name)) for name, module in modules.items()])


def _can_be_copied(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except (TypeError, RuntimeError):
        return False
    return True


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into a model in place (integer buffers are rounded)."""
    targets: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in weights.items():
        target = targets[name]
        rounded = value.is_floating_point() and not target.is_floating_point()
        target.copy_(value.round() if rounded else value)


def added(name: str, value: Tensor, change: Tensor) -> Tensor:
    """Return value + change, but at least 0 for a variance of BatchNorm, which a lossy update may make negative."""
    new = value + change
    return new.clamp_min(0) if name.endswith("running_var") else new


def add_update(model: nn.Module, update: Mapping[str, Tensor]) -> None:
    """Add an update to a model in place, elementwise in float32, so that both ends compute the same bits."""
    load_weights(model, {name: added(name, value.float(), update[name]) for name, value in weights_of(model).items()})


def under(values: Mapping[str, V], prefix: str) -> dict[str, V]:
    """Return the entries that are named `prefix/name`, by their names.

    Example:
        >>> under({"mask/fc1": 1, "layer/fc1": 2}, "mask")
        {'fc1': 1}
    """
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def split_vector(vector: Tensor, shapes: Mapping[str, torch.Size]) -> Weights:
    """Return a mapping: name -> tensor of that shape, views of consecutive parts of a vector [d]."""
    pieces: tuple[Tensor, ...] = torch.split(vector, [shape.numel() for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def check_finite(update: Mapping[str, Tensor]) -> None:
    """Raises RunError if a value of an update is not finite."""
    for name, value in update.items():
        if wrong := int((~torch.isfinite(value)).sum()):
            raise RunError(f"the update of {name} has {wrong} of {value.numel()} values that are not finite: local "
                           "training diverged, and a smaller lr may help")  # fmt: skip


def difference(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Weights:
    """Return the update new - old, float32."""
    return {name: new[name].float() - old[name].float() for name in old}


def fingerprint(weights: Mapping[str, Tensor]) -> bytes:
    """Return the first 8 bytes of SHA-256 over names, shapes and values; both ends compare it before decoding."""
    return _digest(weights).digest()[:FINGERPRINT_BYTES]


def base_fingerprint(model: nn.Module) -> bytes:
    """Return the fingerprint of everything that a forward pass reads:
    the weights, frozen parameters and constant buffers.
    """
    others = dict(model.named_parameters()) | dict(model.named_buffers())
    weights = weights_of(model)
    return fingerprint(weights | {name: value for name, value in others.items() if name not in weights})


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes and values, in hexadecimal."""
    return _digest(weights).hexdigest()


def _digest(weights: Mapping[str, Tensor]) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype};".encode())
        digest.update(tensor_bits(value).numpy().tobytes())
    return digest


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Inner product over the tensors of `a`, accumulated in float64."""
    return sum(torch.sum(a[name].double() * b[name].double()).item() for name in a)


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Cosine of two updates over the tensors of `a`; 0 if either is zero."""
    norm = (dot(a, a) * dot({name: b[name] for name in a}, b)) ** 0.5
    return dot(a, b) / norm if norm > 0 else 0.0


def norm(update: Mapping[str, Tensor], param_spec: ParamSpec) -> float:
    """Return the Euclidean norm of an update over the trainable parameters."""
    parameters = {name: update[name] for name in param_spec.parameters}
    return math.sqrt(dot(parameters, parameters))


def explained_variance(true: Mapping[str, Tensor], decoded: Mapping[str, Tensor]) -> float:
    """Return 1 - |true - decoded|^2 / |true|^2; 0 if `true` is zero."""
    power = dot(true, true)
    if power == 0:
        return 0.0
    missed = 0.0
    for name, value in true.items():  # one tensor at a time, which takes less memory
        rest = (value - decoded[name]).double()
        missed += torch.sum(rest * rest).item()
    return 1 - missed / power


def after_step(identity: bytes, payload: bytes) -> bytes:
    """Return the identity of the weights after a step of a compressed downlink,
    from the identity of the weights before it.

    Full weights are identified by their fingerprint, and weights after a step by SHA-256(identity before, payload). So
    the identity of a client that missed, repeated or swapped a step differs from the server's.
    """
    return hashlib.sha256(identity + payload).digest()[:FINGERPRINT_BYTES]


def sketch(weights: Mapping[str, Tensor]) -> bytes:
    """Sums of the weights under `PROJECTIONS` fixed sign patterns, as little-endian float32.

    On different hardware the weights of server and client may differ by rounding. Their sums under pseudo-random signs
    then differ by about the norm of that difference (`drift`).
    """
    return np.array(list(_projections(weights)), "<f4").tobytes()


def drift(weights: Mapping[str, Tensor], other: bytes) -> float:
    """Return the estimated distance between these weights and those of the sketch `other`,
    relative to the norm of these.

    Raises:
        PayloadError: `other` is not a sketch.
    """
    if len(other) != SKETCH_BYTES:
        raise PayloadError(f"sketch has {len(other)} bytes, expected {SKETCH_BYTES}")
    theirs = np.frombuffer(other, "<f4").astype(np.float64)
    if not bool(np.isfinite(theirs).all()):
        raise PayloadError(f"sketch has the values {theirs.tolist()}, expected finite numbers")
    length = sum(float((value.double() ** 2).sum()) for value in weights.values()) ** 0.5
    apart = float(np.abs(np.array(list(_projections(weights))) - theirs).max())
    return apart / length if length else apart


def _projections(weights: Mapping[str, Tensor]) -> Iterator[float]:
    for number in range(PROJECTIONS):
        bits = np.random.PCG64(number)  # its raw stream is the same on every platform and version
        total = 0.0
        for value in weights.values():
            flat = value.detach().cpu().double().flatten().numpy()
            words = bits.random_raw((flat.size + 63) // 64).astype("<u8")
            signs = np.unpackbits(words.view(np.uint8))[: flat.size]
            total += float(2 * flat @ signs - flat.sum())
        yield total


def displacement_levels(displacement: Tensor) -> Integers:
    """Predict which entries of the next update are large, from the displacement W - W_0 of a tensor -> int64 [d].

    The rows and columns of a weight matrix [outputs, the rest] with the largest displacement contain most of the
    largest entries of the next update; the displacement of single entries is a worse predictor. With M = (W - W_0)^2,

        level(i, j) = 2 log2(mean_j M) + 2 log2(mean_i M) - 2 log2(mean M), each rounded to an integer.

    A tensor without any displacement has a level below all others, lower for more entries. Sums are over integers, so
    processors that add in different orders compute the same levels. This is ours; we know of no paper.
    """
    distance = displacement.detach().abs().double().numpy()
    if not distance.any():
        return np.full(distance.size, -_UNMOVED_TENSOR - int(_log(np.array(float(distance.size)))))
    exponent = math.frexp(float(distance.max()))[1] - _DISPLACEMENT_BITS
    energy = np.rint(np.ldexp(distance, -exponent)).astype(np.int64) ** 2
    energy = energy.reshape(energy.shape[0] if energy.ndim else 1, -1)
    rows, columns = energy.shape
    by_row, by_column = energy.sum(1, keepdims=True) / columns, energy.sum(0, keepdims=True) / rows
    found = _log(by_row) + _log(by_column) - _log(energy.sum() / energy.size)
    return found.ravel() + 4 * exponent


def _log(values: npt.NDArray[np.float64]) -> Integers:
    """2 log2 of the values, rounded to integers."""
    with np.errstate(divide="ignore"):
        logs = np.round(2 * np.log2(values))
    return np.where(np.isfinite(logs), logs, -_UNMOVED_ROW).astype(np.int64)
