"""torchvision beside any torch. Each case is a process of its own: operators cannot be undeclared."""

import os
import sys

from tests.processes import run

WITHOUT_EXTENSION = """
import torch
def fail(path):
    raise OSError("libcudart.so.13: cannot open shared object file")
torch.ops.load_library = fail
from tofu.models.torchvision_compat import torchvision
model = torchvision.models.resnet18(num_classes=3)
print(list(model(torch.zeros(2, 3, 32, 32)).shape))
"""

WITH_OPERATORS = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.impl("nms", lambda dets, scores, iou_threshold: torch.arange(len(scores)), "CPU")
from tofu.models.torchvision_compat import torchvision
print(torch.ops.torchvision.nms(torch.rand(3, 4), torch.rand(3), 0.5).tolist(), torchvision.models.resnet18.__name__)
"""


def _run(code: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run([sys.executable, "-c", code], env=environment, warm=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchvision_imports_and_builds_models_without_its_extension() -> None:
    assert _run(WITHOUT_EXTENSION) == "[2, 3]"


def test_operators_that_are_there_are_left_alone() -> None:
    assert _run(WITH_OPERATORS) == "[0, 1, 2] resnet18"
