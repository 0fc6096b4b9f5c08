"""A clipping norm that follows a quantile of the norms of the clients' updates.

Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, algorithm
1. The norm is the same for all clients of a round, so it is sent as a plugin's broadcast. A client's report is one more
value of its update: it is scaled so that report and update together have the norm `PrivacySettings.joint_norm`, and
gets its noise with the update. In a secure round the server sees only the noised total of the reports.
"""

import math

import torch
from torch import Tensor

from tofu.errors import PayloadError
from tofu.plugins import Export, Plugin, Plugins, PluginState, SumSpec, Weights, make_plugins
from tofu.settings import PrivacySettings, Settings

_RANGE = 9.0
"""Standard deviations of the whole noise within the bound of a client's report: one report in 4e18 exceeds it."""

REPORT = "adaptive-clip/unclipped"
"""Name of the sum of reports."""

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
        >>> total = 10 * clip.report(clipped=False)["adaptive-clip/unclipped"]  # none of 10 clients was clipped
        >>> clip.broadcast = clip.reduce({"unclipped": total}, 10, {})
        >>> round(clip.norm, 3)
        0.905
    """

    name = "adaptive-clip"

    def __init__(self, privacy: PrivacySettings) -> None:
        super().__init__()
        self._privacy = privacy

    @property
    def norm(self) -> float:
        """The clipping norm of the round. Raises PayloadError if the server's broadcast has none that is usable."""
        norm = self.broadcast.get("norm", self._privacy.clip_norm)
        if not (isinstance(norm, float) and _MIN_NORM <= norm <= _MAX_NORM):
            raise PayloadError(f"clip norm is {norm!r:.40}, expected a number from {_MIN_NORM:g} to {_MAX_NORM:g}")
        return norm

    @property
    def unit(self) -> float:
        """The difference between the reports of a client that was clipped and of one that was not, before noise."""
        joint = self._privacy.joint_norm(self.norm)
        return 2 * joint * math.sqrt(self._privacy.count_fraction)

    @property
    def declared(self) -> dict[str, SumSpec]:
        """The sum of the clients' reports, by its whole name."""
        noise = self._privacy.noise_multiplier * self._privacy.joint_norm(self.norm)
        return {REPORT: SumSpec((1,), self.unit / 2 + _RANGE * noise, noised=True)}

    def declare_sums(self, model: torch.nn.Module) -> dict[str, SumSpec]:
        return {"unclipped": self.declared[REPORT]}

    def export(self) -> Export:
        """Nothing yet: the report depends on clipping, and gets the noise of the round (`report`)."""
        return Export({"unclipped": torch.zeros(1, dtype=torch.float64)})

    def report(self, *, clipped: bool) -> dict[str, Tensor]:
        """Return what this client reports, by the name of the sum, before noise."""
        return {REPORT: torch.tensor([-self.unit / 2 if clipped else self.unit / 2], dtype=torch.float64)}

    def reduce(self, sums: Weights, examples: int, broadcast: PluginState) -> PluginState:
        """Return the next round's norm; every client counts as one example under differential privacy."""
        return {"norm": self.next_norm(sums["unclipped"], examples)}

    def next_norm(self, total: Tensor, clients: int) -> float:
        """Return the next round's norm, from the total [1] of the reports of this round's clients."""
        privacy = self._privacy
        unclipped = min(max(float(total) / self.unit / clients + 0.5, 0.0), 1.0)
        norm = self.norm * math.exp(-privacy.clip_lr * (unclipped - privacy.clip_quantile))
        return min(max(norm, _MIN_NORM), _MAX_NORM)


def plugins_of(settings: Settings) -> Plugins:
    """Return the plugins of a run: those that its settings name, and the adaptive clipping norm if it has one."""
    plugins = make_plugins(settings.plugins.plugins, settings.plugins.plugin_options)
    return Plugins((*plugins, AdaptiveClip(settings.privacy))) if settings.privacy.clip_quantile else plugins


def clip_of(plugins: Plugins) -> AdaptiveClip | None:
    """Return the adaptive clipping norm among a run's plugins; None if the norm is fixed."""
    return next((plugin for plugin in plugins if isinstance(plugin, AdaptiveClip)), None)


def clip_norm(settings: Settings, plugins: Plugins) -> float:
    """Return the norm to which clients clip their updates in this round."""
    clip = clip_of(plugins)
    return clip.norm if clip else settings.privacy.clip_norm
