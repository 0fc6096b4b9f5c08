"""Hierarchical labels: heads at increasing depth predict increasingly fine classes of a label tree.

Mukherjee, Garg, Roy, "Encoding Hierarchical Information in Neural Networks helps in Subpopulation Shift", IEEE TAI
2023, arXiv 2112.10844. With V_k(i) = 1 if all heads before k classify image i correctly, and 0 otherwise, the loss of
head k is L_k = mean_i V_k(i) CE_k(i), over all images of the batch. Only the last head predicts.

Ours: proxies describe an update by gradients of a loss on the model's outputs, which the coarser heads do not affect.
The outputs therefore carry a gradient for the weights of these heads, and only for them: as if a head's logit of a node
were added to the logits of all classes under it. The losses above do not use it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.plugins.label_tree import TREES, LabelTree
from client.plugins.round_start import subsample_rows
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
from tofu.weights import eval_mode, seeing_outputs


class BranchedModel(nn.Module):
    """A model with linear heads on intermediate features.

    `forward` returns the model's own outputs [n, classes]. After a forward pass in training mode, `logits` has those of
    all heads, coarsest first; the last are the outputs without the gradient for the other heads.
    """

    def __init__(self, trunk: nn.Module, tree: LabelTree, shape: ImageShape, generator: torch.Generator) -> None:
        super().__init__()
        widths = tree.widths[:-1]
        points = _attachment_points(trunk, shape, len(widths))
        self.trunk = trunk
        self.points = tuple(name for name, _, _ in points)
        self.steps = {name: steps for name, steps, _ in points}
        self.heads = nn.ModuleList(
            nn.Linear(features, width) for (_, _, features), width in zip(points, widths, strict=True)
        )
        for parameter, head in ((p, h) for h in self.heads for p in h.parameters()):
            bound = 1 / math.sqrt(head.in_features)  # type: ignore[arg-type]
            with torch.no_grad():
                parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
        self.register_buffer("above", tree.levels[:-1], persistent=False)
        self.logits: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        features: dict[str, list[Tensor]] = {name: [] for name in self.points}

        def keep(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
            features[name].append(_pool(output, self.steps[name]))  # a spiking network splits large batches

        with seeing_outputs({name: self.trunk.get_submodule(name) for name in features}, keep):
            outputs: Tensor = self.trunk(images)
        pooled = [torch.cat(features[name]) for name in self.points]
        logits = [*(head(each) for head, each in zip(self.heads, pooled, strict=True)), outputs]
        self.logits = logits if self.training else []
        if not torch.is_grad_enabled():
            return outputs
        for head, each, nodes in zip(self.heads, pooled, self.above, strict=True):  # type: ignore[arg-type]
            of_class = _WeightGradient.apply(each, head.weight, head.bias)[:, nodes]  # type: ignore[no-untyped-call]
            outputs = outputs + (of_class - of_class.detach())
        return outputs


class _WeightGradient(torch.autograd.Function):
    """A linear layer that has a gradient for its weights and none for its input; second derivatives are complete."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return F.linear(features, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        (features,), (gradient,) = ctx.saved_tensors, gradients
        return None, gradient.T @ features, gradient.sum(0)


def _pool(features: Tensor, steps: int) -> Tensor:
    """Average [n, channels, h, w] or [n, tokens, dim] over space or tokens: [n, features]; [n, dim] is left as it is.

    Those of a spiking network, [steps * n, ...] with the steps one after the other, are averaged over time as well.
    """
    if features.dim() > 2:
        features = features.mean((2, 3) if features.dim() == 4 else 1)
    return features if steps == 1 else features.reshape(steps, -1, features.shape[1]).mean(0)


def _attachment_points(trunk: nn.Module, shape: ImageShape, heads: int) -> list[tuple[str, int, int]]:
    """Return names, time steps and feature counts of the modules where heads are attached.

    They come after 1/2 + k / (2 heads + 2) of the layers before the model's own head. A probe forward pass finds
    the order of the modules. Those that run several times are left out.
    """
    events: list[tuple[str, int, Tensor]] = []
    calls: dict[str, int] = {}
    layers = 0

    def record(name: str, module: nn.Module, inputs: object, output: object) -> None:
        nonlocal layers
        calls[name] = calls.get(name, 0) + 1
        layers += isinstance(module, nn.Linear | nn.Conv2d)
        if name and isinstance(output, Tensor) and output.dim() in (2, 3, 4):
            events.append((name, layers, output.detach()))

    with eval_mode(trunk), seeing_outputs(dict(trunk.named_modules()), record):
        trunk(torch.zeros(1, *shape.chw))
    before_head = layers - 1
    usable = [event for event in events if 0 < event[1] <= before_head and calls[event[0]] == 1]
    if not usable:
        raise SettingError("plugins", "hierarchy", "a model with a layer before its last one")
    points = []
    for k in range(1, heads + 1):
        target = math.ceil(before_head * (0.5 + k / (2 * heads + 2)))
        reached = [event for event in usable if event[1] <= target] or usable[:1]
        name, _, output = reached[-1]
        points.append((name, len(output), _pool(output, len(output)).shape[1]))
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
    """Trains coarse to fine heads on a label tree.

        plugins = make_plugins("hierarchy", "hierarchy.tree=digits")
        model = plugins.setup(build_model("cnn", data.shape), RoundContext(data.shape))
        train_locally(model, data, config, generator=generator, plugins=plugins)

    `broadcast` holds counts on the clients' training images at the end of the last round: "right" [depth], how many
    have the right node at each depth; "nodes" [3], the totals of `LabelTree.overlap`; and "count" [1].
    """

    changes_head = True
    class_targets = True
    excludes: ClassVar[Mapping[str, str]] = {
        "dct-snn": "thresholds belong to the layers of a network with one head",
        "spatio-temporal": "widths belong to the layers of a network with one head",
    }

    tree: str = option("", "built-in label tree: digits, cifar10 or cifar10-pairs; empty: the option labels")
    labels: list = option([], "label tree as nested lists of class numbers")  # type: ignore[type-arg]
    schedule: str = option("three-step", "one optimizer step per head, or one for all", choices=("three-step", "joint"))
    conditional: bool = option(True, "train a head only on images that the coarser heads classify correctly")
    images: int = option(1000, "maximum number of images, of a client or the server, that are measured", ge=1, le=10**6)

    _tree: LabelTree | None = field(default=None, init=False, repr=False)
    _sums: Mapping[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _held_out: Mapping[str, Tensor] = field(default_factory=dict, init=False, repr=False)

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
        return BranchedModel(model, tree, context.shape, derive_generator(context.seed, "hierarchy"))

    def train_step(self, batch: Batch, step: LocalStep) -> Tensor:
        """Take one step per head, with masks from the weights after the previous step; or one step on the sum."""
        if batch.targets.dim() != 1:  # another plugin mixes labels without declaring it
            raise SettingError("plugins", self.name, "no plugin that mixes labels: the tree has no mixed ones")
        labels = list(self.label_tree.levels.to(batch.targets.device)[:, batch.targets])
        branched = next(module for module in step.model.modules() if isinstance(module, BranchedModel))

        def head_losses(outputs: Tensor) -> Tensor:
            losses = torch.stack(masked_losses(branched.logits, labels, self.conditional))
            if batch.weights is None:
                return losses.mean(1)
            return losses @ batch.weights / batch.weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)

        if self.schedule == "joint":
            return step(lambda outputs: head_losses(outputs).sum())

        def loss_of(head: int) -> Criterion:
            return lambda outputs: head_losses(outputs)[head]

        return torch.stack([step(loss_of(head)) for head in range(len(labels))]).sum()

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        depth, deepest = len(self.label_tree.levels), int(self.label_tree.ancestors.sum(1).max())
        shapes = {"right": (depth, 1), "nodes": (3, deepest), "count": (1, 1)}
        return {name: SumSpec((size,), float(bound * self.images)) for name, (size, bound) in shapes.items()}

    def on_task_end(self, model: nn.Module, data: LabeledImages, final: bool) -> None:
        self._sums = self._measured(model, data)

    def export(self) -> Export:
        return Export(self._sums)

    def reduce(self, sums: Mapping[str, Tensor], examples: int, broadcast: PluginState) -> PluginState:
        return dict(sums)

    def calibrate(self, model: nn.Module, data: LabeledImages) -> PluginState:
        """Measure on the server's held-out images, for the panel; the broadcast stays as it is."""
        self._held_out = self._measured(model, data)
        return self.broadcast

    def panel(self) -> Panel | None:
        sources = (("training images", self.broadcast), ("held-out images", self._held_out))
        measured = {name: _measures(sums) for name, sums in sources if "count" in sums}
        if not measured:
            return None
        names = next(iter(measured.values()))
        rows: list[tuple[str | float, ...]] = [(name, *(each[name] for each in measured.values())) for name in names]
        return Panel(
            "Label hierarchy",
            "How much of the path to the true class is predicted: by the clients' models on their own training images, "
            "and by the global model on images that the server holds out.",
            (TableFigure("Last round", ("measure", *measured), tuple(rows)),),
        )

    @torch.no_grad()
    def _measured(self, model: nn.Module, data: LabeledImages) -> dict[str, Tensor]:
        """Counts on at most `images` of the images, as in `broadcast`; float64."""
        tree, rows = self.label_tree, subsample_rows(len(data), self.images)
        with eval_mode(model):
            predicted = torch.cat([model(to_float(data.images[part])).argmax(1) for part in torch.split(rows, 250)])
        labels = data.labels[rows]
        right = (tree.levels[:, predicted] == tree.levels[:, labels]).sum(1)
        nodes = torch.stack([each.sum() for each in tree.overlap(predicted, labels)])
        return {"right": right.double(), "nodes": nodes.double(), "count": torch.tensor([float(len(rows))]).double()}


def _measures(sums: PluginState | Mapping[str, Tensor]) -> dict[str, float]:
    """Return a mapping: name -> value of the measures in the panel."""
    right, nodes, count = (torch.as_tensor(sums[name]) for name in ("right", "nodes", "count"))
    accuracy, (common, predicted, true) = right / count, nodes.tolist()
    return {
        **{f"accuracy at depth {k + 1}": float(value) for k, value in enumerate(accuracy)},
        "graph distance": float(2 * (1 - accuracy).sum()),
        "hierarchical precision": common / predicted,
        "hierarchical recall": common / true,
        "hierarchical F": 2 * common / (predicted + true),
    }
