"""A simulated client, and two searches for images that give its update.

A search minimizes a distance between the update of candidate images and the observed one. It needs second derivatives
of the network, in float64 for L-BFGS, whose line search would otherwise fail because of rounding.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.base import Reconstruction, Watch
from attacks.observation import Observation
from tofu.codec.search import lbfgs

Tensors = tuple[Tensor, ...]

SOLVED = 1e-13
"""Loss at which a search stops: the fraction of the update's power that is lost in float32 rounding."""

NEAR = 1e-5
"""Loss below which further evaluations are better spent on this descent than on another start."""

NOISE = 0.3
"""Standard deviation of the noise that a search starts from, for pixels in [-1, 1]."""


class SimulatedClient:
    """Gradients and local steps that are differentiable with respect to the images.

    Args:
        observation: its network is copied and put into training mode, so BatchNorm uses statistics of the batch.
    """

    def __init__(self, observation: Observation, dtype: torch.dtype = torch.float64) -> None:
        network = observation.network
        self._observation, self.dtype = observation, dtype
        self.model = copy.deepcopy(network.model).to(dtype).train()
        self._names = list(network.param_spec.parameters)
        self.base: Tensors = tuple(network.base[name].to(dtype) for name in self._names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self._observation.network.shape.chw

    def target(self, *, as_gradient: bool = False) -> Tensors:
        """Return the observed update, or the gradient of its single step, by parameter."""
        seen = self._observation.gradient if as_gradient else self._observation.update
        return tuple(seen[name].to(self.dtype) for name in self._names)

    def loss(self, images: Tensor, labels: Tensor, weights: Tensors | None = None) -> Tensor:
        """Return the mean cross-entropy; labels are int64 [n] or probabilities [n, classes]."""
        parameters = dict(zip(self._names, weights or self.base, strict=True))
        # The fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            logits = functional_call(self.model, parameters, (images,))
        return F.cross_entropy(logits, labels)

    def gradient(self, images: Tensor, labels: Tensor, weights: Tensors | None = None) -> Tensors:
        """Return the gradient with respect to the weights, which can be differentiated again."""
        at = tuple(w.detach().requires_grad_() for w in self.base) if weights is None else weights
        return torch.autograd.grad(self.loss(images, labels, at), at, create_graph=True, materialize_grads=True)

    def update(self, images: Tensor, labels: Tensor, batches: Sequence[Tensor], lr: float) -> Tensors:
        """Return the update of one step of SGD for each batch (int64 rows of the images), in order."""
        weights = tuple(w.detach().requires_grad_() for w in self.base)
        for rows in batches:
            grads = self.gradient(images[rows], labels[rows], weights)
            weights = tuple(w - lr * g for w, g in zip(weights, grads, strict=True))
        return tuple(w - b for w, b in zip(weights, self.base, strict=True))

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Return random images [count, channels, height, width] to start from."""
        return NOISE * torch.randn(count, *self.image_shape, generator=generator, dtype=self.dtype)


def relative_distance(found: Tensors, target: Tensors) -> Tensor:
    """|found - target|^2 / |target|^2 over all tensors together."""
    power = _total(t.square() for t in target)
    return _total((f - t).square() for f, t in zip(found, target, strict=True)) / power.clamp_min(1e-30)


def angular_distance(found: Tensors, target: Tensors) -> Tensor:
    """Return 1 - cosine over all tensors together."""
    inner = _total(f * t for f, t in zip(found, target, strict=True))
    norms = _total(f.square() for f in found) * _total(t.square() for t in target)
    return 1 - inner / norms.clamp_min(1e-30).sqrt()


def total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighboring pixels, down and across."""
    down, across = images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]
    return down.abs().mean() + across.abs().mean()


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack([part.sum() for part in parts]).sum()


@dataclass(frozen=True)
class Found:
    """The best point of a search, its loss, and the number of evaluations of the whole search."""

    point: Tensor
    loss: float
    evals: int


def search_lbfgs(loss: Callable[[Tensor], Tensor], starts: Callable[[], Tensor], *, restarts: int, max_evals: int,
                 watch: Watch) -> Found:  # fmt: skip
    """Minimize by L-BFGS from several starts (float64 vectors), with at most restarts * max_evals evaluations.

    The search stops once it is solved. A descent that is not close to a solution after `max_evals` evaluations is
    replaced by the next start; one that is continues with the remaining evaluations.
    """
    best = Found(starts(), math.inf, 0)
    made = 0
    begin = best.point

    def objective(vector: Tensor) -> tuple[float, Tensor]:
        nonlocal best, made
        point = vector.detach().requires_grad_()
        value = loss(point)
        (slope,) = torch.autograd.grad(value, point)
        made += 1
        number = float(value.detach())
        if not math.isfinite(number):
            return math.inf, torch.zeros_like(vector)
        if number < best.loss:
            best = Found(vector.detach().clone(), number, made)
        return number, slope

    planned = restarts * max_evals
    for restart in range(restarts):
        if restart:
            begin = starts()
        before = made
        for _ in lbfgs(objective, begin):
            enough = best.loss < SOLVED or made >= planned or (made - before >= max_evals and best.loss > NEAR)
            if enough or not watch.go_on(made, planned, best.loss):
                break
        if best.loss < NEAR or made >= planned or not watch.go_on():
            break
    return Found(best.point, best.loss, made)


def search_images(client: SimulatedClient, labels: Tensor, loss: Callable[[Tensor], Tensor], generator: torch.Generator,
                  restarts: int, max_evals: int, watch: Watch, starts: Iterator[Tensor] | None = None,
                  ) -> Reconstruction:  # fmt: skip
    """Search by `search_lbfgs` for the images that belong to labels [n].

    Args:
        loss: images [n, channels, height, width] -> scalar.
        starts: images to start from; None starts from noise.
    """
    shape = (len(labels), *client.image_shape)
    images = starts or (client.noise(len(labels), generator) for _ in range(restarts))
    found = search_lbfgs(lambda vector: loss(vector.view(shape)), lambda: next(images).flatten(), restarts=restarts,
                         max_evals=max_evals, watch=watch)  # fmt: skip
    return Reconstruction(found.point.view(shape).float(), labels, found.loss, found.evals)


def search_adam(loss: Callable[[Tensor], Tensor], start: Tensor, *, max_evals: int, step: float, watch: Watch,
                signed: bool = False, bound: float = 1.0) -> Found:  # fmt: skip
    """Minimize by Adam, on the sign of the gradient if `signed`; the point is clamped to [-bound, bound].

    The step size is divided by 10 after 3/8, 5/8 and 7/8 of the steps (Geiping et al. 2020).
    """
    point = start.detach().clone().requires_grad_()
    adam = torch.optim.Adam([point], lr=step)
    milestones = [int(max_evals * fraction) for fraction in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, milestones=milestones, gamma=0.1)
    best = Found(start, math.inf, 0)
    for made in range(1, max_evals + 1):
        value = loss(point)
        (slope,) = torch.autograd.grad(value, point)
        number = float(value.detach())
        if number < best.loss:
            best = Found(point.detach().clone(), number, made)
        if not math.isfinite(number) or not watch.go_on(made, max_evals, best.loss):
            break
        point.grad = slope.sign() if signed else slope
        adam.step()
        schedule.step()
        with torch.no_grad():
            point.clamp_(-bound, bound)
    return Found(best.point, best.loss, made)
