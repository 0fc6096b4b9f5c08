"""Memorization by loss curvature: find images that a network memorizes, such as mislabeled ones.

Garg, Ravikumar, Roy, "Memorization Through the Lens of Curvature of Loss Function Around Samples", ICML 2024,
arXiv 2307.05831. The score of an image x is Tr(H^2) = E_v ||H v||^2, where H is the Hessian of the loss with respect to
x and v has entries +-1. Finite differences give H v = (grad L(x + h v) - grad L(x)) / h. The score is averaged over
training, because the curvature at a memorized image falls again when the network has fitted it.

Each scoring also gives two cheaper scores: the loss of the image (cumulative sample loss) and the norm of the loss's
gradient with respect to the image (cumulative sample gradient), both averaged over training.

A client scores at the received global weights, which were trained on all clients' images, and after local epochs.
Scores reveal whether an image was trained on, so they stay in the client's private state; the server receives a
histogram and counts. docs/plugins/curvature.md has the options and measurements.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.plugins.round_start import subsample_rows
from tofu.data import LabeledImages, to_float
from tofu.errors import SettingError
from tofu.files import replace_file
from tofu.plugins import (
    Batch,
    Export,
    Panel,
    Plugin,
    PluginState,
    RoundContext,
    SumSpec,
    Weights,
    option,
    plugin_registry,
    state_to_bytes,
)
from tofu.rng import derive_generator
from tofu.rounds.panel import Chart, Series, TableFigure
from tofu.weights import eval_mode

SCORES = ("curvature", "loss", "gradient")
FOLDER = "TOFU_CURVATURE_FOLDER"
"""Environment variable: a folder on the client's own machine in which its scores are saved after each round."""

BINS_PER_DECADE = 10
_LOWEST, _HIGHEST = -12, 8  # decades; scores outside count in the first or last bin
BINS = (_HIGHEST - _LOWEST) * BINS_PER_DECADE

_CHUNK = 250  # images
_LARGEST = 1e30  # replaces what overflows in a network that diverges
_MAX_STATE_BYTES = 2**30


@plugin_registry.register("curvature")
@dataclass
class LossCurvature(Plugin):
    """Scores a client's images by memorization, and can down-weight or drop suspects: images with high scores.

    `state`: "digest" of the images; "count" of scorings; "curvature", "loss" and "gradient", float64 [n] sums of the
    scored images. `broadcast`: "histogram", float64 [BINS] of the clients' mean scores; "flagged", float64 [rounds],
    the fraction of images that were suspects in each round.
    """

    excludes: ClassVar[Mapping[str, str]] = {"dct-snn": "its spikes have no gradient with respect to the image"}
    local_only: ClassVar[frozenset[str]] = frozenset({*SCORES, "scores", "suspects"})

    # fmt: off
    score: str = option("curvature", "the score that selects suspects", choices=SCORES)
    estimator: str = option("squared", "squared: mean of ||H v||^2, the trace of H^2; norm: mean of ||H v||, as in the authors' code", choices=("squared", "norm"))  # noqa: E501
    probes: int = option(5, "random directions v per image and scoring", ge=1, le=1000)
    step: float = option(0.01, "step h of the finite difference; images are in [-1, 1]", ge=1e-5, le=1)
    where: str = option("both", "global: score at the received weights; local: after local epochs; both", choices=("both", "global", "local"))  # noqa: E501
    every: int = option(1, "local epochs between two scorings", ge=1, le=100_000)
    action: str = option("none", "what happens to suspects in training", choices=("none", "down-weight", "drop"))
    weight: float = option(0.1, "weight of a suspect in the loss for action=down-weight", ge=0, le=1)
    quantile: float = option(0.9, "images with a mean score above this quantile are suspects", gt=0, lt=1)
    over: str = option("client", "client: quantile of each client's own scores; all: of all clients' together, from the last round's histogram", choices=("client", "all"))  # noqa: E501
    warm_up: int = option(3, "rounds before suspects are down-weighted or dropped", ge=0, le=100_000)
    images: int = option(100_000, "largest number of a client's images that are scored, evenly spread", ge=1, le=10_000_000)  # noqa: E501
    # fmt: on

    _epoch: int = field(default=0, init=False, repr=False)
    _suspects: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool), init=False, repr=False)

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        """Leaves the model unchanged. Raises SettingError if the run is too short for `action` to take effect."""
        if self.action != "none" and self.warm_up >= context.rounds:
            raise SettingError(f"{self.name}.warm-up", self.warm_up, f"less than the run's rounds, {context.rounds}")
        self._epoch = 0
        return super().setup(model, context)

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        return {"histogram": SumSpec((BINS,), float(self.images)), "flagged": SumSpec((1,), float(self.images))}

    def on_train_begin(self, model: nn.Module, data: LabeledImages) -> None:
        digest = data_digest(data)
        if self.state.get("digest") != digest or len(self._sum(self.score)) != len(self._scored_rows(data)):
            zeros = torch.zeros(len(self._scored_rows(data)), dtype=torch.float64)
            self.state = {"digest": digest, "count": 0, **dict.fromkeys(SCORES, zeros)}
        if self.where != "local":
            self._measure(model, data)
        self._suspects = torch.zeros(len(data), dtype=torch.bool)
        self._suspects[self._scored_rows(data)] = self._above_quantile()

    def on_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        if not self._acts:
            return batch
        suspect = self._suspects[batch.ids.clamp(min=0)] & (batch.ids >= 0)
        if self.action == "down-weight":
            weights = torch.ones(len(batch)) if batch.weights is None else batch.weights
            return batch.replace(weights=torch.where(suspect, self.weight * weights, weights))
        kept = (~suspect).nonzero().flatten()
        if len(kept) == 1 < len(batch):
            kept = kept[:0]  # BatchNorm needs two images
        weights_kept = None if batch.weights is None else batch.weights[kept]
        return Batch(batch.images[kept], batch.targets[kept], batch.ids[kept], weights_kept)

    def on_epoch_end(self, model: nn.Module, data: LabeledImages) -> None:
        self._epoch += 1
        if self.where != "global" and self._epoch % self.every == 0:
            self._measure(model, data)

    def on_task_end(self, model: nn.Module, data: LabeledImages, final: bool) -> None:
        if folder := os.environ.get(FOLDER):
            path = Path(folder).expanduser()
            path.mkdir(parents=True, exist_ok=True)
            rows = {"rows": self._scored_rows(data)}
            file = path / f"curvature-{self.context.client}.scores"
            replace_file(file, state_to_bytes(self.state | rows, max_bytes=_MAX_STATE_BYTES))

    def export(self) -> Export:
        """Return the histogram of this client's mean scores,
        and the number of images that were suspects in this round.
        """
        flagged = torch.tensor([float(self._suspects.sum())], dtype=torch.float64)
        return Export({"histogram": histogram(self.mean_scores()), "flagged": flagged})

    def mean_scores(self, name: str = "") -> Tensor:
        """Return the mean over all scorings, float64 [scored images]; of the option `score` unless another is named."""
        count = self.state.get("count", 0)
        assert isinstance(count, int)
        return self._sum(name or self.score) / max(1, count)

    @property
    def _acts(self) -> bool:
        return self.action != "none" and self.context.round > self.warm_up

    def _sum(self, name: str) -> Tensor:
        value = self.state.get(name)
        return value if isinstance(value, Tensor) else torch.zeros(0, dtype=torch.float64)

    def _scored_rows(self, data: LabeledImages) -> Tensor:
        return subsample_rows(len(data), self.images)

    def _above_quantile(self) -> Tensor:
        """Return bool [scored images]: whether the mean score is above the quantile;
        all False before the first scoring.
        """
        scores, counts = self.mean_scores(), self.broadcast.get("histogram")
        if not self.state.get("count") or (self.over == "all" and not isinstance(counts, Tensor)):
            return torch.zeros(len(scores), dtype=torch.bool)
        if self.over == "all":
            assert isinstance(counts, Tensor)
            return scores > histogram_quantile(counts, self.quantile)
        return scores > scores.sort().values[int(self.quantile * (len(scores) - 1))]

    def _measure(self, model: nn.Module, data: LabeledImages) -> None:
        """Add one scoring of every scored image to the sums."""
        context, count = self.context, self.state["count"]
        assert isinstance(count, int)
        generator = derive_generator(context.seed, context.round, context.client, self.name, count)
        rows = self._scored_rows(data)
        with eval_mode(model):
            found = sample_scores(
                model, data.images[rows], data.labels[rows], probes=self.probes, step=self.step,
                squared=self.estimator == "squared", generator=generator,
            )  # fmt: skip
        self.state |= {name: self._sum(name) + found[name] for name in SCORES}
        self.state["count"] = count + 1

    # Server

    def reduce(self, sums: Weights, examples: int, broadcast: PluginState) -> PluginState:
        fraction = (sums["flagged"] / sums["histogram"].sum().clamp(min=1)).float()
        past = broadcast.get("flagged")
        return {
            "histogram": sums["histogram"],
            "flagged": torch.cat([past, fraction]) if isinstance(past, Tensor) else fraction,
        }

    def panel(self) -> Panel | None:
        """Return the histogram of all clients' mean scores, its quantiles,
        and the fraction of suspects in each round.
        """
        counts, flagged = self.broadcast.get("histogram"), self.broadcast.get("flagged")
        if not isinstance(counts, Tensor) or not isinstance(flagged, Tensor) or not counts.sum():
            return None
        used = counts.nonzero().flatten()
        bins = torch.arange(int(used[0]), int(used[-1]) + 1)
        centers = _LOWEST + (bins + 0.5) / BINS_PER_DECADE
        label = f"log10 of the mean {self.score}"
        quantiles = (0.1, 0.5, 0.9, 0.95, 0.99)
        return Panel(
            "Memorization by loss curvature",
            "Images with high scores are memorized: rare, ambiguous or mislabeled. The server only has the histogram; "
            "each client can draw its own most memorized images.",
            (
                Chart("Images by score", (Series("images", tuple(counts[bins].tolist()), tuple(centers.tolist())),),
                      x_label=label, y_label="images"),
                Chart("Suspects", (Series("fraction", tuple(flagged.tolist()),
                                          tuple(float(i + 1) for i in range(len(flagged)))),),
                      x_label="round with exports", y_label="fraction of images"),
                TableFigure("Quantiles", ("quantile", f"mean {self.score}"),
                            tuple((q, histogram_quantile(counts, q)) for q in quantiles)),
            ),
        )  # fmt: skip


def sample_scores(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    probes: int,
    step: float,
    squared: bool = True,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Curvature, loss and norm of the input gradient of each image, independent of the batches that training uses.

    Args:
        model: in eval mode, on the CPU.
        images: uint8 [n, channels, height, width].
        labels: int64 [n].
        probes: number of directions v for each image.
        step: h of the finite difference.
        squared: average ||H v||^2, which estimates Tr(H^2), and not ||H v||.

    Returns:
        float64 [n] for each of "curvature", "loss" and "gradient".
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in SCORES}
    for chunk, targets in zip(torch.split(images, _CHUNK), torch.split(labels, _CHUNK), strict=True):
        x = to_float(chunk)
        loss, gradient = input_gradient(model, x, targets)
        total = torch.zeros(len(x), dtype=torch.float64)
        for _ in range(probes):
            v = torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
            _, shifted = input_gradient(model, x + step * v, targets)
            norm = ((shifted - gradient).double() / step).flatten(1).norm(dim=1)
            total += norm**2 if squared else norm
        parts["curvature"].append(total / probes)
        parts["loss"].append(loss.double())
        parts["gradient"].append(gradient.double().flatten(1).norm(dim=1))
    empty = torch.zeros(0, dtype=torch.float64)
    return {
        name: torch.cat([empty, *found]).nan_to_num(_LARGEST, _LARGEST, 0).clamp(max=_LARGEST)
        for name, found in parts.items()
    }


def input_gradient(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each image [n], and its gradient with respect to that image, of x's shape.

    The losses are summed, not averaged, so that the gradient of an image does not depend on the size of the batch.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        losses = F.cross_entropy(model(x), labels, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), gradient


def histogram(scores: Tensor) -> Tensor:
    """Return the number of scores [n] in each logarithmic bin: float64 [BINS]. Histograms of several clients add up."""
    decades = scores.double().clamp(min=10.0**_LOWEST).log10()
    bins = ((decades - _LOWEST) * BINS_PER_DECADE).floor().clamp(0, BINS - 1).long()
    return torch.bincount(bins, minlength=BINS).double()


def histogram_quantile(counts: Tensor, quantile: float) -> float:
    """Return the score below which this fraction of the counted scores [BINS] lies, interpolated within its bin."""
    below = counts.cumsum(0)
    target = quantile * float(below[-1])
    bin_ = min(int((below < target).sum()), BINS - 1)
    inside = (target - float(below[bin_] - counts[bin_])) / max(float(counts[bin_]), 1e-12)
    return float(10.0 ** (_LOWEST + (bin_ + min(1.0, max(0.0, inside))) / BINS_PER_DECADE))


def data_digest(data: LabeledImages) -> bytes:
    """Identifies images and labels, so that scores of other data are not continued."""
    digest = hashlib.sha256(str(list(data.images.shape)).encode())
    for part in (data.images, data.labels):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.digest()
