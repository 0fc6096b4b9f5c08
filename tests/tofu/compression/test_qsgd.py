import numpy as np
import pytest
import torch

from tests.conftest import Case
from tests.tofu.compression.common import bare, flat, generator, update_of
from tofu.compression.qsgd import Qsgd, _levels


def test_levels_by_hand() -> None:
    x, dither = np.array([1.0, 0.5, 0.25, 0.0, 0.6]), np.array([0.0, 0.6, 0.4, 0.9, 0.8])
    assert _levels(x, dither, 0.5).tolist() == [2, 1, 0, 0, 2]
    assert _levels(x, dither, 0.25).tolist() == [4, 2, 1, 0, 3]


def test_the_decode_is_whole_levels_of_the_best_unit(mlp_update: Case) -> None:
    network, update = mlp_update
    decoded = Qsgd(network, ratio=12).compress(network, update, generator=generator()).decoded
    x, c = flat(update, network), flat(decoded, network)
    unit = c[c != 0].abs().min()
    assert torch.allclose(c / unit, (c / unit).round(), atol=1e-4)
    assert float((c / unit).abs().max()) > 2
    assert float((x - c) @ c) == pytest.approx(0, abs=1e-5 * float(x @ x))


def test_a_step_as_fine_as_float32_is_fine_enough() -> None:
    network = bare((1000,))
    x = torch.zeros(1000)
    x[[3, 500]] = torch.tensor([1.0, -0.3])
    decoded = Qsgd(network, ratio=10).compress(network, update_of(network, x), generator=generator()).decoded
    assert torch.allclose(decoded["tensors.0"], x, atol=1e-6)


@pytest.mark.parametrize("ratio", [10, 40])
@pytest.mark.parametrize("unbiased", [True, False])
def test_the_plain_step_is_right_on_average_and_the_best_unit_is_not(ratio: float, unbiased: bool) -> None:
    """The mean of N decodes is off by the variance over N and no more; here over 1024 entries, so within some 5 %."""
    network = bare((1024,))
    x = torch.randn(1024, generator=generator())
    compressor = Qsgd(network, ratio=ratio, unbiased=unbiased)
    update, draw = update_of(network, x), generator(1)
    decoded = torch.stack(
        [flat(compressor.compress(network, update, generator=draw).decoded, network) for _ in range(300)]
    )
    error = float((decoded.mean(0) - x).square().sum())
    expected = float(decoded.var(0).sum()) / 300
    assert (error < 1.3 * expected) == unbiased
