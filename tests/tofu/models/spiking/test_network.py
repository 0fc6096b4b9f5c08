"""Fused over time, a network computes what a loop over time steps does; steps change without new weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.app import app
from server.app import serve_in_process
from tofu.codec.compressor import ProxyCompressor
from tofu.codec.options import CompressorOptions, ProxySettings
from tofu.codec.surrogate import Surrogate, smooth_relu
from tofu.data import ImageShape, LabeledImages
from tofu.models import build_model
from tofu.models.spiking import POOL, LeakyIntegrateFire, SpikingNetwork, neurons_of, record_activity, spiking_vgg
from tofu.reference_model import ReferenceModel
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import architecture_of, difference, explained_variance, weights_of

SHAPE = ImageShape(1, 8, 8, 10)


def network(steps: int = 5, widths: tuple[int | str, ...] = (6, POOL, 8, 4)) -> SpikingNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return spiking_vgg(widths, SHAPE, steps=steps)


def images(n: int = 4) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def by_time_loop(model: SpikingNetwork, pixels: Tensor) -> Tensor:
    """The same network as a plain loop over time, potentials in a dict."""
    potentials: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    total = torch.zeros(len(pixels), 10)
    for _ in range(model.steps):
        x = pixels
        for name, module in model.named_children():
            if isinstance(module, LeakyIntegrateFire):
                zero = torch.zeros_like(x)
                u = module.leak * potentials.get(name, zero) + x - module.threshold * last.get(name, zero)
                x = (u > module.threshold).float()
                potentials[name], last[name] = u, x
            elif name in ("repeat", "mean"):
                continue
            else:
                x = module(x)
        total += x
    return total / model.steps


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_fused_network_is_a_loop_over_time(steps: int) -> None:
    model = network()
    names = list(model.state_dict())
    model.steps = steps  # at run time, without new weights
    assert torch.allclose(model(images()), by_time_loop(model, images()), atol=1e-5)
    assert list(model.state_dict()) == names
    assert names == ["conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"]


def test_many_images_are_computed_in_parts() -> None:
    model = network(steps=300)
    with torch.no_grad():
        assert torch.allclose(model(images(8)), torch.cat([model(part) for part in images(8).split(3)]), atol=1e-5)


def test_every_layer_gets_spikes_at_the_start() -> None:
    model = network(8, (8, 8, 8, POOL, 8, 8, 8, 8, 8))
    with record_activity(model) as activity:
        model(images(16))
    assert list(activity) == [f"lif{i}" for i in range(1, 9)]
    for layer in activity.values():
        assert 0.02 < layer.spikes.mean() < 0.6


def test_activity_is_spikes_and_mean_currents() -> None:
    model = network(4)
    with record_activity(model) as activity, torch.no_grad():
        model(images(3))
        model(images(2))
    assert activity["lif2"].spikes.shape == (4, 5, 8, 4, 4)
    assert set(activity["lif2"].spikes.unique().tolist()) == {0, 1}
    first = model.conv1(images(3))  # the constant current of every step
    assert torch.allclose(activity["lif1"].potential[:3], first, atol=1e-6)
    rates = F.avg_pool2d(activity["lif1"].spikes[:, :3].mean(0), 2)
    assert torch.allclose(activity["lif2"].potential[:3], model.conv2(rates), atol=1e-5)
    assert torch.equal(activity["lif1"].potential[3:], activity["lif1"].potential[:2])
    with torch.no_grad():
        model(images(3))
    assert len(activity["lif1"].potential) == 5  # recording has ended


def test_non_spiking_mode_is_the_network_with_relu() -> None:
    model = network()
    model.spiking = False
    x = F.relu(model.conv1(images()))
    x = F.relu(model.conv3(F.relu(model.conv2(F.avg_pool2d(x, 2)))))
    assert torch.allclose(model(images()), model.fc(x.flatten(1)))
    model.spiking = True
    assert not torch.allclose(model(images()), model.fc(x.flatten(1)), atol=1e-3)


def test_the_codec_sees_one_step_of_smooth_rates() -> None:
    model = network()
    model.lif1.threshold.fill_(0.5)  # type: ignore[operator,union-attr]
    x = smooth_relu(model.conv1(images()) / 0.5, 2.0)
    x = smooth_relu(model.conv3(smooth_relu(model.conv2(F.avg_pool2d(x, 2)), 2.0)), 2.0)
    with Surrogate(surrogate_beta=2.0):
        assert torch.allclose(model(images()), model.fc(x.flatten(1)), atol=1e-5)
        model.steps = 50
        assert torch.allclose(model(images()), model.fc(x.flatten(1)), atol=1e-5)


def test_proxies_explain_more_of_a_spiking_update_than_the_sparse_correction_alone(digits: LabeledImages) -> None:
    model = build_model("snn-small", digits.shape)
    start = copy.deepcopy(model)
    few = digits.subset(torch.nonzero(digits.labels < 4).flatten()[:300])
    config = LocalTrainingConfig(epochs=2, batch_size=16, lr=0.1)
    train_locally(model, few, config, generator=torch.Generator().manual_seed(0))
    update = difference(weights_of(model), weights_of(start))
    explained = {}
    for correction in (0.4, 1.0):
        options = CompressorOptions(correction=correction, encoder=ProxySettings(bits=4, max_evals=40))
        reference = ReferenceModel(start.eval(), digits.shape).as_built()
        compressor = ProxyCompressor(reference, ratio=100, options=options)
        sent = compressor.compress(reference, update, generator=torch.Generator().manual_seed(0))
        received = compressor.decompress(reference, sent.body)
        explained[correction] = explained_variance(update, received)
    assert explained[0.4] > explained[1.0] + 0.03


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("snn-small", [16, 32]),
        ("vgg5-snn", [64, 128, 128, 128]),
        ("vgg9-snn", [64, 128, 128, 256, 256, 512, 512, 512]),
    ],
)
def test_models_have_the_published_widths(name: str, widths: list[int]) -> None:
    modules = build_model(name, ImageShape(3, 32, 32, 10)).modules()
    assert [module.out_channels for module in modules if isinstance(module, nn.Conv2d)] == widths


def test_widths_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"widths=.*expected convolutions that leave some of"):
        network(2, (4, POOL, POOL, POOL, POOL))


TINY: dict[str, Any] = {
    "model": "snn-small", "clients": 3, "rounds": 3, "max_evals": 8, "ratio": 20.0, "secure_ratio": 2.0, "lr": 0.1,
    "local_epochs": 2, "train_images": 500, "ema_decay": 0.0, "partition": "iid",
}  # fmt: skip


@pytest.mark.parametrize("schedule", ["compressed", "secure", "fedavg"])
def test_a_federation_trains_a_spiking_network(tmp_path: Path, schedule: str) -> None:
    settings = Settings.of(TINY | {"schedule": schedule, "run_folder": str(tmp_path / "run")})
    end = serve_in_process(app, settings)
    assert float(end["final_accuracy"]) > 0.4  # by chance: 0.1


def test_thresholds_are_constants_of_the_architecture() -> None:
    model, other = network(), network()
    assert list(weights_of(model)) == ["conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"]
    assert architecture_of(model) == architecture_of(other)
    other.lif2.threshold.fill_(1.25)  # type: ignore[operator,union-attr]
    assert architecture_of(model) != architecture_of(other)
    assert float(copy.deepcopy(other).lif2.threshold) == 1.25  # type: ignore[arg-type]


def test_a_factor_of_the_thresholds_has_the_effect_of_other_thresholds() -> None:
    """On spikes, and on the rates that the codec differentiates."""
    lower, factor = network(), network()
    factor.threshold_factor = 0.5
    assert factor.threshold_factor == 0.5
    for layer in neurons_of(lower).values():
        layer.threshold.mul_(0.5)
    assert not torch.equal(lower(images()), network()(images()))
    assert torch.equal(lower(images()), factor(images()))
    with Surrogate(surrogate_beta=10.0):
        rates = lower(images())
    with Surrogate(surrogate_beta=10.0):
        assert torch.equal(rates, factor(images()))
