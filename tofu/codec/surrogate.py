"""Surrogate activations: smooth functions that replace activations with kinks when the codec differentiates a network.

The second derivative of ReLU is zero, so the search cannot learn which units should be active. Both ends of the codec
have the weights, so they may differentiate another function than the trained network. In the surrogate,

- ReLU(x) becomes x * sigmoid(beta x), with beta 4 by default, and LeakyReLU and ReLU6 likewise,
- max-pooling becomes average-pooling,
- BatchNorm normalizes by the statistics of the proxies and leaves its running statistics unchanged.

This is our addition to the paper, as are its constants. `Surrogate` is a context that replaces torch's functions, so it
applies to activations that are modules, functions or methods, without a copy of the network. `register_surrogate` adds
a surrogate of a new activation.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SurrogateFactory = Callable[[float], Callable[..., Any]]

_beta: ContextVar[float | None] = ContextVar("surrogate_beta", default=None)
"""Beta of the innermost active `Surrogate` of this thread."""


def register_surrogate(module_type: type[nn.Module], factory: SurrogateFactory) -> None:
    """Register the surrogate of an activation module, for activations without a useful derivative.

    Call it where the module is defined, so that clients and server both have it.

    Args:
        module_type: the class of the activation; its subclasses have the surrogate too unless they override `forward`.
        factory: beta -> a function of the module and its inputs that replaces `module_type.forward`. A larger beta must
            be closer to the activation.

    Example:
        >>> import torch
        >>> from tofu.codec.surrogate import Surrogate, register_surrogate
        >>> class Spike(torch.nn.Module):
        ...     def forward(self, x):
        ...         return (x > 0).float()
        >>> register_surrogate(Spike, lambda beta: lambda module, x: torch.sigmoid(beta * x))
        >>> spike, x = Spike(), torch.tensor([-1.0, 1.0])
        >>> spike(x).tolist()
        [0.0, 1.0]
        >>> with Surrogate(surrogate_beta=4):
        ...     smooth = spike(x)
        >>> torch.equal(smooth, torch.sigmoid(4 * x))
        True
    """
    original = module_type.forward

    @functools.wraps(original)
    def forward(module: nn.Module, *inputs: Any, **options: Any) -> Any:
        beta = _beta.get()
        return original(module, *inputs, **options) if beta is None else factory(beta)(module, *inputs, **options)

    setattr(module_type, "forward", forward)  # noqa: B010 (type checkers refuse to assign to a method)


class Surrogate(TorchFunctionMode):
    """A context in which activations with kinks run as their smooth surrogates, in this thread only.

    Args:
        surrogate_beta: beta in x * sigmoid(beta x); larger is closer to ReLU and harder to encode through.
        batch_statistics: whether BatchNorm uses the statistics of the batch that it receives.
    """

    def __init__(self, *, surrogate_beta: float = 4.0, batch_statistics: bool = True) -> None:
        super().__init__()
        self._beta, self._swaps = surrogate_beta, _swaps(surrogate_beta, batch_statistics)

    def __enter__(self) -> Self:
        self._token = _beta.set(self._beta)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        _beta.reset(self._token)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self._swaps.get(func, func)(*args, **(kwargs or {}))


def smooth_relu(x: Tensor, surrogate_beta: float) -> Tensor:
    """x * sigmoid(surrogate_beta * x), by torch's fused SiLU."""
    return F.silu(x * surrogate_beta) / surrogate_beta


@functools.lru_cache(maxsize=16)
def _swaps(surrogate_beta: float, batch_statistics: bool) -> dict[Callable[..., Any], Callable[..., Any]]:
    def relu(input: Tensor, inplace: bool = False) -> Tensor:
        return smooth_relu(input, surrogate_beta)

    def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
        return negative_slope * input + (1 - negative_slope) * smooth_relu(input, surrogate_beta)

    def relu6(input: Tensor, inplace: bool = False) -> Tensor:
        return smooth_relu(input, surrogate_beta) - smooth_relu(input - 6, surrogate_beta)

    def batch_norm(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        # Unlike F.batch_norm this also works for one proxy whose feature map is 1x1; the variance is then 0.
        axes = [0, *range(2, input.dim())]
        mean = input.mean(axes, keepdim=True)
        variance = (input - mean).square().mean(axes, keepdim=True)
        shape = [1, -1] + [1] * (input.dim() - 2)
        out = (input - mean) * torch.rsqrt(variance + eps)
        if weight is not None:
            out = out * weight.view(shape)
        return out if bias is None else out + bias.view(shape)

    swaps: dict[Callable[..., Any], Callable[..., Any]] = dict.fromkeys(
        (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), relu
    )
    swaps |= dict.fromkeys((F.leaky_relu, F.leaky_relu_), leaky_relu)
    swaps[F.relu6] = relu6
    for axes, average, adaptive in (
        (1, F.avg_pool1d, F.adaptive_avg_pool1d),
        (2, F.avg_pool2d, F.adaptive_avg_pool2d),
        (3, F.avg_pool3d, F.adaptive_avg_pool3d),
    ):
        name = f"max_pool{axes}d"
        pooled, adapted = getattr(F, name), getattr(F, f"adaptive_{name}")
        swaps |= dict.fromkeys((pooled, getattr(torch, name)), _average_pooling(average, pooled))
        swaps[adapted] = _adaptive_average_pooling(adaptive, adapted)
    if batch_statistics:
        swaps[F.batch_norm] = batch_norm
    return swaps


def _average_pooling(average: Callable[..., Tensor], maximum: Callable[..., Any]) -> Callable[..., Any]:
    """Average-pooling with the arguments of max-pooling; max-pooling itself if it is dilated or returns indices."""

    def pool(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices or (set(dilation) if isinstance(dilation, tuple | list) else {dilation}) != {1}:
            return maximum(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return average(input, kernel_size, stride, padding, ceil_mode, count_include_pad=False)

    return pool


def _adaptive_average_pooling(average: Callable[..., Tensor], maximum: Callable[..., Any]) -> Callable[..., Any]:
    """Adaptive average-pooling with the arguments of adaptive max-pooling; the latter itself if it returns indices."""

    def pool(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
        return maximum(input, output_size, return_indices) if return_indices else average(input, output_size)

    return pool
