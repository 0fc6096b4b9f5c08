"""The proxy compressor: `tofu.proxy` for the trainable parameters, then the largest of what the proxies missed.

Proxies explain what is like a gradient of a few images, and little of the rest. A sparse correction explains the large
entries whatever they come from. Together they explain more of an update than either does in the same bytes (benchmark
`codec`), so a share of the bytes is left to the correction. The published method has none.

Body, little-endian:

    bytes  field
    1      flags: what both ends must agree on (ProxySettings.flags)
    1      bits of a pixel and of a label
    2      number of proxies
    2      side of a proxy in pixels
    -      the proxies (ProxyCode)
    -      one row of 8-bit integers with its scale for each float buffer (BatchNorm's means and variances)
    4 each integer buffers as float32 (the difference of the batch counters)
    -      the correction (`topk.write_largest`), where there is room for one
"""

import struct
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tofu.compression.base import Compressed, Compressor
from tofu.compression.buffers import BufferCode
from tofu.compression.topk import least_room, read_largest, write_largest
from tofu.errors import PayloadError, SettingError
from tofu.network import Network
from tofu.payload import HEADER_BYTES
from tofu.proxy import ENOUGH, ProxyCode, ProxyData, ProxySettings, automatic_sides, decode, encode
from tofu.weights import Layout, Weights

_PREFIX = struct.Struct("<BBHH")

TRIAL_EVERY = 4
"""The steepness that a trial chose is kept for so many encodes of a client."""


class Proxy(Compressor):
    """Proxy images in place of the update.

    Args:
        network_like: any network of the run (its layout and input shape fix the sizes).
        ratio: payload wanted, as float32 bytes of the update over bytes of the payload with its header.
        count: number of proxies; 0 takes as many as `ratio` affords, beside a correction at most `ENOUGH`.
        settings: how to encode.
        correction: share of the payload's bytes that is left to the sparse correction, at least.

    Raises:
        SettingError: the ratio is out of reach for this model, or the proxies do not fit the network.
    """

    name: ClassVar[str] = "proxy"
    code: ClassVar[int] = 2

    def __init__(
        self, network_like: Network, *, ratio: float, count: int, settings: ProxySettings, correction: float = 0.0
    ) -> None:
        try:
            self.settings, self.count = _sized(network_like, ratio / (1 - correction), count, settings)
        except SettingError:  # one proxy takes more than its share, perhaps not more than the whole
            self.settings, self.count = _sized(network_like, ratio, count, settings)
        if correction and not count:  # more of them take long to encode, and explain no more than the correction does
            self.count = min(self.count, ENOUGH)
        self._code = ProxyCode.of(network_like, self.settings, self.count)
        layout = network_like.layout
        left = int(layout.float32_bytes / ratio) - _size(network_like, self.count, self.settings)
        self.correction = left if correction and left >= least_room(layout.parameter_count) else 0

    @property
    def side(self) -> int:
        """Side of a proxy in pixels."""
        return self._code.side

    def compress(
        self, network: Network, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> Compressed:
        age, start = self._remembered(memory)
        settings, age = self.settings, (age + 1) % TRIAL_EVERY
        if start is not None and age and not settings.steepness:
            settings = replace(settings, steepness=start.steepness)
        encoding = encode(network, update, self.count, settings, generator=generator, start=start)
        buffers = BufferCode(network.layout)
        tail = buffers.write(update)
        prefix = _PREFIX.pack(self.settings.flags, self.settings.bits, self.count, self._code.side)
        decoded, correction = encoding.decoded, b""
        if self.correction:
            missed = torch.cat([(update[name] - value).flatten() for name, value in decoded.items()])
            correction = write_largest(missed, self.correction)
            decoded = _corrected(decoded, correction)
        body = prefix + encoding.body + tail + correction
        return Compressed(body, decoded | buffers.read(tail), bytes([age]) + encoding.body, encoding.evaluations)

    def decompress(self, network: Network, body: bytes) -> Weights:
        proxies = self.read_proxies(body)
        buffers = BufferCode(network.layout)
        split = _PREFIX.size + self._code.nbytes
        end = split + buffers.nbytes
        decoded, correction = decode(network, proxies, self.settings), body[end:]
        if self.correction:
            decoded = _corrected(decoded, correction)
        elif correction:
            raise PayloadError(f"proxy body has {len(body)} bytes, expected {end}")
        return decoded | buffers.read(body[split:end])

    def read_proxies(self, body: bytes) -> ProxyData:
        """The proxies in a body, checked.

        Raises:
            PayloadError: they differ from what this run sends, or a value is out of range.
        """
        if len(body) < _PREFIX.size:
            raise PayloadError(f"proxy body has {len(body)} bytes, expected at least {_PREFIX.size}")
        found = _PREFIX.unpack_from(body)
        wanted = (self.settings.flags, self.settings.bits, self.count, self._code.side)
        for field, value, expected in zip(("flags", "bits", "count", "side"), found, wanted, strict=True):
            if value != expected:
                raise PayloadError(f"proxy body has {field} {value}, this run uses {expected}")
        return self._code.read(body[_PREFIX.size : _PREFIX.size + self._code.nbytes])

    def body_bytes(self, layout: Layout) -> int:
        return _PREFIX.size + self._code.nbytes + BufferCode(layout).nbytes + self.correction

    def _remembered(self, memory: bytes) -> tuple[int, ProxyData | None]:
        """How many encodes ago the steepness was tried, and the last proxies."""
        try:
            return (memory[0], self._code.read(memory[1:])) if memory else (-1, None)
        except PayloadError:  # another run's settings, or a damaged state: begin from noise
            return -1, None


def _corrected(decoded: Weights, correction: bytes) -> Weights:
    """The proxies' update with the correction added."""
    sizes = [value.numel() for value in decoded.values()]
    pieces: tuple[Tensor, ...] = torch.split(read_largest(correction, sum(sizes)), sizes)
    return {name: d + piece.view_as(d) for (name, d), piece in zip(decoded.items(), pieces, strict=True)}


def _sized(network: Network, ratio: float, count: int, settings: ProxySettings) -> tuple[ProxySettings, int]:
    """The settings with a side, and how many proxies to send."""
    settings = settings if settings.size else _with_side(network, ratio, count, settings)
    return settings, count or _affordable(network, ratio, settings)


def _with_side(network: Network, ratio: float, count: int, settings: ProxySettings) -> ProxySettings:
    """Choose the largest automatic side of which the ratio affords enough proxies."""
    for side in automatic_sides(network):
        settings = replace(settings, size=side)
        if not count and network.layout.float32_bytes / ratio >= _size(network, ENOUGH, settings):
            break
    return settings


def _size(network: Network, count: int, settings: ProxySettings) -> int:
    """Bytes of a payload with so many proxies, header included."""
    code = ProxyCode.of(network, settings, count)
    return HEADER_BYTES + _PREFIX.size + code.nbytes + BufferCode(network.layout).nbytes


def _affordable(network: Network, ratio: float, settings: ProxySettings) -> int:
    budget = network.layout.float32_bytes / ratio

    def size(count: int) -> int:
        return _size(network, count, settings)

    if size(1) > budget:
        best = network.layout.float32_bytes / size(1)
        raise SettingError("ratio", ratio, f"at most {best:.1f} for this model (one proxy of these settings)")
    # The size is affine in the count up to the rounding of packed bits to whole bytes, so start there and step.
    count = max(1, int((budget - size(1)) / ((size(65) - size(1)) / 64)))
    while count < 0xFFFF and size(count + 1) <= budget:
        count += 1
    while size(count) > budget:
        count -= 1
    return count
