"""`Plugins` calls the hooks of several plugins in a defined order, and checks their exports."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from tofu.data import LabeledImages
from tofu.errors import PayloadError, RunError, SettingError, in_hook
from tofu.hooks import for_each
from tofu.plugins.base import (
    Batch,
    Export,
    LocalStep,
    Plugin,
    Prediction,
    RoundContext,
    RunRequirements,
    Weights,
)  # fmt: skip
from tofu.plugins.state import PluginState, state_from_bytes, state_to_bytes
from tofu.rounds.panel import Panel
from tofu.weights import SumSpec, eval_mode, under

_MAX_SUM = 1e300
"""Bound of a client's plugin sums that declare none, so that totals over many clients stay finite."""


def _inside(plugin: Plugin, hook: str) -> AbstractContextManager[None]:
    return in_hook(plugin.name, hook)


def _call(plugin: Plugin, hook: str, kind: Any, *arguments: Any) -> Any:
    """Return the result of a plugin's hook. Raises RunError if it has another type."""
    with in_hook(plugin.name, hook):
        found = getattr(plugin, hook)(*arguments)
    if not isinstance(found, kind):
        accepted = getattr(kind, "__name__", kind)
        raise RunError(f"plugin {plugin.name}: {hook} returned {type(found).__name__}, expected {accepted}")
    return found


class Plugins(tuple[Plugin, ...]):
    """Plugins in the order in which the user listed them, with the same hooks. Build it with `make_plugins`."""

    __slots__ = ()

    on_round_begin = for_each(Plugin.on_round_begin, _inside)
    on_train_begin = for_each(Plugin.on_train_begin, _inside)
    on_epoch_end = for_each(Plugin.on_epoch_end, _inside)
    on_task_end = for_each(Plugin.on_task_end, _inside)
    on_aggregate = torch.no_grad()(for_each(Plugin.on_aggregate, _inside))

    def named(self) -> dict[str, Plugin]:
        """Return a mapping: name -> plugin."""
        return {plugin.name: plugin for plugin in self}

    def check(self, run: RunRequirements) -> None:
        """Raises SettingError where a plugin refuses such a run."""
        for plugin in self:
            if reason := plugin.incompatibility(run):
                raise SettingError("plugins", plugin.name, reason)

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        """Set up all plugins, the one that changes the head first, because others measure or factorize its result."""
        for plugin in sorted(self, key=lambda plugin: not plugin.changes_head):
            model = _call(plugin, "setup", nn.Module, model, context)
        self.on_round_begin(model, context)
        return model

    def declare_sums(self, model: nn.Module) -> dict[str, SumSpec]:
        """`plugin/name` -> shape and bound of the sum that is exported in this round."""
        return {
            f"{p.name}/{name}": spec for p in self for name, spec in _call(p, "declare_sums", Mapping, model).items()
        }

    def on_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        for plugin in self:
            batch = _call(plugin, "on_batch", Batch, batch, generator)
        return batch

    def train_step(self, batch: Batch, step: LocalStep) -> Tensor:
        """Train on one batch by the plugin that overrides `train_step`, or by one plain step."""
        for plugin in self:
            if overrides(plugin, "train_step"):
                loss: Tensor = _call(plugin, "train_step", Tensor, batch, step)
                return loss
        return step()

    def on_loss(self, outputs: Tensor, batch: Batch, loss: Tensor, model: nn.Module) -> Tensor:
        for plugin in self:
            loss = _call(plugin, "on_loss", Tensor, outputs, batch, loss, model)
        return loss

    @property
    def restricts_steps(self) -> bool:
        """Whether a plugin changes local steps (`on_step`)."""
        return any(overrides(plugin, "on_step") for plugin in self)

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Copies of the trainable parameters for `on_step`, or None where no plugin has that hook."""
        if not self.restricts_steps:
            return None
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def on_step(self, model: nn.Module, before: Weights | None, momenta: Mapping[str, Tensor] | None = None) -> None:
        """Call the hook after a client's optimizer step and after the server's step.

        The server calls it because compression, momentum and error feedback can move the global step out of the
        subspace to which each client's step was projected.

        Args:
            before: what `before_step` returned.
            momenta: name -> momentum buffer of the client's optimizer.
        """
        if before is None:
            return
        plugins = list(reversed(self))
        plugins.sort(key=lambda plugin: -plugin.order)  # a stable sort
        for plugin in plugins:
            with _inside(plugin, "on_step"):
                plugin.on_step(model, before, momenta or {})

    def predict(self, model: nn.Module, images: Tensor) -> Prediction:
        """Predict by the plugin that overrides `predict`, or by the model. The caller sets eval mode."""
        for plugin in self:
            if overrides(plugin, "predict"):
                prediction: Prediction = _call(plugin, "predict", Prediction, model, images)
                return prediction
        return Prediction(model(images))

    @property
    def groups(self) -> int:
        """Number of client groups."""
        return max((plugin.groups for plugin in self), default=1)

    def group_of(self, client: str) -> int:
        """Return the group of a client, by the plugin that has more than one.

        Raises:
            RunError: the plugin returns a number that is not a group.
        """
        for plugin in self:
            if plugin.groups > 1:
                group: int = _call(plugin, "group_of", int, client)
                if not 0 <= group < plugin.groups:
                    raise RunError(f"plugin {plugin.name}: group of client {client} is {group}, "
                                   f"expected 0 to {plugin.groups - 1}")  # fmt: skip
                return group
        return 0

    def predict_groups(self, models: Sequence[nn.Module], images: Tensor) -> Prediction:
        """Predict by the plugin that has groups. The caller sets eval mode."""
        for plugin in self:
            if plugin.groups > 1:
                prediction: Prediction = _call(plugin, "predict_groups", Prediction, models, images)
                return prediction
        return self.predict(models[0], images)

    def export(self, model: nn.Module) -> Export:
        """Return all exports, under `plugin/name`.

        Raises:
            RunError: a sum that was not declared, missing, of another shape or type, not finite or beyond its bound;
                a metric that is not finite; a name that is local only.
        """
        sums: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        for plugin in self:
            export = _call(plugin, "export", Export)
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
            bound = min(bound, _MAX_SUM * clients)
            if not largest <= bound:
                raise RunError(f"sum {name} reaches {largest:g}, expected finite values of at most {bound:g}")

    def reduce(self, sums: Weights, examples: int) -> None:
        """Pass the totals (`plugin/name`) to the plugins, and update their broadcasts."""
        for plugin in self:
            own = under(sums, plugin.name)
            if own:
                plugin.broadcast = dict(_call(plugin, "reduce", Mapping, own, examples, plugin.broadcast))

    def panels(self) -> dict[str, Panel]:
        """Return a mapping: plugin name -> its panel for the report."""
        return {plugin.name: panel for plugin in self if (panel := _call(plugin, "panel", Panel | None))}

    def state_bytes(self, *, max_bytes: int) -> bytes:
        """Return the private states of all plugins, which the client stores; b"" without plugins.

        Raises:
            PayloadError: the states are too large, or have a value of another type.
        """
        states = {p.name: p.state for p in self}
        return state_to_bytes(_joined(states), max_bytes=max_bytes) if self else b""

    def broadcast_bytes(self, *, max_bytes: int) -> bytes:
        """Return the broadcasts of all plugins, which the server sends. Raises PayloadError as `state_bytes` does."""
        return state_to_bytes(_joined({p.name: p.broadcast for p in self}), max_bytes=max_bytes)

    @torch.no_grad()
    def calibrated_bytes(self, model: nn.Module, data: LabeledImages, *, max_bytes: int) -> bytes:
        """Return the broadcasts of all plugins for `predict` with this model; restores its mode.

        Raises as `state_bytes`.
        """
        with eval_mode(model):
            states = {plugin.name: _call(plugin, "calibrate", Mapping, model, data) for plugin in self}
        return state_to_bytes(_joined(states), max_bytes=max_bytes)

    def load(self, *, state: bytes = b"", broadcast: bytes = b"", max_bytes: int) -> None:
        """Load the results of `state_bytes` and `broadcast_bytes`; empty bytes are an empty state.

        Raises:
            PayloadError: the bytes are malformed, or have the state of a plugin that is not here.
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


def overrides(plugin: Plugin, hook: str) -> bool:
    """Return whether a plugin's class has its own version of a hook."""
    return getattr(type(plugin), hook) is not getattr(Plugin, hook)


def _joined(states: Mapping[str, PluginState]) -> PluginState:
    return {f"{plugin}/{name}": value for plugin, state in states.items() for name, value in state.items()}
