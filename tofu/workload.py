"""Workloads: the data, model, local training and evaluation of a federation, which server and clients share.

`NamedWorkload` is that of a run whose settings name a dataset of images, `RowWorkload` that of a dataset of tables or
texts; `tofu.user_workload` has the one that is made of a user's own Python objects, for `tofu.run`.
"""

from collections.abc import Mapping, Sized
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from tofu.data import FederatedData, FederatedRows, ImageShape, LabeledImages, LabeledRows, normalization_of
from tofu.data.preprocessing import split_augmentations
from tofu.errors import DataError
from tofu.evaluation import Evaluation, Predict, evaluate
from tofu.models import build_row_model, run_model
from tofu.models.initial_weights import fill
from tofu.plugins import Plugins
from tofu.reference_model import NO_CALL, ModelCall
from tofu.settings import Settings
from tofu.training import TrainingContext, TrainingResult, train_locally
from tofu.user_workload import DatasetLoop


class Workload(Protocol):
    """The interface of workloads. Server and clients build the same workload from the same arguments."""

    @property
    def shape(self) -> ImageShape:
        """Input and output size of the model, as train requests carry it."""

    def build_model(self, shape: ImageShape) -> nn.Module:
        """Return the model at its initial weights, in training mode on the CPU; the same in every process."""

    def outputs(self, model: nn.Module, shape: ImageShape, count: int = 2) -> object:
        """Return the outputs of a model for examples of this shape, the same in every call;
        () if they are not known.
        """

    def call(self, model: nn.Module, shape: ImageShape) -> ImageShape | ModelCall:
        """Return the call of the model with proxies; `tofu.reference_model.NO_CALL` if proxies are impossible."""

    def client(self, partition: int) -> Sized:
        """Return the training data of one simulated client."""

    def test(self) -> Sized:
        """Return the server's test data; empty if there is none."""

    def train(self, model: nn.Module, data: Sized, context: TrainingContext, plugins: Plugins) -> TrainingResult:
        """Train `model` in place, as `tofu.training.train_locally` does."""

    def evaluate(
        self, model: nn.Module, data: Sized, *, predict: Predict | None = None, device: torch.device
    ) -> Evaluation:
        """Accuracy, loss and metrics; NaN if they cannot be measured."""


class NamedWorkload:
    """The workload of a run that names its dataset and its model in the settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @property
    def data(self) -> FederatedData:
        """The run's dataset. Raises DataError or SettingError if it cannot be opened."""
        return FederatedData.of(self._settings.data, self._settings.run.seed)

    @property
    def shape(self) -> ImageShape:
        return self.data.shape

    @property
    def preprocessing(self) -> dict[str, object]:
        """The content of model.json: sizes, gray bits; mean and standard deviation of pixels in [0, 1] by channel."""
        data = self._settings.data
        mean, std = normalization_of(data, self.shape.channels, self._settings.run.seed)
        return {
            "resize": data.resize, "center_crop": data.center_crop, "gray_bits": self.data.gray_bits,
            "mean": list(mean), "std": list(std),
        }  # fmt: skip

    def build_model(self, shape: ImageShape) -> nn.Module:
        """See `Workload.build_model`. Raises SettingError if the model cannot be built."""
        return run_model(self._settings, shape)

    def outputs(self, model: nn.Module, shape: ImageShape, count: int = 2) -> object:
        return model(torch.randn(count, shape.channels, shape.height, shape.width, generator=torch.Generator()))

    def call(self, model: nn.Module, shape: ImageShape) -> ImageShape:
        return shape

    def client(self, partition: int) -> LabeledImages:
        return self.data.client(partition)

    def test(self) -> LabeledImages:
        return self.data.test()

    def train(self, model: nn.Module, data: Sized, context: TrainingContext, plugins: Plugins) -> TrainingResult:
        return train_locally(
            model, labeled_images(data), context, generator=context.generator, plugins=plugins, final=context.final,
            device=context.device, augmentations=split_augmentations(self._settings.data.augmentation),
        )  # fmt: skip

    def evaluate(
        self, model: nn.Module, data: Sized, *, predict: Predict | None = None, device: torch.device
    ) -> Evaluation:
        return evaluate(model, labeled_images(data), predict=predict, device=device)


def labeled_images(data: Sized) -> LabeledImages:
    """Return the data, for code that needs images. Raises DataError if it is something else."""
    if not isinstance(data, LabeledImages):
        raise DataError(f"{type(data).__name__} is not usable here: expected labeled images")
    return data


class RowWorkload:
    """Classification of rows. In messages, a row has the shape of an image of one channel and one line."""

    def __init__(self, settings: Settings) -> None:
        self._settings, loop = settings, DatasetLoop()
        self.train, self.evaluate = loop.train, loop.evaluate

    @property
    def data(self) -> FederatedRows:
        """The run's dataset. Raises DataError or SettingError if it cannot be opened."""
        return FederatedRows.of(self._settings.data, self._settings.run.seed)

    @property
    def shape(self) -> ImageShape:
        return ImageShape(1, 1, self.data.width, len(self.data.class_names))

    def build_model(self, shape: ImageShape) -> nn.Module:
        """See `Workload.build_model`. Raises SettingError if the model cannot be built."""
        settings = self._settings
        vocabulary = settings.data.vocabulary if settings.data.kind == "text" else 0
        model = build_row_model(
            settings.model.model, shape.width, shape.classes, vocabulary=vocabulary, seed=settings.run.seed
        )
        if settings.model.initial_weights:
            fill(model, settings.model.initial_weights)
        return model

    def outputs(self, model: nn.Module, shape: ImageShape, count: int = 2) -> object:
        if self._settings.data.kind == "text":
            return model(torch.arange(count * shape.width).view(count, -1) % self._settings.data.vocabulary)
        return model(torch.randn(count, shape.width, generator=torch.Generator()))

    def call(self, model: nn.Module, shape: ImageShape) -> ModelCall:
        """Proxies of a table are vectors of features. Token ids have no gradient, so texts have no proxies."""
        if self._settings.data.kind == "text":
            return replace(NO_CALL, impossible="token ids have no gradient, so proxies cannot take their place")
        return ModelCall(((shape.width,),), (shape.classes,))

    def client(self, partition: int) -> LabeledRows:
        if not any(map(len, self.data.clients)):
            raise DataError("the dataset has a test split only: a client needs data of its own (node config: data)")
        return self.data.clients[partition]

    def test(self) -> LabeledRows:
        return self.data.test


def workload_of(settings: Settings) -> Workload:
    """Return the workload of a run of settings alone."""
    return NamedWorkload(settings) if settings.data.kind == "images" else RowWorkload(settings)


def label_names(workload: Workload) -> tuple[str, ...]:
    """Return the names of the labels of a run whose settings name its dataset, in their order; () of other runs."""
    return workload.data.label_names if isinstance(workload, NamedWorkload | RowWorkload) else ()


def data_description(workload: Workload) -> Mapping[str, Any]:
    """Description of the dataset that the settings name, and its classes in order; empty for other runs."""
    if not isinstance(workload, NamedWorkload | RowWorkload):
        return {}
    data = workload.data
    return {"classes": list(data.label_names), "train_left_out": list(data.train_left_out)} | dict(data.description())
