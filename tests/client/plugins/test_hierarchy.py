"""Hierarchical labels: masks, tree distances and steps against values computed by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from client.plugins.hierarchy import BranchedModel, HierarchicalLabels, masked_losses
from client.plugins.label_tree import TREES, GraphDistance, LabelTree
from tofu.data import ImageShape
from tofu.errors import SettingError
from tofu.models import build_model
from tofu.plugins import Batch, RoundContext, make_plugins

TREE = [[[0, 1], [2]], [[3, 4]]]


def test_tree_by_hand() -> None:
    tree = LabelTree(TREE)
    assert tree.levels.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 2, 2], [0, 1, 2, 3, 4]]
    metric = GraphDistance(tree)
    predicted, target = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 2, 3])
    assert tree.distance(predicted, target).tolist() == [0, 2, 4, 6]
    metric.update(predicted, target)
    metric.update(predicted[:1], target[3:])
    assert metric.compute() == 18 / 5
    metric.reset()
    assert math.isnan(metric.compute())


@pytest.mark.parametrize("nested", [[0, 0], [[0], [2]], [[0, 1], []], ["a", 1], [0]])
def test_wrong_trees(nested: list) -> None:  # type: ignore[type-arg]
    with pytest.raises(SettingError):
        LabelTree(nested)


def test_leaf_above_the_last_level_is_its_own_node() -> None:
    assert LabelTree([0, [1, 2]]).levels.tolist() == [[0, 1, 1], [0, 1, 2]]
    assert all(LabelTree(nested).classes == 10 for nested in TREES.values())


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


@pytest.mark.parametrize("name", ["mlp", "lenet5", "cnn", "resnet18"])
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
    assert [each.shape[1] for each in model.coarse] == [2, 3]
    outputs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(images).equal(model.trunk(images))


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
    expected = [float(each.detach().mean()) for each in masked_losses([*model.coarse, outputs], labels)]  # type: ignore[misc]
    total = plugin.train_step(batch, step)
    assert step.losses[0] == pytest.approx(sum(expected) if schedule == "joint" else expected[0], rel=1e-5)
    assert len(step.losses) == steps
    assert float(total) == pytest.approx(sum(step.losses), rel=1e-5)
    assert not torch.equal(head, model.heads[0].weight)  # type: ignore[index,union-attr,arg-type]


@pytest.mark.parametrize("options", ["hierarchy.tree=letters", "", "hierarchy.labels=[0,0]", "hierarchy.schedule=two"])
def test_wrong_options(options: str) -> None:
    with pytest.raises(SettingError, match="hierarchy"):
        make_plugins("hierarchy", options)
