"""What a federation trains: data, model, local training and evaluation, as one object that server and clients share.

`NamedWorkload` is that of a run whose settings name a dataset of images; `tofu.row_workload` has the one of tables and
texts, `tofu.user_workload` the one that is made of a user's own Python objects, for `tofu.run`.
"""

from collections.abc import Sized
from typing import Protocol

import torch
from torch import nn

from tofu.data import FederatedData, ImageShape, LabeledImages
from tofu.errors import DataError
from tofu.evaluation import Evaluation, Predict, evaluate
from tofu.model_call import ModelCall
from tofu.models import initial_model
from tofu.plugins import Plugins, RoundContext
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, TrainingResult, train_locally


class Workload(Protocol):
    """What server and clients need to know of the data and the model. Both build it from the same arguments."""

    @property
    def shape(self) -> ImageShape:
        """Input and output size of the model, as train requests carry it."""

    def build_model(self, shape: ImageShape) -> nn.Module:
        """The model at its initial weights, in training mode on the CPU; the same in every process."""

    def call(self, model: nn.Module, shape: ImageShape) -> ImageShape | ModelCall:
        """How proxies are passed to the model; `tofu.model_call.NO_CALL` if it has none."""

    def client(self, partition: int) -> Sized:
        """The training data of one simulated client."""

    def test(self) -> Sized:
        """The server's test data; empty if there is none."""

    def train(
        self,
        model: nn.Module,
        data: Sized,
        config: LocalTrainingConfig,
        *,
        position: RoundContext,
        generator: torch.Generator,
        plugins: Plugins,
        device: torch.device,
    ) -> TrainingResult:
        """Train `model` in place, as `tofu.training.train_locally` does; `position` has the round and the client."""

    def evaluate(
        self, model: nn.Module, data: Sized, *, predict: Predict | None = None, device: torch.device
    ) -> Evaluation:
        """Accuracy, loss and metrics; NaN where there is nothing to measure."""


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

    def build_model(self, shape: ImageShape) -> nn.Module:
        """See `Workload.build_model`. Raises SettingError if the model cannot be built."""
        return initial_model(self._settings.model, shape, self._settings.run.seed)

    def call(self, model: nn.Module, shape: ImageShape) -> ImageShape:
        return shape

    def client(self, partition: int) -> LabeledImages:
        return self.data.client(partition)

    def test(self) -> LabeledImages:
        return self.data.test()

    def train(
        self,
        model: nn.Module,
        data: Sized,
        config: LocalTrainingConfig,
        *,
        position: RoundContext,
        generator: torch.Generator,
        plugins: Plugins,
        device: torch.device,
    ) -> TrainingResult:
        return train_locally(
            model,
            labeled_images(data),
            config,
            generator=generator,
            plugins=plugins,
            final=position.final,
            device=device,
        )

    def evaluate(
        self, model: nn.Module, data: Sized, *, predict: Predict | None = None, device: torch.device
    ) -> Evaluation:
        return evaluate(model, labeled_images(data), predict=predict, device=device)


def labeled_images(data: Sized) -> LabeledImages:
    """The data, for code that needs images. Raises DataError if it is something else."""
    if not isinstance(data, LabeledImages):
        raise DataError(f"{type(data).__name__} is not usable here: expected labeled images")
    return data
