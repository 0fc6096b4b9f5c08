"""How near a reconstruction came to the client's images.

Reconstructions come in no order, so they are assigned to the images one to one, with the smallest total squared error
(Kuhn 1955, by scipy). All measures are of pixels in [0, 1]: PSNR, SSIM (Wang et al. 2004) and LPIPS (Zhang et al. 2018)
by torchmetrics.

Any blurry digit is near to some digit. So an image only counts as recovered where its reconstruction is nearer to it
than any of the reconstructions is to any image that was *not* in the batch: an attacker who knew nothing of the batch
would pass with a chance of about one in the number of those others.
"""

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
"""What a perfect reconstruction counts as, in dB: beyond it there is only float32 rounding."""

LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
LPIPS_SIDE = 64
"""Smaller images are scaled up: LPIPS's network halves them five times."""


@dataclass(frozen=True)
class Scores:
    """Of one reconstruction; means are over the images that have one assigned.

    Attributes:
        psnr: dB, mean of the images' own.
        ssim, mse: means.
        lpips: mean, or None where its weights are not on this machine.
        recovered: fraction of the images recovered, by the calibrated threshold.
        threshold: PSNR that an image had to pass for that.
        labels: fraction of the labels that are right, in any order; None if the attack infers no labels.
        pairs: for each image, the number of its reconstruction, or -1.
    """

    psnr: float | None
    ssim: float | None
    mse: float | None
    lpips: float | None
    recovered: float | None
    threshold: float | None
    labels: float | None
    pairs: tuple[int, ...]


def score(
    images: Tensor | None,
    labels: Tensor | None,
    *,
    truth: Tensor,
    true_labels: Tensor,
    others: Tensor,
    perceptual: nn.Module | None = None,
) -> Scores:
    """Compare a reconstruction with the truth.

    Args:
        images: float [k, channels, height, width] in [-1, 1], or None.
        labels: int64 [k], or None.
        truth: float [n, channels, height, width] in [-1, 1].
        true_labels: int64 [n].
        others: images that the update was not made of, as `truth`.
        perceptual: of `lpips_network`.
    """
    right = None if labels is None else _overlap(labels, true_labels)
    if images is None:
        return Scores(None, None, None, None, None, None, right, (-1,) * len(truth))
    found, true, rest = (_unit(part) for part in (images, truth, others))
    errors = _squared_errors(true, found)
    rows, columns = linear_sum_assignment(errors.numpy())
    pairs = [-1] * len(true)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        pairs[row] = column
    matched = errors[rows, columns]
    each = _psnr(matched)
    threshold = float(_psnr(_squared_errors(rest, found)).max()) if len(rest) else 0.0
    return Scores(
        psnr=float(each.mean()),
        ssim=statistics.fmean(_ssim(found[c], true[r]) for r, c in zip(rows, columns, strict=True)),
        mse=float(matched.mean()),
        lpips=None if perceptual is None else _lpips(perceptual, found[columns], true[rows]),
        recovered=float((each > threshold).sum()) / len(true),
        threshold=threshold,
        labels=right,
        pairs=tuple(pairs),
    )


def lpips_network() -> nn.Module | None:
    """LPIPS on AlexNet, where torch's cache holds AlexNet's weights already; never downloads them."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS).is_file():
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()


def _unit(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clamped; what is not finite is grey."""
    return (torch.nan_to_num(images.detach().float(), nan=0.0) / 2 + 0.5).clamp(0, 1)


def _squared_errors(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of every pair: float64 [len(a), len(b)]."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / a.shape[1]


def _psnr(errors: Tensor) -> Tensor:
    """Of mean squared errors, the peak being 1 (torchmetrics' definition, for many pairs at once)."""
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
