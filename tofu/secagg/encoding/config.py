"""What all clients of one secure round and the server agree on, as bytes."""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

from tofu.bytes_io import MAX_BITS
from tofu.errors import PayloadError
from tofu.secagg import coordinates
from tofu.secagg.encoding.ranges import MAX_RANGE, MIN_RANGE
from tofu.weights import Weights, weights_sha256

_HEAD = struct.Struct(f"<HBfHfI{coordinates.DIGEST_BYTES}sB")


@dataclass(frozen=True)
class EncodingConfig:
    """The parameters of a round's encoding.

    Attributes:
        clients: maximum number of clients in the sum.
        bits: of the ring.
        unit_weight: number of examples that counts as weight 1.
        ranges: of each tensor, in the order of the ParamSpec: |value * weight| up to which nothing is clipped.
        fraction: of the entries that are sent (`tofu.secagg.coordinates`).
        turn: number of secure rounds before this one.
        digest: of the coordinates that are sent, if that is not all of them.
        nearest_rounding: values are rounded to the nearest step, within ranges that clip the largest ones.
    """

    clients: int
    bits: int
    unit_weight: float
    ranges: tuple[float, ...]
    fraction: float = 1.0
    turn: int = 0
    digest: bytes = bytes(coordinates.DIGEST_BYTES)
    nearest_rounding: bool = False

    def to_bytes(self) -> bytes:
        numbers = (self.clients, self.bits, self.unit_weight, len(self.ranges), self.fraction, self.turn)
        head = _HEAD.pack(*numbers, self.digest, self.nearest_rounding)
        return head + np.array(self.ranges, "<f4").tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> "EncodingConfig":
        """Raises PayloadError if the bytes are malformed or a value is not usable."""
        if len(data) < _HEAD.size:
            raise PayloadError(f"encoding config has {len(data)} bytes, expected at least {_HEAD.size}")
        clients, bits, unit_weight, count, fraction, turn, digest, nearest = _HEAD.unpack_from(data)
        if len(data) != _HEAD.size + 4 * count:
            raise PayloadError(f"encoding config has {len(data)} bytes, expected {_HEAD.size + 4 * count}")
        ranges = tuple(float(value) for value in np.frombuffer(data, "<f4", offset=_HEAD.size))
        if not all(MIN_RANGE / 2 < value < 2 * MAX_RANGE for value in (*ranges, unit_weight)):
            raise PayloadError(f"encoding config has a range or weight outside {MIN_RANGE:g} to {MAX_RANGE:g}")
        if not 1 <= bits <= MAX_BITS:
            raise PayloadError(f"encoding config has {bits} bits, expected 1 to {MAX_BITS}")
        if not 0 < fraction <= 1:
            raise PayloadError(f"encoding config has fraction {fraction:g}, expected above 0 and up to 1")
        if nearest > 1:
            raise PayloadError(f"encoding config has nearest_rounding {nearest}, expected 0 or 1")
        return EncodingConfig(clients, bits, unit_weight, ranges, fraction, turn, digest, bool(nearest))


def purpose_of(config: EncodingConfig, weights: Weights, broadcast: bytes, *more: bytes) -> bytes:
    """Digest of what gives the clients' vectors their meaning, 32 bytes: config, global weights, plugin state.

    It enters all keys and masks, so only clients with the same meaning are summed. Otherwise a server could give all
    clients but one huge ranges, a learning rate of almost 0, or weights that yield zero updates, and see the update of
    that one almost alone
    (Pasquini, Francati, Ateniese, "Eluding Secure Aggregation in Federated Learning via Model Inconsistency",
    CCS 2022).

    Args:
        more: whatever else determines a client's vector, such as the settings and the round (`Settings.meaning`).
    """
    meaning = hashlib.sha256(b"tofu secure round 1")
    for part in (config.to_bytes(), weights_sha256(weights).encode(), hashlib.sha256(broadcast).digest(), *more):
        meaning.update(len(part).to_bytes(4, "little") + part)
    return meaning.digest()
