"""Limited-memory BFGS (Nocedal and Wright, Numerical Optimization, algorithms 7.4 and 7.5) with backtracking.

This is our own because a search must be able to continue after a trial (`tofu.codec.search`), which scipy's cannot, and
because it starts no threads of its own next to other clients.
"""

from collections import deque
from collections.abc import Callable, Iterator

from torch import Tensor

HISTORY = 40
_SUFFICIENT = 1e-4
MAX_BACKTRACKS = 12
"""The shortest steps are between 2^-12 and 10^-12 of the first."""


def lbfgs(objective: Callable[[Tensor], tuple[float, Tensor]], start: Tensor) -> Iterator[None]:
    """Minimize from `start`, yielding after each step; ends when no step helps.

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
