"""Plugins: techniques that bend a client's local training, with the half that runs on the server beside it.

One class is both halves. A client makes the plugins anew in each round, gives them their state and the server's
broadcast, and the local loop calls their hooks; the server makes the same plugins and calls `setup` and `reduce`:

    client  load -> setup -> [on_batch, on_loss, on_step] x steps, on_epoch_end x epochs, on_task_end -> export -> save
    server  setup -> (a round) -> sum of the clients' exported sums -> reduce -> broadcast in the next requests

All hooks are optional. client/plugins/README.md writes one in 40 lines.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from tofu.data import ImageShape, LabeledImages
from tofu.errors import PayloadError, RunError, SettingError
from tofu.imports import import_object
from tofu.plugins.options import option, options_of, read_options, split_options
from tofu.plugins.state import PluginState, state_from_bytes, state_to_bytes
from tofu.rounds.panel import Panel

__all__ = [
    "NO_PLUGINS",
    "Export",
    "Panel",
    "Plugin",
    "PluginState",
    "Plugins",
    "Prediction",
    "RoundContext",
    "RunRequirements",
    "SumSpec",
    "Weights",
    "make_plugins",
    "option",
    "plugin_names",
    "state_from_bytes",
    "state_to_bytes",
]  # fmt: skip

Weights = Mapping[str, Tensor]

_BUILT_IN: Mapping[str, str] = {
    "gpm": "client.plugins.gpm:GradientProjectionMemory",
    "ood": "client.plugins.ood:OutOfDistribution",
    "rank": "client.plugins.utilized_rank:UtilizedRank",
}


@dataclass(frozen=True)
class RoundContext:
    """Where in a run a plugin is. The same on clients and server, `client` aside.

    Attributes:
        shape: of the images, with the number of classes of the data.
        round, rounds: this round, counted from 1, and how many there are.
        task, tasks: this round's task, counted from 0, and how many there are (1: no task stream).
        final: whether this round is the last of its task.
        client: the client's name; empty on the server.
        group: the client group, counted from 0, in a clustered federation (`Plugin.groups`).
        seed: of the run. Derive generators from it (`tofu.rng`) with the round, the client and the plugin's name.
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
    """What is known of a run when it is configured, for `Plugin.incompatibility`.

    Attributes:
        clients: how many train.
        tasks: how many tasks follow each other (1: no task stream).
        exact_updates: every update travels as float32 (schedule=full), so that what a client leaves unchanged, or a
            subspace that it keeps out of, arrives so.
        secure: sums are added under secure aggregation, which needs finite bounds (`SumSpec.bound`).
    """

    clients: int = 1
    tasks: int = 1
    exact_updates: bool = True
    secure: bool = False


@dataclass(frozen=True)
class SumSpec:
    """A sum that a plugin exports: its shape, and the largest magnitude of an entry in one client's part.

    The bound may depend on options, broadcast and model only, never on data: all clients and the server derive the
    same fixed-point range from it. Infinite where there is none: such a sum cannot be added under secure aggregation.
    """

    shape: tuple[int, ...]
    bound: float = float("inf")


@dataclass(frozen=True)
class Export:
    """What a client's plugin hands to the server beside the update.

    Attributes:
        sums: name -> float64, exactly the names and shapes that `declare_sums` gives in this round. The server adds
            those of all clients, and sees only the total where sums are added under secure aggregation.
        metrics: name -> number, averaged over clients by their numbers of examples.
    """

    sums: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """Logits [n, classes] of the data's classes; a score [n] (higher: less like the training data) and which images are
    so much unlike it that the logits mean nothing, bool [n]; both None where the model cannot tell."""

    logits: Tensor
    score: Tensor | None = None
    unknown: Tensor | None = None


@dataclass
class Plugin:
    """Base of all plugins. Subclass it as a dataclass whose options are fields made by `option`.

    Attributes:
        name: as the user writes it in front of options, `name.option=value`. The class name in lower case if not given.
        changes_head: `setup` gives the model another number of outputs. One plugin at most.
        encodes_input: the model is fed something other than images in [-1, 1]. One plugin at most.
        averages_exactly: the average of clients' weights keeps what the plugin is for. If not, `why_inexact` says why.
        why_inexact: one sentence, shown to who configures it where it does not hold.
        needs_task_boundaries: it works at the ends of tasks, so a run without tasks is refused.
        order: `on_step` runs by falling order, then in reverse list order. 0: anything; PROJECTION (-1): projections,
            last; MASK (-2): masks, after those.
        local_only: names of state that must not be exported.
        state: private to one client, kept by it between rounds, never sent.
        broadcast: what `reduce` made, the same on all clients. Empty until then.
    """

    PROJECTION: ClassVar[int] = -1
    MASK: ClassVar[int] = -2

    name: ClassVar[str] = ""
    changes_head: ClassVar[bool] = False
    encodes_input: ClassVar[bool] = False
    why_inexact: ClassVar[str] = ""
    needs_task_boundaries: ClassVar[bool] = False
    order: ClassVar[int] = 0
    local_only: ClassVar[frozenset[str]] = frozenset()

    state: PluginState = field(default_factory=dict, init=False, repr=False)
    broadcast: PluginState = field(default_factory=dict, init=False, repr=False)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()

    @property
    def averages_exactly(self) -> bool:
        return True

    @property
    def groups(self) -> int:
        """Number of client groups, each with a global model of its own. At most one plugin may have more than 1."""
        return 1

    def group_of(self, client: str) -> int:
        """The group, 0 to groups - 1, of the client with this name; a function of the options alone."""
        return 0

    def incompatibility(self, run: RunRequirements) -> str:
        """Why the plugin cannot be used in such a run, as "expected ..." text; empty where it can."""
        if self.needs_task_boundaries and run.tasks < 2:
            return f"a run of at least 2 tasks: {self.name} works at the boundaries between tasks"
        if run.clients > 1 and not self.averages_exactly:
            return f"a run of 1 client: {self.why_inexact}"
        return ""

    # Both halves

    def setup(self, model: nn.Module, about: RoundContext) -> nn.Module:
        """Replace, wrap or only look at the model; called once a round, before any other hook and before the round's
        weights are loaded, on clients and on the server. `broadcast` and `state` are already there.

        What comes out, names and shapes of parameters and which of them are trainable, must be a function of options,
        broadcast and `about` without its client, so that every client and the server have the same.
        """
        return model

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        """The sums that every client's `export` has in this round, by name; called after `setup`, on both ends.

        A plugin that exports only at the ends of tasks declares none in rounds that are not `about.final`."""
        return {}

    # Client: with a GPU the model is there in `on_loss` and `on_step`, with outputs and targets; else on the CPU

    def on_batch(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Another batch in place of this one.

        Args:
            images: float32 [n, channels, height, width] in [-1, 1].
            labels: int64 [n], or probabilities float32 [n, outputs] where an earlier plugin made them.
            generator: all randomness comes from it.

        Returns:
            Images [m, ...] and targets, int64 [m] or float32 [m, outputs], as `F.cross_entropy` takes them.
        """
        return images, labels

    def on_loss(self, outputs: Tensor, targets: Tensor, loss: Tensor, model: nn.Module) -> Tensor:
        """The loss to differentiate; `loss` is cross-entropy, or what the plugin before made of it."""
        return loss

    def on_step(self, model: nn.Module, before: Weights) -> None:
        """Change the weights after an optimizer's step, in place and without a gradient.

        Args:
            before: trainable parameter's name -> its value before the step. Do not keep or write into it.
        """

    def on_epoch_end(self, model: nn.Module, data: LabeledImages) -> None:
        """After each local epoch; the model is in training mode and must be left so."""

    def on_task_end(self, model: nn.Module, data: LabeledImages, final: bool) -> None:
        """At the end of a round's local training; `final` in the last round of a task."""

    def predict(self, model: nn.Module, images: Tensor) -> Prediction:
        """Logits of the data's classes for float32 images [n, channels, height, width], the model being in eval mode.
        Both may be on a GPU. One plugin at most may have its own."""
        return Prediction(model(images))

    def predict_groups(self, models: Sequence[nn.Module], images: Tensor) -> Prediction:
        """Classify with the models of all groups, in eval mode. The default averages their probabilities."""
        logits = [self.predict(model, images).logits for model in models]
        return Prediction(torch.stack([each.softmax(1) for each in logits]).mean(0).log())

    def export(self) -> Export:
        """What the server gets; called once, after `on_task_end`."""
        return Export()

    # Server

    def reduce(self, sums: Weights, examples: int, broadcast: PluginState) -> PluginState:
        """The state to send to all clients from the next round on.

        Args:
            sums: the totals over clients of what they exported, float64; not called when nobody exported any.
            examples: the images of those clients.
            broadcast: what was sent until now; not to be written into.
        """
        return broadcast

    def on_aggregate(self, model: nn.Module, context: RoundContext) -> None:
        """Inspect or change the new global model in place, after the server's optimizer step and after `reduce`.

        Called once per group (`context.group`). It may assign `self.broadcast`. Gradients are disabled.
        """

    def calibrate(self, model: nn.Module, data: LabeledImages) -> PluginState:
        """The broadcast to save with the weights that a run would end with, no client having measured at these yet.

        Args:
            model: with these weights, in eval mode.
            data: the server's own held-out images.
        """
        return self.broadcast

    def panel(self) -> Panel | None:
        """What this plugin adds to the report (`tofu.rounds.panel` has an example), after each round; None: nothing."""
        return None


class Plugins(tuple[Plugin, ...]):
    """Plugins in the order in which the user listed them, with the same hooks. Build it with `make_plugins`."""

    __slots__ = ()

    def named(self) -> dict[str, Plugin]:
        """Name -> plugin."""
        return {plugin.name: plugin for plugin in self}

    def check(self, run: RunRequirements) -> None:
        """Raises SettingError where a plugin refuses such a run."""
        for plugin in self:
            if reason := plugin.incompatibility(run):
                raise SettingError("plugins", plugin.name, reason)

    def setup(self, model: nn.Module, about: RoundContext) -> nn.Module:
        """The one that changes the head goes first, whatever the order: others measure or factorize what it made."""
        for plugin in sorted(self, key=lambda plugin: not plugin.changes_head):
            model = plugin.setup(model, about)
        return model

    def declare_sums(self, model: nn.Module) -> dict[str, SumSpec]:
        """`plugin/name` -> what is exported under it in this round."""
        return {f"{p.name}/{name}": spec for p in self for name, spec in p.declare_sums(model).items()}

    def on_batch(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        for plugin in self:
            images, labels = plugin.on_batch(images, labels, generator)
        return images, labels

    def on_loss(self, outputs: Tensor, targets: Tensor, loss: Tensor, model: nn.Module) -> Tensor:
        for plugin in self:
            loss = plugin.on_loss(outputs, targets, loss, model)
        return loss

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Copies of the trainable parameters for `on_step`, or None where no plugin has that hook."""
        if not any(_overrides(plugin, "on_step") for plugin in self):
            return None
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def on_step(self, model: nn.Module, before: Weights | None) -> None:
        """Call it after any step: the optimizer's, and the server's own after it averaged (which a compressed update,
        momentum or error feedback would otherwise take out of a projection's subspace)."""
        if before is None:
            return
        falling = list(self[::-1])
        falling.sort(key=lambda plugin: -plugin.order)
        for plugin in falling:
            plugin.on_step(model, before)

    def on_epoch_end(self, model: nn.Module, data: LabeledImages) -> None:
        for plugin in self:
            plugin.on_epoch_end(model, data)

    def on_task_end(self, model: nn.Module, data: LabeledImages, final: bool) -> None:
        for plugin in self:
            plugin.on_task_end(model, data, final)

    def predict(self, model: nn.Module, images: Tensor) -> Prediction:
        """By the plugin that has its own way of predicting, or the model's outputs. Eval mode is the caller's."""
        for plugin in self:
            if _overrides(plugin, "predict"):
                return plugin.predict(model, images)
        return Prediction(model(images))

    @property
    def groups(self) -> int:
        """Number of client groups."""
        return max((plugin.groups for plugin in self), default=1)

    def group_of(self, client: str) -> int:
        """The group of a client, by the plugin that has more than one.

        Raises:
            RunError: the plugin returns a number that is not a group.
        """
        for plugin in self:
            if plugin.groups > 1:
                group = plugin.group_of(client)
                if not 0 <= group < plugin.groups:
                    raise RunError(f"plugin {plugin.name}: group of client {client} is {group}, "
                                   f"expected 0 to {plugin.groups - 1}")  # fmt: skip
                return group
        return 0

    def predict_groups(self, models: Sequence[nn.Module], images: Tensor) -> Prediction:
        """By the plugin that has groups. Eval mode is the caller's."""
        for plugin in self:
            if plugin.groups > 1:
                return plugin.predict_groups(models, images)
        return self.predict(models[0], images)

    @torch.no_grad()
    def on_aggregate(self, model: nn.Module, context: RoundContext) -> None:
        for plugin in self:
            plugin.on_aggregate(model, context)

    def export(self, model: nn.Module) -> Export:
        """All exports, under `plugin/name`.

        Raises:
            RunError: a sum that was not declared, missing, of another shape or type, not finite or beyond its bound;
                a metric that is not finite; a name that is local only.
        """
        sums: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        for plugin in self:
            export = plugin.export()
            private = plugin.local_only & (export.sums.keys() | export.metrics.keys())
            if private:
                raise RunError(f"plugin {plugin.name} exports {min(private)}, which is for its client alone")
            sums |= {f"{plugin.name}/{name}": value for name, value in export.sums.items()}
            metrics |= {f"{plugin.name}/{name}": float(value) for name, value in export.metrics.items()}
        for name, value in metrics.items():
            if not abs(value) < float("inf"):
                raise RunError(f"metric {name} is {value}, expected a finite number")
        self.check_sums(sums, model)
        return Export(sums, metrics)

    def check_sums(self, sums: Weights, model: nn.Module, *, clients: int = 1) -> None:
        """Check a client's sums, or totals over so many clients, against `declare_sums`, on both ends.

        Raises:
            RunError: as in `export`.
        """
        declared = self.declare_sums(model)
        if sums.keys() != declared.keys():
            odd = sorted(sums.keys() ^ declared.keys())[0]
            raise RunError(f"sum {odd} is {'not declared' if odd in sums else 'missing'}")
        for name, value in sums.items():
            shape, bound = declared[name].shape, declared[name].bound * clients
            if tuple(value.shape) != shape or value.dtype != torch.float64:
                raise RunError(f"sum {name} is {value.dtype} {list(value.shape)}, expected float64 {list(shape)}")
            largest = float(value.abs().max()) if value.numel() else 0.0
            if not (largest <= bound and largest < float("inf")):
                raise RunError(f"sum {name} reaches {largest:g}, expected finite values of at most {bound:g}")

    def reduce(self, sums: Weights, examples: int) -> None:
        """Give every plugin its totals (under `plugin/name`); its `broadcast` is then the new one."""
        for plugin in self:
            own = _of_plugin(plugin.name, sums)
            if own:
                plugin.broadcast = dict(plugin.reduce(own, examples, plugin.broadcast))

    def panels(self) -> dict[str, Panel]:
        """Plugin name -> its panel for the report."""
        return {plugin.name: panel for plugin in self if (panel := plugin.panel()) is not None}

    def state_bytes(self, *, max_bytes: int) -> bytes:
        """All plugins' private states, for the client to keep.

        Raises:
            PayloadError: too large, or a value that cannot be kept.
        """
        return state_to_bytes(_joined({p.name: p.state for p in self}), max_bytes=max_bytes)

    def broadcast_bytes(self, *, max_bytes: int) -> bytes:
        """All plugins' broadcasts, for the server to send. Raises PayloadError as `state_bytes` does."""
        return state_to_bytes(_joined({p.name: p.broadcast for p in self}), max_bytes=max_bytes)

    @torch.no_grad()
    def calibrated_bytes(self, model: nn.Module, data: LabeledImages, *, max_bytes: int) -> bytes:
        """All plugins' broadcasts, for `predict` with this model; its mode is restored. Raises as `state_bytes`."""
        was_training = model.training
        model.eval()
        states = {plugin.name: plugin.calibrate(model, data) for plugin in self}
        model.train(was_training)
        return state_to_bytes(_joined(states), max_bytes=max_bytes)

    def load(self, *, state: bytes = b"", broadcast: bytes = b"", max_bytes: int) -> None:
        """Give the plugins what `state_bytes` and `broadcast_bytes` made; empty bytes are no state.

        Raises:
            PayloadError: bytes that are not such a state, or one of a plugin that is not here.
        """
        for attribute, data in (("state", state), ("broadcast", broadcast)):
            joined = state_from_bytes(data, max_bytes=max_bytes) if data else {}
            for plugin in self:
                prefix = f"{plugin.name}/"
                own = {n.removeprefix(prefix): joined.pop(n) for n in list(joined) if n.startswith(prefix)}
                setattr(plugin, attribute, own)
            if joined:
                raise PayloadError(
                    f"plugin state holds {min(joined)[:40]!r}, expected plugins {', '.join(self.named())}"
                )


NO_PLUGINS = Plugins()

MAX_STATE_BYTES = 2**30
"""Of all plugins' private states on a client, and of their broadcasts."""

_MAX_METRICS_BYTES = 2**16


def export_to_bytes(export: Export) -> bytes:
    """What a client sends of its plugins in a round whose sums the server may see."""
    sums = {f"sum/{name}": value for name, value in export.sums.items()}
    return state_to_bytes(
        sums | {f"metric/{name}": value for name, value in export.metrics.items()}, max_bytes=MAX_STATE_BYTES
    )


def export_from_bytes(data: bytes, declared: Mapping[str, SumSpec]) -> Export:
    """Raises PayloadError for bytes that are no export, or hold more than the declared sums and some metrics."""
    room = sum(8 * math.prod(spec.shape) + 4 * len(spec.shape) + len(name) + 64 for name, spec in declared.items())
    state = state_from_bytes(data, max_bytes=room + _MAX_METRICS_BYTES)
    sums: dict[str, Tensor] = {}
    metrics: dict[str, float] = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        if kind == "sum" and isinstance(value, Tensor):
            sums[name] = value
        elif kind == "metric" and isinstance(value, float):
            metrics[name] = value
        else:
            raise PayloadError(f"export holds {key[:40]!r}, expected sums and metrics")
    return Export(sums, metrics)


def plugin_names() -> tuple[str, ...]:
    """The built-in names that `make_plugins` accepts beside `package.module:Class`."""
    return tuple(_BUILT_IN)


def make_plugins(names: str, options: str = "") -> Plugins:
    """Build plugins, for example `make_plugins("gpm,my.module:Mix", "gpm.threshold=0.97 mix.share=0.5")`.

    Args:
        names: built-in names or `package.module:Class`, separated by commas; imported only here.
        options: `plugin.option=value`, separated by spaces.

    Raises:
        SettingError: an unknown plugin, one that cannot be imported or occurs twice, two that do not go together, or
            an option that is unknown, of the wrong type, out of range or of a plugin that is not listed.
    """
    classes: dict[str, type[Plugin]] = {}
    for given in filter(None, (part.strip() for part in names.split(","))):
        kind = _import(given)
        if kind.name in classes:
            raise SettingError("plugins", names, f"each plugin once, {kind.name} occurs twice")
        classes[kind.name] = kind
    texts: dict[str, dict[str, str]] = {name: {} for name in classes}
    for part in split_options(options):
        key, equals, text = part.partition("=")
        name, dot, own = key.partition(".")
        if not equals or not dot:
            raise SettingError("plugin-options", part, "plugin.option=value, separated by spaces")
        if name not in texts:
            raise SettingError(key, text, f"an option of a plugin in plugins ({', '.join(texts) or 'there is none'})")
        if own in texts[name]:
            raise SettingError(key, text, "each option once")
        texts[name][own] = text
    plugins = Plugins(kind(**read_options(kind, texts[name], prefix=name)) for name, kind in classes.items())
    _check_together(plugins, names)
    return plugins


def _import(given: str) -> type[Plugin]:
    path = _BUILT_IN.get(given, given)
    if ":" not in path:
        raise SettingError("plugins", given, f"one of {', '.join(_BUILT_IN)}, or package.module:Class")
    try:
        kind = import_object(path)
    except Exception as error:
        # The user's own code may raise anything; its text is what helps.
        text = f"package.module:Class that can be imported ({type(error).__name__}: {error})"
        raise SettingError("plugins", given, text) from error
    if not (inspect.isclass(kind) and issubclass(kind, Plugin)):
        raise SettingError("plugins", given, "a subclass of tofu.plugins.Plugin")
    options_of(kind)
    return kind


def _check_together(plugins: Plugins, names: str) -> None:
    for what, those in (
        ("changes the model's head", [p for p in plugins if p.changes_head]),
        ("encodes the input", [p for p in plugins if p.encodes_input]),
        ("has client groups", [p for p in plugins if p.groups > 1]),
        ("has its own predict", [p for p in plugins if _overrides(p, "predict")]),
    ):
        if len(those) > 1:
            raise SettingError("plugins", names, f"one plugin at most that {what} ({', '.join(p.name for p in those)})")


def _overrides(plugin: Plugin, hook: str) -> bool:
    return getattr(type(plugin), hook) is not getattr(Plugin, hook)


def _joined(states: Mapping[str, PluginState]) -> PluginState:
    return {f"{plugin}/{name}": value for plugin, state in states.items() for name, value in state.items()}


def _of_plugin(plugin: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{plugin}/"
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
