"""Training, encoding and evaluating on a GPU; what arrives is the same as from the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from client import app as honest
from server.app import serve_in_process
from tofu.codec.options import ProxySettings, paper_settings
from tofu.codec.proxies import decode
from tofu.codec.search import encode
from tofu.data import LabeledImages
from tofu.device import open_device
from tofu.evaluation import evaluate
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, cosine, difference, explained_variance, weights_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

HOW = LocalTrainingConfig(1, 32, 0.01, momentum=0.9, weight_decay=1e-4)
TINY: dict[str, Any] = {
    "clients": 3, "max_evals": 20, "ratio": 50.0, "local_epochs": 2, "batch_size": 32, "lr": 0.1,
    "ema_decay": 0.0, "partition": "iid", "device": "cuda",
}  # fmt: skip


def trained(model: torch.nn.Module, data: LabeledImages, device: str) -> Weights:
    """The update of an epoch."""
    before = weights_of(model)
    generator = torch.Generator().manual_seed(3)
    train_locally(model, data, HOW, generator=generator, device=open_device(device))
    return difference(weights_of(model), before)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_local_steps_are_those_of_the_cpu(norm: str, digits: LabeledImages) -> None:
    data = digits.subset(torch.arange(160))  # few steps: rounding grows from step to step
    updates = [trained(build_model("cnn", data.shape, norm=norm, seed=1), data, name) for name in ("cpu", "cuda")]
    assert cosine(*updates) > 0.999


def test_the_model_is_on_the_cpu_again_afterwards_and_scores_alike(digits: LabeledImages) -> None:
    model = build_model("cnn", digits.shape, seed=1)
    trained(model, digits, "cuda")
    assert {tensor.device.type for tensor in weights_of(model).values()} == {"cpu"}
    here, there = (evaluate(model, digits, device=open_device(name)) for name in ("cpu", "cuda"))
    assert there.loss == pytest.approx(here.loss, rel=1e-3)
    assert there.accuracy == pytest.approx(here.accuracy, abs=0.003)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("mode", ["smooth", "paper"])
def test_a_search_on_the_gpu_explains_as_much_and_decodes_on_the_cpu(
    mode: str, norm: str, digits: LabeledImages
) -> None:
    model = build_model("cnn", digits.shape, norm=norm, seed=1).eval()
    network, update = (
        ReferenceModel(model, digits.shape),
        trained(build_model("cnn", digits.shape, norm=norm, seed=1), digits, "cpu"),
    )
    explained = {}
    for device in ("cpu", "cuda"):
        settings = (ProxySettings if mode == "smooth" else paper_settings)(bits=8, device=device)
        made = encode(network, update, 8, settings, generator=torch.Generator().manual_seed(2))
        decoded = decode(network, made.proxies, settings)
        assert all(torch.equal(value, made.decoded[name]) for name, value in decoded.items())
        explained[device] = explained_variance({name: update[name] for name in network.base}, decoded)
    assert explained["cuda"] == pytest.approx(explained["cpu"], abs=0.05)


@pytest.mark.parametrize(
    ("smallest", "more"),
    [
        (0.6, {"model": "cnn", "schedule": "switch", "rounds": 3, "switch_round": 3}),
        (0.7, {"model": "lenet5", "downlink": "proxy", "rounds": 4}),
        (0.7, {"model": "mlp", "plugins": "gpm", "tasks": "pixels", "task_count": 2, "rounds": 4}),
        (0.7, {"model": "mlp", "plugins": "gpm", "plugin_options": "gpm.memory=local gpm.scaling=1", "tasks": "classes",
               "task_heads": "multi", "task_count": 2, "rounds": 4}),
        (0.3, {"model": "cnn", "plugins": "ood,rank", "plugin_options": "rank.after=1 rank.energy=0.99", "rounds": 4}),
    ],
)  # fmt: skip
def test_federations_learn_and_send_as_many_bytes_as_on_the_cpu(
    tmp_path: Path, smallest: float, more: dict[str, Any]
) -> None:
    ends = {}
    for device in ("cpu", "cuda"):
        folder = str(tmp_path / device)
        ends[device] = serve_in_process(honest.app, Settings.of(TINY | more | {"device": device, "run_folder": folder}))
        assert json.loads((tmp_path / device / "config.json").read_text())["device"] == device
    assert float(ends["cuda"]["final_accuracy"]) > smallest
    assert ends["cuda"]["uplink_bytes"] == pytest.approx(ends["cpu"]["uplink_bytes"], rel=0.01)
