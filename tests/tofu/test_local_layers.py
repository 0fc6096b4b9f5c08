"""Layers that stay local: what the federation sees of a model, and what a client keeps."""

import pytest
import torch
from torch import nn

from tofu.errors import SettingError
from tofu.local_layers import LocalLayers
from tofu.weights import layout_of, weights_of


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def test_local_parameters_and_buffers_are_no_part_of_what_is_sent() -> None:
    model = net()
    LocalLayers(model, "1.*, 3.bias")
    assert list(weights_of(model)) == ["0.weight", "0.bias", "3.weight"]
    assert list(layout_of(model).shapes) == ["0.weight", "0.bias", "3.weight"]


def test_a_client_gets_its_values_back_and_the_codec_the_initial_ones() -> None:
    model = net()
    layers = LocalLayers(model, "1.*,3.*")
    initial = {name: value.clone() for name, value in model.named_parameters()}
    layers.begin(model, {})
    assert all(p.requires_grad for p in model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    with torch.no_grad():
        model[3].bias.add_(1.0)
    own = layers.end(model)
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert set(own) == {"1.weight", "1.bias", "3.weight", "3.bias"} | buffers
    assert own["1.num_batches_tracked"] == 1
    assert all(torch.equal(value, initial[name]) for name, value in model.named_parameters())
    assert not model[1].running_mean.any()
    again = net()
    other = LocalLayers(again, "1.*,3.*")
    other.begin(again, other.read(layers.write(own)))
    torch.testing.assert_close(again[3].bias, initial["3.bias"] + 1.0)
    assert again[1].num_batches_tracked == 1


def test_stored_values_of_another_model_or_damaged_ones_are_ignored() -> None:
    model = net()
    layers = LocalLayers(model, "3.*")
    good = layers.write({"3.weight": torch.ones(2, 6), "3.bias": torch.ones(2)})
    assert layers.read(good).keys() == {"3.weight", "3.bias"}
    assert not layers.read(layers.write({"3.weight": torch.ones(2, 5), "3.bias": torch.ones(2)}))
    assert not layers.read(layers.write({"3.weight": torch.ones(2, 6)}))
    assert not layers.read(good[:-3])
    assert not layers.read(None)


def test_patterns_that_match_nothing_or_everything_are_refused() -> None:
    with pytest.raises(SettingError, match=r"local-layers='bn\*' .* 0\.weight"):
        LocalLayers(net(), "3.*, bn*")
    with pytest.raises(SettingError, match="at least one parameter"):
        LocalLayers(net(), "*")
    assert not LocalLayers(net(), "")
