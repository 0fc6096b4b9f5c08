"""The kinds of models, their data, and how each is trained."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tofu
from tofu.data import ImageShape, open_data, to_float
from tofu.models import build_model, build_seeded
from tofu.models.torchvision_compat import torchvision

TOKENS, WORDS, CLASSES = 16, 1000, 4

Data = tuple[Tensor, Tensor]
"""Inputs [n, ...] and labels [n]."""


@dataclass(frozen=True)
class Kind:
    """One row of the table.

    Attributes:
        build: seed -> the model.
        data: folder of the data, seed, number of examples -> data.
        input_shape: for `tofu.encode`.
        lr: step size of Adam.
        options: more arguments of `tofu.encode` and `tofu.decode`.
        examples: of the client, which are one local epoch.
    """

    build: Callable[[int], nn.Module]
    data: Callable[[Path, int, int], Data]
    input_shape: tuple[int, ...]
    lr: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)
    examples: int = 512


def images(name: str) -> Callable[[Path, int, int], Data]:
    """Images of a folder with train.parquet and test.parquet."""

    def load(folder: Path, seed: int, count: int) -> Data:
        part = open_data(str(folder / name), clients=60000 // (4 * count), partition="iid", seed=seed).client(0)
        return to_float(part.images[:count]), part.labels[:count]

    return load


def tokens(_: Path, seed: int, count: int) -> Data:
    """Sequences whose class is that of the topic that most of their tokens belong to."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    topic = torch.randint(WORDS // CLASSES, (count, TOKENS), generator=generator) * CLASSES + labels[:, None]
    other = torch.randint(WORDS, (count, TOKENS), generator=generator)
    return torch.where(torch.rand(count, TOKENS, generator=generator) < 0.4, topic, other), labels


def table(_: Path, seed: int, count: int) -> Data:
    """Rows of 20 features whose class is that of the nearest of 12 random centers."""
    centers = torch.randn(12, 20, generator=torch.Generator().manual_seed(7))
    rows = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
    return rows, torch.cdist(rows, centers).argmin(1) % CLASSES


class TextLstm(nn.Module):
    """An embedding, one LSTM layer, and a linear layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(WORDS, 32), nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embedding(ids))[0].mean(1))
        return logits


def distilbert_lora() -> nn.Module:
    """DistilBERT with 2 layers of 64 features and random weights; LoRA adapters and the head are trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    labels = {"num_labels": CLASSES}
    config = DistilBertConfig(vocab_size=WORDS, dim=64, n_layers=2, n_heads=4, hidden_dim=128, **labels)  # type: ignore[arg-type]
    base = DistilBertForSequenceClassification(config)
    adapters = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["q_lin", "v_lin"])
    model: nn.Module = get_peft_model(base, adapters)
    return model


def _named(name: str, shape: ImageShape, norm: str = "group") -> Callable[[int], nn.Module]:
    return lambda seed: build_model(name, shape, norm=norm, seed=seed)


def _seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda seed: build_seeded(build, seed)


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's scores [n, classes]."""
    outputs = model(input_ids=inputs) if hasattr(model, "peft_config") else model(inputs)
    scores: Tensor = getattr(outputs, "logits", outputs)
    return scores


def train(model: nn.Module, data: Data, lr: float, epochs: int, seed: int) -> None:
    """Adam on all of the data, in batches of 32."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(data[0]), generator=generator), 32):
            optimizer.zero_grad()
            F.cross_entropy(logits_of(model, data[0][rows]), data[1][rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


_MNIST = ImageShape(channels=1, height=28, width=28, classes=10)
_CIFAR = ImageShape(channels=3, height=32, width=32, classes=10)

KINDS: dict[str, Kind] = {
    "tabular MLP": Kind(_seeded(_perceptron), table, (20,)),
    "LeNet-5": Kind(_named("lenet5", _MNIST), images("mnist"), (1, 28, 28)),
    "LSTM": Kind(
        _seeded(TextLstm), tokens, (TOKENS, 32), lr=3e-3, options={"forward": tofu.at_embedding("embedding")}
    ),
    "DistilBERT + LoRA": Kind(_seeded(distilbert_lora), tokens, (8,), lr=3e-3),
    "ViT": Kind(_named("vit_tiny", _CIFAR), images("cifar10"), (3, 32, 32), examples=256),
    "MobileNetV3": Kind(
        _seeded(lambda: torchvision.models.mobilenet_v3_small(num_classes=10)), images("cifar10"), (3, 32, 32),
        examples=256,
    ),
    "ResNet18 GroupNorm": Kind(_named("resnet18", _CIFAR), images("cifar10"), (3, 32, 32), examples=256),
    "ResNet18 BatchNorm": Kind(_named("resnet18", _CIFAR, "batch"), images("cifar10"), (3, 32, 32), examples=256),
}  # fmt: skip
