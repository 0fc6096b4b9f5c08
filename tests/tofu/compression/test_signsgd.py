import pytest
import torch

from tests.conftest import Case
from tests.tofu.compression.common import bare, generator, update_of
from tofu.compression.signsgd import SignSgd
from tofu.errors import SettingError


def test_by_hand() -> None:
    network = bare((2, 2), (4,), (0,), (300,))
    tensors = torch.tensor([[1.0, -3.0], [0.0, 4.0]]), torch.tensor([-8.0, 8.0, 8.0, -8.0]), torch.zeros(0)
    update = update_of(network, *tensors, torch.ones(300))
    decoded = SignSgd(network, ratio=10).compress(network, update, generator=generator()).decoded
    assert decoded["tensors.0"].tolist() == [[2.0, -2.0], [2.0, 2.0]]
    assert torch.equal(decoded["tensors.1"], tensors[1])
    assert decoded["tensors.2"].shape == (0,)


def test_each_tensor_contracts_as_the_paper_says(every_layer_update: Case) -> None:
    network, update = every_layer_update
    decoded = SignSgd(network, ratio=5).compress(network, update, generator=generator()).decoded
    for name in network.param_spec.parameters:
        x, c = update[name].double(), decoded[name].double()
        delta = float(x.abs().sum().square() / (x.numel() * x.square().sum()))
        assert float((x - c).square().sum() / x.square().sum()) == pytest.approx(1 - delta, abs=1e-4)


def test_the_ratio_is_near_32_and_no_more(mlp_update: Case) -> None:
    network, _ = mlp_update
    with pytest.raises(SettingError, match=r"ratio=32 is not usable: expected at most 31\.\d\d for this model with s"):
        SignSgd(network, ratio=32)
    assert SignSgd(network, ratio=31).body_bytes(network.param_spec) == SignSgd(network, ratio=1).body_bytes(
        network.param_spec
    )
