"""Shamir's secret sharing of 32-byte secrets ("How to Share a Secret", CACM 1979), over pycryptodome's GF(2^128).

The field holds 16 bytes, so a secret is shared as two halves with polynomials of their own and the same indices. The
share of index i = 1, 2, ... is the polynomials' values at i; the value at 0 is the secret, which is why an index below
1 must never be taken. The library checks neither that, nor that the threshold is within the number of shares, nor that
enough shares came: too few give a wrong secret and no error. Its `ssss` variant adds x^threshold to the polynomial for
a command-line tool's sake and then wants exactly `threshold` shares; it is not used.
"""

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

from tofu.errors import PayloadError

SECRET_BYTES = 32
SHARE_BYTES = 32
MOST_SHARES = 255
"""Also bounds the time: the library's pure Python takes some 2 s to put 170 shares together."""

_HALF = 16


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares 1 to `count` of the secret, 32 bytes each: any `threshold` give it back, and fewer say nothing.

    Raises:
        ValueError: a secret of another length, or not 1 <= threshold <= count <= 255.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"secret has {len(secret)} bytes, expected {SECRET_BYTES}")
    if not 1 <= threshold <= count <= MOST_SHARES:
        raise ValueError(f"threshold {threshold} of {count} shares, expected 1 <= threshold <= shares <= {MOST_SHARES}")
    halves = [Shamir.split(threshold, count, secret[at : at + _HALF], False) for at in (0, _HALF)]
    return [low + high for (_, low), (_, high) in zip(*halves, strict=True)]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret from index -> share, of which the `threshold` lowest indices are used.

    Raises:
        PayloadError: too few shares, an index outside 1 to 255, or a share of another length.
    """
    if not 1 <= threshold <= len(shares):
        raise PayloadError(f"{len(shares)} shares of a secret came, expected at least {max(threshold, 1)}")
    for index, share in shares.items():
        if not 1 <= index <= MOST_SHARES:
            raise PayloadError(f"share has index {index}, expected 1 to {MOST_SHARES}")
        if len(share) != SHARE_BYTES:
            raise PayloadError(f"share {index} has {len(share)} bytes, expected {SHARE_BYTES}")
    used = sorted(shares.items())[:threshold]
    halves = [Shamir.combine([(i, share[at : at + _HALF]) for i, share in used], False) for at in (0, _HALF)]
    return b"".join(halves)
