"""TREND: quantizers and attacks against second implementations, the metric against values computed by hand."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from benchmarks.plugins.dorefa import quantize_activations, quantize_weights
from client import app as honest
from client.plugins.transferability import (
    InputQuantizer,
    TransferCounts,
    TransferFit,
    attack,
    choose_ensemble,
    count_transfers,
    fit_transfers,
    halftone,
    quantize,
    transferability,
    vote,
)  # fmt: skip
from client.plugins.trend import Trend
from server.app import serve_in_process
from tests.client.plugins.apps import forgetful_app
from tofu.data import FederatedData, ImageShape, LabeledImages, to_float
from tofu.errors import SettingError
from tofu.models import build_model
from tofu.observers.base import Observer
from tofu.plugins import RoundContext, RunRequirements, make_plugins
from tofu.reporting.folder import read_model
from tofu.reporting.panels import read_panels
from tofu.reporting.predict import predict_images
from tofu.rounds.record import RoundRecord
from tofu.settings import Settings
from tofu.weights import weights_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(seed: int, pixels: int = 16, classes: int = 4) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, pixels, generator=generator(seed)))
        layer.bias.copy_(torch.randn(classes, generator=generator(seed + 100)))
    return model.eval()


def random_images(n: int = 6, seed: int = 5) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=generator(seed)) * 2 - 1


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_quantizers_are_mid_rise_with_a_straight_through_gradient(bits: int) -> None:
    images = torch.linspace(-1, 1, 1001).view(1, 1, 7, 143).requires_grad_()
    quantized = quantize(images, bits)
    # A second implementation, on the paper's scale: floor(x / bin) * bin + bin / 2 with bin = 2^-bits.
    unit = (images.detach().double().numpy() + 1) / 2
    step = 2.0**-bits
    expected = np.minimum(np.floor(unit / step), 2**bits - 1) * step + step / 2
    differing = np.abs(quantized.detach().numpy() - (2 * expected - 1)) > 1e-6
    assert differing.mean() <= 0.003 * 2 ** max(0, bits - 4)  # float32 and float64 differ at the edges of the bins
    assert len(quantized.unique()) == 2**bits
    (quantized * torch.arange(1001.0).view(1, 1, 7, 143)).sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad.flatten(), torch.arange(1001.0))


def test_one_and_two_bits_by_hand() -> None:
    images = torch.tensor([-1.0, -0.6, -0.5, -0.1, 0.0, 0.4, 0.5, 1.0]).view(1, 1, 2, 4)
    assert quantize(images, 1).flatten().tolist() == [-0.5] * 4 + [0.5] * 4
    assert quantize(images, 2).flatten().tolist() == [-0.75, -0.75, -0.25, -0.25, 0.25, 0.25, 0.75, 0.75]


def test_halftone_by_hand() -> None:
    images = torch.zeros(1, 2, 3, 3)
    images[0, 0, 1, 1] = 0.1
    images[0, 1] = -1.0
    images = images.requires_grad_()
    output = halftone(images)
    assert output[0, 0].tolist() == [[-1, -1, -1], [-1, 1, -1], [-1, -1, -1]]
    assert output[0, 1].tolist() == [[-1, -1, -1], [-1, -1, -1], [-1, -1, -1]]  # 4 times the image inside, 9 at corners
    output[0, 0, 1, 1].backward()
    assert images.grad is not None
    slope = 2 * 1 / (1 + math.exp(-1.6)) * (1 - 1 / (1 + math.exp(-1.6)))
    assert images.grad[0, 0, 1, 1].item() == pytest.approx(16 * slope, rel=1e-4)
    assert images.grad[0, 1].abs().max() == 0
    assert InputQuantizer("fp")(images) is images


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_benchmarks_quantized_networks(bits: int) -> None:
    """Every quantized layer has at most 2^bits values, which are close to its own if there are many."""
    plain = build_model("lenet5", ImageShape(1, 28, 28, 10), seed=0)
    model = copy.deepcopy(plain)
    quantize_weights(model, bits)
    for name in ("conv2", "fc1", "fc2"):
        weight, own = getattr(model, name).weight, getattr(plain, name).weight
        assert len(weight.unique()) <= 2**bits
        error = float((weight - own).abs().max()) / float(own.abs().max())
        assert error <= (1.0 if bits == 1 else 1.1 / (2**bits - 1))
    assert torch.equal(model.conv1.weight, plain.conv1.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(model.fc3.weight, plain.fc3.weight)  # type: ignore[union-attr,arg-type]
    model(torch.zeros(1, 1, 28, 28)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    quantize_activations(plain, bits)
    values = torch.linspace(-1, 2, 200, requires_grad=True)
    output = plain.relu1(values)  # type: ignore[operator]
    assert torch.allclose(output.unique(), torch.linspace(0, 1, 2**bits))
    output.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == ((values >= 0) & (values <= 1)).float().tolist()


def reference_attack(
    models: list[tuple[Any, Any, int]],
    image: Any,
    label: int,
    start: Any,
    epsilon: float,
    step: float,
    n: int,
    how: str,
) -> Any:
    """PGD on softmax regressions with quantized inputs, for one image, with gradients written out, in float64."""
    x = np.clip(image + start * 2 * epsilon, -1, 1)
    for _ in range(n):
        gradients = []
        for weight, bias, bits in models:
            q = x if bits == 0 else np.minimum(np.floor((x + 1) * 2**bits / 2), 2**bits - 1) * 2 / 2**bits
            q = x if bits == 0 else q + 1 / 2**bits - 1
            z = weight @ q + bias
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            p[label] -= 1
            gradients.append(weight.T @ p)
        stack = np.array(gradients)
        if how == "average":
            direction = np.sign(stack.sum(0))
        elif how == "sign":
            direction = np.sign(np.sign(stack).sum(0))
        else:
            direction = np.where((np.sign(stack) == np.sign(stack[0])).all(0), np.sign(stack[0]), 0)
        x = np.clip(x + 2 * step * direction, np.maximum(image - 2 * epsilon, -1), np.minimum(image + 2 * epsilon, 1))
    return x


@pytest.mark.parametrize("combine", ["average", "sign", "unanimous"])
def test_attacks_agree_with_a_second_implementation(combine: str) -> None:
    kinds = ["fp", "1", "2"]
    members, plain = [], []
    for seed, kind in enumerate(kinds):
        model = linear(seed)
        layer = model[1]  # type: ignore[index]
        plain.append((layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy(),
                      0 if kind == "fp" else int(kind)))  # fmt: skip
        model.register_forward_pre_hook(InputQuantizer(kind).hook)
        members.append(model)
    images, labels = random_images(), torch.tensor([0, 1, 2, 3, 0, 1])
    found = attack(
        members, images, labels, epsilon=0.1, steps=7, step_size=0.03, generator=generator(9), combine=combine
    )
    start = (torch.rand(images.shape, generator=generator(9)) * 2 - 1).double().numpy()
    for row in range(len(images)):
        expected = reference_attack(plain, images[row].double().numpy().ravel(), int(labels[row]), start[row].ravel(),
                                    0.1, 0.03, 7, combine)  # fmt: skip
        assert np.abs(found[row].numpy().ravel() - expected).max() < 1e-4
    assert float((found - images).abs().max()) <= 0.2 + 1e-6
    assert float(found.abs().max()) <= 1


def test_the_three_attacks_differ_where_one_gradient_dominates() -> None:
    """Gradients 5, -1, -1 of a pixel: the average follows the first, signs the majority; they are not unanimous."""
    from client.plugins.transferability import _direction

    gradients = torch.tensor([[5.0, 2.0], [-1.0, 1.0], [-1.0, 3.0]])
    assert _direction(gradients, "average").tolist() == [1, 1]
    assert _direction(gradients, "sign").tolist() == [-1, 1]
    assert _direction(gradients, "unanimous").tolist() == [0, 1]
    with pytest.raises(ValueError, match="average, sign, unanimous"):
        attack([linear(0)], random_images(), torch.zeros(6).long(), epsilon=0.1, steps=1, step_size=0.1,
               generator=generator(), combine="other")  # fmt: skip


def test_counts_agree_with_a_loop_over_images() -> None:
    models = [linear(0), linear(1)]
    images = random_images(40)
    labels = torch.where(torch.arange(40) % 4 > 0, models[0](images).argmax(1), models[1](images).argmax(1))
    epsilons = [0.02, 0.1]
    counts = count_transfers(models, images, labels, epsilons=epsilons, steps=5, generator=generator(3))
    draws = generator(3)
    for source in range(2):
        for k, epsilon in enumerate(epsilons):
            adversarial = attack([models[source]], images, labels, epsilon=epsilon, steps=5, step_size=epsilon / 2,
                                 generator=draws)  # fmt: skip
            for target in range(2):
                right = fooled = transferred = 0
                for x, a, y in zip(images, adversarial, labels, strict=True):
                    if all(int(models[m](x[None]).argmax()) == int(y) for m in (source, target)):
                        right += 1
                        if int(models[source](a[None]).argmax()) != int(y):
                            fooled += 1
                            transferred += int(models[target](a[None]).argmax()) != int(y)
                assert counts.right[target, source] == right
                assert counts.fooled[target, source, k] == fooled
                assert counts.transferred[target, source, k] == transferred
    assert torch.equal(counts.transferred.diagonal(), counts.fooled.diagonal())
    assert counts.fooled.max() > 5
    assert float(counts.rates.max()) == 1.0


def test_the_fit_recovers_a_and_b() -> None:
    epsilons = [0.01, 0.03, 0.06, 0.1, 0.2]
    fit = fit_transfers(epsilons, [700 * (1 - math.exp(-20 * e)) for e in epsilons], limit=1000)
    assert fit.a == pytest.approx(700, rel=1e-3)
    assert fit.b == pytest.approx(-20, rel=1e-3)
    assert fit(0.05) == pytest.approx(700 * (1 - math.exp(-1)), rel=1e-3)
    assert fit_transfers(epsilons, [0.0] * 5, limit=100) == TransferFit(0.0, 0.0)
    straight = fit_transfers(epsilons, [1000 * e for e in epsilons], limit=10_000)
    assert straight(0.1) == pytest.approx(100, rel=0.05)


def test_the_metric_is_relative_to_the_source_alone() -> None:
    epsilons = [0.02, 0.05, 0.1, 0.2]
    curve = torch.tensor([100 * (1 - math.exp(-15 * e)) for e in epsilons], dtype=torch.float64)
    share = torch.tensor([[1.0, 0.25], [0.5, 1.0]], dtype=torch.float64)
    transferred = share[:, :, None] * torch.tensor([1.0, 0.4]).double()[:, None] * curve  # source 1 is harder to fool
    counts = TransferCounts(torch.full((2, 2), 100.0).double(), curve.expand(2, 2, 4), transferred)
    assert torch.allclose(transferability(counts, epsilons, 8 / 255), share, atol=1e-3)


def test_the_ensemble_with_the_least_transfer_is_chosen() -> None:
    metric = torch.tensor([[1.0, 0.9, 0.3, 0.2], [0.9, 1.0, 0.4, 0.1], [0.2, 0.4, 1.0, 0.6], [0.3, 0.3, 0.6, 1.0]])
    # Means of both directions: 01 0.9, 02 0.25, 03 0.25, 12 0.4, 13 0.2, 23 0.6.
    assert choose_ensemble(metric, 2) == (1, 3)
    assert choose_ensemble(metric, 3) == (0, 2, 3)  # 0.367, against 0.517 (012), 0.45 (013) and 0.4 (123)
    assert choose_ensemble(metric, 4) == (0, 1, 2, 3)


def test_votes_outweigh_confidence_which_decides_between_equals() -> None:
    sure, unsure, other = [0.0, 9.0, 0.0], [0.2, 0.0, 0.0], [0.0, 0.0, 0.1]
    logits = torch.tensor([[sure, sure], [unsure, unsure], [unsure, other]])
    result = vote(logits)
    assert result.argmax(1).tolist() == [0, 1]
    assert torch.allclose(result.exp().sum(1), torch.ones(2))
    weights = logits.softmax(2).mean(0)
    assert torch.allclose(result.exp()[0], (torch.tensor([2.0, 1, 0]) + weights[0]) / 4)


def test_members_differ_in_their_quantizers_alone(digits: LabeledImages) -> None:
    images = to_float(digits.images[:4])
    plain = build_model("cnn", digits.shape).eval()
    for group, bits in enumerate((None, 1, 2)):
        plugins = make_plugins("trend")
        context = RoundContext(digits.shape, group=group)
        model = plugins.setup(build_model("cnn", digits.shape).eval(), context)
        assert plugins.setup(model, context) is model  # and one quantizer only
        assert torch.equal(model(images), plain(images if bits is None else quantize(images, bits)))
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_a_client_attacks_the_members_that_were_broadcast(digits: LabeledImages) -> None:
    """The counts of images that a member classifies correctly are those of its own weights and its own quantizer."""
    plugin = Trend(members="fp,1", images=50, steps=1)
    networks = [build_model("mlp", digits.shape, seed=group).eval() for group in range(2)]
    plugin.broadcast = {
        f"member {group}/{name}": value for group in range(2) for name, value in weights_of(networks[group]).items()
    }
    model = plugin.setup(build_model("mlp", digits.shape, seed=2), RoundContext(digits.shape, group=1))
    plugin.on_train_begin(model, digits)
    rows = torch.arange(50) * len(digits) // 50
    images, labels = to_float(digits.images[rows]), digits.labels[rows]
    right = [networks[0](images).argmax(1) == labels, networks[1](quantize(images, 1)).argmax(1) == labels]
    assert plugin.export().sums["right"].tolist() == [[float((a & b).sum()) for b in right] for a in right]


def test_clients_belong_to_groups_by_assignment_number_or_name() -> None:
    plugin = Trend(assign={"alice": 2})
    groups = [plugin.group_of(name) for name in ("alice", "0", "1", "2", "3", "bob")]
    assert groups[:5] == [2, 0, 1, 2, 0]
    assert groups[5] in range(3)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("trend.members=fp", "trend.members='fp' .*two or more of fp, 1, 2, 4, 6, 8, halftone"),
        ("trend.members=fp,3", "trend.members='fp,3' .*two or more of"),
        ("trend.voters=4", "trend.voters=4 .*at most the number of members, 3"),
        ("trend.epsilons=[0.1]", r"trend.epsilons='\[0.1\]' .*two or more increasing"),
        ("trend.epsilons=[0.2,0.1]", r"trend.epsilons='\[0.2, 0.1\]' .*increasing"),
        ("trend.epsilons=[0.1,2]", "trend.epsilons.*at most 1"),
        ('trend.assign={"a":3}', "trend.assign='a: 3' .*0 to 2"),
        ("trend.steps=0", "trend.steps='0' .*at least 1"),
        ("trend.bits=2", "trend.bits='2' .*a known option"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: str, wanted: str) -> None:
    with pytest.raises(SettingError, match=wanted) as error:
        make_plugins("trend", options)
    assert "\n" not in str(error.value)


def test_runs_that_cannot_work_are_refused() -> None:
    assert "at least 3 clients, for 3 groups" in Trend().incompatibility(RunRequirements(clients=2))
    assert "at least 9 clients in secure" in Trend().incompatibility(RunRequirements(clients=6, secure=True))
    assert "without tasks" in Trend().incompatibility(RunRequirements(clients=6, tasks=2))
    assert not Trend().incompatibility(RunRequirements(clients=9, secure=True))


# Federations

TINY: dict[str, Any] = {
    "model": "mlp", "clients": 6, "rounds": 4, "max_evals": 5, "ratio": 20.0, "local_epochs": 2, "batch_size": 32,
    "lr": 0.1, "ema_decay": 0.0, "partition": "iid", "plugins": "trend",
    "plugin_options": "trend.members=fp,1 trend.images=40 trend.steps=4 trend.epsilons=[0.05,0.15]",
}  # fmt: skip


def federate(folder: Path, app: ClientApp = honest.app, observer: Observer | None = None, **more: object) -> Any:
    return serve_in_process(app, Settings.of(TINY | more | {"run_folder": str(folder)}), observer)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("schedule", ["fedavg", "compressed", "secure"])
def test_a_federation_trains_measures_and_votes(tmp_path: Path, schedule: str) -> None:
    run = tmp_path / "run"
    end = federate(run, schedule=schedule)
    records = rows(run)
    assert all(record["failures"] == [] for record in records)
    assert len(records[-1]["group_accuracies"]) == 2
    panel = read_panels(run)["trend"]
    assert panel.figures[0].rows[0][1:] != panel.figures[0].rows[1][1:]  # type: ignore[union-attr]
    first, second = (read_model(run, group=group)[0] for group in range(2))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    plugins = make_plugins("trend", TINY["plugin_options"])
    plugins.load(broadcast=read_model(run)[2], max_bytes=10**6)
    broadcast = plugins[0].broadcast
    assert set(broadcast) == {"metric", "rates", "fooled", "chosen"}  # the members' weights are not kept
    if schedule != "compressed":
        assert float(end["final_accuracy"]) > 0.7
        assert torch.allclose(broadcast["metric"].diagonal(), torch.ones(2).double())  # type: ignore[union-attr]


def test_predict_uses_the_models_of_all_groups(tmp_path: Path) -> None:
    """The classes and probabilities are those of a vote computed here from the files of the run."""
    from PIL import Image

    run, folder = tmp_path / "run", tmp_path / "images"
    federate(run, schedule="fedavg", rounds=2)
    folder.mkdir()
    test = FederatedData.of(Settings.of(TINY).data, 0).test()
    for number in range(30):
        Image.fromarray(test.images[number, 0].numpy()).save(folder / f"{number:02}.png")
    predictions = predict_images(run, folder)
    images, logits = to_float(test.images[:30]), []
    for group in range(2):
        model = build_model("mlp", test.shape).eval()
        model.load_state_dict(read_model(run, group=group)[0])
        logits.append(model(quantize(images, 1) if group else images).detach())
    expected = vote(torch.stack(logits)).exp().max(1)
    assert [row["class"] for row in predictions] == expected.indices.tolist()
    assert [row["probability"] for row in predictions] == pytest.approx(expected.values.tolist(), abs=1e-5)
    alone = F.softmax(logits[0], 1).max(1).values.tolist()
    assert [row["probability"] for row in predictions] != pytest.approx(alone, abs=1e-3)


class KillAfter(Observer):
    def on_round_end(self, record: RoundRecord) -> None:
        if record.round == 3:
            raise KeyboardInterrupt


def test_a_resumed_run_is_bit_exact(tmp_path: Path) -> None:
    """It stops when the members' weights have been broadcast, and nothing has been measured."""
    whole = federate(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "run", observer=KillAfter())
    resumed = federate(tmp_path / "run", resume=str(tmp_path / "run"))
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert read_model(tmp_path / "run")[2] == read_model(tmp_path / "whole")[2]


def test_a_client_that_loses_its_state_goes_on(tmp_path: Path) -> None:
    federate(tmp_path / "run", forgetful_app("1", 4))
    assert [row["failures"] for row in rows(tmp_path / "run")[1:]] == [[]] * 4
    assert "trend" in read_panels(tmp_path / "run")
