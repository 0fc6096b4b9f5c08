"""The search for proxies whose gradients reproduce an update (arXiv 2201.08494, algorithm 1): `encode`.

The objective is 1 - explained variance, with the least-squares scales. Its derivative in a proxy variable p is a
derivative of the proxies' loss L(p; W) along a direction R in weight space, the scaled residual. Derivatives commute:

    d/dp <grad_W L(p; W), R>  =  d/de grad_p L(p; W + e R)  at e = 0.

So one evaluation is two ordinary backward passes, at W and at W + e R, and a difference. It costs less than
differentiating twice, and works with layers that have no second derivative (fused attention).
"""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from tofu.codec.options import ProxySettings
from tofu.codec.proxies import ProxyCode, ProxyData, gradients, proxy_loss, scale_gradients
from tofu.device import on_device, open_device
from tofu.reference_model import ReferenceModel
from tofu.weights import Weights

HISTORY = 40
_SUFFICIENT = 1e-4
MAX_BACKTRACKS = 12
"""The shortest steps are between 2^-12 and 10^-12 of the first."""


def lbfgs(objective: Callable[[Tensor], tuple[float, Tensor]], start: Tensor) -> Iterator[None]:
    """Minimize from `start` by limited-memory BFGS with backtracking, yielding after each step, until no step helps.

    Nocedal and Wright, Numerical Optimization, algorithms 7.4 and 7.5. This is our own because a search must be able to
    continue after a trial, which scipy's cannot, and because it starts no threads next to other clients.

    Args:
        objective: flat float64 vector -> (value, gradient). The caller records the best point.
        start: float64 vector; it is not changed.
    """
    point = start.clone()
    value, gradient = objective(point)
    memory: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=HISTORY)
    while True:
        direction = _direction(gradient, memory)
        slope = float(gradient @ direction)
        if slope >= 0:
            memory.clear()
            direction = -gradient
            slope = float(gradient @ direction)
        if slope == 0:
            return
        step = 1.0 if memory else 1 / float(gradient.norm())
        for _ in range(MAX_BACKTRACKS):
            new_value, new_gradient = objective(point + step * direction)
            if new_value <= value + _SUFFICIENT * step * slope:
                break
            parabola = -slope * step / (2 * (new_value - value - slope * step))
            step *= min(0.5, max(0.1, parabola))
        else:
            return
        step_taken, gradient_change = step * direction, new_gradient - gradient
        curvature = float(step_taken @ gradient_change)
        if curvature > 1e-10 * float(gradient_change @ gradient_change):
            memory.append((step_taken, gradient_change, 1 / curvature))
        point, value, gradient = point + step_taken, new_value, new_gradient
        yield


def _direction(gradient: Tensor, memory: "deque[tuple[Tensor, Tensor, float]]") -> Tensor:
    """The two-loop recursion: minus the estimated inverse Hessian times the gradient."""
    q = gradient.clone()
    weights = []
    for step_taken, gradient_change, rho in reversed(memory):
        weight = rho * float(step_taken @ q)
        weights.append(weight)
        q -= weight * gradient_change
    if memory:
        step_taken, gradient_change, rho = memory[-1]
        q /= rho * float(gradient_change @ gradient_change)
    for (step_taken, gradient_change, rho), weight in zip(memory, reversed(weights), strict=True):
        q += step_taken * (weight - rho * float(gradient_change @ q))
    return -q


STEP = 1e-3
"""|e R| / |W|: float32 rounding and the curvature of L each cost about this fraction of the derivative."""

LABEL_UNIT = 0.05
"""One unit of a free label in the optimizer's variables, so that pixels and labels move alike (measured)."""

STALL = 10
"""Evaluations over which the explained variance must gain `tolerance`, or the search stops."""

SURROGATE_BETAS = (4.0, 1.0, 0.1)
"""The values of beta that an encode tries. A large beta is close to the network, and right for updates that are nearly
gradients and for networks with normalization layers. A small one makes the surrogate nearly linear, and explains more
of the updates of a small trained network with their residuals (benchmark `codec`)."""

TRIAL_EVALS = 30
"""Evaluations of each beta before the best is chosen; 12 often chose wrongly. With fewer than twice as many evaluations
in all there is no trial, and the first beta is taken."""

MAX_START = 1000.0
"""Pixels and labels of a warm start beyond this are rescaled; noise starts at about 1."""

ADAM_STEP = 0.1

DIVERGED = 10.0
"""Value of the objective where it overflows; useful points have at most 1."""


@dataclass(frozen=True)
class Encoding:
    """The result of `encode`.

    Attributes:
        body: the proxies' bytes.
        proxies: the proxies as the receiver will read them.
        decoded: the update that they decode to, over the trainable parameters.
        explained_variance: of `decoded`, relative to the update.
        evals: number of evaluations of the objective.
    """

    body: bytes
    proxies: ProxyData
    decoded: Weights
    explained_variance: float
    evals: int


def encode(
    reference: ReferenceModel,
    update: Weights,
    count: int,
    settings: ProxySettings,
    *,
    generator: torch.Generator,
    start: ProxyData | None = None,
) -> Encoding:
    """Find `count` proxies whose gradients at the reference's weights reproduce `update`.

    Args:
        update: name -> float32 tensor for every trainable parameter (other tensors are ignored).
        generator: draws the noise that the proxies start from.
        start: proxies of an earlier round to start from, if settings.warm_start is set and their shapes fit.

    Returns:
        The encoding. Its proxies are read back from its bytes, so `decoded` is bit-identical to what the receiver
        decodes.
    """
    code = ProxyCode.of(reference, settings, count)
    update = {name: update[name] for name in reference.base}
    if _power(update) == 0:
        return _finish(reference, update, code, _noise(code, generator), settings)
    if start is not None and settings.warm_start and code.fits(start):
        begin = _rescaled(start)
    else:
        begin = _noise(code, generator)
    device = open_device(settings.device)
    with on_device(reference.model, device):
        objective = _Objective(reference, {name: u.to(device) for name, u in update.items()}, settings)
        proxies = _search(objective, begin, settings)
        proxies = dataclasses.replace(proxies, inputs=code.quantize_inputs(proxies.inputs))
        if settings.labels == "free" and settings.solve_labels:
            proxies = _solve_labels(objective, proxies, settings)
    encoding = _finish(reference, update, code, proxies, settings)
    return dataclasses.replace(encoding, evals=objective.evals)


def _search(objective: "_Objective", begin: ProxyData, settings: ProxySettings) -> ProxyData:
    """Descend from `begin`. If beta is open, a trial of each value decides which descent continues."""

    def start(surrogate_beta: float) -> _Descent:
        variables = _Variables(dataclasses.replace(begin, surrogate_beta=surrogate_beta), free=begin.weights is None)
        return _Descent(objective, variables, settings.optimizer, settings.tolerance)

    descent = start(settings.surrogate_beta or SURROGATE_BETAS[0])
    if settings.smooth and not settings.surrogate_beta and settings.max_evals >= 2 * TRIAL_EVALS:
        trials = [descent, *map(start, SURROGATE_BETAS[1:])]
        for trial in trials:
            trial.run(TRIAL_EVALS)
        descent = min(trials, key=lambda trial: trial.min_value)
    descent.run(settings.max_evals)
    return descent.proxies


def _solve_labels(objective: "_Objective", proxies: ProxyData, settings: ProxySettings) -> ProxyData:
    """Variable projection: with the quantized pixels fixed, G is linear in the labels; solve for them once more."""
    labels = _Variables(proxies, free=True, only_labels=True)
    descent = _Descent(objective, labels, "lbfgs", tolerance=0.0)
    descent.run(settings.solve_labels)
    return descent.proxies


def _finish(
    reference: ReferenceModel, update: Weights, code: ProxyCode, proxies: ProxyData, settings: ProxySettings
) -> Encoding:
    """Quantize everything, then fit the scales to what the quantized proxies decode to."""
    unscaled = dataclasses.replace(proxies, scales=torch.zeros(code.tensors))
    grads = gradients(reference, code.read(code.write(unscaled)), settings)
    scales = _least_squares_scales(update, grads, one=settings.scale == "one")
    body = code.write(dataclasses.replace(proxies, scales=scales[: code.tensors]))
    read = code.read(body)
    decoded = scale_gradients(grads, read.scales)
    error = sum(float(torch.sum((update[name] - d).double() ** 2)) for name, d in decoded.items())
    power = _power(update)
    return Encoding(body, read, decoded, explained_variance=1 - error / power if power else 0.0, evals=0)


def _power(update: Weights) -> float:
    return sum(float(torch.sum(u.double() ** 2)) for u in update.values())


def _noise(code: ProxyCode, generator: torch.Generator) -> ProxyData:
    inputs = tuple(torch.randn(code.count, *shape, generator=generator) for shape in code.shapes)
    labels = torch.randn(code.count, *code.target, generator=generator)
    if not code.weighted:
        return ProxyData(inputs, 0.3 * labels, None, torch.zeros(code.tensors))
    return ProxyData(inputs, labels.softmax(1), torch.ones(code.count), torch.zeros(code.tensors))


def _rescaled(proxies: ProxyData) -> ProxyData:
    """The proxies in the range of the noise that a search starts from, if they have left it far behind.

    A nearly linear surrogate is insensitive to large inputs, so they can grow without end over warm starts.
    """
    labels = proxies.labels
    inputs = tuple(x / x.std() if float(x.abs().max()) > MAX_START else x for x in proxies.inputs)
    if proxies.weights is None and float(labels.abs().max()) > MAX_START:
        labels = 0.3 * labels / labels.std()
    return dataclasses.replace(proxies, inputs=inputs, labels=labels)


def _least_squares_scales(update: Weights, grads: Weights, *, one: bool) -> Tensor:
    """Scales [tensors] that fit the gradients to the update, or one for all; 0 where a gradient is 0."""
    top = torch.stack([torch.sum(update[name] * g) for name, g in grads.items()])
    bottom = torch.stack([torch.sum(g * g) for g in grads.values()])
    if one:
        top, bottom = top.sum().expand(len(grads)), bottom.sum().expand(len(grads))
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-30), torch.zeros_like(top))


class _Objective:
    """1 - explained variance of the proxies, with the least-squares scales, and its gradient in the proxies.

    Attributes:
        evals: number of evaluations so far.
    """

    def __init__(self, reference: ReferenceModel, update: Weights, settings: ProxySettings) -> None:
        self.reference, self.update, self.settings = reference, update, settings
        self.base, self.power = reference.base, _power(update)
        self.step_length = STEP * sum(float(torch.sum(w * w)) for w in self.base.values()) ** 0.5
        self.evals = 0

    def __call__(self, leaves: list[Tensor], proxies: ProxyData) -> tuple[float, list[Tensor]]:
        """The objective, and its gradient in each of `leaves` (the tensors that `proxies` was made from)."""
        self.evals += 1
        weights = {name: w.detach().requires_grad_() for name, w in self.base.items()}
        loss = proxy_loss(self.reference, weights, proxies, self.settings)
        variables = [*weights.values(), *leaves]
        grads = torch.autograd.grad(loss, variables, retain_graph=True, materialize_grads=True)
        at_base = grads[len(weights) :]
        decoded = dict(zip(weights, grads[: len(weights)], strict=True))
        scales = _least_squares_scales(self.update, decoded, one=self.settings.scale == "one").unbind()
        rests = [self.update[name] - scale * g for (name, g), scale in zip(decoded.items(), scales, strict=True)]
        residual = {name: scale * rest for name, rest, scale in zip(decoded, rests, scales, strict=True)}
        squares = torch.stack([torch.sum(r * r) for r in (*rests, *residual.values())]).tolist()  # one wait for a GPU
        missed, length = sum(squares[: len(rests)]), sum(squares[len(rests) :]) ** 0.5
        step = self.step_length / length if length > 0 else 0.0
        if step == 0 or not math.isfinite(missed) or not math.isfinite(step):
            return missed / self.power, [torch.zeros_like(leaf) for leaf in leaves]
        shifted = {name: (w + step * residual[name]).detach() for name, w in self.base.items()}
        at_shifted = torch.autograd.grad(
            proxy_loss(self.reference, shifted, proxies, self.settings), leaves, materialize_grads=True
        )
        factor = -2 / (step * self.power)
        return missed / self.power, [factor * (b - a) for a, b in zip(at_base, at_shifted, strict=True)]


class _Variables:
    """The proxies as one flat float64 vector for the optimizer, and back."""

    def __init__(self, begin: ProxyData, *, free: bool, only_labels: bool = False) -> None:
        self._begin, self._free, self._only_labels = begin, free, only_labels
        labels = begin.labels / LABEL_UNIT if free else begin.labels.clamp_min(1e-6).log()
        parts = [] if only_labels else [*begin.inputs]
        parts.append(labels)
        if begin.weights is not None:
            parts.append(begin.weights)
        self._shapes = [p.shape for p in parts]
        self.vector = torch.cat([p.flatten() for p in parts]).double()

    def leaves(self, vector: Tensor) -> list[Tensor]:
        """The vector's tensors in float32, as leaves of a new graph."""
        pieces: tuple[Tensor, ...] = torch.split(vector.float(), [shape.numel() for shape in self._shapes])
        return [p.view(shape).requires_grad_() for p, shape in zip(pieces, self._shapes, strict=True)]

    def proxies(self, leaves: list[Tensor]) -> ProxyData:
        """The proxies that the leaves parametrize."""
        split = 0 if self._only_labels else len(self._begin.inputs)
        inputs, rest = tuple(leaves[:split]) or self._begin.inputs, leaves[split:]
        labels = rest[0] * LABEL_UNIT if self._free else rest[0].softmax(1)
        return dataclasses.replace(self._begin, inputs=inputs, labels=labels, weights=None if self._free else rest[1])

    def unpack(self, vector: Tensor) -> ProxyData:
        """The proxies of a vector, detached."""
        return self.proxies([leaf.detach() for leaf in self.leaves(vector)])


class _Descent:
    """One descent over the proxies' variables, which can be continued from where it stopped.

    Attributes:
        min_value: minimum of the objective so far.
    """

    def __init__(self, objective: _Objective, variables: _Variables, optimizer: str, tolerance: float) -> None:
        self._objective, self._variables, self._tolerance = objective, variables, tolerance
        self._history: list[float] = []
        self._best = variables.vector
        self._steps = lbfgs(self._evaluate, self._best) if optimizer == "lbfgs" else _adam(self._evaluate, self._best)
        self.min_value = math.inf

    def run(self, max_evals: int) -> None:
        """Continue until this descent has made `max_evals` evaluations, it stalls, or no step improves."""
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
            value = DIVERGED
        if value < self.min_value:
            self.min_value, self._best = value, vector.clone()
        self._history.append(self.min_value)
        return value, torch.cat([g.flatten() for g in grads]).double()


def _adam(objective: Callable[[Tensor], tuple[float, Tensor]], start: Tensor) -> Iterator[None]:
    # The same steps as torch.optim.Adam, which imports torch's compiler first: a second of a client app's start.
    vector, steps = start.clone(), torch.zeros(())
    mean, square = torch.zeros_like(vector), torch.zeros_like(vector)
    while True:
        _, gradient = objective(vector.detach())
        adam(
            [vector], [gradient], [mean], [square], [], [steps], foreach=False, amsgrad=False, beta1=0.9, beta2=0.999,
            lr=ADAM_STEP, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip
        yield
