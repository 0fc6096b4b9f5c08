"""Local training: epochs of SGD over a client's own images."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd
from torch.overrides import TorchFunctionMode

from tofu.data import LabeledImages, to_float
from tofu.data.preprocessing import augment
from tofu.device import CPU, on_device
from tofu.errors import RunError
from tofu.plugins import NO_PLUGINS, Batch, Plugins
from tofu.plugins.base import Criterion
from tofu.rng import GlobalGenerators, reseed_own
from tofu.settings.groups import TrainingSettings
from tofu.wire import MAX_METRIC


@dataclass(frozen=True)
class LocalTrainingConfig:
    """Epochs, batch size, SGD's learning rate, momentum and weight decay, and the coefficient of the proximal term."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0

    @staticmethod
    def of(training: TrainingSettings, round_: int) -> "LocalTrainingConfig":
        """Return the training of a run's round, counted from 1."""
        lr, momentum, decay = training.lr_of(round_), training.momentum, training.weight_decay
        return LocalTrainingConfig(training.local_epochs, training.batch_size, lr, momentum, decay, training.proximal)


@dataclass(frozen=True, kw_only=True)
class TrainingContext(LocalTrainingConfig):
    """All that training depends on besides the model, the client's data and plugins.

    It has the attributes of `LocalTrainingConfig`, too: `lr` is that of the round.

    Attributes:
        client: name of the client: "0", "1", ...
        round: number of the round, counted from 1.
        final: whether it is the last round of its task.
        generator: source of this client's randomness in this round, a function of the run's seed.
        device: device of the model.
    """

    client: str
    round: int
    final: bool
    generator: torch.Generator
    device: torch.device


@dataclass(frozen=True)
class TrainingResult:
    """Mean loss over the local steps, number of steps, and their duration in seconds."""

    loss: float
    steps: int
    seconds: float


def train_locally(
    model: nn.Module,
    data: LabeledImages,
    config: LocalTrainingConfig,
    *,
    generator: torch.Generator,
    plugins: Plugins = NO_PLUGINS,
    final: bool = False,
    device: torch.device = CPU,
    augmentations: Sequence[str] = (),
) -> TrainingResult:
    """Train `model` in place.

    Args:
        model: on the CPU, before and after.
        generator: source of all randomness: the order of the images, dropout masks, and the plugins' batches. What
            layers draw from the process's global generators depends on its seed.
        plugins: set up with this model (`Plugins.setup`).
        final: whether this is the last round of a task; passed to `on_task_end`.
        device: device of the training steps.
        augmentations: names of `tofu.data.preprocessing.AUGMENTATIONS`, applied to each batch.

    Raises:
        RunError: the loss is no longer finite.
    """
    began = time.perf_counter()
    model.train()
    reseed_own(model, generator.initial_seed())
    plugins.on_train_begin(model, data)
    optimizer = SGD(dict(model.named_parameters()), config)
    total, steps = torch.zeros((), device=device), 0
    with GlobalGenerators(generator.initial_seed(), device) as shared:
        for _ in range(config.epochs):
            with on_device(model, device):
                for rows in shuffled_batches(len(data), config.batch_size, generator):
                    images = augment(data.images[rows], augmentations, generator)
                    batch = plugins.on_batch(Batch(to_float(images), data.labels[rows], rows), generator)
                    if not len(batch):
                        continue
                    batch = batch.to(device)
                    total += plugins.train_step(batch, BatchStep(model, batch, optimizer, plugins, generator))
                    steps += 1
                    shared.release_if_unused()  # then clients train in parallel, unless the model draws
            plugins.on_epoch_end(model, data)
    mean = float(total) / max(1, steps)
    check_loss(mean, config.lr)
    plugins.on_task_end(model, data, final)
    return TrainingResult(mean, steps, time.perf_counter() - began)


def check_loss(loss: float, lr: float) -> None:
    """Raise RunError if a mean loss is not finite, or more than a reply can carry."""
    if not abs(loss) <= MAX_METRIC:
        raise RunError(f"local training diverged (loss {loss:.4g}): a smaller lr than {lr:g} may help")


@dataclass(frozen=True)
class BatchStep:
    """One optimizer step on a batch (`tofu.plugins.LocalStep`)."""

    model: nn.Module
    batch: Batch
    optimizer: "SGD"
    plugins: Plugins
    generator: torch.Generator

    def __call__(self, criterion: Criterion | None = None, batch: Batch | None = None) -> Tensor:
        """Take the step and return the detached scalar loss; see `LocalStep.__call__`."""
        model, batch = self.model, batch or self.batch
        with SeededDropout(self.generator):
            outputs = model(batch.images)
        loss = criterion(outputs) if criterion else cross_entropy(outputs, batch)
        loss = self.plugins.on_loss(outputs, batch, loss, model)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        before = self.plugins.before_step(model)
        self.optimizer.step()
        self.plugins.on_step(model, before, self.optimizer.momenta if before is not None else None)
        return loss.detach()


def cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a batch, weighted by `batch.weights` if there are any (0 if all of
    them are 0).
    """
    if batch.weights is None:
        return F.cross_entropy(outputs, batch.targets)
    losses = F.cross_entropy(outputs, batch.targets, reduction="none")
    return (losses * batch.weights).sum() / batch.weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)


class SGD:
    """torch's SGD on named parameters.

    `torch.optim.SGD` takes the same steps, but imports torch's compiler, which takes a second; a client app may be a
    new process for every message.

    Args:
        parameters: name -> parameter; those that need no gradient are left out.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: LocalTrainingConfig) -> None:
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._config = config
        self._proximal = ProximalTerm(config.proximal)
        self._momenta: dict[str, Tensor | None] = {}

    @property
    def momenta(self) -> dict[str, Tensor]:
        """Name -> momentum buffer; empty without momentum."""
        return {name: buffer for name, buffer in self._momenta.items() if buffer is not None}

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self._proximal.add_gradient(self._parameters)
        names = [name for name, p in self._parameters.items() if p.grad is not None]
        moving: list[Tensor] = [self._parameters[name] for name in names]
        gradients = [p.grad for p in moving if p.grad is not None]
        momenta = [self._momenta.get(name) for name in names]
        sgd(
            moving, gradients, momenta, lr=self._config.lr, momentum=self._config.momentum,
            weight_decay=self._config.weight_decay, dampening=0.0, nesterov=False, maximize=False, foreach=False,
        )  # fmt: skip
        self._momenta |= zip(names, momenta, strict=True)


class ProximalTerm:
    """The term coefficient/2 * |w - w0|^2 of FedProx (Li et al., "Federated Optimization in Heterogeneous Networks",
    MLSys 2020, equation 2), with w0 the weights before the first step."""

    def __init__(self, coefficient: float) -> None:
        self._coefficient = coefficient
        self._start: dict[str, Tensor] = {}

    @torch.no_grad()
    def add_gradient(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the term's gradient to those of the parameters that have one."""
        if not self._coefficient:
            return
        if not self._start:
            self._start = {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            if p.grad is not None:
                p.grad.add_(p - self._start[name], alpha=self._coefficient)


def shuffled_batches(count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Return the rows 0..count-1 in a random order, in batches of `size` (int64);
    a last batch of one row is dropped.
    """
    batches = list(torch.split(torch.randperm(count, generator=generator), size))
    # BatchNorm refuses a batch of one image.
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


class SeededDropout(TorchFunctionMode):
    """Draws dropout's masks from a given generator.

    torch draws them from one generator of the process, so the masks of clients that train in threads would depend on
    their order.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.dropout:
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        keep = (torch.rand(input.shape, generator=self._generator) >= p).to(input.device)
        if inplace:
            return input.mul_(keep).div_(1 - p) if p < 1 else input.mul_(0)
        return input * keep / (1 - p) if p < 1 else torch.zeros_like(input)
