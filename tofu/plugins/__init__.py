"""Plugins: techniques that change a client's local training, each with a half that runs on the server.

`tofu.plugins.base` documents the interface; client/plugins/README.md implements a complete plugin in 40 lines.
"""

from tofu.plugins.base import (
    Batch,
    Export,
    LocalStep,
    Plugin,
    Prediction,
    RoundContext,
    RunRequirements,
    Weights,
)  # fmt: skip
from tofu.plugins.chain import NO_PLUGINS, Plugins
from tofu.plugins.export import MAX_STATE_BYTES, export_from_bytes, export_to_bytes
from tofu.plugins.loading import make_plugins, plugin_names, plugin_registry
from tofu.plugins.masking import keep_channels, keep_entries
from tofu.plugins.options import option
from tofu.plugins.state import PluginState, state_from_bytes, state_to_bytes
from tofu.rounds.panel import Panel
from tofu.weights import SumSpec

__all__ = [
    "MAX_STATE_BYTES", "NO_PLUGINS", "Batch", "Export", "LocalStep", "Panel", "Plugin", "PluginState", "Plugins",
    "Prediction", "RoundContext", "RunRequirements", "SumSpec", "Weights", "export_from_bytes", "export_to_bytes",
    "keep_channels", "keep_entries", "make_plugins", "option", "plugin_names", "plugin_registry",
    "state_from_bytes", "state_to_bytes",
]  # fmt: skip
