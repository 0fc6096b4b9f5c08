"""Kept channels: a narrower network computes what the wide one does with its other channels at zero."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tofu.data import ImageShape
from tofu.errors import SettingError
from tofu.models import build_model
from tofu.plugins import keep_channels, keep_entries
from tofu.plugins.masking import chain_of
from tofu.weights import architecture_of, layout_of

SHAPE = ImageShape(1, 12, 12, 10)


def network(name: str = "cnn") -> nn.Module:
    return build_model(name, SHAPE, norm="none", seed=3).eval()


@given(st.sampled_from(["cnn", "lenet5", "mlp"]), st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_a_narrow_network_computes_what_the_wide_one_does_without_those_channels(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = network(name)
    kept = {}
    for layer_name, layer in list(chain_of(wide).items())[:-1]:
        count = int(torch.randint(1, len(layer.weight) + 1, (), generator=generator))
        kept[layer_name] = torch.randperm(len(layer.weight), generator=generator)[:count].sort().values
    narrow = copy.deepcopy(wide)
    keep_channels(narrow, kept)
    with torch.no_grad():
        for layer_name, layer in list(chain_of(wide).items())[:-1]:
            removed = torch.ones(len(layer.weight), dtype=torch.bool)
            removed[kept[layer_name]] = False
            layer.weight[removed] = 0
            layer.bias[removed] = 0
        images = torch.randn(3, 1, 12, 12, generator=generator)
        assert torch.allclose(narrow(images), wide(images), atol=1e-5)
    assert {n: len(layer.weight) for n, layer in chain_of(narrow).items() if n in kept} == {
        n: len(channels) for n, channels in kept.items()
    }


def test_channels_are_counted_as_the_layer_was_built_and_can_be_removed_in_two_steps() -> None:
    once, twice = network(), network()
    keep_channels(once, {"conv1": torch.tensor([2, 9])})
    keep_channels(twice, {"conv1": torch.tensor([2, 5, 9, 30])})
    keep_channels(twice, {"conv1": torch.tensor([2, 9])})
    for name, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name])
    weight = twice.get_parameter("conv1.weight")
    keep_channels(twice, {"conv1": torch.tensor([2, 9])})
    assert twice.get_parameter("conv1.weight") is weight
    with pytest.raises(ValueError, match=r"kept channels \[3\] of conv1 are not some of \[2, 9\]"):
        keep_channels(twice, {"conv1": torch.tensor([3])})


def test_other_channels_of_the_same_number_are_another_architecture() -> None:
    first, second, third = network(), network(), network()
    keep_channels(first, {"conv1": torch.tensor([2, 9])})
    keep_channels(second, {"conv1": torch.tensor([2, 10])})
    keep_channels(third, {"conv1": torch.tensor([2, 9])})
    assert layout_of(first) == layout_of(second)
    assert architecture_of(first) == architecture_of(third) != architecture_of(second)
    assert architecture_of(first) != architecture_of(network())
    with torch.no_grad():
        third.get_parameter("conv1.weight").zero_()
    assert architecture_of(first) == architecture_of(third)


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (build_model("cnn", SHAPE, norm="group"), "norm1: GroupNorm"),
        (build_model("vit_tiny", SHAPE), "VisionTransformer"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2)), "groups=2"),
    ],
)
def test_what_is_not_a_chain_is_refused_in_one_line(model: nn.Module, word: str) -> None:
    with pytest.raises(SettingError, match="in sequence, without residual connections") as caught:
        keep_channels(model, {})
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fc2", "nosuch", "relu1"])
def test_classes_and_unknown_layers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not a layer whose outputs can be removed"):
        keep_channels(network(), {name: torch.tensor([0])})


def test_a_masked_layer_stays_in_the_chain_but_cannot_become_narrower() -> None:
    model = network()
    keep_entries(model, {"fc1.weight": torch.ones(128, 128, dtype=torch.bool)})
    keep_channels(model, {"conv1": torch.tensor([0])})
    with pytest.raises(ValueError, match="made from other parameters"):
        keep_channels(model, {"fc1": torch.tensor([0])})
