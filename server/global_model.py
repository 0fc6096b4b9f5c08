"""The global model of one client group, with everything that depends on the names and shapes of its parameters."""

import dataclasses

import torch
from torch import Tensor, nn

from server.checkpoint import Snapshot
from server.secure_ranges import SecureRanges
from tofu.compression import downlink_compressor, uplink_compressor
from tofu.compression.base import Compressor
from tofu.data import ImageShape
from tofu.errors import RunError
from tofu.models import run_model
from tofu.plugins import Plugins
from tofu.privacy import check_param_spec
from tofu.reference_model import ModelCall, ReferenceModel
from tofu.rounds import server_optimizers
from tofu.rounds.downlink import WeightSteps
from tofu.rounds.optimizers import automatic_step
from tofu.rounds.schedule import make_schedule
from tofu.secagg.encoding import flat
from tofu.settings import Settings
from tofu.settings.groups import ServerSettings
from tofu.tasks import round_context
from tofu.weights import Weights, added, copy_model, load_weights, weights_of


class ServerOptimizer:
    """Steps a model's trainable parameters by a torch optimizer, whose gradient is the negated mean update.

    The mean update is added to the buffers unchanged.
    """

    def __init__(self, model: nn.Module, server: ServerSettings) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._buffers = dict(model.named_buffers())
        fixed = server.replace(server_lr=server.server_lr or 1.0)
        self._optimizer = server_optimizers.get(server.server_optimizer)(self._parameters.values(), fixed)

    @torch.no_grad()
    def step(self, update: Weights, factor: float = 1.0) -> None:
        """Apply the mean update, by name, in place; that of parameters times `factor`."""
        for name, parameter in self._parameters.items():
            parameter.grad = -factor * update[name]
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, buffer in self._buffers.items():
            if name not in update:
                continue
            new = added(name, buffer, update[name])
            buffer.copy_(new if buffer.is_floating_point() else new.round())

    def save(self, snapshot: Snapshot) -> None:
        """Add momenta and moments to a checkpoint."""
        for number, state in self._optimizer.state_dict()["state"].items():
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            snapshot.put_tensors(f"optimizer/{number}", tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore what `save` wrote."""
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in snapshot.tensors_of("optimizer").items():
            number, _, name = path.partition("/")
            state.setdefault(int(number), {})[name] = value
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": state})


class Downlink(WeightSteps):
    """The weights that the clients hold: the server's, or an approximation that follows them in compressed steps.

    Every client builds the initial model from the run's settings, so the first round sends none. FedAvg rounds send
    full weights.

    Args:
        master: the server's own model.
    """

    def __init__(self, master: ReferenceModel, settings: Settings) -> None:
        super().__init__(master, downlink_compressor(settings, master), settings.run.seed)

    def save(self, snapshot: Snapshot) -> None:
        """Add the state to a checkpoint."""
        if self._compressor is None:
            return
        snapshot.put_tensors("downlink", weights_of(self.reference.model))
        snapshot.blobs["downlink/memory"] = self._memory
        for number, step in enumerate(self._steps):
            snapshot.blobs[f"downlink/step {number}"] = step
        snapshot.plain["downlink"] = {
            "identity": self.identity.hex(), "steps": len(self._steps), "held": self._held, "shared": self._shared
        }  # fmt: skip

    def restore(self, snapshot: Snapshot, *, clients_kept: bool) -> None:
        """Restore what `save` wrote.

        Args:
            clients_kept: the clients still have their weights; otherwise they receive full weights.
        """
        if self._compressor is None:
            return
        plain = snapshot.plain["downlink"]
        load_weights(self.reference.model, snapshot.tensors_of("downlink"))
        self.identity, self._memory = bytes.fromhex(plain["identity"]), snapshot.blobs["downlink/memory"]
        if clients_kept:
            self._steps = [snapshot.blobs[f"downlink/step {number}"] for number in range(plain["steps"])]
            self._held, self._shared = dict(plain["held"]), plain["shared"]


class GlobalModel:
    """A global model and the state of its rounds.

    Args:
        model: the model as built, at its initial weights; the rounds change it in place.
        shape: size of the images, and the number of classes of the data.
        group: the client group that trains it, counted from 0.
        call: how the codec calls the model; by default with inputs of `shape`.

    Attributes:
        reference: the model that the server steps, in eval mode.
        initial: its initial weights as one vector [values].
        averaged: exponential moving average of the weights, which is evaluated and saved; the model itself with
            ema-decay=0.
        compressors: compressed or fedavg round kind -> compressor of the clients' updates.
        downlink: the weights that the clients hold.
        secure: ranges of the secure sums; None in a run without secure rounds.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: ImageShape,
        settings: Settings,
        plugins: Plugins,
        group: int = 0,
        call: ImageShape | ModelCall | None = None,
    ) -> None:
        self.group, self.shape = group, shape
        self._settings, self._plugins = settings, plugins
        self._kinds = make_schedule(settings.rounds, settings.training.rounds).kinds
        reference = ReferenceModel.of(model, shape, plugins, round_context(settings, shape, 1, group=group), call)
        self._begin(reference, flat(weights_of(reference.model)))

    def _begin(self, reference: ReferenceModel, initial: Tensor, averaged: nn.Module | None = None) -> None:
        settings = self._settings
        if settings.privacy.noise_multiplier:
            check_param_spec(reference.param_spec)
        self.reference, self.initial = reference, initial
        self.optimizer = ServerOptimizer(reference.model, settings.server)
        self.compressors: dict[str, Compressor] = {
            kind: uplink_compressor(settings, kind, reference) for kind in self._kinds if kind != "secure"
        }
        for compressor in self.compressors.values():
            compressor.check(reference)
        self.downlink = Downlink(reference, settings)
        self.averaged = averaged or (copy_model(reference.model) if settings.server.ema_decay else reference.model)
        self.secure = SecureRanges(reference.param_spec, settings) if "secure" in self._kinds else None

    @property
    def classes(self) -> int:
        """Number of the model's outputs, which a plugin may have changed."""
        found = self.reference.input
        return found.classes if isinstance(found, ImageShape) else self.shape.classes

    def prepare(self, round_: int) -> bool:
        """Let the plugins set up the model of a round, and reset the state if that changes its architecture.

        After a change the weights continue as the plugins' `setup` converts them, the optimizer's state starts anew,
        and all clients receive full weights and drop the residuals of the old architecture.

        Returns:
            Whether the architecture changed.
        """
        if not self._plugins:
            return False
        settings, shape, plugins = self._settings, self.shape, self._plugins
        # After the last round, the model keeps the setup of that round.
        context = round_context(settings, shape, min(round_, settings.training.rounds), group=self.group)
        built = run_model(settings, shape)
        fresh = ReferenceModel.of(built, shape, plugins, context)
        if fresh.architecture == self.reference.architecture:
            for model in (self.reference.model, self.downlink.reference.model, self.averaged):
                plugins.on_round_begin(model, context)
            return False
        averaged = None
        if self.averaged is not self.reference.model:
            averaged = ReferenceModel.of(self.averaged, shape, plugins, context).model
        reference = ReferenceModel.of(self.reference.model, shape, plugins, context)
        reference = dataclasses.replace(reference, model=reference.model.eval(), initial=fresh.initial)
        self._begin(reference, flat(weights_of(fresh.model)), averaged)
        return True

    def step(self, update: Weights, factor: float = 1.0) -> None:
        """Apply the mean update, times `factor`, by the server's optimizer, then the plugins' `on_step`."""
        before = self._plugins.before_step(self.reference.model)
        self.optimizer.step(update, factor)
        self._plugins.on_step(self.reference.model, before)

    def automatic_step(self, round_: int, kind: str, diversity: float | None) -> float:
        """Return the factor of the mean update in a round with server-lr=auto; 1 where it does not apply.

        It applies to compressed rounds with plain averaging. Noise of differential privacy makes all updates diverse,
        and the published method has a step of 1.
        """
        settings = self._settings
        plain = settings.server.server_optimizer == "sgd" and settings.codec.codec_mode != "paper"
        if settings.server.server_lr or kind != "compressed" or not plain or settings.privacy.noise_multiplier:
            return 1.0
        return 1.0 if diversity is None else automatic_step(diversity, round_, settings.training.rounds)

    def average(self, round_: int) -> None:
        """Update the moving average; in early rounds it is the plain mean of the rounds so far."""
        if self._settings.server.ema_decay:
            decay = min(self._settings.server.ema_decay, 1 - 1 / round_)
            old, new = weights_of(self.averaged), weights_of(self.reference.model)
            load_weights(self.averaged, {name: decay * old[name] + (1 - decay) * new[name] for name in new})

    def save(self, snapshot: Snapshot) -> None:
        """Add the state to a checkpoint."""
        snapshot.plain["architecture"] = self.reference.architecture.hex()
        snapshot.put_tensors("model", weights_of(self.reference.model))
        snapshot.put_tensors("averaged", weights_of(self.averaged))
        self.optimizer.save(snapshot)
        self.downlink.save(snapshot)
        if self.secure is not None:
            self.secure.save(snapshot)

    def restore(self, snapshot: Snapshot, *, round_: int, clients_kept: bool) -> None:
        """Restore what `save` wrote after a round; the plugins have their broadcast already.

        Args:
            clients_kept: the clients still have their state. If not, they receive full weights.

        Raises:
            RunError: the plugins no longer make the architecture that the checkpoint was written with.
        """
        self.prepare(round_ + 1)
        saved, built = snapshot.plain["architecture"], self.reference.architecture.hex()
        if saved != built:
            raise RunError(f"the checkpoint of round {round_} has architecture {saved}, the plugins made {built}")
        load_weights(self.reference.model, snapshot.tensors_of("model"))
        load_weights(self.averaged, snapshot.tensors_of("averaged"))
        self.optimizer.restore(snapshot)
        self.downlink.restore(snapshot, clients_kept=clients_kept)
        if self.secure is not None:
            self.secure.restore(snapshot)
