"""Run a script with any build of torch: python tests/examples/launch.py SCRIPT [OPTIONS].

transformers and Lightning import torchvision and torchaudio if they are installed, which fails where these are built
for CUDA and torch is not. They do without a torchaudio that cannot be found.
"""

import runpy
import sys

from tofu.models.torchvision_compat import torchvision  # noqa: F401

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):
    sys.modules["torchaudio"] = None  # type: ignore[assignment]

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
