"""Two functions of the public API: `tofu.encode` and `tofu.decode`.

A message of `encode` describes itself, so `decode` needs the model alone. Little-endian:

    bytes  field
    4      magic "TOFE"
    1      version of this layout
    8      ratio, float64
    4 x 2  channels, height and width of the input, number of outputs
    1      length of the compressor's name
    2      length of the options
    -      the compressor's name
    -      the options that differ from their defaults, as JSON; nothing if there are none
    -      the payload (`tofu.payload`), with the fingerprint of the weights that it is relative to
"""

import copy
import dataclasses
import json
import math
import struct
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tofu.bytes_io import ByteReader
from tofu.codec.options import DEFAULTS, CompressorOptions, ProxySettings
from tofu.compression import compressors, make_compressor
from tofu.data import ImageShape
from tofu.errors import PayloadError, SettingError
from tofu.payload import HEADER_BYTES, Payload, read_payload
from tofu.reference_model import ReferenceModel, output_count
from tofu.settings.deprecated import present_value
from tofu.weights import Weights, fingerprint, weights_of

_MAGIC, _VERSION = b"TOFE", 1
_HEADER = struct.Struct("<4sBd4HBH")
_MIN_RATIO, _MAX_SIDE = 0.1, 4096


def encode(
    model: nn.Module,
    update: Mapping[str, Tensor],
    *,
    input_shape: tuple[int, int, int],
    ratio: float = 50.0,
    compressor: str = "proxy",
    options: CompressorOptions | None = None,
    initial: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> bytes:
    """Compress one update of a model; `decode` reverses it for whoever has the model at the same weights.

    Args:
        model: a classifier at the weights that the update is relative to. It is not changed.
        update: new minus old weights: name -> float tensor for every trainable parameter, and optionally for buffers
            (buffers that are missing count as unchanged).
        input_shape: channels, height and width of the model's input.
        ratio: float32 bytes of the update over bytes of the payload. The message's own header adds about 30 bytes.
        compressor: a registered name (proxy, stc, topk, ...) or `package.module:Class`.
        options: options of the compressor; by default the proxy codec with a correction of 0.4.
        initial: trainable parameters that both ends know from earlier, such as the model's initial weights. The
            correction's positions take fewer bits with them. `decode` needs the same.
        seed: seed of the compressor's random numbers.

    Returns:
        The message.

    Raises:
        SettingError: an argument cannot be used, for example a ratio out of reach for this model.
        RunError: the update holds a value that is not finite.

    Example:
        >>> import torch, tofu
        >>> _ = torch.manual_seed(0)
        >>> layers = torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
        >>> model = torch.nn.Sequential(*layers)
        >>> images, labels = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
        >>> loss = torch.nn.functional.cross_entropy(model(images), labels)
        >>> names = [name for name, _ in model.named_parameters()]
        >>> gradients = torch.autograd.grad(loss, list(model.parameters()))
        >>> update = {name: -0.1 * gradient for name, gradient in zip(names, gradients)}
        >>> message = tofu.encode(model, update, input_shape=(1, 8, 8), ratio=30)
        >>> 4 * sum(p.numel() for p in model.parameters()) // len(message)
        28
        >>> decoded = tofu.decode(model, message)
        >>> from tofu.weights import cosine
        >>> cosine(update, decoded) > 0.7
        True
    """
    if options is None:
        encoder = ProxySettings(bits=4, warm_start=False)
        options = CompressorOptions(correction=0.4, encoder=encoder) if compressor == "proxy" else DEFAULTS
    reference = _reference(model, input_shape, initial)
    compressor = present_value("compressor", compressor)
    made = make_compressor(compressor, reference, ratio=ratio, options=options)
    complete = _complete(reference, update)
    compressed = made.compress(reference, complete, generator=torch.Generator().manual_seed(seed))
    name, text = compressor.encode(), _options_to_bytes(options)
    shape = (*input_shape, reference.shape.classes)
    header = _HEADER.pack(_MAGIC, _VERSION, ratio, *shape, len(name), len(text)) + name + text
    return header + Payload(made.code, 0, fingerprint(weights_of(reference.model)), compressed.body).to_bytes()


def decode(
    model: nn.Module,
    message: bytes,
    *,
    input_shape: tuple[int, int, int] | None = None,
    compressor: str | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Weights:
    """Decode a message of `encode` to the update that it stands for.

    Args:
        model: the model at the weights that it was encoded for. It is not changed.
        message: bytes of `encode`. They are checked. Give `input_shape` as well if they come from an untrusted sender,
            because the memory that decoding takes grows with it.
        input_shape: the input shape that the message must have been encoded with; by default any.
        compressor: the compressor that the message must have been written by. It is required for one that is not
            registered, because a message must not choose which code is imported.
        initial: as for `encode`.

    Returns:
        name -> float32 tensor for all trainable parameters and buffers.

    Raises:
        PayloadError: the bytes are not such a message, or were encoded for other weights.

    Example:
        See `tofu.encode`.
    """
    reader = ByteReader(message, "message", min_bytes=_HEADER.size)
    magic, version, ratio, channels, height, width, classes, name_bytes, options_bytes = reader.unpack(_HEADER)
    if (magic, version) != (_MAGIC, _VERSION):
        raise PayloadError(f"message starts with {magic!r} and version {version}, expected {_MAGIC!r} and {_VERSION}")
    if not (_MIN_RATIO <= ratio < math.inf and min(channels, height, width) >= 1 and max(height, width) <= _MAX_SIDE):
        raise PayloadError(f"message has ratio {ratio:g} and input shape {(channels, height, width)}, out of range")
    name = present_value("compressor", reader.take(name_bytes).decode(errors="replace"), warn=False)
    compressor = compressor and present_value("compressor", compressor)
    options = _options_from_bytes(reader.take(options_bytes))
    if input_shape is not None and (channels, height, width) != tuple(input_shape):
        raise PayloadError(f"message has input shape {(channels, height, width)}, expected {tuple(input_shape)}")
    if name != (compressor or name) or (compressor is None and name not in compressors.names()):
        raise PayloadError(f"message was written by compressor {name!r}, expected {compressor or 'a registered one'}")
    try:
        reference = _reference(model, (channels, height, width), initial)
    except SettingError as error:
        raise PayloadError(f"message does not fit this model: {error}") from error
    if classes != reference.shape.classes:
        raise PayloadError(f"message is for {classes} outputs, this model has {reference.shape.classes}")
    try:
        made = make_compressor(name, reference, ratio=ratio, options=options)
    except SettingError as error:
        raise PayloadError(f"message has options that do not fit this model: {error}") from error
    limit = HEADER_BYTES + made.body_bytes(reference.param_spec)
    base = fingerprint(weights_of(reference.model))
    payload = read_payload(reader.rest(), codec=made.code, round_=0, fingerprint=base, max_bytes=limit)
    return made.decompress(reference, payload.body)


def _reference(
    model: nn.Module, input_shape: tuple[int, int, int], initial: Mapping[str, Tensor] | None
) -> ReferenceModel:
    """A copy of the model on the CPU, in eval mode, with its input shape and number of outputs."""
    model = copy.deepcopy(model).cpu().eval()
    shape = ImageShape(*input_shape, classes=1)
    try:
        shape = dataclasses.replace(shape, classes=output_count(model, shape))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SettingError("input_shape", tuple(input_shape), f"the shape of this model's input ({reason})") from error
    reference = ReferenceModel(model, shape)
    if initial is None:
        return reference
    missing = reference.param_spec.parameters.keys() - initial.keys()
    if missing:
        raise SettingError("initial", sorted(initial)[:5], f"all trainable parameters ({min(missing)} is missing)")
    known = {name: initial[name].detach().cpu().float() for name in reference.param_spec.parameters}
    return dataclasses.replace(reference, initial=known)


def _complete(reference: ReferenceModel, update: Mapping[str, Tensor]) -> Weights:
    """The update over all tensors of the param_spec, checked; buffers that are missing are zero."""
    complete: Weights = {}
    for name, shape in reference.param_spec.shapes.items():
        value = update.get(name, torch.zeros(shape) if name in reference.param_spec.buffers else None)
        if value is None or value.shape != shape:
            found = "nothing" if value is None else f"a tensor {list(value.shape)}"
            raise SettingError("update", f"{name}: {found}", f"a tensor {list(shape)}")
        complete[name] = value.detach().cpu().float()
    return complete


def _options_to_bytes(options: CompressorOptions) -> bytes:
    """The options that differ from their defaults, without those of the sender alone; b"" if there are none."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    values["encoder"] = {
        name: getattr(options.encoder, name)
        for name in ("smooth", "batch_statistics", "labels", "scale", "size", "bits")
        if getattr(options.encoder, name) != getattr(DEFAULTS.encoder, name)
    }
    changed = {name: value for name, value in values.items() if value not in ({}, getattr(DEFAULTS, name))}
    return json.dumps(changed, separators=(",", ":")).encode() if changed else b""


def _options_from_bytes(data: bytes) -> CompressorOptions:
    """The inverse of `_options_to_bytes`. Raises PayloadError for options that cannot be used."""
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
