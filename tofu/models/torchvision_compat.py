"""Import torchvision with any build of torch: always `from tofu.models.torchvision_compat import torchvision`.

The Linux wheel of torchvision is linked against CUDA. Its extension does not load with a CPU-only torch, and the import
then fails with `operator torchvision::nms does not exist`. Models, transforms and datasets do not use these
operators, so declaring their schemas is enough.
"""

from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _declare_missing_operators() -> torch.library.Library:
    """Declare the operators that the extension failed to register.

    The extension is `_C`, and `_C_stable` from torchvision 0.29 on. It must be loaded first: if it finds an operator
    that is declared already, it ends the process.
    """
    package = find_spec("torchvision")
    folders = (package.submodule_search_locations if package else None) or []
    for extension in (file for folder in folders for file in sorted(Path(folder).glob("_C*"))):
        if extension.name.endswith(tuple(EXTENSION_SUFFIXES)):
            with suppress(OSError):
                torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SCHEMA)  # type: ignore[no-untyped-call]
    return library


# The schemas are removed when the object that declared them is deleted.
_LIBRARY = _declare_missing_operators()

import torchvision  # noqa: E402

__all__ = ["torchvision"]
