"""Inverting Gradients against a second implementation of equation 4, written plainly and apart from ours."""

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.inverting import Inverting
from attacks.metrics import score
from tests.attacks.conftest import Look
from tofu.data import to_float


def plain_inversion(model: nn.Module, wanted: list[Tensor], labels: Tensor, start: Tensor, *, steps: int) -> Tensor:
    """1 - cosine + 1e-4 TV by hand-written Adam on signs, x in [-1, 1], the best point seen."""
    x, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    best, least = start, float("inf")
    weights = list(model.parameters())
    for t in range(1, steps + 1):
        x.requires_grad_(True)
        grads = torch.autograd.grad(F.cross_entropy(model(x), labels), weights, create_graph=True)
        a, b = torch.cat([g.reshape(-1) for g in grads]), torch.cat([g.reshape(-1) for g in wanted])
        tv = (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()
        cost = 1 - a.dot(b) / (a.norm() * b.norm()) + 1e-4 * tv
        sign = torch.autograd.grad(cost, x)[0].sign()
        x = x.detach()
        if cost.item() < least:
            best, least = x.clone(), cost.item()
        rate = 0.1 * 0.1 ** sum(t > int(steps * share) for share in (3 / 8, 5 / 8, 7 / 8))
        mean, square = 0.9 * mean + 0.1 * sign, 0.999 * square + 0.001 * sign**2
        x = (x - rate * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)).clamp(-1, 1)
    return best


def test_two_implementations_agree_within_2_db(look: Look) -> None:
    steps, ours, theirs = 300, [], []
    seen, truth, others = look("exact", batch=2, know_labels=True)
    wanted = [seen.gradient[name] for name in seen.network.param_spec.parameters]
    for seed in range(3):
        attack = Inverting(restarts=1, max_evals=steps)
        found = attack.run(seen, generator=torch.Generator().manual_seed(seed)).images
        start = 0.3 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(100 + seed))
        plain = plain_inversion(seen.network.model, wanted, truth.labels, start, steps=steps)
        for images, kept in ((found, ours), (plain, theirs)):
            scores = score(images, None, truth=to_float(truth.images), true_labels=truth.labels,
                           others=to_float(others.images), classes=truth.classes)  # fmt: skip
            assert scores.psnr is not None
            kept.append(scores.psnr)
    assert abs(statistics.fmean(ours) - statistics.fmean(theirs)) < 2
    assert min(*ours, *theirs) > 15
