"""The smooth twin of a network: what both ends of the codec differentiate in place of the network itself.

The gradient of a gradient is zero through ReLU's kink, so proxies cannot learn which units fire. Both ends of the codec
know the weights; nothing forces them to differentiate the very activation that the model trains with. In the twin,

- ReLU(x) becomes x * sigmoid(b x), b being the surrogate_beta (4 by default), and LeakyReLU and ReLU6 likewise,
- max-pooling becomes average-pooling,
- BatchNorm normalizes by the proxies' own batch statistics and leaves its running ones alone.

This is our addition to the paper, as are its constants. No copy of the network is made: `Surrogate` is a context in
which torch's own functions are swapped, so it reaches activations written as modules, as functions and as methods.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Surrogate(TorchFunctionMode):
    """Inside `with Surrogate(...)`, kinked functions run as their smooth twins (in this thread only).

    Args:
        surrogate_beta: b in x * sigmoid(b x); larger is closer to ReLU and harder to encode through.
        batch_statistics: whether BatchNorm uses the statistics of the batch that it is given.
    """

    def __init__(self, *, surrogate_beta: float = 4.0, batch_statistics: bool = True) -> None:
        super().__init__()
        self._swaps = _swaps(surrogate_beta, batch_statistics)

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


def _swaps(surrogate_beta: float, batch_statistics: bool) -> dict[Callable[..., Any], Callable[..., Any]]:
    def relu(input: Tensor, inplace: bool = False) -> Tensor:
        return smooth_relu(input, surrogate_beta)

    def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
        return negative_slope * input + (1 - negative_slope) * smooth_relu(input, surrogate_beta)

    def relu6(input: Tensor, inplace: bool = False) -> Tensor:
        return smooth_relu(input, surrogate_beta) - smooth_relu(input - 6, surrogate_beta)

    def max_pool2d(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad=False)

    def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
        return F.adaptive_avg_pool2d(input, output_size)

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
        # Also right for one proxy whose map is 1x1, where F.batch_norm would raise: the variance is then 0.
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
    swaps |= dict.fromkeys((F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices), max_pool2d)
    swaps |= dict.fromkeys((F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices), adaptive_max_pool2d)
    if batch_statistics:
        swaps[F.batch_norm] = batch_norm
    return swaps
