"""The workload of a run whose dataset holds rows: tables of features, or texts."""

from collections.abc import Mapping, Sized

import torch
from torch import nn

from tofu.data import FederatedRows, ImageShape, LabeledRows
from tofu.errors import DataError
from tofu.evaluation import Evaluation, Predict
from tofu.model_call import NO_CALL, ModelCall
from tofu.models import build_row_model
from tofu.models.initial_weights import fill
from tofu.plugins import Plugins, RoundContext
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, TrainingResult
from tofu.user_workload import DatasetLoop
from tofu.workload import NamedWorkload, Workload


class RowWorkload:
    """Classification of rows. On the wire, a row is an image of one channel and one line."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._loop = settings, DatasetLoop()

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

    def call(self, model: nn.Module, shape: ImageShape) -> ModelCall:
        """Of a table a vector of features. Token ids have no gradient, so texts have no proxies."""
        return NO_CALL if self._settings.data.kind == "text" else ModelCall(((shape.width,),), (shape.classes,))

    def client(self, partition: int) -> LabeledRows:
        if not any(map(len, self.data.clients)):
            raise DataError("the dataset has a test split only: a client needs data of its own (node config: data)")
        return self.data.clients[partition]

    def test(self) -> LabeledRows:
        return self.data.test

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
        return self._loop.train(
            model, data, config, position=position, generator=generator, plugins=plugins, device=device
        )

    def evaluate(
        self, model: nn.Module, data: Sized, *, predict: Predict | None = None, device: torch.device
    ) -> Evaluation:
        return self._loop.evaluate(model, data, device=device)


def workload_of(settings: Settings) -> Workload:
    """The workload of a run of settings alone."""
    return NamedWorkload(settings) if settings.data.kind == "images" else RowWorkload(settings)


def label_names(workload: Workload) -> tuple[str, ...]:
    """The names of the labels of a run whose settings name its dataset, in their order; () of other runs."""
    return workload.data.label_names if isinstance(workload, NamedWorkload | RowWorkload) else ()


def data_description(workload: Workload) -> Mapping[str, object]:
    """What was read of the dataset that the settings name, and the classes in order; empty for other runs."""
    if not isinstance(workload, NamedWorkload | RowWorkload):
        return {}
    return {"classes": list(workload.data.label_names)} | dict(workload.data.description())
