import pytest
import torch

from tests.conftest import Case
from tests.tofu.compression.common import flat, generator
from tofu.codec.compressor import ProxyCompressor
from tofu.codec.options import paper_settings
from tofu.codec.proxies import gradients
from tofu.compression.threesfc import ThreeSfc
from tofu.errors import SettingError


def test_full_size_samples_of_8_bits_or_one_of_4(mlp_update: Case) -> None:
    network, _ = mlp_update
    side = network.shape.height
    found = [(c.count, c.settings.bits, c.side) for c in (ThreeSfc(network, ratio=r) for r in (200, 1000, 1500))]
    assert found[0] == (8, 8, side)
    assert found[1:] == [(1, 8, side), (1, 4, side)]
    with pytest.raises(SettingError, match="ratio=5000 is not usable: expected at most"):
        ThreeSfc(network, ratio=5000)


def test_it_decodes_to_the_projection_on_the_network_s_own_gradient(mlp_update: Case) -> None:
    network, update = mlp_update
    compressor = ThreeSfc(network, ratio=500)
    compressed = compressor.compress(network, update, generator=generator())
    u, c = flat(update, network), flat(compressed.decoded, network)
    own = gradients(network, compressor.describe(compressed.body).proxies, compressor.settings)
    g = flat(own, network)
    cosine = u @ g / (u.norm() * g.norm())
    assert torch.allclose(c, u.norm() * cosine * g / g.norm(), rtol=0.01, atol=1e-6)  # the scale is a bfloat16
    assert abs(float(cosine)) > 0.2
    assert 10 < compressed.evals <= paper_settings().max_evals == 200
    assert (compressor.code, ProxyCompressor.code) == (9, 2)
