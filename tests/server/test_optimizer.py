import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from server.checkpoint import Snapshot
from server.global_model import ServerOptimizer
from tofu.settings import Settings
from tofu.settings.groups import ServerSettings
from tofu.weights import weights_of


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def update(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full(w.shape, value) for name, w in weights_of(network()).items()}


def halved(parameters: Iterable[Tensor], server: ServerSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=server.server_lr / 2)


def test_an_optimizer_of_one_s_own() -> None:
    model = network()
    before = weights_of(model)["0.weight"]
    server = Settings.of({"server-optimizer": f"{__name__}:halved", "server-lr": 3.0}).server
    ServerOptimizer(model, server).step(update(1.0))
    assert torch.allclose(weights_of(model)["0.weight"], before + 1.5)


def test_plain_adds_the_update() -> None:
    model = network()
    before = weights_of(model)
    ServerOptimizer(model, Settings().server).step(update(0.25))
    for name, value in weights_of(model).items():
        if name == "1.num_batches_tracked":  # an integer: 0 + 0.25 rounds to 0
            assert value == before[name]
        else:
            assert torch.equal(value, before[name] + 0.25), name


def test_a_factor_is_of_parameters_and_not_of_buffers() -> None:
    model = network()
    before = weights_of(model)
    ServerOptimizer(model, Settings().server).step(update(0.5), 2.5)
    after = weights_of(model)
    assert torch.allclose(after["0.weight"], before["0.weight"] + 1.25)
    assert torch.equal(after["1.running_mean"], before["1.running_mean"] + 0.5)


def test_the_plain_step_is_torchs_to_the_bit() -> None:
    server = Settings.of({"server-lr": 0.3}).server
    model, other = network(), network()
    ServerOptimizer(model, server).step(update(0.1))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.3)
    for parameter in other.parameters():
        parameter.grad = torch.full_like(parameter, -0.1)
    optimizer.step()
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_ef21_adds_the_sum_of_all_changes_in_every_round() -> None:
    model = network()
    before = weights_of(model)
    server = Settings.of({"server-optimizer": "ef21", "client-fraction": 0.5, "step-ahead": 0.0}).server
    optimizer = ServerOptimizer(model, server)
    for value in (1.0, 0.5, -1.5):  # half of the clients changed: the mean directions are 0.5, 0.75, 0
        optimizer.step(update(value))
    after = weights_of(model)
    assert torch.allclose(after["0.weight"], before["0.weight"] + 1.25)
    assert torch.allclose(after["1.running_mean"], before["1.running_mean"])  # buffers: the sum of the updates


def test_momentum_carries_the_last_step_on() -> None:
    model = network()
    before = weights_of(model)["0.weight"]
    optimizer = ServerOptimizer(model, Settings.of({"server_optimizer": "momentum", "server_momentum": 0.5}).server)
    optimizer.step(update(1.0))
    optimizer.step(update(0.0))
    assert torch.allclose(weights_of(model)["0.weight"], before + 1.5)


def test_adam_normalizes_and_resumes_from_its_state() -> None:
    model = network()
    before = weights_of(model)["0.weight"]
    settings = Settings.of({"server_optimizer": "adam", "server_lr": 0.1})
    optimizer = ServerOptimizer(model, settings.server)
    optimizer.step(update(5.0))
    assert torch.allclose(weights_of(model)["0.weight"], before + 0.1, atol=1e-3)
    twin = copy.deepcopy(model)
    resumed = ServerOptimizer(twin, settings.server)
    snapshot = Snapshot()
    optimizer.save(snapshot)
    resumed.restore(Snapshot.from_bytes(snapshot.to_bytes()))
    optimizer.step(update(-1.0))
    resumed.step(update(-1.0))
    assert torch.equal(weights_of(model)["0.weight"], weights_of(twin)["0.weight"])


def test_a_variance_never_falls_below_zero() -> None:
    model = network()
    ServerOptimizer(model, Settings().server).step(update(-3.0))
    assert float(model.get_buffer("1.running_var").min()) == 0
    assert torch.equal(model.get_buffer("1.running_mean"), torch.full((2,), -3.0))
