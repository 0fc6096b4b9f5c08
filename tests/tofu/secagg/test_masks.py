import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tofu.bytes_io import CHUNK, pack
from tofu.errors import PayloadError
from tofu.secagg.masks import (
    PAIR_MASK,
    SHARE_KEY,
    RingVector,
    add_mask,
    agree,
    check_public_key,
    largest,
    new_seed,
    pair_seed,
    public_key,
    word_bytes,
)


def mask(seed: bytes, count: int, bits: int) -> RingVector:
    vector = np.zeros(count, dtype=np.uint64)
    add_mask(vector, seed, bits)
    return vector


def test_two_clients_agree_and_every_part_matters() -> None:
    one, other = new_seed(), new_seed()
    terms = os.urandom(32)
    seed = pair_seed(one, public_key(other), terms, b"one", b"other")
    assert seed == pair_seed(other, public_key(one), terms, b"other", b"one")
    third = new_seed()
    others = [
        pair_seed(one, public_key(third), terms, b"one", b"other"),
        pair_seed(one, public_key(other), os.urandom(32), b"one", b"other"),
        pair_seed(one, public_key(other), terms, b"one", b"third"),
        agree(one, public_key(other), SHARE_KEY, terms, (b"one", b"other")),
        agree(one, public_key(other), PAIR_MASK, terms, (b"other", b"one")),
        agree(one, public_key(other), PAIR_MASK, terms, (b"oneo", b"ther")),
    ]
    assert len({seed, *others}) == 7


@pytest.mark.parametrize("public", [bytes(32), bytes([1]) + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"])
def test_keys_of_low_order_are_refused(public: bytes) -> None:
    with pytest.raises(PayloadError, match="low order"):
        check_public_key(public)
    with pytest.raises(PayloadError, match="low order"):
        agree(new_seed(), public, PAIR_MASK, b"", ())


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 12, 16, 17, 32, 33, 63, 64])
def test_a_mask_is_the_cipher_s_words_cut_to_the_ring(bits: int) -> None:
    seed, count = new_seed(), CHUNK + 77
    width = word_bytes(bits)
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor().update(bytes(count * width))
    expected = [int.from_bytes(stream[at : at + width], "little") % 2**bits for at in range(0, len(stream), width)]
    assert mask(seed, count, bits).tolist() == expected


@pytest.mark.parametrize("bits", [3, 12, 64])
def test_a_mask_comes_off_again(bits: int) -> None:
    seed = new_seed()
    vector = np.arange(CHUNK + 5, dtype=np.uint64) & largest(bits)
    masked = vector.copy()
    add_mask(masked, seed, bits)
    assert (masked != vector).any()
    assert int(masked.max()) <= largest(bits)
    add_mask(masked, seed, bits, negative=True)
    assert (masked == vector).all()


def test_seeds_that_differ_in_one_bit_give_unrelated_masks() -> None:
    bits, count = 12, 200_000
    seed = bytearray(new_seed())
    first = np.frombuffer(pack(mask(bytes(seed), count, bits), bits), dtype=np.uint8)
    for place in (0, 100, 255):
        changed = bytearray(seed)
        changed[place // 8] ^= 1 << place % 8
        second = np.frombuffer(pack(mask(bytes(changed), count, bits), bits), dtype=np.uint8)
        agreement = 1 - np.unpackbits(first ^ second).mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(count * bits)


def test_elements_are_uniform_in_a_ring_that_fills_no_word() -> None:
    bits, count = 5, 320_000
    counts = np.bincount(mask(new_seed(), count, bits).astype(np.int64), minlength=32)
    chi_square = ((counts - count / 32) ** 2 / (count / 32)).sum()
    assert abs(chi_square - 31) < 6 * np.sqrt(62)
