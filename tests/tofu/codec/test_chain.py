import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tofu.codec.chain import Chain
from tofu.codec.options import ProxySettings, paper_settings
from tofu.codec.proxies import ProxyData, proxy_loss
from tofu.codec.surrogate import register_surrogate
from tofu.data import ImageShape
from tofu.models.small import ChannelsLast, lenet5
from tofu.reference_model import ReferenceModel


class Step(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).float()


register_surrogate(Step, lambda beta: lambda module, x: torch.sigmoid(beta * x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.inner(x))


def convolutions(channels: int) -> nn.Module:
    return nn.Sequential(
        ChannelsLast(),
        nn.Conv2d(channels, 6, 3, padding=1, stride=(2, 1), dilation=(1, 2)),
        nn.BatchNorm2d(6),
        nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)),
        nn.Conv2d(6, 4, 3, padding="same", groups=2, bias=False),
        nn.GroupNorm(2, 4),
        nn.MaxPool2d(2, dilation=1, stride=1),
        nn.Conv2d(4, 6, 1, padding_mode="circular"),
        nn.LeakyReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Twice(),
        nn.Linear(6, 5, bias=False),
        Step(),
        nn.Linear(5, 10),
    )


def tied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10))
    model[4].weight = model[3].weight
    model[5].bias.requires_grad_(False)
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    model[1].register_forward_hook(lambda layer, inputs, output: 3 * output)
    return model


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = hooked()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) ** 2


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "color": (lambda: convolutions(3), 3),
    "gray": (lambda: convolutions(1), 1),
    "tied and frozen": (tied, 1),
    "hooked": (hooked, 1),
    "no sequence": (Whole, 1),
}


@pytest.mark.parametrize("mode", [ProxySettings(), paper_settings()], ids=["smooth", "paper"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_loss_that_the_receiver_differentiates(case: str, mode: ProxySettings) -> None:
    torch.manual_seed(0)
    build, channels = CASES[case]
    reference = ReferenceModel(build().eval(), ImageShape(channels, 8, 8, 10))
    simplex = mode.labels == "simplex"
    labels = torch.randn(3, 10).softmax(1) if simplex else torch.randn(3, 10)
    proxies = ProxyData(
        (torch.randn(3, channels, 8, 8),), labels, torch.rand(3) if simplex else None, torch.ones(1), 0.7
    )
    weights = {name: (w + 0.1 * torch.randn_like(w)).requires_grad_() for name, w in reference.base.items()}
    chain = Chain(reference, mode)
    pixels = [x.clone().requires_grad_() for x in proxies.inputs]
    prepared = chain.prepare(pixels)
    inputs = [x.detach() for x in prepared]
    found = chain.gradients(weights, inputs, proxies, by_weights=True, by_inputs=True)
    by_pixels = torch.autograd.grad(prepared, pixels, found.inputs)
    given = [x.clone().requires_grad_() for x in (*proxies.inputs, proxies.labels, proxies.weights) if x is not None]
    leaves = dataclasses.replace(proxies, inputs=(given[0],), labels=given[1], weights=given[2] if simplex else None)
    loss = proxy_loss(reference, weights, leaves, mode)
    exact = torch.autograd.grad(loss, [*weights.values(), *given], materialize_grads=True)
    for ours, theirs in zip([*found.weights, *by_pixels, *found.targets], exact, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * float(exact[0].abs().max()))
    only = chain.gradients(weights, inputs, proxies, by_weights=False, by_inputs=False)
    assert not only.weights
    assert not only.inputs
    assert all(map(torch.equal, only.targets, found.targets))


def enlarged() -> nn.Module:
    return nn.Sequential(
        nn.Upsample(size=(14, 9), mode="bilinear"),
        nn.Sequential(nn.Conv2d(1, 4, (5, 3), stride=(2, 1), padding=(2, 0), dilation=(1, 2)), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(10),
    )


GRAY: dict[str, Callable[[], nn.Module]] = {
    "enlarged": enlarged,
    "channels last": lambda: convolutions(1),
    "lenet5": lambda: lenet5(ImageShape(1, 12, 8, 10), "none"),
    "pooled to an odd side": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 10)
    ),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", GRAY)
def test_patches_of_small_gray_proxies_give_the_gradients_of_the_enlarged_images(case: str, bias: bool) -> None:
    torch.manual_seed(0)
    model, shape = GRAY[case](), ImageShape(1, 12, 8, 10)
    model(torch.zeros(2, 1, 12, 8))  # the size of a lazy layer
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    first.bias = first.bias if bias else None
    reference, settings = ReferenceModel(model.eval(), shape), ProxySettings()
    proxies = ProxyData((torch.randn(3, 1, 6, 4),), torch.randn(3, 10), None, torch.ones(1), 0.7)
    weights = {name: w.requires_grad_() for name, w in reference.base.items()}
    chain = Chain(reference, settings)
    pixels = proxies.inputs[0].clone().requires_grad_()
    prepared = chain.prepare([pixels])
    assert prepared[0].shape[1] == first.weight[0].numel()
    found = chain.gradients(weights, [x.detach() for x in prepared], proxies, by_weights=True, by_inputs=True)
    leaves = dataclasses.replace(proxies, inputs=(proxies.inputs[0].clone().requires_grad_(),))
    exact = torch.autograd.grad(
        proxy_loss(reference, weights, leaves, settings), [*weights.values(), *leaves.inputs], materialize_grads=True
    )
    by_pixels = torch.autograd.grad(prepared, pixels, found.inputs)
    for ours, theirs in zip([*found.weights, *by_pixels], exact, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * float(exact[0].abs().max()))
