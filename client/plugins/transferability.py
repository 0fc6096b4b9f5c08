"""Input quantizers, attacks on ensembles and the transferability metric of TREND.

Ravikumar, Kodge, Garg, Roy, "TREND: Transferability-based Robust ENsemble Design", IEEE TAI 4(3), 2023, arXiv
2008.01524. Images are in [-1, 1]; attack strengths are given on the paper's scale, for images in [0, 1].
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tofu.errors import SettingError

QUANTIZERS = ("fp", "1", "2", "4", "6", "8", "halftone")
"""Names of input quantizers: full precision, bits per pixel, or a binary halftone."""

ATTACKS = ("average", "sign", "unanimous")

_HALFTONE = ((-1.0, -2.0, -1.0), (-2.0, 16.0, -2.0), (-1.0, -2.0, -1.0))


def quantize(images: Tensor, bits: int) -> Tensor:
    """Mid-rise quantization of images in [-1, 1] to 2^bits levels; the gradient passes straight through (BPDA)."""
    width = 2.0 / 2**bits
    levels = ((images.detach() + 1) / width).floor().clamp(0, 2**bits - 1)
    quantized: Tensor = levels * width + width / 2 - 1
    return quantized + _zero_with_gradient(images)


def halftone(images: Tensor) -> Tensor:
    """Return the sign, -1 or 1, of images [n, c, h, w] after the paper's 3x3 filter;
    the gradient is that of a sigmoid.
    """
    channels = images.shape[1]
    kernel = images.new_tensor(_HALFTONE).expand(channels, 1, 3, 3)
    filtered = F.conv2d(images, kernel, padding=1, groups=channels)
    return (filtered.detach() >= 0).to(images) * 2 - 1 + _zero_with_gradient(2 * torch.sigmoid(filtered))


def _zero_with_gradient(values: Tensor) -> Tensor:
    return values - values.detach()


@dataclass(frozen=True)
class InputQuantizer:
    """A forward pre-hook that quantizes a model's images.

    Args:
        kind: one of `QUANTIZERS`.
    """

    kind: str

    def __call__(self, images: Tensor) -> Tensor:
        if self.kind == "fp":
            return images
        return halftone(images) if self.kind == "halftone" else quantize(images, int(self.kind))

    def hook(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (self(inputs[0]),)


def attack(
    models: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    combine: str = "average",
) -> Tensor:
    """Projected gradient descent in the maximum norm, with a random start, on one model or on an ensemble.

    Args:
        models: in eval mode; quantizers inside them are passed straight through.
        images: float32 [n, channels, height, width] in [-1, 1].
        labels: int64 [n].
        epsilon, step_size: largest change of a pixel, in all and in one step, for images in [0, 1].
        combine: average: the sign of the sum of the members' gradients (D-AG in the paper); sign: the sign of the sum
            of their signs (A-GD); unanimous: only where all signs agree (U-GD).

    Returns:
        Adversarial images of the same shape, in [-1, 1].
    """
    if combine not in ATTACKS:
        raise ValueError(f"combine is {combine!r}, expected one of {', '.join(ATTACKS)}")
    low, high = (images - 2 * epsilon).clamp(min=-1), (images + 2 * epsilon).clamp(max=1)
    noise = torch.rand(images.shape, generator=generator).to(images) * 2 - 1
    adversarial = torch.clamp(images + 2 * epsilon * noise, low, high)
    for _ in range(steps):
        gradients = torch.stack([_gradient(model, adversarial, labels) for model in models])
        adversarial = torch.clamp(adversarial + 2 * step_size * _direction(gradients, combine), low, high)
    return adversarial


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each image's own cross-entropy."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        loss = F.cross_entropy(model(images), labels, reduction="sum")
        return torch.autograd.grad(loss, images)[0]


def _direction(gradients: Tensor, combine: str) -> Tensor:
    if combine == "average":
        return gradients.sum(0).sign()
    signs = gradients.sign().sum(0)
    return signs.sign() if combine == "sign" else (signs / len(gradients)).trunc()


@dataclass(frozen=True)
class TransferCounts:
    """Numbers of images, which add up over clients; float64.

    Attributes:
        right: [targets, sources], classified correctly by both models.
        fooled: [targets, sources, strengths], of these, misclassified by the source after an attack on the source.
        transferred: [targets, sources, strengths], of these, misclassified by the target, too.
    """

    right: Tensor
    fooled: Tensor
    transferred: Tensor

    @property
    def rates(self) -> Tensor:
        """Fraction of the source's adversarial images that fool the target: [targets, sources, strengths]."""
        return self.transferred / self.fooled.clamp(min=1)


@torch.no_grad()
def count_transfers(
    models: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    epsilons: Sequence[float],
    steps: int,
    generator: torch.Generator,
) -> TransferCounts:
    """Attack every model at every strength, and count which of the others are fooled. Steps are 2.5 epsilon / steps."""
    right = torch.stack([model(images).argmax(1) == labels for model in models])
    both = right[:, None] & right[None]
    fooled, transferred = [], []
    for source, epsilon in itertools.product(range(len(models)), epsilons):
        adversarial = attack([models[source]], images, labels, epsilon=epsilon, steps=steps,
                             step_size=2.5 * epsilon / steps, generator=generator)  # fmt: skip
        wrong = torch.stack([model(adversarial).argmax(1) != labels for model in models])
        candidates = both[:, source] & wrong[source]
        fooled.append(candidates.sum(1))
        transferred.append((candidates & wrong).sum(1))
    shape = (len(models), len(epsilons), len(models))
    matrices = [torch.stack(counts).view(shape).permute(2, 0, 1).double() for counts in (fooled, transferred)]
    return TransferCounts(both.sum(2).double(), *matrices)


@dataclass(frozen=True)
class TransferFit:
    """f(epsilon) = a (1 - exp(b epsilon)), with a >= 0 and b <= 0."""

    a: float
    b: float

    def __call__(self, epsilon: float) -> float:
        return float(-self.a * torch.expm1(torch.tensor(self.b * epsilon, dtype=torch.float64)))


def fit_transfers(epsilons: Sequence[float], counts: Sequence[float], limit: float) -> TransferFit:
    """Least-squares fit of `TransferFit` to counts at attack strengths.

    Args:
        limit: upper bound of a: the number of images that could have been counted. Without it, a and b are not
            determined by counts that grow linearly.
    """
    import numpy as np
    from scipy.optimize import least_squares

    if max(counts) <= 0 or limit <= 0:
        return TransferFit(0.0, 0.0)
    strengths, observed = np.array(epsilons), np.array(counts)
    start = (min(limit, max(counts)), -1 / float(np.median(strengths)))
    found = least_squares(
        lambda p: -p[0] * np.expm1(p[1] * strengths) - observed, start, bounds=((0, -1e4), (limit * 1.001, 0)),
        x_scale=np.abs(start),
    )  # fmt: skip
    return TransferFit(float(found.x[0]), float(found.x[1]))


def transferability(counts: TransferCounts, epsilons: Sequence[float], epsilon: float) -> Tensor:
    """Return the metric TM[target, source] = f_ij / f_jj at this strength: float64 [models, models]; 0 where f_jj is 0.

    f_ij is fitted to the counts from source j to target i, f_jj to those of the source itself.
    """
    members = range(len(counts.right))
    fitted = torch.zeros(len(members), len(members), dtype=torch.float64)
    for i, j in itertools.product(members, members):
        fit = fit_transfers(epsilons, counts.transferred[i, j].tolist(), float(counts.right[i, j]))
        fitted[i, j] = fit(epsilon)
    own = fitted.diag()
    return torch.where(own > 0, fitted / own.clamp(min=torch.finfo(torch.float64).tiny), 0)


def choose_ensemble(metric: Tensor, size: int) -> tuple[int, ...]:
    """Return the members [models] among which the mean of the metric between different ones is least; the first if
    equal.
    """

    def mean(members: tuple[int, ...]) -> float:
        pairs = list(itertools.permutations(members, 2))
        return sum(float(metric[pair]) for pair in pairs) / max(1, len(pairs))

    return min(itertools.combinations(range(len(metric)), size), key=mean)


def vote(logits: Tensor) -> Tensor:
    """Majority vote of members' logits [members, n, classes]: log-probabilities [n, classes].

    A class's probability is the number of its votes plus the members' mean probability, normalized. Mean probabilities
    therefore decide between classes with equally many votes only.
    """
    members, _, classes = logits.shape
    votes = F.one_hot(logits.argmax(2), classes).to(logits).sum(0)
    scores = (votes + logits.softmax(2).mean(0)) / (members + 1)
    return scores.clamp(min=torch.finfo(logits.dtype).tiny).log()


def named_quantizers(setting: str, text: str) -> tuple[str, ...]:
    """Return the names of quantizers, separated by commas.

    Raises SettingError if there are fewer than two, or an unknown one.
    """
    names = tuple(name.strip() for name in text.split(","))
    if len(names) < 2 or not set(names) <= set(QUANTIZERS):
        raise SettingError(setting, text, f"two or more of {', '.join(QUANTIZERS)}, separated by commas")
    return names
