"""The attack of the plugin `trend` against the Adversarial Robustness Toolbox, through a straight-through quantizer."""

import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.plugins.transferability import InputQuantizer, attack
from tofu.data import LabeledImages, to_float
from tofu.models import build_model
from tofu.training import LocalTrainingConfig, train_locally

pytestmark = pytest.mark.skipif(
    find_spec("art") is None,
    reason="the optional adversarial-robustness-toolbox is not installed (pip install .[dev])",
)

EPSILON, STEPS = 0.15, 20


@pytest.fixture(scope="module")
def trained(digits: LabeledImages) -> nn.Module:
    model = build_model("mlp", digits.shape, seed=0)
    config = LocalTrainingConfig(epochs=8, batch_size=32, lr=0.05, momentum=0.9)
    train_locally(model, digits, config, generator=torch.Generator().manual_seed(0))
    return model.eval()


class WithHooks(nn.Module):
    """A model as one layer: ART calls the layers of an `nn.Sequential` itself, and so skips its hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits


def classifier_of(model: nn.Module, images: Tensor):  # type: ignore[no-untyped-def]
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        WithHooks(model), nn.CrossEntropyLoss(), input_shape=tuple(images.shape[1:]), nb_classes=10,
        clip_values=(-1.0, 1.0), device_type="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["fp", "1", "2", "halftone"])
def test_pgd_is_as_strong_as_that_of_art(kind: str, trained: nn.Module, digits: LabeledImages) -> None:
    """From random starts of their own, both fool about as many of 300 images, and stay as close to them."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    model = copy.deepcopy(trained)
    model.register_forward_pre_hook(InputQuantizer(kind).hook)
    images, labels = to_float(digits.images[:300]), digits.labels[:300]
    step = 2.5 * EPSILON / STEPS
    ours = attack([model], images, labels, epsilon=EPSILON, steps=STEPS, step_size=step,
                  generator=torch.Generator().manual_seed(0))  # fmt: skip
    np.random.seed(0)  # ART draws its random start from NumPy's generator
    method = ProjectedGradientDescentPyTorch(
        classifier_of(model, images), norm=np.inf, eps=2 * EPSILON, eps_step=2 * step, max_iter=STEPS,
        num_random_init=1, batch_size=300, verbose=False,
    )  # fmt: skip
    theirs = torch.from_numpy(method.generate(x=images.numpy(), y=labels.numpy()))
    robust = []
    for adversarial in (ours, theirs):
        assert float((adversarial - images).abs().max()) <= 2 * EPSILON + 1e-5
        assert float(adversarial.abs().max()) <= 1
        with torch.no_grad():
            robust.append(float((model(adversarial).argmax(1) == labels).float().mean()))
    with torch.no_grad():
        clean = float((model(images).argmax(1) == labels).float().mean())
    assert robust[0] < clean - 0.2
    assert robust[0] == pytest.approx(robust[1], abs=0.05)


@pytest.mark.parametrize("kind", ["fp", "1", "2"])
def test_one_step_is_that_of_art(kind: str, trained: nn.Module, digits: LabeledImages) -> None:
    """From the same start, pixels move as by ART's fast gradient sign method, except where the gradient is 0."""
    from art.attacks.evasion import FastGradientMethod

    model = copy.deepcopy(trained)
    model.register_forward_pre_hook(InputQuantizer(kind).hook)
    images, labels = to_float(digits.images[:50]), digits.labels[:50]
    tiny = 1e-6  # keeps our random start at the image
    generator = torch.Generator().manual_seed(0)
    ours = attack([model], images, labels, epsilon=tiny, steps=1, step_size=1, generator=generator)
    method = FastGradientMethod(classifier_of(model, images), norm=np.inf, eps=2 * tiny, batch_size=50)
    theirs = torch.from_numpy(method.generate(x=images.numpy(), y=labels.numpy()))
    inside = images.abs() < 1
    assert float((ours - theirs).abs()[inside].gt(tiny).float().mean()) < 0.01
    assert int(inside.sum()) > 300
