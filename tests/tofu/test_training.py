import sys
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.processes import run
from tofu.data import LabeledImages, to_float
from tofu.errors import RunError
from tofu.models import build_model
from tofu.plugins import NO_PLUGINS, Batch, LocalStep, Plugin, Plugins, Weights
from tofu.training import SGD, LocalTrainingConfig, SeededDropout, shuffled_batches, train_locally
from tofu.weights import fingerprint, weights_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_epoch_is_plain_sgd_over_shuffled_batches(digits: LabeledImages) -> None:
    """Against a loop written out."""
    data = digits.subset(torch.arange(100))
    ours, theirs = build_model("mlp", data.shape, seed=1), build_model("mlp", data.shape, seed=1)
    result = train_locally(ours, data, LocalTrainingConfig(2, 32, 0.1), generator=generator(3))
    g = generator(3)
    for _ in range(2):
        order = torch.randperm(100, generator=g)
        for i in range(0, 100, 32):
            rows = order[i : i + 32]
            F.cross_entropy(theirs(to_float(data.images[rows])), data.labels[rows]).backward()
            for p in theirs.parameters():
                assert p.grad is not None
                p.data -= 0.1 * p.grad
                p.grad = None
    assert result.steps == 8
    for name, value in weights_of(ours).items():
        assert torch.allclose(value, weights_of(theirs)[name], atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_a_step_is_torchs_to_the_bit(momentum: float, weight_decay: float, digits: LabeledImages) -> None:
    ours, theirs = build_model("cnn", digits.shape, seed=1), build_model("cnn", digits.shape, seed=1)
    still = next(theirs.parameters()).detach().clone()
    for model in (ours, theirs):
        next(model.parameters()).requires_grad_(False)
    descent = SGD(dict(ours.named_parameters()), LocalTrainingConfig(1, 32, 0.1, momentum, weight_decay))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for start in range(0, 160, 32):
        images, labels = to_float(digits.images[start : start + 32]), digits.labels[start : start + 32]
        for model in (ours, theirs):
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()
        descent.step()
        optimizer.step()
    assert fingerprint(weights_of(ours)) == fingerprint(weights_of(theirs))
    assert torch.equal(next(ours.parameters()), still)


def test_a_client_and_a_servers_step_leave_alone_what_takes_long_to_import() -> None:
    """It takes longer than a small client's epoch, and a client app may start anew for every message."""
    code = """
import sys, torch
from tofu.training import LocalTrainingConfig, train_locally
from tofu.compression import uplink_compressor
from tofu.data import LabeledImages, ImageShape
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.settings import Settings
from tofu.weights import weights_of
data = LabeledImages(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 10, 10)
build_model("cnn", data.shape)
model = build_model("mlp", data.shape, seed=0)
g = torch.Generator()
train_locally(model, data, LocalTrainingConfig(1, 8, 0.1, 0.9), generator=g)
network = ReferenceModel(model.eval(), data.shape)
update = {name: torch.randn(w.shape, generator=g) for name, w in weights_of(model).items()}
for mode in ("smooth", "paper"):
    settings = Settings.of({"max_evals": 3, "codec_mode": mode})
    uplink_compressor(settings, "compressed", network).compress(network, update, generator=g, memory=b"")
heavy = {"torchvision", "datasets", "flwr_datasets", "sklearn", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
from server.global_model import ServerOptimizer
ServerOptimizer(model, settings.server).step(update)
assert "torch._dynamo" not in sys.modules
"""
    run([sys.executable, "-c", code], check=True)


def test_training_learns_and_the_seed_decides(digits: LabeledImages) -> None:
    prints = []
    for seed in (1, 1, 2):
        model = build_model("mlp", digits.shape, seed=0)
        result = train_locally(model, digits, LocalTrainingConfig(1, 32, 0.05), generator=generator(seed))
        prints.append(fingerprint(weights_of(model)))
    assert prints[0] == prints[1] != prints[2]
    again = train_locally(model, digits, LocalTrainingConfig(1, 32, 0.05), generator=generator())
    assert again.loss < result.loss - 0.3


def test_dropout_draws_from_the_given_generator_only() -> None:
    layer = nn.Dropout(0.5)
    x = torch.ones(1000)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    with SeededDropout(generator(1)):
        a = layer(x)
    with SeededDropout(generator(1)):
        b = layer(x)
    with SeededDropout(generator(2)):
        c = layer(x)
        assert torch.equal(layer.eval()(x), x)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert set(a.tolist()) == {0.0, 2.0}
    assert 400 < int((a == 0).sum()) < 600
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_in_place_changes_its_input_by_the_same_numbers() -> None:
    x = torch.randn(1000)
    changed = x.clone()
    with SeededDropout(generator(1)):
        expected = nn.functional.dropout(x, 0.3)
    with SeededDropout(generator(1)):
        returned = nn.functional.dropout(changed, 0.3, inplace=True)
    assert returned is changed
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, x)


def test_a_lone_last_image_is_left_out_as_batch_norm_could_not_take_it() -> None:
    assert [len(b) for b in shuffled_batches(65, 32, generator())] == [32, 32]
    assert [len(b) for b in shuffled_batches(66, 32, generator())] == [32, 32, 2]
    assert [len(b) for b in shuffled_batches(1, 32, generator())] == [1]


def test_divergence_is_an_error_that_says_what_may_help(digits: LabeledImages) -> None:
    with pytest.raises(RunError, match="a smaller lr than 1e\\+10 may help"):
        train_locally(build_model("mlp", digits.shape), digits, LocalTrainingConfig(1, 32, 1e10), generator=generator())


@dataclass
class Everything(Plugin):
    """Overrides every hook of the loop without changing anything, and counts the calls."""

    calls: list[str] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    labels: Tensor = field(default_factory=lambda: torch.zeros(0))
    soft: bool = False

    def on_train_begin(self, model: nn.Module, data: LabeledImages) -> None:
        self.calls.append("begin")
        self.labels = data.labels

    def train_step(self, batch: Batch, step: LocalStep) -> Tensor:
        self.calls.append("train")
        return step()

    def on_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        self.calls.append("batch")
        self.ids.append(batch.ids)
        assert torch.equal(batch.targets, self.labels[batch.ids]) if len(self.labels) else True
        return batch.replace(targets=F.one_hot(batch.targets, 10).float()) if self.soft else batch

    def on_loss(self, outputs: Tensor, batch: Batch, loss: Tensor, model: nn.Module) -> Tensor:
        self.calls.append("loss")
        return loss

    def on_step(self, model: nn.Module, before: Weights, momenta: Weights) -> None:
        self.calls.append("step")
        assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def on_epoch_end(self, model: nn.Module, data: LabeledImages) -> None:
        self.calls.append("epoch")

    def on_task_end(self, model: nn.Module, data: LabeledImages, final: bool) -> None:
        self.calls.append(f"end {final}")


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_plugins_that_change_nothing_leave_a_run_as_it_was_to_the_bit(digits: LabeledImages, model: str) -> None:
    data, how, weights = digits.subset(torch.arange(96)), LocalTrainingConfig(2, 32, 0.1, 0.9, 1e-3), []
    watcher = Everything()
    for plugins in (NO_PLUGINS, Plugins([watcher])):
        network = build_model(model, data.shape, seed=1)
        train_locally(network, data, how, generator=generator(3), plugins=plugins, final=True)
        weights.append(fingerprint(weights_of(network)))
    assert weights[0] == weights[1]
    assert watcher.calls == ["begin", *2 * (3 * ["batch", "train", "loss", "step"] + ["epoch"]), "end True"]
    for epoch in (watcher.ids[:3], watcher.ids[3:]):
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(96))  # every image once, by its row


def test_targets_may_be_soft(digits: LabeledImages) -> None:
    data, results = digits.subset(torch.arange(64)), []
    for soft in (False, True):
        network = build_model("mlp", data.shape, seed=1)
        plugins = Plugins([Everything(soft=soft)])
        train_locally(network, data, LocalTrainingConfig(1, 32, 0.1), generator=generator(3), plugins=plugins)
        results.append(weights_of(network))
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=1e-6)


class Reweights(Plugin):
    """Gives the second half of a batch the weight 0, or drops it."""

    drop: bool = False

    def on_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        half = len(batch) // 2
        if self.drop:
            return Batch(batch.images[:half], batch.targets[:half], batch.ids[:half])
        return batch.replace(weights=torch.tensor([2.0] * half + [0.0] * (len(batch) - half)))


def test_a_weight_of_zero_is_like_leaving_the_sample_out(digits: LabeledImages) -> None:
    data, results = digits.subset(torch.arange(64)), []
    for drop in (False, True):
        network, plugin = build_model("mlp", data.shape, seed=1), Reweights()
        plugin.drop = drop
        train_locally(network, data, LocalTrainingConfig(1, 32, 0.1), generator=generator(3), plugins=Plugins([plugin]))
        results.append(weights_of(network))
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=1e-6)


class Twice(Plugin):
    """Takes two steps on every batch, the second with a loss of its own."""

    def train_step(self, batch: Batch, step: LocalStep) -> Tensor:
        step()
        return step(lambda outputs: outputs.square().mean())


def test_a_plugin_may_take_several_steps_on_a_batch(digits: LabeledImages) -> None:
    data, network = digits.subset(torch.arange(64)), build_model("mlp", digits.shape, seed=1)
    expected = build_model("mlp", digits.shape, seed=1)
    config = LocalTrainingConfig(1, 64, 0.1)
    result = train_locally(network, data, config, generator=generator(3), plugins=Plugins([Twice()]))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    rows = torch.randperm(64, generator=generator(3))
    images, labels = to_float(data.images[rows]), data.labels[rows]
    for loss_of in (lambda outputs: F.cross_entropy(outputs, labels), lambda outputs: outputs.square().mean()):
        optimizer.zero_grad()
        loss = loss_of(expected(images))
        loss.backward()
        optimizer.step()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, value in weights_of(expected).items():
        assert torch.allclose(value, weights_of(network)[name], atol=1e-6)
