"""Measures of the similarity of reconstructions to the client's images.

Reconstructions have no order, so they are assigned to the images one to one with the smallest total squared error
(Kuhn 1955, by scipy). All measures are of pixels in [0, 1]: PSNR, SSIM (Wang et al. 2004) and LPIPS (Zhang et al.
2018), computed by torchmetrics.

A blurry digit is similar to some digit. An image therefore counts as recovered only if its reconstruction is more
similar to it than any reconstruction is to any image outside the batch. An attacker who knows nothing about the batch
passes this test, for each image, with a probability of about one over the number of other images: `Scores.chance`.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import tofu.models.torchvision_compat  # noqa: F401  # before torchmetrics, which imports torchvision
from tofu.imports import from_extra

with from_extra("attacks"):
    from torchmetrics.functional.image import structural_similarity_index_measure

BEST_PSNR = 100.0
"""Upper limit of the PSNR, in dB: larger values only reflect float32 rounding."""

LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
LPIPS_SIDE = 64
"""Smaller images are scaled up: LPIPS's network halves them five times."""


@dataclass(frozen=True)
class Scores:
    """The measures of one attack's reconstructions; means are over the images with an assigned reconstruction.

    Attributes:
        psnr: mean over images, in dB.
        ssim, mse: means.
        lpips: mean, or None if its weights are not on this machine.
        recovered: fraction of the images recovered, by the calibrated threshold.
        threshold: PSNR above which an image counts as recovered.
        chance: probability that reconstructions which know nothing about the batch recover as many images.
        labels: fraction of correct labels, in any order; None if the attack infers no labels.
        labels_guess: the same fraction for a guess of equally many labels of each class.
        pairs: for each image, the number of its reconstruction, or -1.
    """

    psnr: float | None
    ssim: float | None
    mse: float | None
    lpips: float | None
    recovered: float | None
    threshold: float | None
    chance: float | None
    labels: float | None
    labels_guess: float | None
    pairs: tuple[int, ...]


def score(
    images: Tensor | None,
    labels: Tensor | None,
    *,
    truth: Tensor,
    true_labels: Tensor,
    others: Tensor,
    classes: int,
    perceptual: nn.Module | None = None,
) -> Scores:
    """Compare a reconstruction with the truth.

    Args:
        images: float [k, channels, height, width] in [-1, 1], or None.
        labels: int64 [k], or None.
        truth: float [n, channels, height, width] in [-1, 1].
        true_labels: int64 [n].
        others: images that the update was not computed from, as `truth`.
        classes: number of classes.
        perceptual: of `lpips_network`.
    """
    right = None if labels is None else _overlap(labels, true_labels)
    guess = None if labels is None else _uniform_guess(true_labels, classes)
    if images is None:
        return Scores(None, None, None, None, None, None, None, right, guess, (-1,) * len(truth))
    found, true, rest = (_unit(part) for part in (images, truth, others))
    errors = _squared_errors(true, found)
    rows, columns = linear_sum_assignment(errors.numpy())
    pairs = [-1] * len(true)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        pairs[row] = column
    matched = errors[rows, columns]
    each = _psnr(matched)
    threshold = float(_psnr(_squared_errors(rest, found)).max()) if len(rest) else 0.0
    passed = int((each > threshold).sum())
    return Scores(
        psnr=float(each.mean()),
        ssim=statistics.fmean(_ssim(found[c], true[r]) for r, c in zip(rows, columns, strict=True)),
        mse=float(matched.mean()),
        lpips=None if perceptual is None else _lpips(perceptual, found[columns], true[rows]),
        recovered=passed / len(true),
        threshold=threshold,
        # Without knowledge all images are alike: the `passed` nearest of all are then of the batch as in a fair draw.
        chance=math.comb(len(true), passed) / math.comb(len(true) + len(rest), passed),
        labels=right,
        labels_guess=guess,
        pairs=tuple(pairs),
    )


def lpips_network() -> nn.Module | None:
    """LPIPS on AlexNet, or None if torch's cache does not contain AlexNet's weights: nothing is downloaded."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS).is_file():
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()


def _unit(images: Tensor) -> Tensor:
    """Scale pixels from [-1, 1] to [0, 1], clamped; values that are not finite become gray."""
    return (torch.nan_to_num(images.detach().float(), nan=0.0) / 2 + 0.5).clamp(0, 1)


def _squared_errors(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared error of every pair: float64 [len(a), len(b)]."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / a.shape[1]


def _psnr(errors: Tensor) -> Tensor:
    """Return the PSNR for mean squared errors of pixels in [0, 1], as torchmetrics defines it,
    for many pairs at once.
    """
    return (-10 * torch.log10(errors.clamp_min(1e-30))).clamp_max(BEST_PSNR)


def _ssim(found: Tensor, true: Tensor) -> float:
    # The Gaussian window of 11 pixels is padded by reflection, which needs images larger than its half.
    small = min(true.shape[-2:]) < 7
    value = structural_similarity_index_measure(
        found.unsqueeze(0), true.unsqueeze(0), data_range=1.0, gaussian_kernel=not small, kernel_size=3 if small else 11
    )
    assert isinstance(value, Tensor)
    return float(value)


def _lpips(network: nn.Module, found: Tensor, true: Tensor) -> float:
    side = max(LPIPS_SIDE, *true.shape[-2:])
    both = [
        nn.functional.interpolate(part.expand(-1, 3, -1, -1), size=(side, side), mode="bilinear", align_corners=False)
        for part in (found, true)
    ]
    with torch.no_grad():
        return float(network(*both))


def _overlap(labels: Tensor, truth: Tensor) -> float:
    classes = int(max(labels.max(), truth.max())) + 1
    counts = [torch.bincount(part, minlength=classes) for part in (labels, truth)]
    return float(torch.minimum(*counts).sum()) / len(truth)


def _uniform_guess(truth: Tensor, classes: int) -> float:
    counts = torch.bincount(truth, minlength=classes).double()
    return float(counts.clamp_max(len(truth) / classes).sum()) / len(truth)
