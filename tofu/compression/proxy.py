"""The proxy compressor: `tofu.proxy` for the trainable parameters, few-bit integers for the buffers.

Body, little-endian:

    bytes  field
    1      flags: what both ends must agree on (ProxySettings.flags)
    1      bits of a pixel and of a label
    2      number of proxies
    2      side of a proxy in pixels
    -      the proxies (ProxyCode)
    -      the buffers (BufferCode)
"""

import struct
from dataclasses import replace
from typing import ClassVar

import torch

from tofu.compression.base import Compressed, Compressor
from tofu.compression.buffers import BufferCode
from tofu.errors import PayloadError, SettingError
from tofu.network import Network
from tofu.payload import HEADER_BYTES
from tofu.proxy import ENOUGH, ProxyCode, ProxyData, ProxySettings, automatic_sides, decode, encode
from tofu.weights import Layout, Weights

_PREFIX = struct.Struct("<BBHH")


class Proxy(Compressor):
    """Proxy images in place of the update.

    Args:
        network_like: any network of the run (its layout and input shape fix the sizes).
        ratio: payload wanted, as float32 bytes of the update over bytes of the payload with its header.
        count: number of proxies; 0 takes as many as `ratio` affords.
        settings: how to encode.

    Raises:
        SettingError: the ratio is out of reach for this model, or the proxies do not fit the network.
    """

    name: ClassVar[str] = "proxy"
    code: ClassVar[int] = 2

    def __init__(self, network_like: Network, *, ratio: float, count: int, settings: ProxySettings) -> None:
        settings = settings if settings.size else _with_side(network_like, ratio, count, settings)
        self.settings = settings
        self.count = count or _affordable(network_like, ratio, settings)
        self._code = ProxyCode.of(network_like, settings, self.count)

    @property
    def side(self) -> int:
        """Side of a proxy in pixels."""
        return self._code.side

    def compress(
        self, network: Network, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> Compressed:
        start = self._remembered(memory)
        encoding = encode(network, update, self.count, self.settings, generator=generator, start=start)
        buffers = BufferCode(network.layout)
        tail = buffers.write(update)
        prefix = _PREFIX.pack(self.settings.flags, self.settings.bits, self.count, self._code.side)
        decoded = encoding.decoded | buffers.read(tail)
        return Compressed(prefix + encoding.body + tail, decoded, encoding.body, encoding.evaluations)

    def decompress(self, network: Network, body: bytes) -> Weights:
        split = _PREFIX.size + self._code.nbytes
        proxies = self.read_proxies(body)
        return decode(network, proxies, self.settings) | BufferCode(network.layout).read(body[split:])

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
        return _PREFIX.size + self._code.nbytes + BufferCode(layout).nbytes

    def _remembered(self, memory: bytes) -> ProxyData | None:
        try:
            return self._code.read(memory) if memory else None
        except PayloadError:  # another run's settings, or a damaged state: begin from noise
            return None


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
