"""TOFU: a weight update as the gradients of a few proxy images.

Garg, Nagaraj, Roy, "TOFU: Towards Obfuscated Federated Updates by Encoding Weight Updates into Gradients from Proxy
Data", arXiv 2201.08494. A client makes n images x_i with labels y_i such that, at the shared weights W, the gradients

    G(x, y) = grad_W sum_i loss(f(x_i; W), y_i)

point along its update U, by gradient descent on x and y. Whoever knows W decodes with one backward pass.

Two modes, and every difference between them is a setting of its own (`ProxySettings`):

- paper: cross-entropy against soft labels on the simplex, a weight per image, one scale, the network as it is. What the
  paper leaves open (optimizer, start, sizes) is our choice.
- smooth (ours, the default): the network's smooth twin (`tofu.codec.surrogate`), free labels (the loss is sum(f(x) * Y) with Y
  unconstrained, so that G is linear in Y and Y can be solved for), a least-squares scale per tensor.

How the derivative through a gradient is taken. The objective's derivative in any proxy variable p is a derivative of
the proxies' loss L(p; W) along a direction R in weight space (the scaled residual), and derivatives commute:

    d/dp <grad_W L(p; W), R>  =  d/de grad_p L(p; W + e R)  at e = 0.

So one evaluation is two ordinary first-order passes, at W and at W + eR, and a difference. It costs less than
differentiating twice and works with layers that have no second derivative (fused attention).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from tofu.codec.lbfgs import lbfgs
from tofu.codec.surrogate import Surrogate
from tofu.compression.quantize import BITS, RowCode, bfloat16_bytes, bfloat16_from
from tofu.device import on_device, open_device
from tofu.errors import PayloadError, SettingError
from tofu.reference_model import ReferenceModel
from tofu.weights import Weights

STEP = 1e-3
"""|e R| / |W|: float32 rounding and the curvature of L each cost about this share of the derivative."""

LABEL_UNIT = 0.05
"""What counts as one unit of a free label for the optimizer, so that pixels and labels move alike (measured)."""

STALL = 10
"""Evaluations over which the explained variance must gain `tolerance`, or the encoder stops."""

SURROGATE_BETAS = (4.0, 1.0, 0.1)
"""What an encode chooses the twin's surrogate_beta from. The steep twin is like the network, and right for updates that are
nearly gradients and for networks with normalization layers. The flat one is nearly linear, and explains more of a small
trained network's updates with their residuals (benchmark `codec`)."""

TRIAL = 30
"""Evaluations of each surrogate_beta before the best is chosen; 12 often chose wrongly. With fewer than twice as many
max_evals in all there is no trial, and the first is taken."""

MAX_STEEPNESS = 1000.0

RUNAWAY = 1000.0
"""Pixels or labels beyond this are brought back before they start another search; noise begins at about 1."""

ADAM_STEP = 0.1

SMALLEST_SIDE = 7
"""Below this a proxy's labels and scales would outweigh its pixels, and an encode would take many proxies."""

ENOUGH = 16
"""Number of proxies beyond which larger ones are as good as more of them."""

UNUSABLE = 10.0
"""What the objective counts as where it overflows; 1 is the worst that a useful point has."""


@dataclass(frozen=True)
class ProxySettings:
    """How to encode; both ends must agree on all but the last six.

    Attributes:
        smooth: differentiate the smooth twin in place of the network.
        surrogate_beta: of the twin's activations; 0 chooses one of `SURROGATE_BETAS` by a trial.
        batch_statistics: the twin's BatchNorm uses the proxies' own statistics.
        labels: "free" (unconstrained, solved for) or "simplex" (probabilities, with cross-entropy and image weights).
        scale: "tensor" (one least-squares scale per parameter tensor) or "one".
        size: side of the square proxies in pixels, upsampled to the network's input; 0 chooses one.
        bits: bits of a pixel and of a label: 2, 3, 4, 5, 6, 8, 16, or 32 for float32.
        optimizer: "lbfgs" or "adam".
        max_evals: of the objective and its gradient, beside those of a trial; the last line search may take a few
            more.
        tolerance: stop early when the last 10 max_evals together gained less explained variance; 0 never stops.
        warm_start: begin from the proxies of the client's last round rather than from noise.
        solve_labels: max_evals spent on solving for the free labels again after the pixels were rounded.
        device: where the search runs (`tofu.device`); what it found is decoded on the CPU.
    """

    smooth: bool = True
    surrogate_beta: float = 0.0
    batch_statistics: bool = True
    labels: str = "free"
    scale: str = "tensor"
    size: int = 0
    bits: int = 8
    optimizer: str = "lbfgs"
    max_evals: int = 100
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
        check(0 <= self.surrogate_beta <= MAX_STEEPNESS, "surrogate_beta", f"0 (chooses) to {MAX_STEEPNESS:g}")
        check(self.size == 0 or 2 <= self.size <= 1024, "size", "0 (automatic) or 2 to 1024 pixels")
        check(self.max_evals >= 1, "max_evals", "at least 1")
        check(self.tolerance >= 0, "tolerance", "0 or more")
        check(self.solve_labels >= 0, "solve_labels", "0 or more")

    @property
    def flags(self) -> int:
        """What the two ends must agree on, as one byte."""
        return (
            self.smooth
            | (self.batch_statistics << 1)
            | ((self.labels == "simplex") << 2)
            | ((self.scale == "tensor") << 3)
        )


def paper_settings(**changes: Any) -> ProxySettings:
    """The published method: the same network, cross-entropy, simplex labels, image weights, one scale, from noise."""
    paper = ProxySettings(
        smooth=False,
        batch_statistics=False,
        labels="simplex",
        scale="one",
        optimizer="adam",  # through ReLU's kinks L-BFGS's line search fails (benchmark `codec`)
        max_evals=200,
        warm_start=False,
        solve_labels=0,
    )
    return dataclasses.replace(paper, **changes)


@dataclass(frozen=True)
class ProxyData:
    """What travels in place of an update.

    Attributes:
        images: float32 [n, channels, h, w].
        labels: float32 [n, classes]; free, or probabilities in simplex mode.
        weights: float32 [n] weight of each image in simplex mode, else None.
        scales: float32 [number of parameter tensors], or [1].
        surrogate_beta: of the twin's activations.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor | None
    scales: Tensor
    surrogate_beta: float = SURROGATE_BETAS[0]

    def on(self, device: torch.device) -> "ProxyData":
        """The same with images, labels and weights on a device."""
        weights = self.weights.to(device) if self.weights is not None else None
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device), weights=weights)


@dataclass(frozen=True)
class Encoding:
    """The outcome of `encode`: bytes to send, the proxies as the receiver will read them, and what they decode to."""

    body: bytes
    proxies: ProxyData
    decoded: Weights
    explained_variance: float
    max_evals: int


def proxy_side(network: ReferenceModel, settings: ProxySettings) -> int:
    """Side of the square proxies in pixels; where the settings leave it open, the least of `automatic_sides`.

    Raises:
        SettingError: larger than the input.
    """
    side = min(network.shape.height, network.shape.width)
    if settings.size > side:
        raise SettingError("proxy-size", settings.size, f"at most the input's side, {side}")
    return settings.size or automatic_sides(network)[-1]


def automatic_sides(network: ReferenceModel) -> list[int]:
    """Sides to choose from, largest first: from 1/2 to 1/4 of the input's side (14 to 7 for 28), but 7 at least.

    At equal bytes the benchmark `codec` finds these alike as long as there are some `ENOUGH` proxies; fewer and larger
    ones take less time.
    """
    side = min(network.shape.height, network.shape.width)
    least = min(side, max(SMALLEST_SIDE, round(side / 4)))
    return list(range(max(least, side // 2), least - 1, -1))


@dataclass(frozen=True)
class ProxyCode:
    """Proxies <-> bytes: images, labels, weights (simplex mode only), surrogate_beta, scales, in this order, no padding."""

    count: int
    channels: int
    side: int
    classes: int
    tensors: int
    bits: int
    weighted: bool

    @staticmethod
    def of(network: ReferenceModel, settings: ProxySettings, count: int) -> "ProxyCode":
        tensors = len(network.param_spec.parameters) if settings.scale == "tensor" else 1
        shape, side = network.shape, proxy_side(network, settings)
        weighted = settings.labels == "simplex"
        return ProxyCode(count, shape.channels, side, shape.classes, tensors, settings.bits, weighted)

    @property
    def _images(self) -> RowCode:
        return RowCode(self.count, self.channels * self.side**2, self.bits)

    @property
    def _labels(self) -> RowCode:
        return RowCode(self.count, self.classes, self.bits)

    @property
    def nbytes(self) -> int:
        weights = 2 * self.count if self.weighted else 0
        return self._images.nbytes + self._labels.nbytes + weights + 2 + 2 * self.tensors

    def write(self, proxies: ProxyData) -> bytes:
        weights = bfloat16_bytes(proxies.weights) if proxies.weights is not None else b""
        images, labels = self._images.write(proxies.images), self._labels.write(proxies.labels)
        return images + labels + weights + bfloat16_bytes(torch.tensor([proxies.surrogate_beta, *proxies.scales]))

    def read(self, data: bytes) -> ProxyData:
        """Raises PayloadError when the length or a value cannot be right."""
        if len(data) != self.nbytes:
            raise PayloadError(f"{self.count} proxies take {len(data)} bytes, expected {self.nbytes}")
        a = self._images.nbytes
        b = a + self._labels.nbytes
        c = b + (2 * self.count if self.weighted else 0)
        images = self.rounded_images(data[:a])
        labels = self._labels.read(data[a:b], "proxy labels")
        if self.weighted:  # rounding may leave the simplex
            labels = labels.clamp_min(0) / labels.clamp_min(0).sum(1, keepdim=True).clamp_min(1e-6)
        weights = bfloat16_from(data[b:c], "proxy weights") if self.weighted else None
        surrogate_beta, *scales = bfloat16_from(data[c:], "scales").tolist()
        if not 0 < surrogate_beta <= MAX_STEEPNESS:
            raise PayloadError(f"surrogate_beta {surrogate_beta:g}, expected above 0 and at most {MAX_STEEPNESS:g}")
        return ProxyData(images, labels, weights, torch.tensor(scales), surrogate_beta)

    def rounded_images(self, data: bytes) -> Tensor:
        return self._images.read(data, "proxy images").view(self.count, self.channels, self.side, self.side)

    def round_images(self, images: Tensor) -> Tensor:
        """The images as the receiver will read them."""
        return self.rounded_images(self._images.write(images))


def proxy_loss(network: ReferenceModel, weights: Weights, proxies: ProxyData, settings: ProxySettings) -> Tensor:
    """L(p; W), whose gradient in W the proxies stand for; computed where the weights are."""
    proxies = proxies.on(next(iter(weights.values())).device)
    if settings.smooth:
        with Surrogate(surrogate_beta=proxies.surrogate_beta, batch_statistics=settings.batch_statistics):
            logits = network.logits(weights, proxies.images)
    else:
        logits = network.logits(weights, proxies.images)
    if proxies.weights is None:
        return torch.sum(logits * proxies.labels)
    return torch.sum(proxies.weights * F.cross_entropy(logits, proxies.labels, reduction="none"))


def gradients(network: ReferenceModel, proxies: ProxyData, settings: ProxySettings) -> Weights:
    """G: the gradient of the proxies' loss at the base weights, before any scale."""
    weights = {name: w.detach().requires_grad_() for name, w in network.base.items()}
    grads = torch.autograd.grad(proxy_loss(network, weights, proxies, settings), list(weights.values()))
    return dict(zip(weights, grads, strict=True))


def decode(network: ReferenceModel, proxies: ProxyData, settings: ProxySettings) -> Weights:
    """The update that the proxies stand for at the network's weights: one backward pass, then the scales."""
    return _scaled(gradients(network, proxies, settings), proxies.scales)


def _scaled(grads: Weights, scales: Tensor) -> Weights:
    spread = scales.expand(len(grads)).unbind()
    return {name: scale * g for (name, g), scale in zip(grads.items(), spread, strict=True)}


def encode(
    network: ReferenceModel,
    update: Weights,
    count: int,
    settings: ProxySettings,
    *,
    generator: torch.Generator,
    start: ProxyData | None = None,
) -> Encoding:
    """Find `count` proxies whose gradients at the network's weights reproduce `update`.

    Args:
        update: name -> float32 tensor for every trainable parameter (others are ignored).
        generator: draws the noise that the proxies start from.
        start: proxies of an earlier round to begin from, when settings.warm_start is on and their shapes fit.

    The returned proxies are read back from `body`, so `decoded` is, to the bit, what the receiver will decode.
    """
    code = ProxyCode.of(network, settings, count)
    update = {name: update[name] for name in network.base}
    if _power(update) == 0:
        return _finish(network, update, code, _noise(code, generator), settings)
    warm = start is not None and settings.warm_start and _fits(start, code)
    begin = _tamed(start) if warm and start is not None else _noise(code, generator)
    device = open_device(settings.device)
    with on_device(network.model, device):
        objective = _Objective(network, {name: u.to(device) for name, u in update.items()}, settings)
        proxies = _search(objective, begin, settings)
        proxies = dataclasses.replace(proxies, images=code.round_images(proxies.images))
        if settings.labels == "free" and settings.solve_labels:
            # Variable projection: with the rounded pixels fixed, G is linear in the labels: solve for them once more.
            labels = _Variables(proxies, free=True, only_labels=True)
            solve = _Search(objective, labels, "lbfgs", tolerance=0.0)
            solve.run(settings.solve_labels)
            proxies = solve.proxies
    made = _finish(network, update, code, proxies, settings)
    return dataclasses.replace(made, max_evals=objective.max_evals)


def _finish(
    network: ReferenceModel, update: Weights, code: ProxyCode, proxies: ProxyData, settings: ProxySettings
) -> Encoding:
    """Round everything, then fit the scales to what the rounded proxies really decode to."""
    unscaled = dataclasses.replace(proxies, scales=torch.zeros(code.tensors))
    grads = gradients(network, code.read(code.write(unscaled)), settings)
    scales = _scales(update, grads, one=settings.scale == "one")
    body = code.write(dataclasses.replace(proxies, scales=scales[: code.tensors]))
    read = code.read(body)
    decoded = _scaled(grads, read.scales)
    error = sum(float(torch.sum((update[name] - d).double() ** 2)) for name, d in decoded.items())
    power = _power(update)
    return Encoding(body, read, decoded, explained_variance=1 - error / power if power else 0.0, max_evals=0)


def _power(update: Weights) -> float:
    return sum(float(torch.sum(u.double() ** 2)) for u in update.values())


def _noise(code: ProxyCode, generator: torch.Generator) -> ProxyData:
    images = torch.randn(code.count, code.channels, code.side, code.side, generator=generator)
    labels = torch.randn(code.count, code.classes, generator=generator)
    if not code.weighted:
        return ProxyData(images, 0.3 * labels, None, torch.zeros(code.tensors))
    return ProxyData(images, labels.softmax(1), torch.ones(code.count), torch.zeros(code.tensors))


def _tamed(proxies: ProxyData) -> ProxyData:
    """The proxies in the range of the noise that a search begins from, where they have left it far behind.

    A nearly linear twin hardly minds larger pixels, so they can grow from round to round of a warm start, without end.
    """
    images, labels = proxies.images, proxies.labels
    if float(images.abs().max()) > RUNAWAY:
        images = images / images.std()
    if proxies.weights is None and float(labels.abs().max()) > RUNAWAY:
        labels = 0.3 * labels / labels.std()
    return dataclasses.replace(proxies, images=images, labels=labels)


def _fits(proxies: ProxyData, code: ProxyCode) -> bool:
    images = (code.count, code.channels, code.side, code.side)
    same = tuple(proxies.images.shape) == images and tuple(proxies.labels.shape) == (code.count, code.classes)
    return same and (proxies.weights is not None) == code.weighted and float(proxies.labels.abs().max()) > 0


def _scales(update: Weights, grads: Weights, *, one: bool) -> Tensor:
    """Least-squares scales [tensors] of the gradients towards the update, or one for all; 0 where a gradient is 0."""
    top = torch.stack([torch.sum(update[name] * g) for name, g in grads.items()])
    bottom = torch.stack([torch.sum(g * g) for g in grads.values()])
    if one:
        top, bottom = top.sum().expand(len(grads)), bottom.sum().expand(len(grads))
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-30), torch.zeros_like(top))


class _Objective:
    """1 - explained variance of the proxies, with the best scales, and its gradient in the proxies."""

    def __init__(self, network: ReferenceModel, update: Weights, settings: ProxySettings) -> None:
        self.network, self.update, self.settings = network, update, settings
        self.base, self.power = network.base, _power(update)
        self.reach = STEP * sum(float(torch.sum(w * w)) for w in self.base.values()) ** 0.5
        self.max_evals = 0

    def __call__(self, leaves: list[Tensor], proxies: ProxyData) -> tuple[float, list[Tensor]]:
        """The objective, and its gradient in each of `leaves` (tensors that `proxies` was made from)."""
        self.max_evals += 1
        weights = {name: w.detach().requires_grad_() for name, w in self.base.items()}
        loss = proxy_loss(self.network, weights, proxies, self.settings)
        grads = torch.autograd.grad(loss, [*weights.values(), *leaves], retain_graph=True)
        at_base = grads[len(weights) :]
        decoded = dict(zip(weights, grads[: len(weights)], strict=True))
        scales = _scales(self.update, decoded, one=self.settings.scale == "one").unbind()
        rests = [self.update[name] - scale * g for (name, g), scale in zip(decoded.items(), scales, strict=True)]
        residual = {name: scale * rest for name, rest, scale in zip(decoded, rests, scales, strict=True)}
        squares = torch.stack([torch.sum(r * r) for r in (*rests, *residual.values())]).tolist()  # one wait for a GPU
        missed, length = sum(squares[: len(rests)]), sum(squares[len(rests) :]) ** 0.5
        step = self.reach / length if length > 0 else 0.0
        if step == 0 or not math.isfinite(missed) or not math.isfinite(step):
            return missed / self.power, [torch.zeros_like(leaf) for leaf in leaves]
        moved = {name: (w + step * residual[name]).detach() for name, w in self.base.items()}
        at_moved = torch.autograd.grad(proxy_loss(self.network, moved, proxies, self.settings), leaves)
        factor = -2 / (step * self.power)
        return missed / self.power, [factor * (b - a) for a, b in zip(at_base, at_moved, strict=True)]


class _Variables:
    """The proxies as one flat float64 vector for the optimizer, and back."""

    def __init__(self, begin: ProxyData, *, free: bool, only_labels: bool = False) -> None:
        self._begin, self._free, self._only_labels = begin, free, only_labels
        labels = begin.labels / LABEL_UNIT if free else begin.labels.clamp_min(1e-6).log()
        parts = [] if only_labels else [begin.images]
        parts.append(labels)
        if begin.weights is not None:
            parts.append(begin.weights)
        self._shapes = [p.shape for p in parts]
        self.vector = torch.cat([p.flatten() for p in parts]).double()

    def leaves(self, vector: Tensor) -> list[Tensor]:
        pieces: tuple[Tensor, ...] = torch.split(vector.float(), [shape.numel() for shape in self._shapes])
        return [p.view(shape).requires_grad_() for p, shape in zip(pieces, self._shapes, strict=True)]

    def proxies(self, leaves: list[Tensor]) -> ProxyData:
        rest = leaves if self._only_labels else leaves[1:]
        images = self._begin.images if self._only_labels else leaves[0]
        labels = rest[0] * LABEL_UNIT if self._free else rest[0].softmax(1)
        return dataclasses.replace(self._begin, images=images, labels=labels, weights=None if self._free else rest[1])

    def unpack(self, vector: Tensor) -> ProxyData:
        return self.proxies([leaf.detach() for leaf in self.leaves(vector)])


class _Search:
    """One descent over the proxies' variables, that can be taken up again where it was left.

    Attributes:
        least: the objective's least value so far.
    """

    def __init__(self, objective: _Objective, variables: _Variables, optimizer: str, tolerance: float) -> None:
        self._objective, self._variables, self._tolerance = objective, variables, tolerance
        self._history: list[float] = []
        self._best = variables.vector
        self._steps = lbfgs(self._evaluate, self._best) if optimizer == "lbfgs" else _adam(self._evaluate, self._best)
        self.least = math.inf

    def run(self, max_evals: int) -> None:
        """Go on until some `max_evals` were made here in all, the explained variance stalls, or no step helps."""
        past = self._history
        for _ in self._steps:
            stalled = len(past) > STALL and past[-1 - STALL] - past[-1] < self._tolerance
            if stalled or len(past) >= max_evals:
                return

    @property
    def proxies(self) -> ProxyData:
        """The best proxies so far."""
        return self._variables.unpack(self._best)

    def _evaluate(self, vector: Tensor) -> tuple[float, Tensor]:
        leaves = self._variables.leaves(vector)
        value, grads = self._objective(leaves, self._variables.proxies(leaves))
        if not math.isfinite(value):
            value = UNUSABLE
        if value < self.least:
            self.least, self._best = value, vector.clone()
        self._history.append(self.least)
        return value, torch.cat([g.flatten() for g in grads]).double()


def _search(objective: _Objective, begin: ProxyData, settings: ProxySettings) -> ProxyData:
    """From `begin` to proxies near the update. With the surrogate_beta open, the one that is ahead after a trial goes on."""

    def start(surrogate_beta: float) -> _Search:
        variables = _Variables(dataclasses.replace(begin, surrogate_beta=surrogate_beta), free=begin.weights is None)
        return _Search(objective, variables, settings.optimizer, settings.tolerance)

    search = start(settings.surrogate_beta or SURROGATE_BETAS[0])
    if settings.smooth and not settings.surrogate_beta and settings.max_evals >= 2 * TRIAL:
        trials = [search, *map(start, SURROGATE_BETAS[1:])]
        for trial in trials:
            trial.run(TRIAL)
        search = min(trials, key=lambda trial: trial.least)
    search.run(settings.max_evals)
    return search.proxies


def _adam(objective: Callable[[Tensor], tuple[float, Tensor]], start: Tensor) -> Iterator[None]:
    # As torch.optim.Adam, whose class imports torch's compiler first: a second of a client app's start.
    vector, steps = start.clone(), torch.zeros(())
    mean, square = torch.zeros_like(vector), torch.zeros_like(vector)
    while True:
        _, gradient = objective(vector.detach())
        adam(
            [vector], [gradient], [mean], [square], [], [steps], foreach=False, amsgrad=False, beta1=0.9, beta2=0.999,
            lr=ADAM_STEP, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip
        yield
