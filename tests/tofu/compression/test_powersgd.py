import pytest
import torch

from tests.conftest import Case
from tests.tofu.compression.common import bare, generator, missed, update_of
from tofu.compression.powersgd import PowerSgd
from tofu.errors import SettingError
from tofu.reference_model import ReferenceModel
from tofu.wire import HEADER_BYTES


def low_rank(rank: int, *, rows: int = 60, columns: int = 80) -> torch.Tensor:
    return torch.randn(rows, rank, generator=generator(1)) @ torch.randn(rank, columns, generator=generator(2))


def decay(rows: int = 60, columns: int = 80) -> torch.Tensor:
    """A full matrix whose singular values fall slowly, so that one subspace iteration from noise is not enough."""
    u, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator(1)))
    v, _ = torch.linalg.qr(torch.randn(columns, rows, generator=generator(2)))
    return u @ torch.diag(0.9 ** torch.arange(rows)) @ v.T


def test_rank_and_bits_follow_from_the_ratio() -> None:
    network = bare((60, 80), (80,))
    found = [(c.rank, c.bits) for c in (PowerSgd(network, ratio=r) for r in (1.9, 3.5, 20, 60, 100, 200))]
    assert found == [(60, 16), (60, 8), (6, 8), (1, 8), (1, 6), (1, 2)]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_matrix_of_low_rank_comes_back_up_to_rounding(rank: int) -> None:
    network = bare((60, 80), (80,))
    update = update_of(network, low_rank(rank), torch.randn(80, generator=generator(3)))
    compressor = PowerSgd(network, ratio=20)
    assert (compressor.rank, compressor.bits) == (6, 8)
    decoded = compressor.compress(network, update, generator=generator()).decoded
    assert missed(update, decoded, network) < 3e-4


def test_a_convolution_is_a_matrix_of_its_output_channels() -> None:
    matrix = low_rank(2, rows=40, columns=45)
    whole, folded = bare((40, 45)), bare((40, 5, 3, 3))
    bodies = [
        PowerSgd(n, ratio=8).compress(n, update_of(n, matrix.view(shape)), generator=generator()).body
        for n, shape in ((whole, (40, 45)), (folded, (40, 5, 3, 3)))
    ]
    assert bodies[0] == bodies[1]


def test_a_warm_start_goes_on_where_the_last_call_ended() -> None:
    network = bare((60, 80))
    compressor, update = PowerSgd(network, ratio=20), update_of(network, decay())
    errors, memory = [], b""
    for seed in range(6):
        compressed = compressor.compress(network, update, generator=generator(seed), memory=memory)
        memory = compressed.memory
        errors.append(missed(update, compressed.decoded, network))
    cold = compressor.compress(network, update, generator=generator(5))
    singular = torch.linalg.svdvals(decay()).square()
    best = float(singular[compressor.rank :].sum() / singular.sum())
    assert errors[1] < errors[0] - 0.01
    assert best <= errors[-1] < best + 0.01 < missed(update, cold.decoded, network)


def test_memory_of_a_zero_update_or_another_ratio_is_no_dead_end(mlp_update: Case) -> None:
    network, update = mlp_update
    compressor = PowerSgd(network, ratio=50)
    cold = compressor.compress(network, update, generator=generator())
    zero = {name: torch.zeros_like(value) for name, value in update.items()}
    after_zero = compressor.compress(network, zero, generator=generator()).memory
    other = PowerSgd(network, ratio=20).compress(network, update, generator=generator()).memory
    for memory in (after_zero, other, b"junk"):
        assert compressor.compress(network, update, generator=generator(), memory=memory).body == cold.body


def test_the_decode_is_the_projection_on_the_factor_as_received() -> None:
    """At any bits of P: what is left of M is orthogonal to P's columns, up to the rounding of Q."""
    network = bare((60, 80))
    compressor, matrix = PowerSgd(network, ratio=60), decay()
    compressed = compressor.compress(network, update_of(network, matrix), generator=generator())
    decoded = compressed.decoded["tensors.0"]
    p = decoded[:, decoded.abs().sum(0).argmax()]
    p = p / p.norm()
    best = torch.outer(p, matrix.T @ p)
    assert (matrix - decoded).square().sum() <= (matrix - best).square().sum() * 1.001


def test_a_ratio_out_of_reach_says_what_is_in_reach(mlp_update: Case) -> None:
    network: ReferenceModel = mlp_update[0]
    with pytest.raises(SettingError, match="ratio=9999 is not usable: expected at most") as error:
        PowerSgd(network, ratio=9999)
    reach = float(error.value.accepted.split()[2])
    compressor = PowerSgd(network, ratio=reach)
    assert (compressor.rank, compressor.bits) == (1, 2)
    assert HEADER_BYTES + compressor.body_bytes(network.param_spec) <= network.param_spec.float32_bytes / reach
