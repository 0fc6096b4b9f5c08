"""The byte format of a plugin's state: named tensors, numbers, texts and bytes. Reading checks every field.

    offset  bytes  field
    0       4      magic "TPST"
    4       1      version of this layout
    5       4      number of entries, little-endian unsigned, as all numbers here
    9       -      entries: length of the name (2), name in UTF-8, kind (1), value

Kinds: an integer (8, signed); a float (8); a text or bytes (length 4, content); a tensor (type 1, dimensions 1, each
size 4, then its elements).
"""

import math
import struct
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tofu.bytes_io import ByteReader
from tofu.errors import PayloadError

PluginState = dict[str, Tensor | int | float | str | bytes]
"""State of a plugin: name -> value. Tensors are detached, on the CPU, of a type in `_TYPES`, and finite."""

MAGIC = b"TPST"
VERSION = 1
_HEADER = struct.Struct("<4sBI")
_INT, _FLOAT, _TEXT, _BYTES, _TENSOR = range(1, 6)
_TYPES = ((torch.float32, "<f4"), (torch.float64, "<f8"), (torch.int64, "<i8"), (torch.int32, "<i4"),
          (torch.uint8, "|u1"), (torch.bool, "|b1"))  # fmt: skip
_MAX_DIMENSIONS = 8


def state_to_bytes(state: Mapping[str, Tensor | int | float | str | bytes], *, max_bytes: int) -> bytes:
    """Return the bytes that `state_from_bytes` reads.

    Raises:
        PayloadError: a value that cannot be kept (its type, or it is not finite), or more than `max_bytes` in all.
    """
    parts = [_HEADER.pack(MAGIC, VERSION, len(state))]
    for name, value in state.items():
        encoded = name.encode()
        if not 0 < len(encoded) < 1 << 16:
            raise PayloadError(f"plugin state's name {name[:40]!r} has {len(encoded)} bytes, expected 1 to 65535")
        parts += [struct.pack("<H", len(encoded)), encoded, _value_bytes(name, value)]
    data = b"".join(parts)
    if len(data) > max_bytes:
        raise PayloadError(f"plugin state has {len(data)} bytes, expected at most {max_bytes}")
    return data


def state_from_bytes(data: object, *, max_bytes: int) -> PluginState:
    """Invert `state_to_bytes`.

    Raises:
        PayloadError: one line that names the field, its value and what was expected.
    """
    reader = ByteReader(data, "plugin state", min_bytes=_HEADER.size, max_bytes=max_bytes)
    magic, version, count = reader.unpack(_HEADER)
    if magic != MAGIC:
        raise PayloadError(f"plugin state starts with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise PayloadError(f"plugin state has version {version}, this program reads version {VERSION}")
    state: PluginState = {}
    for _ in range(count):
        name = _text(reader.prefixed(_U16))
        if not name or name in state:
            raise PayloadError(f"plugin state's name {name[:40]!r} is empty or occurs twice")
        state[name] = _read_value(name if name.isprintable() else repr(name), reader)
    reader.finish()
    return state


_U8, _U16, _U32, _I64, _F64 = (struct.Struct(f"<{code}") for code in "BHIqd")


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise PayloadError("plugin state holds a text that is not UTF-8") from None


def _value_bytes(name: str, value: object) -> bytes:
    match value:
        case Tensor():
            return _tensor_bytes(name, value)
        case int() if not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63:
            return _U8.pack(_INT) + _I64.pack(value)
        case float() if math.isfinite(value):
            return _U8.pack(_FLOAT) + _F64.pack(value)
        case str() | bytes():
            content = value.encode() if isinstance(value, str) else value
            return _U8.pack(_TEXT if isinstance(value, str) else _BYTES) + _U32.pack(len(content)) + content
    raise PayloadError(f"plugin state's {name} is {value!r:.60}: expected a tensor, 64-bit integer, finite float, str or bytes")  # noqa: E501  # fmt: skip


def _tensor_bytes(name: str, value: Tensor) -> bytes:
    codes = [i for i, (dtype, _) in enumerate(_TYPES) if dtype == value.dtype]
    if not codes or value.dim() > _MAX_DIMENSIONS:
        raise PayloadError(f"plugin state's {name} is {value.dtype} with {value.dim()} dimensions: not a type we keep")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise PayloadError(f"plugin state's {name} holds a value that is not finite")
    elements = value.detach().cpu().contiguous().numpy().astype(_TYPES[codes[0]][1]).tobytes()
    return struct.pack(f"<BBB{value.dim()}I", _TENSOR, codes[0], value.dim(), *value.shape) + elements


def _read_value(name: str, reader: ByteReader) -> Tensor | int | float | str | bytes:
    kind = reader.unpack(_U8)[0]
    if kind == _INT:
        return int(reader.unpack(_I64)[0])
    if kind == _FLOAT:
        number = float(reader.unpack(_F64)[0])
        if not math.isfinite(number):
            raise PayloadError(f"plugin state's {name} is {number}, expected a finite number")
        return number
    if kind == _TEXT:
        return _text(reader.prefixed(_U32))
    if kind == _BYTES:
        return reader.prefixed(_U32)
    if kind == _TENSOR:
        return _read_tensor(name, reader)
    raise PayloadError(f"plugin state's {name} is of kind {kind}, expected {_INT} to {_TENSOR}")


def _read_tensor(name: str, reader: ByteReader) -> Tensor:
    code, dimensions = reader.unpack(_U8)[0], reader.unpack(_U8)[0]
    if code >= len(_TYPES) or dimensions > _MAX_DIMENSIONS:
        raise PayloadError(f"plugin state's {name} is a tensor of type {code} with {dimensions} dimensions")
    shape = [reader.unpack(_U32)[0] for _ in range(dimensions)]
    if math.prod(max(size, 1) for size in shape) >= 1 << 40:  # a size of 0 would allow any others
        raise PayloadError(f"plugin state's {name} has the shape {shape}, expected fewer than 2^40 values")
    _, layout = _TYPES[code]
    content = reader.take(math.prod(shape) * np.dtype(layout).itemsize)
    array = np.frombuffer(content, dtype=layout)
    if layout == "|b1" and bool((array.view(np.uint8) > 1).any()):
        raise PayloadError(f"plugin state's {name} holds a boolean that is neither 0 nor 1")
    if not np.isfinite(array).all():
        raise PayloadError(f"plugin state's {name} holds a value that is not finite")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).view(shape)
