"""The workload of `tofu.run` with Python objects: torch datasets, a model factory, a loss, an optimizer, metrics."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from tofu.arguments import CALLS, check_call, check_calls, check_dataset, check_metrics, shown
from tofu.data import ImageShape
from tofu.device import CPU, on_device
from tofu.errors import SettingError, user_code
from tofu.evaluation import ClassCounts, Evaluation, Predict
from tofu.models import build_seeded
from tofu.models.checks import changed_buffers, check_memory, check_stateless, drop_constant_buffers, without_wrappers
from tofu.plugins import Plugins
from tofu.reference_model import NO_CALL, Forward, InputShape, ModelCall, call_of
from tofu.rng import GlobalGenerators, reseed_own
from tofu.samples import FirstSamples, described_value, model_outputs, split_batch
from tofu.training import (
    SGD,
    ProximalTerm,
    SeededDropout,
    TrainingContext,
    TrainingResult,
    check_loss,
    shuffled_batches,
)
from tofu.weights import copy_model, eval_mode

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) of a batch -> scalar loss, the mean over the batch."""
Metric = Callable[[Any, Any], float]
"""(outputs, targets) of all test samples -> number."""
OptimizerFactory = Callable[..., torch.optim.Optimizer]
"""(parameters, lr=) -> optimizer, such as `torch.optim.Adam`; called once per client and round."""
_EVALUATION_BATCH = 256


TrainFunction = Callable[[nn.Module, Any, TrainingContext], "float | None"]
"""Trains a model in place on a client's dataset and returns the mean loss, if it knows one."""


@dataclass(frozen=True)
class DatasetLoop:
    """Training and evaluation on torch datasets of (input, target) pairs, or of mappings with a key "labels".

    Attributes:
        loss, optimizer, metrics, train_function, collate: arguments of `tofu.run`, which describes them.
    """

    loss: Loss | None = None
    optimizer: OptimizerFactory | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    train_function: TrainFunction | None = None
    collate: Callable[[list[Any]], Any] = default_collate

    def __post_init__(self) -> None:
        check_calls({"loss": self.loss, "optimizer": self.optimizer, "train": self.train_function})
        check_call("collate", self.collate, CALLS["collate"])
        check_metrics(self.metrics)

    def train(self, model: nn.Module, data: Sized, context: TrainingContext, plugins: Plugins) -> TrainingResult:
        """Train by the user's function, or by epochs of the loss over shuffled batches.

        Raises:
            RunError: the loss is no longer finite.
        """
        began = time.perf_counter()
        model.train()
        seed, device = context.generator.initial_seed(), context.device
        reseed_own(model, seed)
        with on_device(model, device), GlobalGenerators(seed, device) as shared:
            if self.train_function is not None:
                mean, steps = float(self.train_function(model, data, context) or 0.0), 0
            else:
                mean, steps = self._epochs(model, data, context, shared)
        check_loss(mean, context.lr)
        return TrainingResult(mean, steps, time.perf_counter() - began)

    def _epochs(
        self, model: nn.Module, data: Sized, context: TrainingContext, shared: GlobalGenerators
    ) -> tuple[float, int]:
        """Return the mean loss and number of steps."""
        total, steps = torch.zeros((), device=context.device), 0
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        proximal = ProximalTerm(context.proximal if self.optimizer else 0.0)
        if self.optimizer is None:
            optimizer: Any = SGD(parameters, context)  # adds the proximal term itself
        else:
            optimizer = self.optimizer(list(parameters.values()), lr=context.lr)
        for _ in range(context.epochs):
            batches = [rows.tolist() for rows in shuffled_batches(len(data), context.batch_size, context.generator)]
            for inputs, targets in self._batches(data, batches, context.device):
                with SeededDropout(context.generator):
                    outputs = model_outputs(model, inputs)
                loss = self._loss_of(outputs, targets)
                model.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                proximal.add_gradient(parameters)
                optimizer.step()
                total += loss.detach()
                steps += 1
                shared.release_if_unused()  # then clients train in parallel, unless layers or datasets draw
        return float(total) / max(1, steps), steps

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, data: Sized, *, predict: Predict | None = None, device: torch.device = CPU
    ) -> Evaluation:
        """Return the mean loss, accuracy of classifiers with class numbers as targets, and the user's metrics."""
        if not len(data):
            return Evaluation(math.nan, math.nan)
        rows = [rows.tolist() for rows in torch.split(torch.arange(len(data)), _EVALUATION_BATCH)]
        loss, classified, counts, kept = 0.0, True, ClassCounts(), []
        with eval_mode(model), on_device(model, device), GlobalGenerators(0, device):
            for numbers, (inputs, targets) in zip(rows, self._batches(data, rows, device), strict=True):
                outputs = model_outputs(model, inputs)
                loss += float(self._loss_of(outputs, targets)) * len(numbers)
                classified = classified and _classifies(outputs, targets)
                if classified:
                    counts.add(outputs.argmax(1), targets)
                if self.metrics:
                    kept.append(_to((outputs, targets), CPU))
        metrics = {}
        if self.metrics:
            outputs, targets = (_joined(list(parts)) for parts in zip(*kept, strict=True))
            for name, metric in self.metrics.items():
                with user_code(f"metrics[{name!r}]", shown(metric), CALLS["metric"].accepted):
                    metrics[name] = float(metric(outputs, targets))
        if not classified:
            counts = ClassCounts()
        accuracy = metrics.pop("accuracy", counts.right.total() / len(data) if classified else math.nan)
        return Evaluation(accuracy, loss / len(data), metrics, counts)

    def _loss_of(self, outputs: Any, targets: Any) -> Tensor:
        if self.loss is not None:
            return self.loss(outputs, targets)
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            found = f"as the targets, a batch {described_value(targets)}, are not class numbers (int64)"
            raise SettingError("loss", None, f"a function of (outputs, targets), {found}")
        return F.cross_entropy(outputs, targets)

    def _batches(self, data: Any, rows: list[list[int]], device: torch.device) -> Iterator[tuple[Any, Any]]:
        # The loader always draws a number, which must not come from the generator that clients share.
        loader = DataLoader(data, batch_sampler=rows, collate_fn=self.collate, generator=torch.Generator())
        for batch in loader:
            yield _to(split_batch(batch), device)


@dataclass(frozen=True, kw_only=True)
class UserWorkload(DatasetLoop):
    """The workload of `tofu.run` with Python objects; its arguments are described there.

    Attributes:
        input_shape, forward: how proxies are passed to the model (`tofu.encode`); by default found by calling it.
        model: builds the model; called once for the server and once for each client and round.
        clients: one dataset of (input, target) pairs, or of mappings with a key "labels", per client.

    Raises:
        SettingError: a dataset has no samples, or model or loss do not accept them.
    """

    model: Callable[[], nn.Module]
    clients: Sequence[Any]
    test_data: Any = ()
    input_shape: InputShape | None = None
    forward: Forward | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_calls({"forward": self.forward})
        if self.forward is not None and self.input_shape is None:
            raise SettingError("input_shape", None, "the shape of one proxy, with which `forward` is called")
        for number, data in enumerate(self.clients):
            check_dataset(f"clients[{number}]", data)
        check_dataset("test", self.test_data, empty=True)

    @cached_property
    def _probe(self) -> tuple[Any, Any]:
        """Inputs and outputs of the first samples of client 0. The first sample of every other dataset is checked."""
        check, first = FirstSamples(self.collate, self.loss, self._loss_of), self.clients[0]
        inputs, targets = check.batch("clients[0]", first, range(min(2, len(first))))
        model = build_seeded(self.model, self.seed).eval()
        outputs = check.outputs("clients[0]", model, inputs)
        if self.train_function is None:
            check.check_loss("clients[0]", first, outputs, targets)
        self._check_optimizer(model)
        others = {f"clients[{number}]": data for number, data in enumerate(self.clients)} | {"test": self.test_data}
        del others["clients[0]"]
        for name, data in others.items():
            if len(data) and (name == "test" or self.train_function is None):
                made, targets = check.batch(name, data)
                check.check_loss(name, data, check.outputs(name, model, made), targets)
            elif len(data):  # the training function may need samples of another form
                check.read(name, data)
        return inputs, outputs

    def _check_optimizer(self, model: nn.Module) -> None:
        """Raise SettingError unless `optimizer` makes an object with `step()` for this model's parameters."""
        if self.optimizer is None or self.train_function is not None:
            return
        accepted = CALLS["optimizer"].accepted
        with user_code("optimizer", shown(self.optimizer), accepted), GlobalGenerators(self.seed):
            made = self.optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1)
        try:
            check_call("step", getattr(made, "step", None), CALLS["step"])
        except SettingError as error:
            reason = f"{accepted}, with a method step() (it returns {type(made).__name__})"
            raise SettingError("optimizer", shown(self.optimizer), reason) from error

    @property
    def takes_images(self) -> bool:
        """Whether the model maps float images [n, channels, height, width] to logits [n, classes]."""
        inputs, outputs = self._probe
        image = isinstance(inputs, Tensor) and inputs.dim() == 4 and inputs.is_floating_point()
        return image and isinstance(outputs, Tensor) and outputs.dim() == 2

    @property
    def shape(self) -> ImageShape:
        """Input and output size of a model for images; ones for any other model, to which `call` applies."""
        inputs, outputs = self._probe
        if not self.takes_images:
            return ImageShape(1, 1, 1, 1)
        channels, height, width = inputs.shape[1:]
        return ImageShape(channels, height, width, outputs.shape[1])

    def build_model(self, shape: ImageShape | None = None) -> nn.Module:
        """Return the model, whose initial weights are a function of the seed; constant buffers are not sent."""
        model = build_seeded(self.model, self.seed)
        inputs, _ = self._probe
        accepted = "a model that accepts the inputs in training mode, too"
        try:
            with user_code("model", type(model).__name__, accepted), GlobalGenerators(self.seed):
                drop_constant_buffers(model, changed_buffers(model, lambda: model_outputs(model, inputs)))
                check_memory(model)
                check_stateless(model, lambda: model_outputs(model, inputs))
        except SettingError as error:
            if error.__cause__ is None or self.train_function is None:  # its function may call the model otherwise
                raise
        return model.train()

    def outputs(self, model: nn.Module, shape: ImageShape | None = None, count: int = 2) -> object:
        """See `Workload.outputs`; () if the user's training function calls the model."""
        if self.train_function is not None:
            return ()
        first = self.clients[0]
        inputs, _ = split_batch(self.collate([first[row % len(first)] for row in range(count)]))
        return model_outputs(model, inputs)

    def call(self, model: nn.Module, shape: ImageShape) -> ImageShape | ModelCall:
        """Return how proxies are passed to the model: as images, or as floating-point inputs of any other shapes.

        Raises:
            SettingError: the model does not accept the given input shape.
        """
        found = self._probe[0]
        names = tuple(found) if isinstance(found, Mapping) and self.forward is None else ()
        if self.input_shape is not None:
            return call_of(model, self.input_shape, forward=self.forward, names=names)
        if self.takes_images:
            return shape
        values = found.values() if isinstance(found, Mapping) else found
        inputs = [found] if isinstance(found, Tensor) else list(values) if isinstance(values, Iterable) else [values]
        if not all(isinstance(each, Tensor) and each.is_floating_point() and each.dim() > 1 for each in inputs):
            why = f"not all inputs of the model, a batch {described_value(found)}, are floating-point tensors with axes"
            return replace(NO_CALL, impossible=f"{why} that proxies could take the place of")
        try:
            return call_of(model, tuple(tuple(each.shape[1:]) for each in inputs), names=names)
        except SettingError as error:
            return replace(NO_CALL, impossible=f"the model does not accept proxies ({error})")

    def client(self, partition: int) -> Sized:
        data: Sized = self.clients[partition]
        return data

    def test(self) -> Sized:
        data: Sized = self.test_data
        return data


def factory_of(model: nn.Module | Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a function that builds the model, or copies it if it is a module."""
    if isinstance(model, nn.Module):
        bare = without_wrappers(model)
        return lambda: copy_model(bare)

    def build() -> nn.Module:
        with user_code("model", shown(model), CALLS["model"].accepted):
            made = model()
        return without_wrappers(made)

    return build


def _classifies(outputs: Any, targets: Any) -> bool:
    tensors = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    return tensors and outputs.dim() == 2 and targets.dim() == 1 and not targets.is_floating_point()


def _to(value: Any, device: torch.device) -> Any:
    """Return a nested value with all tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _to(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_to(item, device) for item in value)
    return value


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Mapping):
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(_joined(list(column)) for column in zip(*parts, strict=True))
    return torch.cat(parts)
