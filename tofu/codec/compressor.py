"""The proxy compressor: `tofu.codec.proxies` for the trainable parameters, then the largest of what the proxies missed.

Proxies explain what is like a gradient of a few images, and little of the rest. A sparse correction explains the large
entries whatever they come from. Early in training they explain more together than either does in the same bytes; late,
the correction alone often does. So now and then both are tried, and a client keeps to what explained more. The
published method has no correction.

Body, little-endian:

    bytes  field
    1      flags: what both ends must agree on (ProxySettings.flags)
    1      bits of a pixel and of a label
    2      number of proxies; 0 where the correction has all the bytes
    2      side of a proxy in pixels
    -      the proxies (ProxyCode), where there are any
    -      one row of 8-bit integers with its scale for each float buffer (BatchNorm's means and variances)
    4 each integer buffers as float32 (the difference of the batch counters)
    -      the correction (`entries.write_entries`), where there is room for one
"""

import math
import struct
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tofu.codec.correction import least_room, read_entries, write_entries
from tofu.codec.proxies import ENOUGH, ProxyCode, ProxyData, ProxySettings, automatic_sides, decode, encode
from tofu.codec.strata import Strata, strata_of
from tofu.compression.base import Compressed, Compressor
from tofu.compression.buffers import BufferCode
from tofu.compression.flat import LARGEST
from tofu.errors import PayloadError, RunError, SettingError
from tofu.payload import HEADER_BYTES
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, Weights, explained_variance

_PREFIX = struct.Struct("<BBHH")

TRIAL_EVERY = 4
"""What a trial chose, a surrogate_beta or no proxies at all, a client keeps for so many encodes."""

MAX_PROXIES = 8
"""Beside a correction more of them take long to encode, and explain no more than the correction does in their bytes."""


class Proxy(Compressor):
    """Proxy images in place of the update.

    Args:
        network_like: any network of the run (its param_spec and input shape fix the sizes).
        ratio: payload wanted, as float32 bytes of the update over bytes of the payload with its header.
        count: number of proxies; 0 takes as many as `ratio` affords, beside a correction at most `MAX_PROXIES`.
        settings: how to encode.
        correction: share of the payload's bytes that is left to the sparse correction, at least; 1 sends no proxies.

    Attributes:
        count: number of proxies in a payload that has any.

    Raises:
        SettingError: the ratio is out of reach for this model, or the proxies do not fit the network.
    """

    name: ClassVar[str] = "proxy"
    code: ClassVar[int] = 2

    def __init__(
        self,
        network_like: ReferenceModel,
        *,
        ratio: float,
        count: int,
        settings: ProxySettings,
        correction: float = 0.0,
    ) -> None:
        param_spec = network_like.param_spec
        self._beside = _PREFIX.size + BufferCode(param_spec).nbytes
        least = least_room(param_spec.parameter_count) if correction else math.inf
        room = int(param_spec.float32_bytes / ratio) - HEADER_BYTES - self._beside
        if correction == 1:
            self.settings, self.count = replace(settings, size=settings.size or automatic_sides(network_like)[-1]), 0
            if room < least:
                best = param_spec.float32_bytes / (HEADER_BYTES + self._beside + least)
                raise SettingError("ratio", ratio, f"at most {best:.1f} for this model (a correction of one entry)")
        else:
            most = MAX_PROXIES if correction else 0
            try:
                self.settings, self.count = _sized(network_like, ratio / (1 - correction), count, settings, most)
            except SettingError:  # one proxy takes more than its share, perhaps not more than the whole
                self.settings, self.count = _sized(network_like, ratio, count, settings, most)
        self._code = ProxyCode.of(network_like, self.settings, self.count)
        self._rooms = {}
        """Bytes of the correction, by the number of proxies before it."""
        if room >= least:
            self._rooms[0] = room
        if self.count:
            left = room - self._code.nbytes
            self._rooms[self.count] = left if left >= least else 0

    @property
    def side(self) -> int:
        """Side of a proxy in pixels."""
        return self._code.side

    @property
    def correction(self) -> int:
        """Bytes of the correction beside the proxies."""
        return self._rooms[self.count]

    def compress(
        self, network: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> Compressed:
        """See `Compressor.compress`.

        Raises:
            RunError: the update holds a value that is not finite.
        """
        if not all(bool(torch.isfinite(value).all()) for value in update.values()):
            raise RunError("the update holds a value that is not finite: local training diverged")
        age, last = self._remembered(memory)
        age = (age + 1) % TRIAL_EVERY
        classes = strata_of(network) if any(self._rooms.values()) else None
        zero = {name: torch.zeros_like(w) for name, w in network.base.items()}
        made = []
        if 0 in self._rooms and (not age or last is None):
            made.append(self._body(network, update, 0, b"", zero, classes))
        if self.count and not (age and last is None and made):
            settings = self.settings
            if last is not None and age and not settings.surrogate_beta:
                settings = replace(settings, surrogate_beta=last.surrogate_beta)
            encoding = encode(network, update, self.count, settings, generator=generator, start=last)
            with_proxies = self._body(network, update, self.count, encoding.body, encoding.decoded, classes)
            made = [replace(one, max_evals=encoding.max_evals) for one in (with_proxies, *made)]
        best = max(made, key=lambda one: explained_variance({name: update[name] for name in zero}, one.decoded))
        return replace(best, memory=bytes([age]) + best.memory)

    def decompress(self, network: ReferenceModel, body: bytes) -> Weights:
        proxies = self.read_proxies(body)
        count = 0 if proxies is None else self.count
        split = _PREFIX.size + (self._code.nbytes if count else 0)
        end = split + self._beside - _PREFIX.size
        correction = body[end:]
        if proxies is None:
            decoded = {name: torch.zeros_like(w) for name, w in network.base.items()}
        else:
            decoded = decode(network, proxies, self.settings)
        if self._rooms[count]:
            if len(correction) > self._rooms[count]:
                raise PayloadError(f"correction has {len(correction)} bytes, expected at most {self._rooms[count]}")
            decoded = _corrected(decoded, correction, strata_of(network))
        elif correction:
            raise PayloadError(f"proxy body has {len(body)} bytes, expected {end}")
        return decoded | BufferCode(network.param_spec).read(body[split:end])

    def read_proxies(self, body: bytes) -> ProxyData | None:
        """The proxies in a body, checked; None where it has none.

        Raises:
            PayloadError: they differ from what this run sends, or a value is out of range.
        """
        if len(body) < _PREFIX.size:
            raise PayloadError(f"proxy body has {len(body)} bytes, expected at least {_PREFIX.size}")
        found = _PREFIX.unpack_from(body)
        count = 0 if found[2] == 0 and 0 in self._rooms else self.count
        for field, value, expected in zip(("flags", "bits", "count", "side"), found, self._fields(count), strict=True):
            if value != expected:
                raise PayloadError(f"proxy body has {field} {value}, this run uses {expected}")
        return self._code.read(body[_PREFIX.size : _PREFIX.size + self._code.nbytes]) if count else None

    def body_bytes(self, param_spec: ParamSpec) -> int:
        sizes = [(self._code.nbytes if count else 0) + room for count, room in self._rooms.items()]
        return self._beside + max(sizes)

    def _fields(self, count: int) -> tuple[int, int, int, int]:
        return self.settings.flags, self.settings.bits, count, self._code.side

    def _body(
        self,
        network: ReferenceModel,
        update: Weights,
        count: int,
        proxies: bytes,
        decoded: Weights,
        classes: Strata | None,
    ) -> Compressed:
        """A body with these proxies, which decode to `decoded`; its memory is the proxies alone."""
        buffers = BufferCode(network.param_spec)
        tail, correction = buffers.write(update), b""
        if classes is not None and self._rooms[count]:
            missed = torch.cat([(update[name] - value).flatten() for name, value in decoded.items()])
            correction = write_entries(missed.clamp(-LARGEST, LARGEST), self._rooms[count], classes)
            decoded = _corrected(decoded, correction, classes)
        body = _PREFIX.pack(*self._fields(count)) + proxies + tail + correction
        return Compressed(body, decoded | buffers.read(tail), proxies)

    def _remembered(self, memory: bytes) -> tuple[int, ProxyData | None]:
        """How many encodes ago there was a trial, and the last proxies; None where the last payload had none."""
        try:
            if len(memory) > 1 and self.count:
                return memory[0], self._code.read(memory[1:])
            return (memory[0], None) if len(memory) == 1 and 0 in self._rooms else (-1, None)
        except PayloadError:  # another run's settings, or a damaged state: begin anew
            return -1, None


def _corrected(decoded: Weights, correction: bytes, classes: Strata) -> Weights:
    """The proxies' update with the correction added."""
    sizes = [value.numel() for value in decoded.values()]
    pieces: tuple[Tensor, ...] = torch.split(read_entries(correction, classes), sizes)
    return {name: d + piece.view_as(d) for (name, d), piece in zip(decoded.items(), pieces, strict=True)}


def _sized(
    network: ReferenceModel, ratio: float, count: int, settings: ProxySettings, most: int
) -> tuple[ProxySettings, int]:
    """The settings with a side, and how many proxies to send: `count`, or as many as the ratio affords.

    Args:
        most: proxies beside a correction, which are of the smallest side; 0 without one.
    """
    if not settings.size and most and not count:
        settings = replace(settings, size=automatic_sides(network)[-1])
    elif not settings.size:
        settings = _with_side(network, ratio, count, settings)
    affordable = count or _affordable(network, ratio, settings)
    return settings, affordable if count or not most else min(affordable, most)


def _with_side(network: ReferenceModel, ratio: float, count: int, settings: ProxySettings) -> ProxySettings:
    """Choose the largest automatic side of which the ratio affords enough proxies."""
    for side in automatic_sides(network):
        settings = replace(settings, size=side)
        if not count and network.param_spec.float32_bytes / ratio >= _size(network, ENOUGH, settings):
            break
    return settings


def _size(network: ReferenceModel, count: int, settings: ProxySettings) -> int:
    """Bytes of a payload with so many proxies, header included."""
    code = ProxyCode.of(network, settings, count)
    return HEADER_BYTES + _PREFIX.size + code.nbytes + BufferCode(network.param_spec).nbytes


def _affordable(network: ReferenceModel, ratio: float, settings: ProxySettings) -> int:
    budget = network.param_spec.float32_bytes / ratio

    def size(count: int) -> int:
        return _size(network, count, settings)

    if size(1) > budget:
        best = network.param_spec.float32_bytes / size(1)
        raise SettingError("ratio", ratio, f"at most {best:.1f} for this model (one proxy of these settings)")
    # The size is affine in the count up to the rounding of packed bits to whole bytes, so start there and step.
    count = max(1, int((budget - size(1)) / ((size(65) - size(1)) / 64)))
    while count < 0xFFFF and size(count + 1) <= budget:
        count += 1
    while size(count) > budget:
        count -= 1
    return count
