"""Leaky integrate-and-fire neurons, fused over time, with a linear surrogate gradient.

With current I_t = W s_t and threshold theta, a layer computes

    u_t = leak u_{t-1} + I_t - theta o_{t-1},    o_t = 1 if u_t > theta, else 0        (soft reset)
    do_t / du_t := 0.3 max(0, 1 - |u_t / theta - 1|) / theta                          (linear surrogate)

(Garg, Chowdhury, Roy, "DCT-SNN", ICCV 2021; the surrogate is that of Bellec et al., NeurIPS 2018). As in snnTorch, no
gradient flows through the reset. Then u is linear in the currents, and its backward pass is the same filter backward in
time. So it needs no graph of T steps, and can be differentiated twice.
"""

import itertools
from typing import Any

import torch
from snntorch.surrogate import custom_surrogate
from torch import Tensor

LEAK = 0.9901
"""The leak of DCT-SNN and of its authors' other networks."""

SURROGATE_SLOPE = 0.3


def _linear(x: Tensor, grad_output: Tensor, spikes: Tensor) -> Tensor:
    return grad_output * (SURROGATE_SLOPE * (1 - x.abs()).clamp(min=0))


spike = custom_surrogate(_linear)
"""x = u / theta - 1 -> 1.0 where x is positive, 0.0 elsewhere; twice differentiable by the linear surrogate."""


class _Filter(torch.autograd.Function):
    """y_t = x_t + leak y_{t-1} along the first dimension, or with `backward_in_time` y_t = x_t + leak y_{t+1}."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leak: float, backward_in_time: bool) -> Tensor:
        ctx.leak, ctx.backward_in_time = leak, backward_in_time
        out = x.clone()
        steps = list(out.unbind())
        if backward_in_time:
            steps.reverse()
        for last, step in itertools.pairwise(steps):
            step.add_(last, alpha=leak)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _filter(grads[0], ctx.leak, not ctx.backward_in_time), None, None


def _filter(x: Tensor, leak: float, backward_in_time: bool) -> Tensor:
    return _Filter.apply(x, leak, backward_in_time)  # type: ignore[no-any-return,no-untyped-call]


class _Potential(torch.autograd.Function):
    """Currents [T, ...] -> potentials u [T, ...] before the reset of their own step."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, threshold: Tensor, leak: float) -> Tensor:
        ctx.leak = leak
        out = current.clone()
        steps = out.unbind()
        for last, step in itertools.pairwise(steps):
            step.add_(last, alpha=leak)
            step.sub_((last > threshold).to(last.dtype).mul_(threshold))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _filter(grads[0], ctx.leak, True), None, None


def potentials(current: Tensor, threshold: Tensor, leak: float = LEAK) -> Tensor:
    """Membrane potentials of currents over time, with soft reset.

    Args:
        current: [T, ...].
        threshold: [], positive; no gradient flows to it.

    Returns:
        [T, ...]; a step spikes where it exceeds the threshold.

    Example:
        >>> potentials(torch.tensor([0.75, 0.75, 0.75]), torch.tensor(1.0), leak=1.0).tolist()
        [0.75, 1.5, 1.25]
    """
    return _Potential.apply(current, threshold.detach(), leak)  # type: ignore[no-any-return,no-untyped-call]


class _Fire(torch.autograd.Function):
    """Currents [T, ...] -> spikes [T, ...], in one pass over time in each direction."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, threshold: Tensor, leak: float) -> Tensor:
        u, spikes = torch.empty_like(current), torch.empty_like(current)
        theta = float(threshold)
        for step, (potential, out) in enumerate(zip(u, spikes, strict=True)):
            potential.copy_(current[step])
            if step:
                potential.add_(u[step - 1], alpha=leak).sub_(spikes[step - 1], alpha=theta)
            torch.gt(potential, theta, out=out)
        ctx.save_for_backward(current, threshold, u)
        ctx.leak = leak
        return spikes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        current, threshold, u = ctx.saved_tensors
        if torch.is_grad_enabled():  # the result is differentiated again
            fired = spike(potentials(current, threshold, ctx.leak) / threshold - 1)
            return torch.autograd.grad(fired, current, grads[0], create_graph=True)[0], None, None
        theta, result = float(threshold), torch.empty_like(current)
        for step in range(len(u) - 1, -1, -1):
            slope = result[step]
            torch.div(u[step], theta, out=slope)
            slope.sub_(1).abs_().neg_().add_(1).clamp_(min=0).mul_(SURROGATE_SLOPE / theta).mul_(grads[0][step])
            if step + 1 < len(u):
                slope.add_(result[step + 1], alpha=ctx.leak)
        return result, None, None


def integrate_and_fire(current: Tensor, threshold: Tensor, leak: float = LEAK) -> Tensor:
    """Return the spikes of currents over time; equal to `spike(potentials(...) / threshold - 1)`,
    also in its derivatives.

    Neither direction makes intermediate tensors for all steps: a single step fits in the processor's cache.

    Args:
        current: [T, ...].
        threshold: [], positive; no gradient flows to it.

    Returns:
        [T, ...] of 0 and 1.
    """
    return _Fire.apply(current, threshold.detach(), leak)  # type: ignore[no-any-return,no-untyped-call]
