"""torchvision beside any torch. Each case is a process of its own: operators cannot be undeclared."""

import os
import sys
from pathlib import Path

import pytest

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

# A torchvision whose extension, like the real one, cannot bear that an operator is declared already.
STAND_IN = """
import torch
torch.ops.load_library(__path__[0] + "/EXTENSION")
"""

WITH_EXTENSION = """
import sys, torch
loaded = []
def load(path):
    if path not in loaded:
        loaded.append(path)
        library = torch.library.Library("torchvision", "DEF")
        loaded.append(library)
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.ops.load_library = load
sys.path.insert(0, sys.argv[1])
from tofu.models.torchvision_compat import torchvision
print(torchvision.__file__.startswith(sys.argv[1]))
"""


def _run(code: str, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run([sys.executable, "-c", code, *arguments], env=environment, warm=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchvision_imports_and_builds_models_without_its_extension() -> None:
    assert _run(WITHOUT_EXTENSION) == "[2, 3]"


def test_operators_that_are_there_are_left_alone() -> None:
    assert _run(WITH_OPERATORS) == "[0, 1, 2] resnet18"


@pytest.mark.parametrize("extension", ["_C.so", "_C_stable.so"])  # the names until torchvision 0.28, and since 0.29
def test_the_extension_is_loaded_before_operators_are_declared(tmp_path: Path, extension: str) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / extension).touch()
    (package / "__init__.py").write_text(STAND_IN.replace("EXTENSION", extension))
    assert _run(WITH_EXTENSION, str(tmp_path)) == "True"
