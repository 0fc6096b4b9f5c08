import pytest
import torch
from torch import nn

from tofu.errors import SettingError
from tofu.weights import cosine, difference, explained_variance, fingerprint, layout_of, load_weights, weights_of


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_layout_tells_parameters_from_buffers() -> None:
    param_spec = layout_of(model())
    assert list(param_spec.parameters) == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert list(param_spec.buffers) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert param_spec.integers == {"1.num_batches_tracked"}
    assert param_spec.parameter_count == 18 + 2 + 2 + 2 + 24 + 3
    assert param_spec.float32_bytes == 4 * (51 + 2 + 2 + 1)


def test_frozen_parameters_do_not_travel() -> None:
    frozen = model()
    frozen.get_parameter("0.weight").requires_grad_(False)
    assert "0.weight" not in layout_of(frozen).shapes
    assert "0.weight" not in weights_of(frozen)


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(SettingError, match="at least one trainable parameter"):
        layout_of(nn.ReLU())


def test_load_undoes_a_change() -> None:
    network = model()
    before = weights_of(network)
    network(torch.randn(4, 1, 4, 4))  # moves BatchNorm's statistics
    update = difference(weights_of(network), before)
    assert float(update["1.num_batches_tracked"]) == 1
    assert float(update["1.running_mean"].abs().sum()) > 0
    load_weights(network, before)
    assert fingerprint(weights_of(network)) == fingerprint(before)


def test_fingerprint_sees_value_name_and_shape() -> None:
    weights = {"a": torch.zeros(2, 2), "b": torch.zeros(1)}
    seen = {
        fingerprint(weights),
        fingerprint({"a": torch.zeros(2, 2), "b": torch.tensor([1e-45])}),
        fingerprint({"a": torch.zeros(4), "b": torch.zeros(1)}),
        fingerprint({"c": torch.zeros(2, 2), "b": torch.zeros(1)}),
    }
    assert len(seen) == 4
    assert all(len(print_) == 8 for print_ in seen)


def test_cosine_and_explained_variance() -> None:
    u = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    half = {name: value / 2 for name, value in u.items()}
    assert cosine(u, half) == 1
    assert explained_variance(u, half) == 0.75
    zero = {name: torch.zeros_like(value) for name, value in u.items()}
    assert cosine(u, zero) == 0
    assert explained_variance(zero, u) == 0
    assert cosine(u, half | {"c": torch.ones(1)}) == 1  # tensors that only the second has do not count
