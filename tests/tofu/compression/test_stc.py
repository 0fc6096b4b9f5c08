import pytest
import torch

from tests.conftest import Case
from tests.tofu.compression.common import bare, flat, generator, missed, update_of
from tofu.compression.stc import Stc


def test_by_hand() -> None:
    """3 and -5 together hold 34, of which mu = 4 explains 2 mu^2 = 32; the -5 alone explains 25, with the 1 also 27."""
    network = bare((64,))
    x = torch.zeros(64)
    x[5], x[20], x[60] = 3.0, 1.0, -5.0
    compressed = Stc(network, ratio=6).compress(network, update_of(network, x), generator=generator())
    assert compressed.body[:8] == b"\x02\0\0\0" + b"\0\0\x80\x40"  # k = 2, mu = 4.0
    expected = torch.zeros(64)
    expected[5], expected[60] = 4.0, -4.0
    assert torch.equal(flat(compressed.decoded, network), expected.double())


@pytest.mark.parametrize("ratio", [20, 100, 400])
def test_the_paper_s_operator(mlp_update: Case, ratio: float) -> None:
    network, update = mlp_update
    decoded = Stc(network, ratio=ratio).compress(network, update, generator=generator()).decoded
    x, c = flat(update, network), flat(decoded, network)
    count = int(c.count_nonzero())
    order = sorted(range(x.numel()), key=lambda i: -abs(float(x[i])))[:count]
    mu = sum(abs(float(x[i])) for i in order) / count
    expected = torch.zeros_like(x)
    for i in order:
        expected[i] = mu if x[i] > 0 else -mu
    assert torch.allclose(c, expected, rtol=1e-6)
    delta = mu**2 * count / float(x.square().sum())
    assert missed(update, decoded, network) == pytest.approx(1 - delta, abs=1e-6)
    fewer = float(x.abs().topk(count // 2).values.sum()) ** 2 / (count // 2)
    assert fewer < mu**2 * count
