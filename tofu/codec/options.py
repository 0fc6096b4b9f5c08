"""The options of compressors, in particular of the proxy codec. This module does not import torch."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tofu.errors import SettingError

if TYPE_CHECKING:
    from tofu.settings.groups import CodecSettings

BITS = (2, 3, 4, 5, 6, 8, 16, 32)
"""Bits per value that `tofu.compression.coding.RowCode` supports; 32 is float32."""

MAX_SURROGATE_BETA = 1000.0


@dataclass(frozen=True)
class ProxySettings:
    """How proxies are encoded. The defaults are ours; `paper_settings` is the published method.

    Both ends must agree on the fields up to `bits`; the others are the sender's choice.

    Attributes:
        smooth: differentiate through the surrogate (`tofu.codec.surrogate`) instead of the network itself.
        surrogate_beta: beta of the surrogate's activations; 0 chooses one of `search.SURROGATE_BETAS` by a trial.
        batch_statistics: the surrogate's BatchNorm uses the statistics of the proxies.
        labels: "free" (unconstrained) or "simplex" (probabilities, with cross-entropy and a weight per proxy).
        scale: "tensor" (one least-squares scale per parameter tensor) or "one".
        size: side of the square proxies in pixels, upsampled to the network's input; 0 chooses one.
        bits: bits of a pixel and of a label, one of `BITS`.
        optimizer: "lbfgs" or "adam".
        max_evals: maximum number of evaluations of the objective and its gradient, not counting a trial of betas; the
            last line search may exceed it by a few.
        tolerance: stop early if the last 10 evaluations gained less explained variance than this; 0 never stops early.
        warm_start: start from the proxies of the client's last round instead of noise.
        solve_labels: number of evaluations that optimize the free labels again after the pixels are quantized.
        device: device of the search (`tofu.device`); decoding always runs on the CPU.

    Raises:
        SettingError: a field is out of range.
    """

    smooth: bool = True
    surrogate_beta: float = 0.0
    batch_statistics: bool = True
    labels: str = "free"
    scale: str = "tensor"
    size: int = 0
    bits: int = 8
    optimizer: str = "lbfgs"
    max_evals: int = 45
    tolerance: float = 0.002
    warm_start: bool = True
    solve_labels: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, accepted: str) -> None:
            if not ok:
                raise SettingError(field, getattr(self, field), accepted)

        check(self.labels in ("free", "simplex"), "labels", "free or simplex")
        check(self.scale in ("tensor", "one"), "scale", "tensor or one")
        check(self.optimizer in ("lbfgs", "adam"), "optimizer", "lbfgs or adam")
        check(self.bits in BITS, "bits", f"one of {', '.join(map(str, BITS))}")
        check(0 <= self.surrogate_beta <= MAX_SURROGATE_BETA, "surrogate_beta", f"0 to {MAX_SURROGATE_BETA:g}")
        check(0 <= self.size <= 1024, "size", "0 (automatic) to 1024 pixels")
        check(self.max_evals >= 1, "max_evals", "at least 1")
        check(self.tolerance >= 0, "tolerance", "0 or more")
        check(self.solve_labels >= 0, "solve_labels", "0 or more")

    @property
    def flags(self) -> int:
        """The binary fields that both ends must agree on, as one byte."""
        return (
            self.smooth
            | (self.batch_statistics << 1)
            | ((self.labels == "simplex") << 2)
            | ((self.scale == "tensor") << 3)
        )

    @staticmethod
    def of(codec: "CodecSettings", device: str) -> "ProxySettings":
        """Return the settings of a run's proxy codec, with a search on this device."""
        common: dict[str, Any] = {"size": codec.proxy_size, "bits": codec.bits, "device": device}
        if codec.codec_mode == "paper":
            return paper_settings(**common)
        return ProxySettings(
            smooth=codec.surrogate,
            surrogate_beta=codec.surrogate_beta,
            batch_statistics=codec.surrogate and codec.batch_statistics,
            labels="free" if codec.free_labels else "simplex",
            scale="tensor" if codec.tensor_scales else "one",
            max_evals=codec.max_evals,
            tolerance=codec.tolerance,
            warm_start=codec.warm_start,
            **common,
        )


def paper_settings(**changes: Any) -> ProxySettings:
    """Return the published method: no surrogate, cross-entropy, simplex labels, a weight per proxy, one scale, no warm
    start.

    The optimizer, the starting point and the sizes, which the paper does not specify, are our choice.
    """
    paper = ProxySettings(
        smooth=False,
        batch_statistics=False,
        labels="simplex",
        scale="one",
        optimizer="adam",  # the line search of L-BFGS fails at the kinks of ReLU (benchmark `codec`)
        max_evals=200,
        warm_start=False,
        solve_labels=0,
    )
    return dataclasses.replace(paper, **changes)


AUTOMATIC = 0.0
"""A gain that the sender chooses for each message."""


def automatic_gain(explained_variance: float) -> float:
    """Return the gain w = 1 + 0.8 (1 - c²) of a message that explains the fraction c² of its target's variance.

    It is 1.8 for a message that explains little and 1 for an exact one, which a larger gain would overshoot. It is
    rounded down to a multiple of 1/256 (docs/error-feedback.md).
    """
    missed = 1 - min(1.0, max(0.0, explained_variance))
    return 1 + math.floor(256 * 0.8 * missed) / 256


@dataclass(frozen=True)
class CompressorOptions:
    """Options of all compressors; each compressor reads those that it needs.

    Over-relaxation: with error feedback, a compressor that explains only a part of an update converges faster if the
    decoded update is multiplied by a gain w, 1 < w < 2; the residual accounts for it. With `AUTOMATIC` the sender
    chooses w for each message (`automatic_gain`).

    Attributes:
        gain: w, or AUTOMATIC, for all compressors but the proxy codec, whose proxies have none.
        proxies: number of proxies; 0 sends as many as the ratio allows.
        correction: minimum fraction of the payload for the sparse correction; 0: proxies only, 1: correction only.
        correction_gain: w of the correction, or AUTOMATIC.
        proxies_below: search for proxies only where the correction alone explains less than this fraction of an update;
            1 always searches, which is best without error feedback, where what is missed is lost.
        encoder: how proxies are encoded.
    """

    gain: float = 1.0
    proxies: int = 0
    correction: float = 0.0
    correction_gain: float = 1.0
    proxies_below: float = 1.0
    encoder: ProxySettings = dataclasses.field(default_factory=ProxySettings)

    def __post_init__(self) -> None:
        for field in ("gain", "correction_gain"):
            if not AUTOMATIC <= getattr(self, field) < 2:
                raise SettingError(field, getattr(self, field), "at least 0 and below 2")
        for field in ("correction", "proxies_below"):
            if not 0 <= getattr(self, field) <= 1:
                raise SettingError(field, getattr(self, field), "0 to 1")
        if not 0 <= self.proxies <= 0xFFFF:
            raise SettingError("proxies", self.proxies, "0 to 65535")

    @staticmethod
    def of(
        codec: "CodecSettings", device: str, *, proxies: int = 0, gain: float = 1.0, proxies_below: float = 1.0
    ) -> "CompressorOptions":
        """Return the options of a run's compressors, with a search for proxies on this device."""
        return CompressorOptions(
            gain,
            proxies,
            correction=0.0 if codec.codec_mode == "paper" else codec.correction,
            correction_gain=gain,
            proxies_below=proxies_below,
            encoder=ProxySettings.of(codec, device),
        )


DEFAULTS = CompressorOptions()
