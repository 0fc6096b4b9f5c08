"""The plugin interface: one class is both the client half and the server half of a technique.

In every round a client builds the plugins, loads their state and the server's broadcast, and the local loop calls their
hooks. The server builds the same plugins and calls `setup`, `reduce` and `on_aggregate`:

    client  load -> setup -> on_round_begin -> on_train_begin -> [on_batch, train_step (on_loss, on_step)] x batches,
            on_epoch_end x epochs, on_task_end -> export -> save
    server  setup -> on_round_begin -> (a round) -> on_step -> reduce(sum of the clients' exports) -> on_aggregate
            -> broadcast -> panel

All hooks are optional. client/plugins/README.md implements a complete plugin in 40 lines.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from tofu.data import ImageShape, LabeledImages
from tofu.plugins.state import PluginState
from tofu.rounds.panel import Panel
from tofu.weights import SumSpec

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class RoundContext:
    """The position in a run. Apart from `client`, all clients and the server have the same.

    Attributes:
        shape: shape of the images, and the number of classes of the data.
        round, rounds: this round, counted from 1, and the number of rounds.
        task, tasks: this round's task, counted from 0, and the number of tasks (1 without a task stream).
        final: whether this round is the last one of its task.
        client: the client's name; empty on the server.
        seed: the run's seed. Derive generators from it (`tofu.rng`) with the round, the client and the plugin's name.
        group: the client group, counted from 0, in a clustered federation (`Plugin.groups`).
    """

    shape: ImageShape
    round: int = 1
    rounds: int = 1
    task: int = 0
    tasks: int = 1
    final: bool = True
    client: str = ""
    seed: int = 0
    group: int = 0


@dataclass(frozen=True)
class RunRequirements:
    """Properties of a run's configuration, by which `Plugin.incompatibility` decides.

    Attributes:
        clients: number of clients.
        tasks: number of consecutive tasks (1 without a task stream).
        exact_updates: every update is sent as float32 (schedule=fedavg). Only then does the server receive exactly the
            entries that a client left unchanged, or an update that stays within a subspace.
        secure: there are secure rounds, in which sums need finite bounds (`SumSpec.bound`).
        model: the setting `model`.
    """

    clients: int = 1
    tasks: int = 1
    exact_updates: bool = True
    secure: bool = False
    model: str = ""


@dataclass(frozen=True)
class Export:
    """The data that a client's plugin sends to the server in addition to the update.

    Attributes:
        sums: name -> float64 tensor; exactly the names and shapes that `declare_sums` gives in this round. The server
            adds those of all clients, and sees only the totals in secure rounds.
        metrics: name -> number; averaged over clients, weighted by their number of examples.
    """

    sums: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """Output of `Plugin.predict`.

    Attributes:
        logits: [n, classes], for the classes of the data.
        score: [n], higher for images less like the training data; None where the plugin has no such score.
        unknown: bool [n], whether the image is too unlike the training data for its logits to be meaningful, or None.
    """

    logits: Tensor
    score: Tensor | None = None
    unknown: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """A batch of local training.

    Attributes:
        images: float32 [n, channels, height, width] in [-1, 1].
        targets: int64 [n], or probabilities float32 [n, outputs], as `F.cross_entropy` accepts them.
        ids: int64 [n]; the row of each image in the `data` that the other hooks receive (with tasks=classes, that of
            the task), the same in all rounds. -1 for an image that a plugin added.
        weights: float32 [n], non-negative weights of the samples in the loss; None for the unweighted mean.
    """

    images: Tensor
    targets: Tensor
    ids: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Batch":
        weights = self.weights.to(device) if self.weights is not None else None
        return Batch(self.images.to(device), self.targets.to(device), self.ids.to(device), weights)

    def replace(self, **changes: Tensor | None) -> "Batch":
        """Return a copy with other values for the named fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


Criterion = Callable[[Tensor], Tensor]
"""Outputs of the model -> scalar loss."""


class LocalStep(Protocol):
    """One complete optimizer step on the current batch: forward pass, loss, `on_loss`, backward pass, optimizer,
    `on_step`. It may be called several times for one batch; each call runs a new forward pass."""

    @property
    def model(self) -> nn.Module: ...

    def __call__(self, criterion: Criterion | None = None, batch: Batch | None = None) -> Tensor:
        """Take the step and return the detached scalar loss.

        Args:
            criterion: replaces cross-entropy; the plugins' `on_loss` still applies to its result.
            batch: replaces the current batch.
        """


@dataclass
class Plugin:
    """Base class of all plugins. A subclass is a dataclass whose options are fields made by `option`.

    Attributes:
        name: prefix of the options, `name.option=value`. Defaults to the class name in lower case.
        changes_head: `setup` changes the number of outputs or attaches heads; it is called before that of the others,
            which measure, mask or factorize its result. At most one plugin may do so.
        mixes_labels: `on_batch` gives probabilities as targets, of several classes for one image.
        class_targets: the plugin needs one class per image, so it cannot be combined with one that mixes labels.
        encodes_input: the model receives something other than images in [-1, 1]. At most one plugin may do so.
        why_inexact: one sentence that is shown to the user where `averages_exactly` is False.
        needs_task_boundaries: the plugin acts at the ends of tasks, so a run without tasks is refused.
        order: `on_step` runs in descending order, and in reverse list order among equals. 0: anything;
            PROJECTION (-1): projections, after those; MASK (-2): masks, last.
        local_only: names that must never be exported.
        excludes: name of a plugin that cannot be combined with this one -> the reason, shown to the user.
        state: private state of one client, saved by the client between rounds and never sent.
        broadcast: the result of `reduce`, the same on all clients; empty at first.
    """

    PROJECTION: ClassVar[int] = -1
    MASK: ClassVar[int] = -2

    name: ClassVar[str] = ""
    changes_head: ClassVar[bool] = False
    mixes_labels: ClassVar[bool] = False
    class_targets: ClassVar[bool] = False
    encodes_input: ClassVar[bool] = False
    why_inexact: ClassVar[str] = ""
    needs_task_boundaries: ClassVar[bool] = False
    order: ClassVar[int] = 0
    local_only: ClassVar[frozenset[str]] = frozenset()
    excludes: ClassVar[Mapping[str, str]] = MappingProxyType({})

    state: PluginState = field(default_factory=dict, init=False, repr=False)
    broadcast: PluginState = field(default_factory=dict, init=False, repr=False)
    _context: RoundContext | None = field(default=None, init=False, repr=False)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()

    @property
    def averages_exactly(self) -> bool:
        """Whether the plugin's guarantee survives the averaging of weights over several clients."""
        return True

    @property
    def groups(self) -> int:
        """Number of client groups, each with its own global model. At most one plugin may have more than 1."""
        return 1

    def group_of(self, client: str) -> int:
        """Return the group, 0 to groups - 1, of the client with this name; a function of the options alone."""
        return 0

    def incompatibility(self, run: RunRequirements) -> str:
        """Return the reason why the plugin cannot be used in such a run, as "expected ..." text; empty if it can."""
        if self.needs_task_boundaries and run.tasks < 2:
            return f"a run of at least 2 tasks: {self.name} works at the boundaries between tasks"
        if run.clients > 1 and not self.averages_exactly:
            return f"a run of 1 client: {self.why_inexact}"
        return ""

    @property
    def context(self) -> RoundContext:
        """The context of the last call of `Plugin.setup`."""
        assert self._context is not None, f"plugin {self.name}: setup comes first, and calls super().setup"
        return self._context

    # Clients and server

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        """Replace, wrap or inspect the model. Called once per round, on clients and server, before any other hook and
        before the round's weights are loaded; `broadcast` and `state` are available.

        The names, shapes and `requires_grad` of the resulting parameters must be a function of the options, the
        broadcast and `context` without its client, so that they are the same everywhere. They may change from round to
        round: the server then calls `setup` on its trained model, which must convert the weights or replace them, and
        clients receive full weights. Entries and channels that all clients must neither train nor send are removed this
        way (`tofu.plugins.keep_entries`, `tofu.plugins.keep_channels`).

        Buffers that are not sent (`persistent=False`) are constants of the architecture: other values are a change,
        even if all names and shapes stay the same. After a change clients drop the residuals of error feedback and the
        compressor's memory, because both belong to the old architecture.
        """
        self._context = context
        return model

    def on_round_begin(self, model: nn.Module, context: RoundContext) -> None:
        """Set, in place, what depends on the round but is not a weight, such as a network's number of time steps.

        Called after `setup` on clients, and on the server at each round boundary on every copy of its model, also where
        the architecture stays the same. Like `setup` it must do the same everywhere; weights are not touched.
        """

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        """Return a mapping: name -> shape and bound of the sums that every client exports in this round;
        called after `setup`.

        A plugin that exports only at the ends of tasks declares none in rounds that are not `context.final`. Sums add
        over the clients of all groups; a plugin that needs them per group declares a leading dimension of `groups`.
        """
        return {}

    # Client. `on_loss`, `train_step` and `on_step` see tensors on the training device, the other hooks on the CPU.

    def on_train_begin(self, model: nn.Module, data: LabeledImages) -> None:
        """Called before local training, with the model at the round's global weights and in training mode.

        All clients have the same weights here, so sums over their images can be added.
        """

    def on_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return the batch to train on; one without images is skipped.

        Args:
            generator: source of all randomness.
        """
        return batch

    def train_step(self, batch: Batch, step: LocalStep) -> Tensor:
        """Train on one batch and return the detached scalar loss. At most one plugin may override it.

        An override may call `step` several times, with its own loss, or update `step.model` directly.
        """
        return step()

    def on_loss(self, outputs: Tensor, batch: Batch, loss: Tensor, model: nn.Module) -> Tensor:
        """Return the scalar loss to differentiate; `loss` is the criterion's, or the previous plugin's result."""
        return loss

    def on_step(self, model: nn.Module, before: Weights, momenta: Mapping[str, Tensor]) -> None:
        """Change the weights in place after an optimizer step; gradients are disabled.

        The server calls it, too, after its own step.

        Args:
            before: name -> value of each trainable parameter before the step. Read only; do not keep it.
            momenta: name -> momentum buffer, which may be changed in place; empty without momentum.
        """

    def on_epoch_end(self, model: nn.Module, data: LabeledImages) -> None:
        """Called after each local epoch. The model is in training mode and must be left in it."""

    def on_task_end(self, model: nn.Module, data: LabeledImages, final: bool) -> None:
        """Called at the end of a round's local training; `final` in the last round of a task."""

    def predict(self, model: nn.Module, images: Tensor) -> Prediction:
        """Classify float32 images [n, channels, height, width]; the model is in eval mode, and both may be on a GPU.

        At most one plugin may override it.
        """
        return Prediction(model(images))

    def predict_groups(self, models: Sequence[nn.Module], images: Tensor) -> Prediction:
        """Classify with the models of all groups, in eval mode. The default averages their probabilities."""
        logits = [self.predict(model, images).logits for model in models]
        return Prediction(torch.stack([each.softmax(1) for each in logits]).mean(0).log())

    def export(self) -> Export:
        """Return the data to send to the server; called once, after `on_task_end`."""
        return Export()

    # Server

    def reduce(self, sums: Weights, examples: int, broadcast: PluginState) -> PluginState:
        """Return the state to send to all clients from the next round on. Not called if nothing was exported.

        Args:
            sums: totals over clients of their exported sums, float64.
            examples: number of images of those clients.
            broadcast: the current state; read only.
        """
        return broadcast

    def on_aggregate(self, model: nn.Module, context: RoundContext) -> None:
        """Inspect or change the new global model in place, after the server's optimizer step and after `reduce`.

        Called once per group (`context.group`). It may assign `self.broadcast`. Gradients are disabled.
        """

    def calibrate(self, model: nn.Module, data: LabeledImages) -> PluginState:
        """Return the broadcast to save with a run's final weights, at which no client has made measurements.

        Args:
            model: the final model, in eval mode.
            data: the server's own held-out images.
        """
        return self.broadcast

    def panel(self) -> Panel | None:
        """Return the plugin's section of the run's report, drawn from `broadcast`; None for no section."""
        return None
