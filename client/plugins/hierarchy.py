"""Hierarchical labels: heads at increasing depth predict increasingly fine classes of a label tree.

Mukherjee, Garg, Roy, "Encoding Hierarchical Information in Neural Networks helps in Subpopulation Shift", IEEE TAI
2023, arXiv 2112.10844. With V_k(i) = 1 if all heads before k classify image i correctly, and 0 otherwise, the loss of
head k is L_k = mean_i V_k(i) CE_k(i), over all images of the batch. Only the last head predicts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.plugins.label_tree import TREES, LabelTree
from tofu.data import ImageShape, LabeledImages, to_float
from tofu.errors import SettingError
from tofu.plugins import (
    Batch,
    Export,
    Panel,
    Plugin,
    PluginState,
    RoundContext,
    RunRequirements,
    SumSpec,
    option,
    plugin_registry,
)  # fmt: skip
from tofu.plugins.base import Criterion, LocalStep
from tofu.rng import derive_generator
from tofu.rounds.panel import TableFigure


class BranchedModel(nn.Module):
    """A model with linear heads on intermediate features.

    `forward` returns the model's own outputs [n, classes]; the logits of the other heads, coarsest first, are in
    `coarse` after a forward pass in training mode.
    """

    def __init__(self, trunk: nn.Module, widths: list[int], shape: ImageShape, generator: torch.Generator) -> None:
        super().__init__()
        points = _attachment_points(trunk, shape, len(widths))
        self.trunk = trunk
        self.points = tuple(name for name, _ in points)
        self.heads = nn.ModuleList(
            nn.Linear(features, width) for (_, features), width in zip(points, widths, strict=True)
        )
        for parameter, head in ((p, h) for h in self.heads for p in h.parameters()):
            bound = 1 / math.sqrt(head.in_features)  # type: ignore[arg-type]
            with torch.no_grad():
                parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
        self.coarse: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        features: dict[str, Tensor] = {}
        modules = dict(self.trunk.named_modules())

        def keep(name: str, output: Tensor) -> None:
            features[name] = output

        handles = [
            modules[name].register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
            for name in set(self.points)
        ]
        try:
            outputs: Tensor = self.trunk(images)
        finally:
            for handle in handles:
                handle.remove()
        coarse = [head(_pool(features[name])) for name, head in zip(self.points, self.heads, strict=True)]
        self.coarse = coarse if self.training else []
        # Every parameter gets a gradient from the outputs alone, zero for the heads.
        for logits in coarse:
            outputs = outputs + 0 * logits.sum()
        return outputs


def _pool(features: Tensor) -> Tensor:
    """[n, channels, h, w] or [n, tokens, dim] or [n, dim] -> [n, features], averaged over space or tokens."""
    if features.dim() == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.dim() == 3 else features


def _attachment_points(trunk: nn.Module, shape: ImageShape, heads: int) -> list[tuple[str, int]]:
    """Names and feature counts of the modules after 1/2 + k / (2 heads + 2) of the layers before the model's own head.

    A probe forward pass finds the order of the modules. Those that run several times are left out.
    """
    events: list[tuple[str, int, Tensor]] = []
    calls: dict[str, int] = {}
    layers = 0

    def record(name: str, module: nn.Module, output: object) -> None:
        nonlocal layers
        calls[name] = calls.get(name, 0) + 1
        layers += isinstance(module, nn.Linear | nn.Conv2d)
        if name and isinstance(output, Tensor) and output.dim() in (2, 3, 4):
            events.append((name, layers, output.detach()))

    handles = [
        module.register_forward_hook(lambda m, _i, output, name=name: record(name, m, output))
        for name, module in trunk.named_modules()
    ]
    training = trunk.training
    try:
        trunk.eval()(torch.zeros(1, shape.channels, shape.height, shape.width))
    finally:
        trunk.train(training)
        for handle in handles:
            handle.remove()
    before_head = layers - 1
    usable = [event for event in events if 0 < event[1] <= before_head and calls[event[0]] == 1]
    if not usable:
        raise SettingError("plugins", "hierarchy", "a model with a layer before its last one")
    points = []
    for k in range(1, heads + 1):
        target = math.ceil(before_head * (0.5 + k / (2 * heads + 2)))
        reached = [event for event in usable if event[1] <= target] or usable[:1]
        name, _, output = reached[-1]
        points.append((name, _pool(output).shape[1]))
    return points


def masked_losses(logits: list[Tensor], labels: list[Tensor], conditional: bool = True) -> list[Tensor]:
    """V_k * CE_k of every head, float [n] each; V_k = 1 everywhere if not `conditional`."""
    losses = []
    valid = torch.ones(len(labels[0]), device=labels[0].device)
    for outputs, target in zip(logits, labels, strict=True):
        losses.append(valid * F.cross_entropy(outputs, target, reduction="none"))
        if conditional:
            valid = valid * (outputs.detach().argmax(1) == target)
    return losses


@plugin_registry.register("hierarchy")
@dataclass
class HierarchicalLabels(Plugin):
    """Trains coarse to fine heads on a label tree. `broadcast` holds the last round's counts on training images."""

    tree: str = option("", "built-in label tree: digits or cifar10; empty: the option labels")
    labels: list = option([], "label tree as nested lists of class numbers")  # type: ignore[type-arg]
    schedule: str = option("three-step", "one optimizer step per head, or one for all", choices=("three-step", "joint"))
    conditional: bool = option(True, "train a head only on images that the coarser heads classify correctly")
    images: int = option(200, "maximum number of a client's images that are measured", ge=1, le=1_000_000)

    _tree: LabelTree | None = field(default=None, init=False, repr=False)
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if bool(self.tree) == bool(self.labels) or (self.tree and self.tree not in TREES):
            expected = f"one of {', '.join(TREES)}, or a tree in hierarchy.labels (not both)"
            raise SettingError("hierarchy.tree", self.tree, expected)
        self._tree = LabelTree(self.labels or TREES[self.tree], "hierarchy.labels")

    @property
    def label_tree(self) -> LabelTree:
        assert self._tree is not None
        return self._tree

    def incompatibility(self, run: RunRequirements) -> str:
        if run.tasks > 1:
            return "a run without tasks: the tree covers all classes"
        return super().incompatibility(run)

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        tree = self.label_tree
        if tree.classes != context.shape.classes:
            raise SettingError("hierarchy.labels", f"{tree.classes} classes", f"{context.shape.classes}, as the data")
        if isinstance(model, BranchedModel):
            return model
        return BranchedModel(model, tree.widths[:-1], context.shape, derive_generator(context.seed, "hierarchy"))

    def train_step(self, batch: Batch, step: LocalStep) -> Tensor:
        """One step per head, with masks from the weights after the previous step; or one step on the sum."""
        if batch.targets.dim() != 1:
            raise SettingError("plugins", "hierarchy", "no plugin that mixes labels: a tree has no mixed labels")
        labels = list(self.label_tree.levels.to(batch.targets.device)[:, batch.targets])
        branched = next(module for module in step.model.modules() if isinstance(module, BranchedModel))

        def head_losses(outputs: Tensor) -> Tensor:
            losses = torch.stack(masked_losses([*branched.coarse, outputs], labels, self.conditional))
            return losses.mean(1) if batch.weights is None else losses @ batch.weights / batch.weights.sum()

        if self.schedule == "joint":
            return step(lambda outputs: head_losses(outputs).sum())

        def loss_of(head: int) -> Criterion:
            return lambda outputs: head_losses(outputs)[head]

        return torch.stack([step(loss_of(head)) for head in range(len(labels))]).sum()

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        depth = len(self.label_tree.levels)
        return {"right": SumSpec((depth,), float(self.images)), "count": SumSpec((1,), float(self.images))}

    def on_task_end(self, model: nn.Module, data: LabeledImages, final: bool) -> None:
        """Count the images whose predicted class has the right node at each depth of the tree."""
        n = min(self.images, len(data))
        model.eval()
        with torch.no_grad():
            predicted = model(to_float(data.images[:n])).argmax(1)
        model.train()
        levels = self.label_tree.levels
        right = (levels[:, predicted] == levels[:, data.labels[:n]]).sum(1)
        self._sums = {"right": right.double(), "count": torch.tensor([float(n)], dtype=torch.float64)}

    def export(self) -> Export:
        return Export(self._sums)

    def reduce(self, sums: Mapping[str, Tensor], examples: int, broadcast: PluginState) -> PluginState:
        return {"right": sums["right"], "count": sums["count"]}

    def panel(self) -> Panel | None:
        right, count = self.broadcast.get("right"), self.broadcast.get("count")
        if not (isinstance(right, Tensor) and isinstance(count, Tensor)):
            return None
        accuracy = right / count
        rows = tuple((f"accuracy at depth {k + 1}", float(value)) for k, value in enumerate(accuracy))
        distance = float(2 * (1 - accuracy).sum())
        return Panel(
            "Label hierarchy",
            "How much of the path to the true class the clients' models predict, on their own training images.",
            (TableFigure("Last round", ("measure", "value"), (*rows, ("graph distance", distance))),),
        )
