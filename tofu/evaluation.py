"""Accuracy and loss of a model on held-out images."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tofu.data import LabeledImages, to_float
from tofu.device import CPU, on_device
from tofu.plugins import Prediction
from tofu.rng import GlobalGenerators
from tofu.weights import eval_mode

Predict = Callable[[nn.Module, Tensor], Prediction]
_BATCH = 500


@dataclass(frozen=True)
class Evaluation:
    """Accuracy (0 to 1) and mean loss, NaN where they cannot be measured, and the user's own metrics by name.

    Attributes:
        by_class: counts of the samples of each class, where targets are class numbers.
    """

    accuracy: float
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    by_class: "ClassCounts" = field(default_factory=lambda: ClassCounts())


@dataclass
class ClassCounts:
    """Class number -> number of its samples, and of those that were classified right."""

    samples: Counter[int] = field(default_factory=Counter)
    right: Counter[int] = field(default_factory=Counter)

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        """Count a batch of predicted and true classes [n]."""
        self.samples.update(labels.tolist())
        self.right.update(labels[predicted == labels].tolist())

    @staticmethod
    def total(parts: "Sequence[ClassCounts]") -> "ClassCounts":
        """Return the sum of counts of disjoint samples."""
        return ClassCounts(
            sum((part.samples for part in parts), Counter()), sum((part.right for part in parts), Counter())
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: LabeledImages,
    *,
    predict: Predict | None = None,
    device: torch.device = CPU,
) -> Evaluation:
    """Evaluate a model in eval mode and restore its mode.

    Args:
        predict: computes the logits; by default the model's forward pass.
        device: device of the forward passes; the model is on the CPU before and after.
    """
    counts, loss = ClassCounts(), 0.0
    with eval_mode(model), on_device(model, device), GlobalGenerators(0, device) as shared:
        for start in range(0, len(data), _BATCH):
            images = to_float(data.images[start : start + _BATCH].to(device))
            logits = predict(model, images).logits if predict else model(images)
            labels = data.labels[start : start + _BATCH].to(device)
            counts.add(logits.argmax(1), labels)
            loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            shared.release_if_unused()
    return Evaluation(counts.right.total() / len(data), loss / len(data), by_class=counts)
