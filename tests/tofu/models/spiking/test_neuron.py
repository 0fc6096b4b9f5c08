"""The fused neuron against snnTorch, SpikingJelly, a loop and values computed by hand."""

from collections.abc import Callable

import pytest
import snntorch
import torch
from hypothesis import given
from hypothesis import strategies as st
from snntorch.surrogate import custom_surrogate
from torch import Tensor

from tofu.models.spiking import LeakyIntegrateFire, integrate_and_fire, potentials, spike
from tofu.models.spiking.neuron import _filter


def currents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.2


def fused(current: Tensor, threshold: float, leak: float) -> Tensor:
    layer = LeakyIntegrateFire(threshold, leak)
    layer.steps = len(current)
    return layer(current.flatten(0, 1)).view_as(current)  # type: ignore[no-any-return]


def by_snntorch(current: Tensor, threshold: float, leak: float) -> Tensor:
    """snnTorch's neuron step by step. It divides by no threshold, so the surrogate is written for its argument."""

    def surrogate(x: Tensor, grad: Tensor, spikes: Tensor) -> Tensor:
        return grad * 0.3 * (1 - (x / threshold).abs()).clamp(min=0) / threshold

    neuron = snntorch.Leaky(leak, threshold=threshold, spike_grad=custom_surrogate(surrogate))
    potential, out = torch.zeros_like(current[0]), []
    for step in current:
        spikes, potential = neuron(step, potential)
        out.append(spikes)
    return torch.stack(out)


def test_potentials_by_hand() -> None:
    current = torch.tensor([0.9, 0.9, 0.9, -1.0, 2.5, 0.0])
    u = potentials(current, torch.tensor(1.0), leak=0.5)
    # 0.9; 0.45+0.9 spikes; 0.675+0.9-1; 0.2875-1; -0.35625+2.5 spikes; 1.071875-1
    assert u.tolist() == pytest.approx([0.9, 1.35, 0.575, -0.7125, 2.14375, 0.071875])
    assert spike(u - 1).tolist() == [0, 1, 0, 0, 1, 0]


def test_the_surrogate_gradient_by_hand() -> None:
    x = torch.tensor([-1.5, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0], requires_grad=True)
    spike(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([0, 0, 0.225, 0.3, 0.15, 0, 0])


@given(
    steps=st.integers(1, 12), threshold=st.sampled_from([0.3, 1.0, 2.5]), leak=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_spikes_and_gradients_are_those_of_snntorch(steps: int, threshold: float, leak: float, seed: int) -> None:
    results = []
    for function in (fused, by_snntorch):
        current = currents(steps, 3, 5, seed=seed).requires_grad_()
        spikes = function(current, threshold, leak)
        spikes.backward(currents(steps, 3, 5, seed=seed + 100))
        results.append((spikes.detach(), current.grad))
    (ours, our_gradient), (theirs, their_gradient) = results
    # A potential that is equal to a threshold up to rounding would spike in one of them only; none is, at these seeds.
    assert torch.equal(ours, theirs)
    assert torch.allclose(our_gradient, their_gradient, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("leak", [1.0, 0.9901])
def test_second_derivatives_are_those_of_snntorch(leak: float) -> None:
    """The codec differentiates gradients."""

    def second(function: Callable[[Tensor, float, float], Tensor]) -> Tensor:
        current = currents(8, 4, 6).requires_grad_()
        weights = currents(8, 4, 6, seed=1)
        (gradient,) = torch.autograd.grad((function(current, 1.0, leak) * weights).sum(), current, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), current)[0]

    ours = second(fused)
    assert ours.abs().max() > 0
    assert torch.allclose(ours, second(by_snntorch), atol=1e-5)


@pytest.mark.parametrize("backward_in_time", [False, True])
def test_the_filter_has_exact_derivatives(backward_in_time: bool) -> None:
    x = currents(5, 3).double().requires_grad_()

    def function(x: Tensor) -> Tensor:
        return _filter(x, 0.7, backward_in_time).sin()

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_integrate_and_fire_is_that_of_spikingjelly() -> None:
    """Without leak. With one the two differ by design: there the reset leaks too, as it comes before the next step."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", reason="SpikingJelly is not installed")
    theirs = neuron.IFNode(v_threshold=0.8, v_reset=None, detach_reset=True, step_mode="m")
    current = currents(20, 4, 7)
    spikes = fused(current, 0.8, 1.0)
    assert 0.1 < spikes.mean() < 0.5
    assert torch.equal(spikes, theirs(current))


def test_no_gradient_reaches_the_threshold() -> None:
    layer = LeakyIntegrateFire()
    assert not list(layer.parameters())
    assert [name for name, _ in layer.named_buffers()] == ["threshold"]


@pytest.mark.parametrize("leak", [0.4, 0.9901])
def test_one_pass_is_the_composition_of_potential_and_spike(leak: float) -> None:
    gradients = []
    for function in (integrate_and_fire, lambda *a: spike(potentials(*a) / a[1] - 1)):
        current = currents(9, 5, 4).requires_grad_()
        spikes = function(current, torch.tensor(0.7), leak)
        spikes.backward(currents(9, 5, 4, seed=2))
        gradients.append((spikes.detach(), current.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-6)  # type: ignore[arg-type]
