"""Out-of-distribution detection with an auxiliary class: one forward pass, and a threshold as the only stored value.

Ravikumar, Kodge, Garg, Roy, "Exploring Vicinal Risk Minimization for Lightweight Out-of-Distribution Detection", arXiv
2012.08398: besides its K classes the network has an auxiliary class for unknown inputs, which it learns from
images mixed with noise, x = l x_i + (1 - l) n with target l e_y + (1 - l) e_{K+1}. No outside images are needed, so the
auxiliary class means the same on all clients, even if their own classes differ, and its weights can be averaged.

Intra-class mixup (a partner of the same class, the label unchanged) is that paper's and that of "Intra-Class Mixup for
Out-of-Distribution Detection", IEEE Access 2023, which scores by the angle between the features and the last layer's
weights. n is Gaussian, as in the first paper. The papers do not say how l is drawn; here it is uniform.

Ours: the clients calibrate the threshold together. Each client counts the scores of its own images at the round's
global weights in a histogram. From the sum the server derives the score that only a chosen fraction of the images
reach. For the final weights, at which no client has scored, the threshold is derived from the server's held-out images.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.plugins.round_start import at_weights, subsample
from tofu.data import LabeledImages, to_float
from tofu.errors import SettingError
from tofu.plugins import Batch, Export, Plugin, PluginState, Prediction, RoundContext, SumSpec, option, plugin_registry
from tofu.weights import Weights, weights_of

BINS = 2000
"""Number of bins of the histogram; each covers 0.04 of the auxiliary class's log-odds."""

_AXES: Mapping[str, tuple[float, float]] = {"auxiliary": (-40.0, 40.0), "angle": (0.0, 2.0), "energy": (-50.0, 50.0)}
"""The range of each score, fixed so that histograms add up; scores outside count in the first or last bin."""

_AT_A_TIME = 250  # images

_SCORE_HELP = (
    "auxiliary: probability of the class for the unknown; angle: 1 - cosine of the features and the nearest class's "
    "weights; energy: -logsumexp of the classes' logits"
)


class WiderHead(nn.Linear):
    """A linear layer with one output more than the one it replaces: the same weights, and zeros for the new output."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features + 1, bias=head.bias is not None, device="meta")
        self.weight = nn.Parameter(F.pad(head.weight.detach(), (0, 0, 0, 1)))
        if head.bias is not None:
            self.bias = nn.Parameter(F.pad(head.bias.detach(), (0, 1)))


@plugin_registry.register("ood")
@dataclass
class OutOfDistribution(Plugin):
    """Adds the auxiliary class to a model, trains it, and marks out-of-distribution inputs.

        plugins = make_plugins("ood", "ood.false-alarms=0.01")
        model = plugins.setup(build_model("cnn", data.shape), RoundContext(data.shape))
        train_locally(model, data, config, generator=generator, plugins=plugins)
        plugins.reduce(plugins.export(model).sums, len(data))
        prediction = plugins.predict(model.eval(), images)
        unknown = plugins[0].unknown(prediction.score)

    `broadcast["threshold"]` is the threshold of the last round's global weights, from the clients' images. With a
    run's final weights, their own threshold is saved, from the server's images.
    """

    changes_head = True
    mixes_labels = True

    fraction: float = option(0.5, "noise-mixed images added to a batch, as a fraction of it", gt=0, le=1)
    noise: float = option(0.5, "standard deviation of the noise, images being in [-1, 1]", gt=0, le=10)
    intra_class: bool = option(False, "mix every image with another of its class in the batch")
    score: str = option("auxiliary", _SCORE_HELP, choices=tuple(_AXES))
    false_alarms: float = option(0.05, "fraction of images like the clients' own that may be flagged", gt=0, le=0.5)
    images: int = option(1000, "most images of a client, or of the server, that calibrate it", ge=1, le=1_000_000)

    _classes: int = field(default=0, init=False, repr=False)
    _start: Weights = field(default_factory=dict, init=False, repr=False)
    _scores: Tensor = field(default_factory=lambda: torch.zeros(0), init=False, repr=False)

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        """Widen the head: the last linear layer, which must give the logits.

        Raises:
            SettingError: the model does not end in a linear layer.
        """
        self._classes = context.shape.classes
        if any(isinstance(module, WiderHead) for module in model.modules()):
            return model
        heads = [name for name, module in model.named_modules()
                 if isinstance(module, nn.Linear) and module.out_features == context.shape.classes]  # fmt: skip
        if not heads:
            raise SettingError("plugins", self.name, "a model that ends in a linear layer, for the class it adds")
        parent, _, child = heads[-1].rpartition(".")
        old = model.get_submodule(heads[-1])
        assert isinstance(old, nn.Linear)
        setattr(model.get_submodule(parent), child, WiderHead(old).train(old.training))
        return model

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        return {"histogram": SumSpec((BINS,), float(self.images))}

    def on_train_begin(self, model: nn.Module, data: LabeledImages) -> None:
        self._start = weights_of(model)

    def on_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        images, targets = batch.images, batch.targets
        if targets.dim() == 1:
            targets = F.one_hot(targets, self._classes).float()
        targets = F.pad(targets, (0, self._classes + 1 - targets.shape[1]))
        rows = torch.randperm(len(images), generator=generator)[: max(1, round(self.fraction * len(images)))]
        unknown, unknown_targets = mix_with_noise(images[rows], targets[rows], self.noise, generator)
        if self.intra_class:
            images = mix_within_classes(images, targets.argmax(1), generator)
        added = torch.full((len(unknown),), -1)
        weights = None if batch.weights is None else torch.cat([batch.weights, batch.weights[rows]])
        return Batch(
            torch.cat([images, unknown]), torch.cat([targets, unknown_targets]), torch.cat([batch.ids, added]), weights
        )

    def on_task_end(self, model: nn.Module, data: LabeledImages, final: bool) -> None:
        with at_weights(model, self._start):
            self._scores = self._scores_of(model, data)

    def export(self) -> Export:
        metrics = {"false-alarms": float(self.unknown(self._scores).float().mean())} if self.broadcast else {}
        return Export({"histogram": histogram(self._scores, self.score)}, metrics)

    def reduce(self, sums: Mapping[str, Tensor], examples: int, broadcast: PluginState) -> PluginState:
        return {"threshold": threshold(sums["histogram"], self.score, self.false_alarms)}

    def calibrate(self, model: nn.Module, data: LabeledImages) -> PluginState:
        counts = histogram(self._scores_of(model, data), self.score)
        return {"threshold": threshold(counts, self.score, self.false_alarms)}

    def predict(self, model: nn.Module, images: Tensor) -> Prediction:
        logits, score = self._scored(model, images)
        return Prediction(logits, score, self.unknown(score))

    def unknown(self, score: Tensor) -> Tensor:
        """Return which of these scores mark out-of-distribution images: bool [n]; None before a calibration."""
        line = self.broadcast.get("threshold")
        return score >= line if isinstance(line, float) else torch.zeros_like(score, dtype=torch.bool)

    def _scores_of(self, model: nn.Module, data: LabeledImages) -> Tensor:
        """Return the scores [n] of at most `images` of the images."""
        batches = torch.split(subsample(data, self.images), _AT_A_TIME)
        return torch.cat([self._scored(model, to_float(batch))[1] for batch in batches])

    def _scored(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, K] and scores [n], in one forward pass."""
        head = next(module for module in model.modules() if isinstance(module, WiderHead))
        features: list[Tensor] = []
        with head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0])):
            outputs: Tensor = model(images)
        logits = outputs[:, :-1]
        if self.score == "energy":
            return logits, -logits.logsumexp(1)
        if self.score == "angle":
            cosines = F.normalize(features[0], dim=1) @ F.normalize(head.weight[:-1], dim=1).T
            return logits, 1 - cosines.max(1).values
        return logits, torch.sigmoid(outputs[:, -1] - logits.logsumexp(1))


def mix_with_noise(images: Tensor, targets: Tensor, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return l x + (1 - l) n, cut to [-1, 1], and l y + (1 - l) e_{K+1}, for l uniform in [0, 1) and n Gaussian.

    Args:
        images: float32 [n, channels, height, width].
        targets: float32 [n, K + 1].
        noise: standard deviation of n.
    """
    weights = torch.rand(len(images), generator=generator)
    n = noise * torch.randn(images.shape, generator=generator)
    mixed = torch.lerp(n, images, weights.view(-1, 1, 1, 1)).clamp(-1, 1)
    last = F.one_hot(torch.tensor(targets.shape[1] - 1), targets.shape[1]).float()
    return mixed, torch.lerp(last.expand_as(targets), targets, weights[:, None])


def mix_within_classes(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return l x_i + (1 - l) x_j, where j is a random image of i's class in the batch (perhaps i itself), l uniform."""
    partner = torch.arange(len(labels))
    for label in torch.unique(labels):
        rows = (labels == label).nonzero().flatten()
        partner[rows] = rows[torch.randperm(len(rows), generator=generator)]
    weights = torch.rand(len(images), generator=generator).view(-1, 1, 1, 1)
    return torch.lerp(images[partner], images, weights)


def histogram(scores: Tensor, kind: str) -> Tensor:
    """Return the histogram of scores [n] over the range of their kind: float64 [BINS]; histograms can be added."""
    low, high = _AXES[kind]
    position = torch.logit(scores.double()) if kind == "auxiliary" else scores.double()
    bins = ((position - low) / (high - low) * BINS).floor().clamp(0, BINS - 1).long()
    return torch.bincount(bins, minlength=BINS).double()


def threshold(counts: Tensor, kind: str, false_alarms: float) -> float:
    """Return the lowest score, among the edges of the bins,
    that at most this fraction of the counted scores [BINS] reach.
    """
    low, high = _AXES[kind]
    reach = counts.flip(0).cumsum(0).flip(0)  # how many reach a bin's lower edge
    bin_ = int((reach > false_alarms * reach[0]).sum())  # reach falls, so these are the first
    edge = low + (high - low) * bin_ / BINS
    return float(torch.tensor(edge, dtype=torch.float64).sigmoid()) if kind == "auxiliary" else edge
