"""Optional libraries of the extra `examples`."""

import sys
from importlib.util import find_spec
from typing import Any

import pytest


def transformers_and_peft() -> tuple[Any, Any]:
    """The two modules; the tests of the caller are skipped where they are not installed.

    transformers imports torchvision and torchaudio if they are installed, and fails where these are built for CUDA and
    torch is not. It does without a torchaudio that cannot be found.
    """
    for name in ("transformers", "peft"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'tofu-fl[examples]'")
    from tofu.models.torchvision_compat import torchvision  # noqa: F401

    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
    import peft
    import transformers

    return transformers, peft
