import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.errors import PayloadError
from tofu.secagg.shamir import _tables, combine, split


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 8), st.integers(0, 6), st.randoms())
def test_any_threshold_of_shares_gives_the_secret_back(secret, threshold, more, random) -> None:  # type: ignore[no-untyped-def]
    shares = dict(enumerate(split(secret, threshold, threshold + more), start=1))
    taken = dict(random.sample(sorted(shares.items()), threshold))
    assert combine(taken, threshold) == secret
    assert combine(shares, threshold) == secret


@pytest.mark.parametrize("secret", [bytes(32), bytes(31) + b"\1", b"\xff" * 32, bytes(16) + b"\xff" * 16])
def test_secrets_at_the_field_s_ends(secret: bytes) -> None:
    assert combine(dict(enumerate(split(secret, 3, 5), start=1)), 3) == secret


def test_the_largest_sharing_works() -> None:
    secret = os.urandom(32)
    shares = dict(enumerate(split(secret, 3, 255), start=1))
    assert combine({i: shares[i] for i in (253, 254, 255)}, 3) == secret
    assert combine(dict(enumerate(split(secret, 255, 255), start=1)), 255) == secret


def test_one_share_too_few_is_refused_and_would_not_give_the_secret() -> None:
    secret = os.urandom(32)
    shares = dict(enumerate(split(secret, 4, 6), start=1))
    for taken in itertools.combinations(shares, 3):
        with pytest.raises(PayloadError, match="3 shares of a secret arrived, expected at least 4"):
            combine({i: shares[i] for i in taken}, 4)
        assert combine({i: shares[i] for i in taken}, 3) != secret


def test_fewer_shares_fit_every_secret() -> None:
    """For t - 1 shares and any candidate there is a polynomial through both, whose further shares look no different."""
    secret = os.urandom(32)
    shares = split(secret, 4, 6)
    known = {i: shares[i - 1] for i in (1, 2, 3)}
    for candidate in (bytes(32), os.urandom(32), secret):
        # The polynomial through the candidate at 0 and the three shares has one value at 4, the missing share.
        missing = interpolated({0: candidate, **known}, 4)
        assert combine({**known, 4: missing}, 4) == candidate
        assert (candidate == secret) == (missing == shares[3])


@settings(max_examples=15, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 8), st.integers(0, 5))
def test_shares_are_values_of_one_polynomial(secret, threshold, more) -> None:  # type: ignore[no-untyped-def]
    """Against plain multiplication in the field and Lagrange's formula at any place."""
    shares = dict(enumerate(split(secret, threshold, threshold + more), start=1))
    first = {i: shares[i] for i in range(1, threshold + 1)}
    assert interpolated(first, 0) == secret
    for index, share in shares.items():
        assert interpolated(first, index) == share


def times(a: int, b: int) -> int:
    """Product in GF(2^8), from FIPS 197, section 4.2: polynomials over GF(2) modulo x^8 + x^4 + x^3 + x + 1."""
    result = 0
    for bit in range(8):
        if b >> bit & 1:
            result ^= a << bit
    for bit in range(14, 7, -1):
        if result >> bit & 1:
            result ^= 0x11B << (bit - 8)
    return result


INVERSE = {a: b for a in range(1, 256) for b in range(1, 256) if times(a, b) == 1}


def interpolated(points: dict[int, bytes], x: int) -> bytes:
    """The polynomials' values at x, by Lagrange's formula."""
    result = bytearray(32)
    for one, value in points.items():
        weight = 1
        for other in points:
            if other != one:
                weight = times(weight, times(x ^ other, INVERSE[one ^ other]))
        for place, byte in enumerate(value):
            result[place] ^= times(weight, byte)
    return bytes(result)


def test_multiplication_is_that_of_the_standard() -> None:
    assert times(0x57, 0x83) == 0xC1  # the standard's own example
    products = _tables()[2]
    generator = np.random.default_rng(0)
    for a, b in generator.integers(0, 256, (2000, 2)).tolist():
        assert products[a, b] == times(a, b)
    assert sorted(_tables()[0].tolist()) == list(range(1, 256))


def test_fewer_shares_are_uniform_whatever_the_secret() -> None:
    for secret in (bytes(32), b"\xff" * 32):
        data = b"".join(b"".join(split(secret, 3, 3)[:2]) for _ in range(1500))
        counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
        expected = len(data) / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - 255) < 6 * np.sqrt(2 * 255)


def test_what_is_no_sharing_is_refused() -> None:
    for size in (0, 16, 31, 33):
        with pytest.raises(ValueError, match="expected 32"):
            split(bytes(size), 2, 3)
    for threshold, count in ((0, 3), (4, 3), (2, 256), (-1, 3)):
        with pytest.raises(ValueError, match="threshold"):
            split(bytes(32), threshold, count)
    shares = dict(enumerate(split(bytes(32), 2, 3), start=1))
    for bad in ({0: bytes(32)}, {256: bytes(32)}, {-1: bytes(32)}):
        with pytest.raises(PayloadError, match="index"):
            combine(shares | bad, 2)
    with pytest.raises(PayloadError, match="share 2 has 31 bytes"):
        combine({1: shares[1], 2: shares[2][:31]}, 2)
    with pytest.raises(PayloadError, match="0 shares"):
        combine({}, 0)
