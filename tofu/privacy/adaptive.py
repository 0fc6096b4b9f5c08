"""A clipping norm that follows a quantile of the norms of the clients' updates.

Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, algorithm
1. The norm is the same for all clients of a round, so it is sent as a plugin's broadcast. The clients' reports are sent
as a plugin's sum: in a secure round the server sees only their noised total.
"""

import math

import torch

from tofu.errors import PayloadError
from tofu.plugins import Export, Plugin, Plugins, PluginState, SumSpec, Weights, make_plugins
from tofu.privacy.noise import Noise
from tofu.secagg.encoding import SUM_STEPS
from tofu.settings import PrivacySettings, Settings

_RANGE = 8.0
"""Standard deviations of the whole noise that a client's report must hold: it exceeds them once in 8e14 reports."""

_MIN_NORM, _MAX_NORM = 1e-9, 1e9


class AdaptiveClip(Plugin):
    """The clipping norm of each round.

    Every client reports b - 1/2 with noise, where b is 1 if its update was not clipped. With the mean b of a round, the
    next norm is C exp(-lr (b - quantile)). The mean is first limited to [0, 1], so that neither noise nor a client that
    lies moves the norm by more than a factor of exp(lr).

    Args:
        privacy: with `clip_quantile` above 0.

    Example:
        >>> from tofu.settings import PrivacySettings
        >>> clip = AdaptiveClip(PrivacySettings(noise_multiplier=1.0, clip_norm=1.0, clip_quantile=0.5))
        >>> clip.broadcast = clip.reduce({"unclipped": torch.tensor([5.0])}, 10, {})  # none of 10 clients was clipped
        >>> round(clip.norm, 3)
        0.905
    """

    name = "adaptive-clip"

    def __init__(self, privacy: PrivacySettings) -> None:
        super().__init__()
        self._privacy = privacy
        largest = 0.5 + _RANGE * privacy.noise_multiplier / (2 * math.sqrt(privacy.count_fraction))
        self._sum = SumSpec((1,), largest)

    @property
    def norm(self) -> float:
        """The clipping norm of the round. Raises PayloadError if the server's broadcast has none that is usable."""
        norm = self.broadcast.get("norm", self._privacy.clip_norm)
        if not (isinstance(norm, float) and _MIN_NORM <= norm <= _MAX_NORM):
            raise PayloadError(f"clip norm is {norm!r:.40}, expected a number from {_MIN_NORM:g} to {_MAX_NORM:g}")
        return norm

    def declare_sums(self, model: torch.nn.Module) -> dict[str, SumSpec]:
        return {"unclipped": self._sum}

    def export(self) -> Export:
        """Nothing yet: only the noise of the round makes the report (`report`)."""
        return Export({"unclipped": torch.zeros(1, dtype=torch.float64)})

    def report(self, export: Export, noise: Noise, *, clipped: bool) -> Export:
        """The export with what this client reports, which has the noise of the round."""
        bound = self._sum.bound
        value = noise.add_to_count(-0.5 if clipped else 0.5, bound / SUM_STEPS)
        value = min(max(value, -bound), bound)
        own = {f"{self.name}/unclipped": torch.tensor([value], dtype=torch.float64)}
        return Export({**export.sums, **own}, export.metrics)

    def reduce(self, sums: Weights, examples: int, broadcast: PluginState) -> PluginState:
        """The next round's norm; every client counts as one example under differential privacy."""
        privacy = self._privacy
        unclipped = min(max(float(sums["unclipped"]) / examples + 0.5, 0.0), 1.0)
        norm = self.norm * math.exp(-privacy.clip_lr * (unclipped - privacy.clip_quantile))
        return {"norm": min(max(norm, _MIN_NORM), _MAX_NORM)}


def plugins_of(settings: Settings) -> Plugins:
    """The plugins of a run: those that its settings name, and the adaptive clipping norm if it has one."""
    plugins = make_plugins(settings.plugins.plugins, settings.plugins.plugin_options)
    return Plugins((*plugins, AdaptiveClip(settings.privacy))) if settings.privacy.clip_quantile else plugins


def clip_of(plugins: Plugins) -> AdaptiveClip | None:
    """The adaptive clipping norm among a run's plugins; None if the norm is fixed."""
    return next((plugin for plugin in plugins if isinstance(plugin, AdaptiveClip)), None)


def clip_norm(settings: Settings, plugins: Plugins) -> float:
    """The norm to which clients clip their updates in this round."""
    clip = clip_of(plugins)
    return clip.norm if clip else settings.privacy.clip_norm
