"""Communication-efficient federated learning: updates as proxy images, secure sums, and plugins for local training.

`import tofu` loads nothing but this file; each name below is imported when it is first used.

    tofu.encode, tofu.decode    one update of any torch model as bytes, and back
    tofu.at_embedding           for models of token ids: proxies take the place of embeddings
    tofu.run                    a federation in this process, with your own datasets, model, loss and training
    tofu.Settings               the settings of a run
    tofu.Plugin                 base class of techniques that change local training
    tofu.Compressor             base class of compressors of updates
    tofu.compress               a mod that compresses the updates of any Flower app's clients
    tofu.Compressed             the wrapper of that app's strategy
    tofu.keep_local             a mod that keeps some layers on the client
    tofu.Robust                 a wrapper of a strategy that aggregates by a robust rule
    tofu.FirstReplies           a wrapper of a strategy that ends rounds with the first replies
    tofu.secure                 a mod that masks the updates of any Flower app's clients
    tofu.SecureAggregation      the wrapper of that app's strategy, which learns the sum only
    tofu.record                 a wrapper that saves what the app's server receives, for `tofu attack`
    tofu.hybrid, tofu.Hybrid    the same for compressed rounds that secure rounds follow
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tofu.api import decode as decode
    from tofu.api import encode as encode
    from tofu.compression.base import Compressor as Compressor
    from tofu.flower.compress import Compressed as Compressed
    from tofu.flower.compress import compress as compress
    from tofu.flower.hybrid import Hybrid as Hybrid
    from tofu.flower.hybrid import hybrid as hybrid
    from tofu.flower.options import FirstReplies as FirstReplies
    from tofu.flower.options import keep_local as keep_local
    from tofu.flower.record import record as record
    from tofu.flower.robust import Robust as Robust
    from tofu.flower.secure import SecureAggregation as SecureAggregation
    from tofu.flower.secure_mod import secure as secure
    from tofu.plugins import Plugin as Plugin
    from tofu.reference_model import at_embedding as at_embedding
    from tofu.running import run as run
    from tofu.settings import Settings as Settings

    __version__: str

_EXPORTS = {
    "encode": "tofu.api",
    "decode": "tofu.api",
    "at_embedding": "tofu.reference_model",
    "run": "tofu.running",
    "Settings": "tofu.settings",
    "Plugin": "tofu.plugins",
    "Compressor": "tofu.compression.base",
    "compress": "tofu.flower.compress",
    "Compressed": "tofu.flower.compress",
    "FirstReplies": "tofu.flower.options",
    "Robust": "tofu.flower.robust",
    "keep_local": "tofu.flower.options",
    "secure": "tofu.flower.secure_mod",
    "SecureAggregation": "tofu.flower.secure",
    "hybrid": "tofu.flower.hybrid",
    "record": "tofu.flower.record",
    "Hybrid": "tofu.flower.hybrid",
}
"""Public name -> the module that defines it."""

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tofu-fl")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tofu' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_EXPORTS[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
