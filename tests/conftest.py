"""Networks and updates that many tests need. All small, all real."""

import signal

import pytest
import torch
from hypothesis import settings
from torch import nn

from tests.processes import port_conflicts
from tofu.data import ImageShape, LabeledImages, open_data
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.weights import Weights, difference, load_weights, weights_of

# On a busy machine one example may take any time: no deadline for an example, only the limit of pytest-timeout.
settings.register_profile("tofu", deadline=None)
settings.load_profile("tofu")

torch.set_num_threads(1)

# A shell starts jobs in the background with this signal ignored, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the ports that failed tests found taken, and who holds them."""
    failed = [report for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])]
    for report in failed:
        for line in port_conflicts(report.longreprtext):
            terminalreporter.write_line(f"{report.nodeid}: {line}", red=True)


Case = tuple[ReferenceModel, Weights]
"""A network at its base weights, and an update of it."""


@pytest.fixture(scope="session")
def digits() -> LabeledImages:
    """All training images of the embedded digits."""
    return open_data("digits", clients=1, partition="iid", seed=0).client(0)


class EveryLayer(nn.Module):
    """Each layer that the codec must encode through: conv, three norms, ReLU in two forms, pooling, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.batch = nn.BatchNorm2d(8)
        self.group = nn.GroupNorm(2, 8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.batch(self.conv(x))))
        x = torch.relu(self.group(x)).flatten(2).transpose(1, 2)
        x = self.norm(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def trained_update(model: nn.Module, data: LabeledImages, *, epochs: int = 1, seed: int = 0) -> Case:
    """A network after one round of local training, and the update of the next one relative to it."""
    from tofu.training import LocalTrainingConfig, train_locally

    how = LocalTrainingConfig(epochs=epochs, batch_size=32, lr=0.05)
    train_locally(model, data, how, generator=torch.Generator().manual_seed(seed))
    base = weights_of(model)
    train_locally(model, data, how, generator=torch.Generator().manual_seed(seed + 1))
    update = difference(weights_of(model), base)
    load_weights(model, base)
    shape = ImageShape(data.images.shape[1], data.images.shape[2], data.images.shape[3], data.classes)
    return ReferenceModel(model.eval(), shape), update


@pytest.fixture(scope="session")
def mlp_update(digits: LabeledImages) -> Case:
    """A small multi-layer perceptron on the digits, and an update of it."""
    return trained_update(build_model("mlp", digits.shape, seed=0), digits)


@pytest.fixture(scope="session")
def every_layer_update(digits: LabeledImages) -> Case:
    """The network with every kind of layer, and an update of it."""
    torch.manual_seed(0)
    return trained_update(EveryLayer(), digits, epochs=2)
