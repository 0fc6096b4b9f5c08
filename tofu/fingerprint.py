"""How a client that builds the global weights from steps, and the server, know that they hold the same ones.

Weights sent whole are identified by the fingerprint of their values. A step on top of them is identified by the chain

    identity after = SHA-256(identity before, payload of the step),

so a client that missed, repeated or swapped a step has another identity than the server, whatever its numbers are. The
values themselves may differ in their last bits where server and client compute on other hardware, so they are compared
by a sketch: a few sums under pseudo-random signs, which stray by about the length of the difference.
"""

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from tofu.errors import PayloadError
from tofu.weights import FINGERPRINT_BYTES

PROJECTIONS = 8
SKETCH_BYTES = 4 * PROJECTIONS
TOLERANCE = 1e-3
"""Largest difference between two ends' weights that counts as rounding, as a share of the weights' length."""


def after_step(identity: bytes, payload: bytes) -> bytes:
    """The identity of the weights that a step leads to, from that of the weights it starts at."""
    return hashlib.sha256(identity + payload).digest()[:FINGERPRINT_BYTES]


def sketch(weights: Mapping[str, Tensor]) -> bytes:
    """The weights' sums under `PROJECTIONS` fixed patterns of signs, as little-endian float32."""
    return np.array(list(_projections(weights)), "<f4").tobytes()


def drift(weights: Mapping[str, Tensor], other: bytes) -> float:
    """RoundContext the distance between these weights and those that `other` is the sketch of, over these weights'
    length.

    Raises:
        PayloadError: `other` is no sketch.
    """
    if len(other) != SKETCH_BYTES:
        raise PayloadError(f"sketch has {len(other)} bytes, expected {SKETCH_BYTES}")
    theirs = np.frombuffer(other, "<f4").astype(np.float64)
    if not bool(np.isfinite(theirs).all()):
        raise PayloadError("sketch holds a value that is not finite")
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
