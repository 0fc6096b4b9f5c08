import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tofu.codec.surrogate import Surrogate, register_surrogate, smooth_relu


@pytest.mark.parametrize(
    "call", [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, torch.Tensor.relu, lambda x: x.relu_()]
)
def test_relu_in_every_form_becomes_smooth(call) -> None:  # type: ignore[no-untyped-def]
    x = torch.linspace(-3, 3, 31)
    with Surrogate(surrogate_beta=4):
        twin = call(x.clone())
    assert torch.allclose(twin, x * torch.sigmoid(4 * x))
    assert torch.equal(call(x.clone()), x.clamp_min(0))


def test_sharpness_makes_it_relu() -> None:
    x = torch.linspace(-3, 3, 31)
    assert torch.allclose(smooth_relu(x, 1e3), x.clamp_min(0), atol=1e-3)


def test_leaky_relu_and_relu6() -> None:
    x = torch.linspace(-9, 9, 61)
    with Surrogate(surrogate_beta=1e3):
        assert torch.allclose(nn.LeakyReLU(0.3)(x), F.leaky_relu(x, 0.3), atol=1e-3)
        assert torch.allclose(nn.ReLU6()(x), x.clamp(0, 6), atol=1e-3)


def test_pooling_becomes_average() -> None:
    x = torch.rand(2, 3, 8, 8)
    with Surrogate():
        assert torch.equal(nn.MaxPool2d(2)(x), F.avg_pool2d(x, 2))
        assert torch.equal(nn.MaxPool2d(3, stride=2, padding=1)(x), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False))
        assert torch.equal(nn.AdaptiveMaxPool2d(1)(x), x.mean((2, 3), keepdim=True))


def test_batch_norm_uses_the_batch_and_leaves_its_statistics_alone() -> None:
    norm = nn.BatchNorm2d(3).eval()
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    x = 5 + 3 * torch.randn(16, 3, 4, 4)
    with Surrogate():
        twin = norm(x)
    assert torch.allclose(twin, F.batch_norm(x, None, None, norm.weight, norm.bias, training=True), atol=1e-5)
    assert torch.equal(norm.running_mean, torch.zeros(3))
    with Surrogate(batch_statistics=False):
        assert torch.equal(norm(x), norm.eval()(x))


def test_batch_norm_of_a_single_value_is_its_bias() -> None:
    norm = nn.BatchNorm1d(3).eval()
    with Surrogate():
        assert torch.equal(norm(torch.randn(1, 3)), torch.zeros(1, 3))


def test_twin_ends_with_its_context_and_nests_in_other_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x = torch.tensor([-1.0])
    with Surrogate(), ThreadPoolExecutor(1) as pool:
        assert float(F.relu(x)) < 0
        assert float(pool.submit(F.relu, x).result()) == 0
    assert float(F.relu(x)) == 0


def test_a_registered_surrogate_replaces_a_module_inside_the_context_of_its_thread_alone() -> None:
    from concurrent.futures import ThreadPoolExecutor

    class Spike(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x > 0).float()

    register_surrogate(Spike, lambda beta: lambda module, x: torch.sigmoid(beta * x))
    spike, x = Spike(), torch.tensor([-1.0, 1.0], requires_grad=True)
    with Surrogate(surrogate_beta=2), ThreadPoolExecutor(1) as pool:
        assert torch.equal(spike(x), torch.sigmoid(2 * x))
        assert bool(torch.autograd.grad(spike(x).sum(), x)[0].all())
        with Surrogate(surrogate_beta=3):
            assert torch.equal(spike(x), torch.sigmoid(3 * x))
        assert torch.equal(spike(x), torch.sigmoid(2 * x))
        assert pool.submit(spike, x).result().tolist() == [0.0, 1.0]
    assert spike(x).tolist() == [0.0, 1.0]
