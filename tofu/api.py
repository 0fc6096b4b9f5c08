"""`tofu.encode` and `tofu.decode`: one update of any torch model as bytes, and back.

A message of `encode` describes itself, so `decode` needs the model alone. Little-endian:

    bytes  field
    4      magic "TOFE"
    1      version of this layout
    8      ratio, float64
    1      1 if `forward` was given, plus 2 if `loss` was
    1      number of the model's inputs, 0 if none is known
    -      the shape of each input and that of the target: the number of axes (1 byte) and their lengths (4 bytes each)
    1      length of the compressor's name
    2      length of the options
    -      the compressor's name
    -      the options that differ from their defaults, as JSON; empty if there are none
    -      the payload (`tofu.wire`), with the fingerprint of the weights that it is relative to
"""

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tofu.arguments import check_calls, check_kind, check_number, shown
from tofu.bytes_io import ByteReader
from tofu.codec.options import DEFAULTS, CompressorOptions, ProxySettings
from tofu.compression import compressors, make_compressor
from tofu.errors import PayloadError, SettingError
from tofu.reference_model import (
    LOG,
    MAX_AXES,
    Forward,
    InputShape,
    Loss,
    ModelCall,
    ReferenceModel,
    Shape,
    inputs_of,
    resolve_compressor,
)
from tofu.settings import python_call
from tofu.settings.deprecated import present_value
from tofu.weights import Weights, base_fingerprint, copy_model, in_float32
from tofu.wire import HEADER_BYTES, Payload, read_payload

_MAGIC, _VERSION = b"TOFE", 2
_FIXED = struct.Struct("<4sBdBB")
_LENGTHS = struct.Struct("<BH")
_MIN_RATIO, _MAX_VALUES = 0.1, 1 << 26
_FORWARD, _LOSS = 1, 2
_NEARLY = 0.1
"""Squared distance from the weights, relative to theirs, below which an update looks like new weights."""
_PROXY_OPTIONS = CompressorOptions(correction=0.4, encoder=ProxySettings(bits=4, warm_start=False))


@python_call
def encode(
    model: nn.Module,
    update: Mapping[str, Tensor],
    *,
    input_shape: InputShape | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    target_shape: Shape | None = None,
    ratio: float = 50.0,
    compressor: str | None = None,
    correction: float | None = None,
    proxies_below: float | None = None,
    options: CompressorOptions | None = None,
    initial: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> bytes:
    """Compress one update of a model to a message, which `decode` reverses for the same model at the same weights.

    Args:
        model: the model at the weights that the update is relative to. It is not changed.
        update: new minus old weights: name -> float tensor for every trainable parameter. Buffers are optional. The
            model's own weights are refused, and a warning is logged for an update that is nearly these.
        input_shape: shape of one example, without the batch, such as (features,) or (channels, height, width); or a
            tuple of such shapes for several inputs.
        forward: forward(model, *inputs) -> outputs, if the model cannot simply be called with floating-point inputs.
            `tofu.at_embedding` makes one for models of token ids.
        loss: loss(outputs, targets) -> scalar, if the outputs have so many values that a free target costs too much.
        target_shape: shape of one example's target in `loss`.
        ratio: float32 bytes of the update over bytes of the payload; the message has about 30 bytes more.
        compressor: a registered name (proxy, sparse, stc, topk, ...) or `package.module:Class`. By default `proxy`, or
            `sparse` if there is no input shape, or the model takes integers and there is no `forward`.
        correction: smallest fraction of a proxy payload that is left to the sparse correction; 0.4 by default.
        proxies_below: no proxies where the correction alone explains this fraction of the update; by default always.
        options: all options of the compressor, in place of `correction` and `proxies_below`.
        initial: trainable parameters that both ends know, such as the initial weights; they make the message shorter.
        seed: seed of the compressor's random numbers.

    Raises:
        SettingError: an argument cannot be used, for example a ratio that this model cannot reach.
        RunError: the update holds a value that is not finite.

    Example:
        >>> import torch, tofu
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> update = {name: 0.01 * torch.randn(p.shape) for name, p in model.named_parameters()}
        >>> message = tofu.encode(model, update, input_shape=(1, 8, 8), ratio=10)
        >>> tofu.decode(model, message)["1.weight"].shape
        torch.Size([10, 64])
    """
    _check(model, compressor, initial, {"forward": forward, "loss": loss})
    check_kind("update", update, Mapping, "a mapping of names to tensors: new minus old weights")
    options = _options(options, {"correction": correction, "proxies_below": proxies_below})
    _check_numbers(ratio, seed)
    model, compressor = in_float32(model), compressor and present_value("compressor", compressor)
    name, call = resolve_compressor(
        compressor, model, input_shape, forward=forward, loss=loss, target_shape=target_shape
    )
    options = options or (_PROXY_OPTIONS if name == "proxy" else DEFAULTS)
    header = _Header(ratio, forward is not None, loss is not None, call.inputs, call.target, name, options)
    return header.to_bytes() + _compressed(_reference(model, call, initial), update, header, seed).to_bytes()


@python_call
def decode(
    model: nn.Module,
    message: bytes,
    *,
    input_shape: InputShape | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    compressor: str | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Weights:
    """Decode a message of `encode`.

    Args:
        model: the model at the weights that it was encoded for. It is not changed.
        message: bytes of `encode`. They are checked. Give `input_shape` as well if they come from an untrusted sender,
            because the memory that decoding takes grows with it.
        input_shape: the input shape that the message must have been encoded with; by default any.
        forward: as for `encode`.
        loss: as for `encode`.
        initial: as for `encode`.
        compressor: the compressor that the message must have been written by. It is required for one that is not
            registered, because a message must not choose which code is imported.

    Returns:
        The decoded update: name -> float32 tensor for all trainable parameters and buffers.

    Raises:
        PayloadError: the bytes are not such a message, or were encoded for other weights.
        SettingError: another argument cannot be used.
    """
    _check(model, compressor, initial, {"forward": forward, "loss": loss})
    reader = ByteReader(message, "message", min_bytes=_FIXED.size)
    header = _Header.read(reader)
    if (header.has_forward, header.has_loss) != (forward is not None, loss is not None):
        raise PayloadError("message was encoded with a `forward` or `loss` where this decode has none, or the reverse")
    name, shapes, model = header.compressor, header.inputs, in_float32(model)
    compressor = compressor and present_value("compressor", compressor)
    if name != (compressor or name) or (compressor is None and name not in compressors.names()):
        raise PayloadError(f"message was written by compressor {name!r}, expected {compressor or 'a registered one'}")
    expected, _ = inputs_of(model, input_shape or shapes or (1,), forward)
    if shapes not in ((), expected):
        raise PayloadError(f"message has input shape {shapes}, expected {expected}")
    try:
        _, call = resolve_compressor(
            name, model, shapes or None, forward=forward, loss=loss, target_shape=header.target if loss else None
        )
        reference = _reference(model, call, initial)
        made = make_compressor(name, reference, ratio=header.ratio, options=header.options)
    except SettingError as error:
        raise PayloadError(f"message does not fit this model: {error}") from error
    if header.target != call.target:
        raise PayloadError(f"message is for outputs of shape {header.target}, this model has {call.target}")
    limit = HEADER_BYTES + made.body_bytes(reference.param_spec)
    base = base_fingerprint(reference.model)
    payload = read_payload(reader.rest(), codec=made.code, round_=0, fingerprint=base, max_bytes=limit)
    return made.decompress(reference, payload.body)


def _check(model: object, compressor: object, initial: object, calls: Mapping[str, object]) -> None:
    """Check the types of arguments that `encode` and `decode` share. Raises SettingError."""
    check_kind("model", model, nn.Module, "a torch.nn.Module, such as torch.nn.Linear(4, 2)")
    check_kind("compressor", compressor, str | None, "a name, such as 'topk', or 'package.module:Class'")
    check_kind(
        "initial", initial, Mapping | None, "a mapping of names to tensors, such as dict(model.named_parameters())"
    )
    check_calls(calls)


@dataclass(frozen=True)
class _Header:
    """The header of a message, from which `decode` builds the compressor.

    Attributes:
        ratio: as given to `encode`, like `compressor` and `options`.
        has_forward, has_loss: whether `forward` and `loss` were given.
        inputs, target: shapes of one example's inputs and of its target.
    """

    ratio: float
    has_forward: bool
    has_loss: bool
    inputs: tuple[Shape, ...]
    target: Shape
    compressor: str
    options: CompressorOptions

    def to_bytes(self) -> bytes:
        flags = _FORWARD * self.has_forward | _LOSS * self.has_loss
        name, options = self.compressor.encode(), _options_to_bytes(self.options)
        shapes = (struct.pack(f"<B{len(shape)}I", len(shape), *shape) for shape in (*self.inputs, self.target))
        fixed = _FIXED.pack(_MAGIC, _VERSION, self.ratio, flags, len(self.inputs))
        return b"".join((fixed, *shapes, _LENGTHS.pack(len(name), len(options)), name, options))

    @staticmethod
    def read(reader: ByteReader) -> "_Header":
        """Read and check a header. Raises PayloadError if it is not one."""
        magic, version, ratio, flags, inputs = reader.unpack(_FIXED)
        if (magic, version) != (_MAGIC, _VERSION):
            raise PayloadError(
                f"message starts with {magic!r} and version {version}, expected {_MAGIC!r} and {_VERSION}"
            )
        if not _MIN_RATIO <= ratio < math.inf or inputs > MAX_AXES or flags > _FORWARD | _LOSS:
            raise PayloadError(f"message has ratio {ratio:g}, flags {flags} and {inputs} inputs, out of range")
        shapes, target = tuple(_read_shape(reader) for _ in range(inputs)), _read_shape(reader)
        name_bytes, options_bytes = reader.unpack(_LENGTHS)
        name = present_value("compressor", reader.take(name_bytes).decode(errors="replace"), warn=False)
        options = _options_from_bytes(reader.take(options_bytes))
        return _Header(ratio, bool(flags & _FORWARD), bool(flags & _LOSS), shapes, target, name, options)


def _read_shape(reader: ByteReader) -> Shape:
    """Read a shape and check its number of values, which bounds the memory that decoding takes."""
    (axes,) = reader.unpack(struct.Struct("<B"))
    if axes > MAX_AXES:
        raise PayloadError(f"message has a shape of {axes} axes, expected at most {MAX_AXES}")
    shape: Shape = reader.unpack(struct.Struct(f"<{axes}I"))
    if not 1 <= math.prod(shape) <= _MAX_VALUES:
        raise PayloadError(f"message has the shape {shape}, expected 1 to {_MAX_VALUES} values")
    return shape


def _reference(model: nn.Module, call: ModelCall, initial: Mapping[str, Tensor] | None) -> ReferenceModel:
    """Return a copy of the model on the CPU, in eval mode."""
    reference = ReferenceModel(copy_model(model).cpu().eval(), call)
    if initial is None:
        return reference
    missing = reference.param_spec.parameters.keys() - initial.keys()
    if missing:
        raise SettingError("initial", sorted(initial)[:5], f"all trainable parameters ({min(missing)} is missing)")
    shapes = reference.param_spec.shapes
    known = {name: _tensor("initial", name, initial[name], shapes[name]) for name in reference.param_spec.parameters}
    return dataclasses.replace(reference, initial=known)


def _compressed(reference: ReferenceModel, update: Mapping[str, Tensor], header: "_Header", seed: int) -> Payload:
    """Return the payload of an update, with the compressor that a message's header names."""
    made = make_compressor(header.compressor, reference, ratio=header.ratio, options=header.options)
    complete = _complete(reference, update)
    _check_difference(reference, complete)
    body = made.compress(reference, complete, generator=torch.Generator().manual_seed(seed)).body
    return Payload(made.code, 0, base_fingerprint(reference.model), body)


def _complete(reference: ReferenceModel, update: Mapping[str, Tensor]) -> Weights:
    """Check an update and return it with all tensors of the param_spec; missing buffers are zero."""
    known = {*reference.model.state_dict(), *(name for name, _ in reference.model.named_buffers())}
    unknown = [shown(name) for name in update if name not in known]
    if unknown:
        names = ", ".join(reference.param_spec.parameters)
        raise SettingError("update", unknown[0], f"names of the model's tensors: {names:.200}")
    complete: Weights = {}
    for name, shape in reference.param_spec.shapes.items():
        value = update.get(name, torch.zeros(shape) if name in reference.param_spec.buffers else None)
        complete[name] = _tensor("update", name, value, shape)
    return complete


def _options(options: object, given: Mapping[str, float | None]) -> CompressorOptions | None:
    """Return the compressor's options; None for the defaults. Raises SettingError if they cannot be used."""
    check_kind("options", options, CompressorOptions | None, "a tofu.codec.options.CompressorOptions, or None")
    changes = {name: value for name, value in given.items() if value is not None}
    for name, value in changes.items():
        check_number(name, value, 0, 1)
        if options is not None:
            raise SettingError(name, value, f"None with `options`: CompressorOptions({name}={value:g}) has it")
    if not changes:
        return options if isinstance(options, CompressorOptions) else None
    return dataclasses.replace(_PROXY_OPTIONS, **changes)  # type: ignore[arg-type]


def _check_difference(reference: ReferenceModel, update: Weights) -> None:
    """Raise SettingError for an update that is the model's weights, and log a warning if it is nearly these."""
    size = error = 0.0
    for name, weight in reference.base.items():
        size += float(weight.double().square().sum())
        error += float((weight - update[name]).double().square().sum())
    if size and not error:
        accepted = "new minus old weights of each parameter, such as {name: new[name] - old[name] for name in new}"
        raise SettingError("update", "the model's own weights", accepted)
    if error < _NEARLY * size:
        LOG.warning("update is nearly the model's weights: it should be new minus old weights, not the new weights")


def _check_numbers(ratio: object, seed: object) -> None:
    if not isinstance(ratio, int | float) or not _MIN_RATIO <= ratio < math.inf:
        raise SettingError("ratio", shown(ratio), f"a finite number of at least {_MIN_RATIO}, such as 50")
    if not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 64:
        raise SettingError("seed", shown(seed), "a whole number of 64 bits, such as 0")


def _tensor(argument: str, name: str, value: object, shape: Shape) -> Tensor:
    """Return a value of an argument in float32 on the CPU. Raises SettingError unless it is a tensor of this shape."""
    if not isinstance(value, Tensor) or value.shape != shape:
        kind = "nothing" if value is None else type(value).__name__
        found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else kind
        raise SettingError(argument, f"{name}: {found}", f"a tensor {list(shape)}")
    return value.detach().cpu().float()


def _options_to_bytes(options: CompressorOptions) -> bytes:
    """Return the options that `decode` needs and that differ from their defaults, as JSON; b"" if there are none."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    values["encoder"] = {
        name: getattr(options.encoder, name)
        for name in ("smooth", "batch_statistics", "labels", "scale", "size", "bits")
        if getattr(options.encoder, name) != getattr(DEFAULTS.encoder, name)
    }
    changed = {name: value for name, value in values.items() if value not in ({}, getattr(DEFAULTS, name))}
    return json.dumps(changed, separators=(",", ":")).encode() if changed else b""


def _options_from_bytes(data: bytes) -> CompressorOptions:
    """Invert `_options_to_bytes`. Raises PayloadError for options that cannot be used."""
    try:
        values = json.loads(data or b"{}")
        encoder = values.pop("encoder", {})
        for given, defaults in ((values, DEFAULTS), (encoder, DEFAULTS.encoder)):
            for name, value in given.items():
                kind = type(getattr(defaults, name))
                if not isinstance(value, (int, float) if kind is float else kind):
                    raise TypeError(f"{name} is {value!r}")
        return CompressorOptions(**values, encoder=ProxySettings(**encoder))
    except (ValueError, TypeError, AttributeError, SettingError) as error:
        raise PayloadError(f"message has options that cannot be used ({error})") from error
