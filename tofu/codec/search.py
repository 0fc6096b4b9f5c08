"""The search for proxies whose gradients reproduce an update (arXiv 2201.08494, algorithm 1): `encode`.

The objective is 1 - explained variance, with least-squares scales. Its gradient with respect to the proxies p needs the
mixed second derivative of their loss L(p; W) along a direction R in weight space, the scaled residual. The order of
differentiation can be exchanged:

    d/dp <grad_W L(p; W), R>  =  d/de grad_p L(p; W + e R)  at e = 0.

So one evaluation takes two ordinary backward passes, at W and at W + e R, and a finite difference. It is cheaper than
double backward, and works with layers that do not support it (fused attention).
"""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from tofu.codec.chain import Chain, ProxyGradients
from tofu.codec.options import ProxySettings
from tofu.codec.proxies import ProxyCode, ProxyData, gradients, scale_gradients
from tofu.device import on_device, open_device
from tofu.reference_model import ReferenceModel
from tofu.weights import Weights

HISTORY = 40
_SUFFICIENT = 1e-4
MAX_BACKTRACKS = 12
"""Maximum number of reductions of one step, each by a factor of 2 to 10."""


def lbfgs(objective: Callable[[Tensor], tuple[float, Tensor]], start: Tensor) -> Iterator[None]:
    """Minimize by L-BFGS with a backtracking line search. Yields after each step; ends when no step improves.

    Nocedal and Wright, Numerical Optimization, algorithms 7.4 and 7.5. Unlike scipy's, it can be continued after a
    trial, and it starts no threads that would compete with those of other clients.

    Args:
        objective: float64 vector -> (value, gradient). The caller records the best point.
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
    """Minus the estimated inverse Hessian times the gradient, by the two-loop recursion."""
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
"""Step of the finite difference, |e R| / |W|, at which errors of float32 rounding and of curvature are about equal."""

LABEL_UNIT = 0.4
"""Size of a free label that is one unit for the optimizer, so that pixels and labels change at similar rates."""

LABEL_START = 0.3
"""Standard deviation of the initial free labels."""

STALL = 10
"""Number of evaluations in which the explained variance must gain `tolerance`, or else the search stops."""

SURROGATE_BETAS = (4.0, 0.3)
"""The values of beta that an encode tries. A large beta is close to the network: best for updates that are nearly
gradients, and for networks with normalization layers. A small beta makes the surrogate nearly linear, and explains more
of the updates plus residuals of a small trained network (benchmarks `codec` and `speed.replay`)."""

TRIAL_EVALS = 20
"""Number of evaluations of each beta before the best is chosen. There is no trial, and the first
beta is used, if `max_evals` is less than twice this."""

MAX_START = 1000.0
"""Maximum magnitude of pixels and labels in a warm start; larger ones are rescaled to about 1."""

ADAM_STEP = 0.1

DIVERGED = 10.0
"""Value that replaces an objective that is not finite; useful points have at most 1."""


@dataclass(frozen=True)
class Encoding:
    """The result of `encode`.

    Attributes:
        body: the proxies' bytes.
        decoded: the update that they decode to, over the trainable parameters.
        evals: number of evaluations of the objective.
    """

    body: bytes
    decoded: Weights
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
        generator: source of the initial noise.
        start: proxies of an earlier round to start from, if settings.warm_start is set and their shapes fit.

    Returns:
        The encoding. Its proxies are read back from its bytes, so the receiver's decoded update is bit-identical.
    """
    code = ProxyCode.of(reference, settings, count)
    update = {name: update[name] for name in reference.base}
    if _power(update) == 0:
        return _finish(reference, update, code, _noise(code, generator), settings)
    warm = start is not None and settings.warm_start and code.fits(start)
    begin = _rescaled(start) if start is not None and warm else _noise(code, generator)
    device = open_device(settings.device)
    with on_device(reference.model, device):
        objective = _Objective(reference, {name: u.to(device) for name, u in update.items()}, settings)
        proxies = _search(objective, begin, settings, warm=warm)
        proxies = dataclasses.replace(proxies, inputs=code.quantize_inputs(proxies.inputs))
        if settings.labels == "free" and settings.solve_labels:
            proxies = _solve_labels(objective, proxies, settings)
    encoding = _finish(reference, update, code, proxies, settings)
    return dataclasses.replace(encoding, evals=objective.evals)


def _search(objective: "_Objective", begin: ProxyData, settings: ProxySettings, *, warm: bool) -> ProxyData:
    """Minimize from `begin`. If beta is not set, each value is tried, and the best descent is continued."""

    def start(surrogate_beta: float) -> _Descent:
        proxies = dataclasses.replace(begin, surrogate_beta=surrogate_beta)
        if not warm:
            proxies = objective.align_labels(proxies)
        variables = _Variables(proxies, free=begin.weights is None)
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
    """Optimize the labels again with the quantized pixels fixed; G is linear in the labels."""
    labels = _Variables(proxies, free=True, only_labels=True)
    descent = _Descent(objective, labels, "lbfgs", tolerance=0.0)
    descent.run(settings.solve_labels)
    return descent.proxies


def _finish(
    reference: ReferenceModel, update: Weights, code: ProxyCode, proxies: ProxyData, settings: ProxySettings
) -> Encoding:
    """Quantize the proxies, then fit the scales to the gradients of the quantized proxies."""
    unscaled = dataclasses.replace(proxies, scales=torch.zeros(code.tensors))
    grads = gradients(reference, code.read(code.write(unscaled)), settings)
    scales = _least_squares_scales(update, grads, one=settings.scale == "one")
    body = code.write(dataclasses.replace(proxies, scales=scales[: code.tensors]))
    return Encoding(body, scale_gradients(grads, code.read(body).scales), evals=0)


def _power(update: Weights) -> float:
    return sum(float(torch.sum(u.double() ** 2)) for u in update.values())


def _noise(code: ProxyCode, generator: torch.Generator) -> ProxyData:
    inputs = tuple(torch.randn(code.count, *shape, generator=generator) for shape in code.shapes)
    labels = torch.randn(code.count, *code.target, generator=generator)
    if not code.weighted:
        return ProxyData(inputs, LABEL_START * labels, None, torch.zeros(code.tensors))
    return ProxyData(inputs, labels.softmax(1), torch.ones(code.count), torch.zeros(code.tensors))


def _rescaled(proxies: ProxyData) -> ProxyData:
    """Rescale inputs and labels beyond `MAX_START` to the range of the initial noise.

    A nearly linear surrogate is insensitive to large inputs, so they can grow without bound over warm starts.
    """
    labels = proxies.labels
    inputs = tuple(x / x.std() if float(x.abs().max()) > MAX_START else x for x in proxies.inputs)
    if proxies.weights is None and float(labels.abs().max()) > MAX_START:
        labels = LABEL_START * labels / labels.std()
    return dataclasses.replace(proxies, inputs=inputs, labels=labels)


def _least_squares_scales(update: Weights, grads: Weights, *, one: bool) -> Tensor:
    """Scales [tensors] that fit the gradients to the update, or one for all; 0 where a gradient is 0."""
    top = torch.stack([torch.sum(update[name] * g) for name, g in grads.items()])
    bottom = torch.stack([torch.sum(g * g) for g in grads.values()])
    if one:
        top, bottom = top.sum().expand(len(grads)), bottom.sum().expand(len(grads))
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-30), torch.zeros_like(top))


class _Objective:
    """1 - explained variance of the proxies, with least-squares scales, and its gradient.

    Attributes:
        evals: number of evaluations so far.
    """

    def __init__(self, reference: ReferenceModel, update: Weights, settings: ProxySettings) -> None:
        self._base = {name: w.contiguous() for name, w in reference.base.items()}
        self._update = {name: update[name] for name in self._base}
        self._call, self._chain, self._one = reference.call, Chain(reference, settings), settings.scale == "one"
        self._power = _power(update)
        self._step_length = STEP * sum(float(torch.sum(w * w)) for w in self._base.values()) ** 0.5
        self._device = next(iter(self._base.values())).device
        self.evals = 0

    def __call__(self, proxies: ProxyData, *, by_inputs: bool = True) -> tuple[float, list[Tensor]]:
        """Return the objective, and its gradients with respect to the inputs (if `by_inputs`),
        labels and weights (if any).
        """
        self.evals += 1
        proxies = proxies.on(self._device)
        leaves = [x.detach().requires_grad_(by_inputs) for x in proxies.inputs]
        inputs = self._chain.prepare(leaves)

        def gradients(weights: Weights, *, by_weights: bool) -> ProxyGradients:
            detached = [x.detach() for x in inputs]
            return self._chain.gradients(weights, detached, proxies, by_weights=by_weights, by_inputs=by_inputs)

        at_base = gradients(self._base, by_weights=True)
        if self.evals == 1:  # use the memory formats of the gradients from now on
            formats = dict(zip(self._base, at_base.weights, strict=True))
            self._base = {name: torch.empty_like(formats[name]).copy_(w) for name, w in self._base.items()}
            self._update = {name: torch.empty_like(formats[name]).copy_(u) for name, u in self._update.items()}
        missed, scales, rests = self._fit(at_base.weights)
        length = sum(scale * scale * square for scale, square in zip(scales, missed, strict=True)) ** 0.5
        step = self._step_length / length if length > 0 else 0.0
        value = sum(missed) / self._power
        if step == 0 or not math.isfinite(value) or not math.isfinite(step):
            return value, [torch.zeros_like(x) for x in (*(leaves if by_inputs else ()), *at_base.targets)]
        shifted = {
            name: torch.add(w, rest.as_strided(w.shape, w.stride()), alpha=step * scale)
            for (name, w), rest, scale in zip(self._base.items(), rests, scales, strict=True)
        }
        at_shifted = gradients(shifted, by_weights=False)
        factor = -2 / (step * self._power)
        found = [factor * (b - a) for a, b in zip(at_base.inputs, at_shifted.inputs, strict=True)]
        by_input = torch.autograd.grad(inputs, leaves, found) if by_inputs else ()
        return value, [*by_input, *(factor * (b - a) for a, b in zip(at_base.targets, at_shifted.targets, strict=True))]

    def align_labels(self, proxies: ProxyData) -> ProxyData:
        """Return the same inputs, with the free labels whose gradient has the largest inner product with the update.

        <G, update> equals the inner product of the labels with the derivative of the outputs along the update, so the
        best labels of a given norm are proportional to this derivative. It takes two forward passes.
        """
        if proxies.weights is not None or self._call.loss is not None:
            return proxies
        on = proxies.on(self._device)
        inputs = self._chain.prepare(on.inputs)
        step = self._step_length / self._power**0.5
        shifted_weights = {name: w + step * self._update[name] for name, w in self._base.items()}
        before, after = (
            self._chain.gradients(weights, inputs, on, by_weights=False, by_inputs=False).targets[0]
            for weights in (self._base, shifted_weights)
        )
        change = (after - before).cpu()
        if not bool(torch.isfinite(change).all()) or not float(change.std()) > 0:
            return proxies
        return dataclasses.replace(proxies, labels=LABEL_START * change / change.std())

    def _fit(self, grads: list[Tensor]) -> tuple[list[float], list[float], list[Tensor]]:
        """Return for each tensor the squared norm of the residual, the least-squares scale,
        and the residual as a vector.
        """
        decoded = [_flat(g, w) for g, w in zip(grads, self._base.values(), strict=True)]
        update = [_flat(u, w) for u, w in zip(self._update.values(), self._base.values(), strict=True)]
        products = [torch.dot(u, g) for u, g in zip(update, decoded, strict=True)]
        found = torch.stack([*products, *(torch.dot(g, g) for g in decoded)]).tolist()  # one synchronization with a GPU
        top, bottom = found[: len(decoded)], found[len(decoded) :]
        if self._one:
            top, bottom = [sum(top)] * len(decoded), [sum(bottom)] * len(decoded)
        scales = [t / b if b > 0 else 0.0 for t, b in zip(top, bottom, strict=True)]
        rests = [torch.sub(u, g, alpha=scale) for u, g, scale in zip(update, decoded, scales, strict=True)]
        return torch.stack([torch.dot(rest, rest) for rest in rests]).tolist(), scales, rests


def _flat(values: Tensor, like: Tensor) -> Tensor:
    """Return the values as a vector, in the memory order of `like`, a dense tensor of the same shape."""
    if values.stride() != like.stride():
        values = torch.empty_like(like).copy_(values)
    return values.as_strided((values.numel(),), (1,))


class _Variables:
    """Converts between proxies and the optimizer's float64 vector."""

    def __init__(self, begin: ProxyData, *, free: bool, only_labels: bool = False) -> None:
        self._begin, self._free, self.only_labels = begin, free, only_labels
        labels = begin.labels / LABEL_UNIT if free else begin.labels.clamp_min(1e-6).log()
        parts = [] if only_labels else [*begin.inputs]
        parts.append(labels)
        if begin.weights is not None:
            parts.append(begin.weights)
        self._shapes = [p.shape for p in parts]
        self.vector = torch.cat([p.flatten() for p in parts]).double()

    def proxies(self, vector: Tensor) -> ProxyData:
        """Return the proxies of a vector."""
        pieces: tuple[Tensor, ...] = torch.split(vector.float(), [shape.numel() for shape in self._shapes])
        parts = [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        split = 0 if self.only_labels else len(self._begin.inputs)
        inputs, rest = tuple(parts[:split]) or self._begin.inputs, parts[split:]
        labels = rest[0] * LABEL_UNIT if self._free else rest[0].softmax(1)
        return dataclasses.replace(self._begin, inputs=inputs, labels=labels, weights=None if self._free else rest[1])

    def gradient(self, proxies: ProxyData, by_proxies: list[Tensor]) -> Tensor:
        """Return the gradient with respect to the vector, from those for the inputs,
        labels and weights of its proxies.
        """
        parts = [g.cpu() for g in by_proxies]
        at = len(parts) - (1 if self._free else 2)
        if self._free:
            parts[at] = parts[at] * LABEL_UNIT
        else:
            parts[at] = proxies.labels * (parts[at] - (proxies.labels * parts[at]).sum(1, keepdim=True))
        return torch.cat([g.flatten() for g in parts]).double()


class _Descent:
    """A minimization over the proxies' variables that can be continued after `run` returns.

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
        """Continue until `max_evals` evaluations in all, a stall (`STALL`), or a step that does not improve."""
        past = self._history
        for _ in self._steps:
            stalled = len(past) > STALL and past[-1 - STALL] - past[-1] < self._tolerance
            if stalled or len(past) >= max_evals:
                return

    @property
    def proxies(self) -> ProxyData:
        """The best proxies so far."""
        return self._variables.proxies(self._best)

    def _evaluate(self, vector: Tensor) -> tuple[float, Tensor]:
        proxies = self._variables.proxies(vector)
        value, by_proxies = self._objective(proxies, by_inputs=not self._variables.only_labels)
        if not math.isfinite(value):
            value = DIVERGED
        if value < self.min_value:
            self.min_value, self._best = value, vector.clone()
        self._history.append(self.min_value)
        return value, self._variables.gradient(proxies, by_proxies)


def _adam(objective: Callable[[Tensor], tuple[float, Tensor]], start: Tensor) -> Iterator[None]:
    # torch.optim.Adam takes the same steps, but imports torch's compiler first, which takes a second.
    vector, steps = start.clone(), torch.zeros(())
    mean, square = torch.zeros_like(vector), torch.zeros_like(vector)
    while True:
        _, gradient = objective(vector.detach())
        adam(
            [vector], [gradient], [mean], [square], [], [steps], foreach=False, amsgrad=False, beta1=0.9, beta2=0.999,
            lr=ADAM_STEP, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip
        yield
