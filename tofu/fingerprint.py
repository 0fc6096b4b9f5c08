"""Checks that a client that computes the global weights from the server's steps has the same weights as the server.

Full weights are identified by the fingerprint of their values. A step on top of them is identified by the chain

    identity after = SHA-256(identity before, payload of the step),

so a client that missed, repeated or swapped a step has a different identity from the server, whatever its values are.
The values may differ in their last bits if server and client run on different hardware, so they are compared by a
sketch: a few sums under pseudo-random signs, which differ by about the norm of the difference.
"""

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from tofu.errors import PayloadError
from tofu.weights import FINGERPRINT_BYTES

PROJECTIONS = 8
SKETCH_BYTES = 4 * PROJECTIONS
MAX_DRIFT = 1e-3
"""Maximum difference between the weights of both ends that counts as rounding, relative to the norm of the weights."""


def after_step(identity: bytes, payload: bytes) -> bytes:
    """The identity of the weights after a step, from the identity of the weights before it."""
    return hashlib.sha256(identity + payload).digest()[:FINGERPRINT_BYTES]


def sketch(weights: Mapping[str, Tensor]) -> bytes:
    """Sums of the weights under `PROJECTIONS` fixed sign patterns, as little-endian float32."""
    return np.array(list(_projections(weights)), "<f4").tobytes()


def drift(weights: Mapping[str, Tensor], other: bytes) -> float:
    """The estimated distance between these weights and those of the sketch `other`, relative to the norm of these.

    Raises:
        PayloadError: `other` is not a sketch.
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
