"""Hierarchical labels: masks, tree distances and steps against values computed by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client import app as honest
from client.plugins.hierarchy import BranchedModel, HierarchicalLabels, masked_losses
from client.plugins.label_tree import TREES, LabelTree
from client.plugins.tree_metrics import GraphDistance, HierarchicalF, HierarchicalPrecision, HierarchicalRecall
from server.app import serve_in_process
from tests.client.plugins.apps import forgetful_app
from tofu.data import FederatedData, ImageShape, to_float
from tofu.errors import SettingError
from tofu.models import build_model
from tofu.observers.base import Observer
from tofu.plugins import Batch, RoundContext, make_plugins
from tofu.reporting.folder import read_model
from tofu.reporting.panels import read_panels
from tofu.rounds.record import RoundRecord
from tofu.settings import Settings

TREE = [[[0, 1], [2]], [[3, 4]]]


def test_tree_by_hand() -> None:
    tree = LabelTree(TREE)
    assert tree.levels.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 2, 2], [0, 1, 2, 3, 4]]
    predicted, target = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 2, 3])
    assert tree.distance(predicted, target).tolist() == [0, 2, 4, 6]
    assert [each.tolist() for each in tree.overlap(predicted, target)] == [[3, 2, 1, 0], [3] * 4, [3] * 4]


def test_nodes_above_classes_of_different_depth() -> None:
    """0 is below the root itself, 1 and 2 are below a node, and 3 is below a node of its own and that node."""
    tree = LabelTree([0, [1, 2, [3]]])
    classes = torch.tensor([0, 1, 2, 3])
    own = tree.overlap(classes, classes)
    assert [each.tolist() for each in own] == [[1, 2, 2, 3]] * 3
    common, predicted, true = tree.overlap(torch.tensor([3, 3, 0]), torch.tensor([1, 0, 2]))
    assert (common.tolist(), predicted.tolist(), true.tolist()) == ([1, 0, 0], [3, 3, 1], [2, 1, 2])


def test_metrics_by_hand() -> None:
    tree = LabelTree([0, [1, 2, [3]]])
    # Nodes in common, above the predicted and above the true class: 1 of 3 and 2; 3 of 3 and 3; 1 of 1 and 1.
    predicted, target = torch.tensor([3, 3, 0]), torch.tensor([1, 3, 0])
    wanted = {HierarchicalPrecision: 5 / 7, HierarchicalRecall: 5 / 6, HierarchicalF: 10 / 13, GraphDistance: 4 / 3}
    for kind, value in wanted.items():
        metric = kind(tree)
        metric.update(predicted[:1], target[:1])
        metric.update(predicted[1:], target[1:])
        assert float(metric.compute()) == pytest.approx(value), kind
        metric.reset()
        metric.update(predicted[1:2], target[1:2])
        assert float(metric.compute()) == (0 if kind is GraphDistance else 1)
    for beta, value in ((1, 2 / 5), (2, 5 / 11), (0.5, 1.25 / 3.5)):  # hP = 1/3, hR = 1/2
        metric = HierarchicalF(tree, beta)
        metric.update(predicted[:1], target[:1])
        assert float(metric.compute()) == pytest.approx(value)
    assert math.isnan(float(GraphDistance(tree).compute()))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_laws_of_the_metrics(pairs: list[tuple[int, int]]) -> None:
    """Precision of (p, t) is recall of (t, p); F is their harmonic mean; a padded tree's distance is a metric."""
    predicted, target = (torch.tensor(side) for side in zip(*pairs, strict=True))
    tree = LabelTree([[0, [1]], 2, [3, 4]])

    def value(kind: type[HierarchicalF], first: Tensor, second: Tensor) -> float:
        metric = kind(tree)
        metric.update(first, second)
        return float(metric.compute())

    precision, recall = (value(kind, predicted, target) for kind in (HierarchicalPrecision, HierarchicalRecall))
    assert precision == value(HierarchicalRecall, target, predicted)
    harmonic = 2 * precision * recall / (precision + recall) if precision else 0.0
    assert value(HierarchicalF, predicted, target) == pytest.approx(harmonic)
    distance = tree.distance(predicted, target)
    assert distance.equal(tree.distance(target, predicted))
    assert distance.eq(0).equal(predicted == target)
    through = tree.distance(predicted, torch.full_like(target, 2)) + tree.distance(torch.full_like(target, 2), target)
    assert bool((distance <= through).all())


@pytest.mark.parametrize(
    ("predicted", "target"), [([0, 5], [0, 0]), ([0], [0, 0]), ([0.0], [0]), ([-1], [0]), ([[0]], [[0]])]
)
def test_metrics_refuse_what_is_no_class(predicted: list, target: list) -> None:  # type: ignore[type-arg]
    with pytest.raises(SettingError, match=r"classes 0 to 4"):
        GraphDistance(LabelTree(TREE)).update(torch.tensor(predicted), torch.tensor(target))


@pytest.mark.parametrize("nested", [[0, 0], [[0], [2]], [[0, 1], []], ["a", 1], [0]])
def test_wrong_trees(nested: list) -> None:  # type: ignore[type-arg]
    with pytest.raises(SettingError):
        LabelTree(nested)


def test_leaf_above_the_last_level_is_its_own_node() -> None:
    assert LabelTree([0, [1, 2]]).levels.tolist() == [[0, 1, 1], [0, 1, 2]]
    assert {name: LabelTree(nested).widths for name, nested in TREES.items()} == {
        "digits": [3, 6, 10], "cifar10": [2, 6, 10], "cifar10-pairs": [2, 3, 5]
    }  # fmt: skip


def test_masks_by_hand() -> None:
    first = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)  # right, wrong
    second = torch.zeros(2, 3, requires_grad=True)
    losses = masked_losses([first, second], [torch.tensor([0, 0]), torch.tensor([1, 2])])
    assert losses[0].tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))])
    assert losses[1].tolist() == pytest.approx([math.log(3), 0.0])
    losses[1].mean().backward()
    assert second.grad is not None
    assert first.grad is None
    assert second.grad.tolist()[0] == pytest.approx([1 / 6, -1 / 3, 1 / 6])  # the mean is over both images
    assert second.grad.tolist()[1] == [0, 0, 0]


def test_an_error_of_any_coarser_head_masks_the_last_one() -> None:
    right, wrong = [5.0, 0.0], [0.0, 5.0]
    logits = [torch.tensor([right, wrong, right]), torch.tensor([right, right, wrong]), torch.zeros(3, 4)]
    losses = masked_losses(logits, [torch.zeros(3, dtype=torch.int64)] * 3)
    assert losses[2].tolist() == pytest.approx([math.log(4), 0, 0])
    unmasked = masked_losses(logits, [torch.zeros(3, dtype=torch.int64)] * 3, conditional=False)
    assert unmasked[2].tolist() == pytest.approx([math.log(4)] * 3)


@pytest.mark.parametrize("name", ["mlp", "lenet5", "cnn", "resnet18", "vgg11", "vit_tiny", "snn-small", "vgg5-snn"])
def test_heads_on_models(name: str) -> None:
    shape = ImageShape(1, 16, 16, 5)
    context = RoundContext(shape)
    plugin = HierarchicalLabels(labels=TREE)
    model = plugin.setup(build_model(name, shape), context)
    assert isinstance(model, BranchedModel)
    assert plugin.setup(model, context) is model
    images = torch.zeros(3, 1, 16, 16)
    outputs = model.train()(images)
    assert outputs.shape == (3, 5)
    assert [each.shape[1] for each in model.logits] == [2, 3, 5]
    outputs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(images).equal(model.trunk(images))


def test_features_of_a_spiking_network_are_averaged_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, images = ImageShape(1, 16, 16, 5), torch.rand(3, 1, 16, 16)
    trunk = build_model("vgg5-snn", shape)
    model = HierarchicalLabels(labels=TREE).setup(trunk, RoundContext(shape))
    assert isinstance(model, BranchedModel)
    assert model.points[0] == "pool2"
    seen: list[torch.Tensor] = []
    trunk.get_submodule("pool2").register_forward_hook(lambda _m, _i, output: seen.append(output))
    model.train()(images)
    by_hand = seen[0].view(8, 3, 128, -1).mean((0, 3))
    whole = model.logits[0]
    assert torch.allclose(whole, model.heads[0](by_hand), atol=1e-6)
    monkeypatch.setattr("tofu.models.spiking.network._MAX_ROWS", 16)  # without gradients, two images at a time
    with torch.no_grad():
        model(images)
    assert len(seen) == 3
    assert torch.allclose(model.logits[0], whole, atol=1e-6)


def test_outputs_have_a_gradient_for_the_coarse_heads_and_images_none() -> None:
    """That of the sum of a class's logits over the depths, with everything but the heads' weights held fixed."""
    shape = ImageShape(1, 8, 8, 5)
    plugin = HierarchicalLabels(labels=TREE)
    model = plugin.setup(build_model("mlp", shape), RoundContext(shape)).double()
    assert isinstance(model, BranchedModel)
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    labels = torch.arange(6) % 5
    model.train()(images)
    coarse = [each.detach().requires_grad_() for each in model.logits[:-1]]
    loss = F.cross_entropy(model(images), labels)
    heads = [head.bias for head in model.heads]
    got = torch.autograd.grad(loss, [images, *heads], create_graph=True)  # type: ignore[arg-type]
    levels = plugin.label_tree.levels
    # The value is that of the trunk alone, so the sum of logits is moved back to it.
    summed = model.trunk(images)
    for logits, nodes in zip(coarse, levels, strict=False):
        summed = summed + logits[:, nodes] - logits[:, nodes].detach()
    plain = F.cross_entropy(summed, labels)
    expected = torch.autograd.grad(plain, [images, *coarse], create_graph=True)
    assert torch.allclose(got[0], expected[0])
    for head, logits in zip(got[1:], expected[1:], strict=True):
        assert torch.allclose(head, logits.sum(0))
        assert head.abs().max() > 0


def test_the_gradient_for_the_coarse_heads_can_be_differentiated() -> None:
    """By the images, as the search for proxies does; against central differences."""
    shape = ImageShape(1, 4, 4, 5)
    model = HierarchicalLabels(labels=TREE).setup(build_model("mlp", shape), RoundContext(shape)).double().eval()
    images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double().requires_grad_()

    def gradients(images: Tensor) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(model(images), torch.tensor([0, 3]))
        return torch.autograd.grad(loss, [head.weight for head in model.heads], create_graph=True)  # type: ignore[union-attr]

    assert torch.autograd.gradcheck(lambda x: tuple(gradients(x)), (images,))


class Steps:
    """A step of plain gradient descent that counts."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch, self.losses = model, batch, list[float]()

    def __call__(self, criterion=None, batch=None) -> Tensor:  # type: ignore[no-untyped-def]
        self.model.zero_grad()
        loss = criterion(self.model(self.batch.images))
        loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
        self.losses.append(loss.item())
        return loss.detach()


@pytest.mark.parametrize(("schedule", "steps"), [("three-step", 3), ("joint", 1)])
def test_schedules(schedule: str, steps: int) -> None:
    shape = ImageShape(1, 8, 8, 5)
    plugin = HierarchicalLabels(labels=TREE, schedule=schedule)
    model = plugin.setup(build_model("mlp", shape), RoundContext(shape)).train()
    images = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = Batch(images, torch.arange(10) % 5, torch.arange(10))
    step = Steps(model, batch)
    head = model.heads[0].weight.detach().clone()  # type: ignore[index,union-attr,operator]
    outputs = model(images)
    labels = list(plugin.label_tree.levels[:, batch.targets])
    assert outputs.equal(model.logits[-1])  # type: ignore[index]
    expected = [float(each.detach().mean()) for each in masked_losses(model.logits, labels)]  # type: ignore[arg-type]
    total = plugin.train_step(batch, step)
    assert step.losses[0] == pytest.approx(sum(expected) if schedule == "joint" else expected[0], rel=1e-5)
    assert len(step.losses) == steps
    assert float(total) == pytest.approx(sum(step.losses), rel=1e-5)
    assert not torch.equal(head, model.heads[0].weight)  # type: ignore[index,union-attr,arg-type]


def test_losses_of_a_weighted_batch() -> None:
    shape = ImageShape(1, 8, 8, 5)
    plugin = HierarchicalLabels(labels=TREE, schedule="joint")
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    totals = []
    for weights in (torch.tensor([1.0, 1.0, 0.0, 0.0]), None, torch.zeros(4)):
        model = plugin.setup(build_model("mlp", shape, seed=0), RoundContext(shape)).train()
        rows = slice(0, 4 if weights is not None else 2)
        batch = Batch(images[rows], torch.arange(4)[rows], torch.arange(4)[rows], weights)
        totals.append(float(plugin.train_step(batch, Steps(model, batch))))
    assert totals[0] == pytest.approx(totals[1])
    assert totals[2] == 0


@pytest.mark.parametrize("options", ["hierarchy.tree=letters", "", "hierarchy.labels=[0,0]", "hierarchy.schedule=two"])
def test_wrong_options(options: str) -> None:
    with pytest.raises(SettingError, match="hierarchy"):
        make_plugins("hierarchy", options)


@pytest.mark.parametrize("names", ["hierarchy,ood", "ood,hierarchy"])
def test_a_plugin_that_mixes_labels_is_refused_at_the_start(names: str) -> None:
    with pytest.raises(SettingError, match=f"plugins='{names}' .*no ood with hierarchy, which needs one class"):
        Settings.of(TINY | {"plugins": names})


def test_mixed_labels_are_refused() -> None:
    shape = ImageShape(1, 8, 8, 5)
    plugin = HierarchicalLabels(labels=TREE)
    model = plugin.setup(build_model("mlp", shape), RoundContext(shape))
    batch = Batch(torch.zeros(2, 1, 8, 8), torch.full((2, 5), 0.2), torch.arange(2))
    with pytest.raises(SettingError, match="mixes labels"):
        plugin.train_step(batch, Steps(model, batch))


def test_a_tree_of_other_classes_and_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="without tasks"):
        Settings.of(TINY | {"tasks": "classes", "task_count": 3})
    with pytest.raises(SettingError, match=r"hierarchy.labels='5 classes' .*10, as the data"):
        federate(tmp_path / "run", plugin_options="hierarchy.tree=cifar10-pairs")


# Federations

TINY: dict[str, Any] = {
    "model": "mlp", "clients": 3, "rounds": 3, "max_evals": 20, "ratio": 20.0, "local_epochs": 2, "batch_size": 32,
    "lr": 0.1, "ema_decay": 0.0, "partition": "iid", "plugins": "hierarchy", "plugin_options": "hierarchy.tree=digits",
}  # fmt: skip
PARITY = {"subpopulations": "0,2/4 1,3/5 6/8 7/9", "plugin_options": "hierarchy.labels=[[0,2],[1,3]]"}


def federate(folder: Path, app: ClientApp = honest.app, observer: Observer | None = None, **more: object) -> Any:
    return serve_in_process(app, Settings.of(TINY | more | {"run_folder": str(folder)}), observer)


def failures(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line)["failures"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("schedule", ["fedavg", "compressed", "secure"])
@pytest.mark.parametrize("more", [{}, PARITY])
def test_it_works_in_every_kind_of_round_and_draws_a_panel(
    tmp_path: Path, schedule: str, more: dict[str, object]
) -> None:
    run = tmp_path / "run"
    federate(run, schedule=schedule, **more)
    assert failures(run)[1:] == [[]] * 3
    plugins = make_plugins(Settings.of(TINY | more).plugins.plugins, Settings.of(TINY | more).plugins.plugin_options)
    weights, shape, state = read_model(run)
    plugins.load(broadcast=state, max_bytes=10**6)
    data = FederatedData.of(Settings.of(TINY | more).data, Settings.of(TINY | more).run.seed)
    counted = plugins[0].broadcast["count"]
    assert counted.tolist() == pytest.approx([sum(len(data.client(k)) for k in range(3))])  # type: ignore[union-attr]
    (table,) = read_panels(run)["hierarchy"].figures
    held_out = {row[0]: row[2] for row in table.rows}  # type: ignore[union-attr]
    model = plugins.setup(build_model("mlp", shape), RoundContext(shape)).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        predicted = model(to_float(data.test().images)).argmax(1)
    for name, kind in (("graph distance", GraphDistance), ("hierarchical F", HierarchicalF)):
        metric = kind(plugins[0].label_tree)  # type: ignore[attr-defined]
        metric.update(predicted, data.test().labels)
        assert held_out[name] == pytest.approx(float(metric.compute()))


@pytest.mark.parametrize("schedule", ["fedavg", "compressed"])
def test_coarse_heads_learn_in_uncompressed_and_in_proxy_rounds(tmp_path: Path, schedule: str) -> None:
    """Also from proxies alone, which tell how their weights changed; chance is 1/3 and 1/6."""
    federate(tmp_path / "run", schedule=schedule, correction=0.0, max_evals=60)
    weights, shape, _ = read_model(tmp_path / "run")
    plugin = HierarchicalLabels(tree="digits")
    model = plugin.setup(build_model("mlp", shape, seed=0), RoundContext(shape))
    assert isinstance(model, BranchedModel)
    for name, head in model.state_dict().items():
        if name in ("heads.0.weight", "heads.1.weight"):
            assert float((weights[name] - head).norm()) > 0.5 * float(head.norm())
    model.load_state_dict(weights)
    test = FederatedData.of(Settings.of(TINY).data, Settings.of(TINY).run.seed).test()
    model.train()(to_float(test.images))
    levels = plugin.label_tree.levels
    right = [
        float((logits.argmax(1) == nodes[test.labels]).float().mean())
        for logits, nodes in zip(model.logits, levels, strict=True)
    ]
    assert right[0] > 0.6, right
    assert right[1] > 0.5, right


class KillAfter(Observer):
    def on_round_end(self, record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    whole = federate(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "run", observer=KillAfter())
    resumed = federate(tmp_path / "run", resume=str(tmp_path / "run"))
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert read_panels(tmp_path / "run") == read_panels(tmp_path / "whole")


def test_a_client_that_loses_its_state_goes_on(tmp_path: Path) -> None:
    federate(tmp_path / "run", forgetful_app("1", 3))
    assert failures(tmp_path / "run")[1:] == [[]] * 3
