import math

import pytest
import torch

from tests.tofu.compression.common import bare, generator, missed, update_of
from tofu.compression.eden import Eden, centroids
from tofu.compression.hadamard import MIN_PIECE, hadamard, pieces, random_signs, rotate, rotate_back
from tofu.wire import HEADER_BYTES


def plain_hadamard(values: list[float]) -> list[float]:
    """H[i][j] is -1 to the number of binary digits that i and j share."""
    n = len(values)
    return [sum((-1) ** (i & j).bit_count() * values[j] for j in range(n)) / math.sqrt(n) for i in range(n)]


def one_bit(length: int) -> float:
    """The ratio at which a power of two of entries has one bit each."""
    return 4 * length / (HEADER_BYTES + 8 + 2 + length // 8)


def test_hadamard_by_hand_and_by_a_plain_sum() -> None:
    assert hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [5.0, -1.0, -2.0, 0.0]
    x = torch.randn(64, generator=generator())
    assert hadamard(x).tolist() == pytest.approx(plain_hadamard(x.tolist()), abs=1e-5)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000, 61_706])
def test_pieces_hold_the_vector_and_little_more(length: int) -> None:
    cut = pieces(length)
    assert 0 <= sum(cut) - length < MIN_PIECE
    assert all(piece & (piece - 1) == 0 for piece in cut)
    assert list(cut) == sorted(set(cut), reverse=True)


def test_the_rotation_keeps_lengths_and_turns_back() -> None:
    x, signs = torch.randn(1792, generator=generator()), random_signs(1792, generator(1))
    z = rotate(x, signs)
    assert float(z.norm()) == pytest.approx(float(x.norm()), rel=1e-5)
    assert torch.allclose(rotate_back(z, signs), x, atol=1e-5)
    spike = torch.zeros(1024)
    spike[17] = 1.0
    assert torch.allclose(rotate(spike, signs[:1024]).abs(), torch.full((1024,), 1 / 32))


def test_centroids_are_those_of_the_literature() -> None:
    """Max 1960, table I."""
    assert centroids(0).tolist() == [0.0]
    assert centroids(1).tolist() == pytest.approx([-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)])
    assert centroids(2)[2:].tolist() == pytest.approx([0.4528, 1.510], abs=1e-3)
    assert centroids(3)[4:].tolist() == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=1e-3)


def test_one_bit_misses_what_drive_says() -> None:
    network = bare((4096,))
    update = update_of(network, torch.randn(4096, generator=generator()).pow(3))
    compressor = Eden(network, ratio=one_bit(4096))
    assert compressor._bits(network.param_spec) == (1, 0)
    decoded = compressor.compress(network, update, generator=generator()).decoded
    assert missed(update, decoded, network) == pytest.approx(1 - 2 / math.pi, abs=0.03)


@pytest.mark.parametrize(("bits", "expected"), [(0.25, 1 - 0.25 * 2 / math.pi), (2, 0.1175), (3, 0.03454)])
def test_fewer_and_more_bits(bits: float, expected: float) -> None:
    """Of a normal sample, Max's quantizer of 2 bits misses 0.1175, of 3 bits 0.03454."""
    network = bare((8192,))
    update = update_of(network, torch.randn(8192, generator=generator()))
    compressor = Eden(network, ratio=4 * 8192 / (HEADER_BYTES + 10 + bits * 1024))
    decoded = compressor.compress(network, update, generator=generator()).decoded
    assert missed(update, decoded, network) == pytest.approx(expected, rel=0.05)
