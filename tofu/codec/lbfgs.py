"""Limited-memory BFGS (Nocedal and Wright, Numerical Optimization, algorithms 7.4 and 7.5) with backtracking.

Written here because it must be taken up again where it was left (the trial in `tofu.codec.proxies`), which neither scipy's nor
torch's can; scipy's also starts BLAS threads beside other clients' own.
"""

from collections import deque
from collections.abc import Callable, Iterator

from torch import Tensor

HISTORY = 40
_SUFFICIENT = 1e-4
TRIES = 12
"""Shortest steps are between 2^-12 and 10^-12 of the first."""


def lbfgs(objective: Callable[[Tensor], tuple[float, Tensor]], start: Tensor) -> Iterator[None]:
    """Minimize from `start`, yielding after each step; ends when no step helps.

    Args:
        objective: flat float64 vector -> (value, gradient). It keeps the best point itself.
        start: float64 vector; not changed.
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
        for _ in range(TRIES):
            new_value, new_gradient = objective(point + step * direction)
            if new_value <= value + _SUFFICIENT * step * slope:
                break
            parabola = -slope * step / (2 * (new_value - value - slope * step))
            step *= min(0.5, max(0.1, parabola))
        else:
            return
        moved, turned = step * direction, new_gradient - gradient
        curvature = float(moved @ turned)
        if curvature > 1e-10 * float(turned @ turned):
            memory.append((moved, turned, 1 / curvature))
        point, value, gradient = point + moved, new_value, new_gradient
        yield


def _direction(gradient: Tensor, memory: "deque[tuple[Tensor, Tensor, float]]") -> Tensor:
    """The two-loop recursion: minus the inverse Hessian's estimate times the gradient."""
    q = gradient.clone()
    weights = []
    for moved, turned, rho in reversed(memory):
        weight = rho * float(moved @ q)
        weights.append(weight)
        q -= weight * turned
    if memory:
        moved, turned, rho = memory[-1]
        q /= rho * float(turned @ turned)
    for (moved, turned, rho), weight in zip(memory, reversed(weights), strict=True):
        q += moved * (weight - rho * float(turned @ q))
    return -q
