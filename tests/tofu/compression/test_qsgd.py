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
