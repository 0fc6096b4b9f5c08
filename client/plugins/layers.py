"""The inputs of a network's layers, where every layer is a matrix that multiplies rows of inputs.

A linear layer's rows are its inputs, one for each image (or token). A convolution's are the patches under its kernel
(im2col), one for each image and position; each group of a grouped convolution is a matrix of its own. Attention's
projections are two: of queries, keys and values together, and of the heads' outputs.

    grams(model, images)["conv1.weight"]   # sum over rows x of x x^T, float64: adds over images, batches and clients

Weights that are used in another way, such as by `F.linear` in a custom module or by a convolution that is not 2-d, are
not found; frozen ones are left out.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tofu.data import to_float
from tofu.weights import eval_mode, removing

_BATCH = 50  # number of images whose patches are in memory at a time


@dataclass(frozen=True)
class Site:
    """A matrix of a layer, [outputs, columns]: `parameter.flatten(1)[start:stop]` of the parameter `weight`.

    Attributes:
        name: the parameter's name, with "#group" for a convolution's groups.
        weight, bias: names of the parameters; the bias, or None, has the same rows.
        start, stop: rows.
        columns: length of an input row.
    """

    name: str
    weight: str
    bias: str | None
    start: int
    stop: int
    columns: int


See = Callable[[Site, Tensor], None]
"""Called with a site and its input rows, float32 [rows, columns]."""


def sites(model: nn.Module) -> tuple[Site, ...]:
    """Return all matrices of a model in its modules' order, the first layer's first."""
    return tuple(site for _, own in _layers(model) for site in own)


def matrix(site: Site, model: nn.Module) -> Tensor:
    """Return the site's matrix [outputs, columns], a view of the parameter;
    outputs before the bias are `rows @ matrix.T`.
    """
    return model.get_parameter(site.weight).flatten(1)[site.start : site.stop]


@contextmanager
def capture_inputs(model: nn.Module, see: See) -> Iterator[None]:
    """Call `see` with the inputs of every layer in forward passes within the block."""
    with removing(
        module.register_forward_pre_hook(_hook(own, see), with_kwargs=True) for module, own in _layers(model)
    ):
        yield


@torch.no_grad()
def record_inputs(model: nn.Module, images: Tensor, see: See) -> None:
    """Call `see` with the inputs of every layer for uint8 images [n, channels, height, width], in eval mode."""
    with eval_mode(model), capture_inputs(model, see):
        for batch in torch.split(images, _BATCH):
            model(to_float(batch))


def grams(model: nn.Module, images: Tensor, *, bias: bool = False, max_norm: float = float("inf")) -> dict[str, Tensor]:
    """Return the sum over input rows x of x x^T for every site, float64 [columns, columns], in eval mode.

    Args:
        images: uint8 [n, channels, height, width].
        bias: append a 1 to the rows of layers with a bias, whose matrix is then [weight | bias].
        max_norm: rows of a larger norm are scaled to it.
    """
    every = sites(model)
    size = {site.name: site.columns + (bias and site.bias is not None) for site in every}
    total = {name: torch.zeros(d, d, dtype=torch.float64) for name, d in size.items()}

    def add(site: Site, rows: Tensor) -> None:
        rows = rows.double()
        if size[site.name] > site.columns:
            rows = F.pad(rows, (0, 1), value=1.0)
        if max_norm < float("inf"):
            rows = rows * (max_norm / rows.norm(dim=1, keepdim=True).clamp(min=max_norm))
        total[site.name].addmm_(rows.T, rows)

    record_inputs(model, images, add)
    return total


def packed(gram: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix [d, d], row by row: [d (d + 1) / 2]."""
    return gram[tuple(torch.triu_indices(*gram.shape))]


def unpacked(triangle: Tensor) -> Tensor:
    """Invert `packed`."""
    size = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    rows, columns = torch.triu_indices(size, size)
    gram = triangle.new_zeros(size, size)
    gram[rows, columns] = gram[columns, rows] = triangle
    return gram


def leading_count(values: Tensor, fraction: float) -> int:
    """Return the fewest largest of the eigenvalues, [n] in ascending order,
    with this fraction of their sum; at least 1.
    """
    falling = values.flip(0).clamp(min=0)
    # Rounding may leave the last of the running sums below a fraction of 1.
    return min(int((falling.cumsum(0) < fraction * falling.sum()).sum()) + 1, len(falling))


def rows_per_image(model: nn.Module, channels: int, height: int, width: int) -> dict[str, int]:
    """Return the number of input rows per image at every site; 0 for layers that a forward pass does not reach."""
    count = {site.name: 0 for site in sites(model)}

    def add(site: Site, rows: Tensor) -> None:
        count[site.name] += len(rows)

    record_inputs(model, torch.zeros(1, channels, height, width, dtype=torch.uint8), add)
    return count


_Layer = tuple[nn.Module, tuple[Site, ...]]


def _layers(model: nn.Module) -> list[_Layer]:
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    # Attention uses the weights of its last layer without calling it.
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    found: list[_Layer] = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            own = _attention_sites(module, names)
        elif isinstance(module, nn.Linear | nn.Conv2d) and id(module) not in inside:
            own = _plain_sites(module, names)
        else:
            continue
        if own:
            found.append((module, own))
    return found


def _plain_sites(module: nn.Linear | nn.Conv2d, names: dict[int, str]) -> tuple[Site, ...]:
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    own = []
    for group in range(groups):
        suffix = f"#{group}" if groups > 1 else ""
        own += _site(module.weight, module.bias, names, group, groups, suffix)
    return tuple(own)


def _attention_sites(module: nn.MultiheadAttention, names: dict[int, str]) -> tuple[Site, ...]:
    own: list[Site] = []
    if module.in_proj_weight is not None:
        own += _site(module.in_proj_weight, module.in_proj_bias, names)
    else:
        # Their biases are thirds of one parameter, which therefore belongs to no site.
        for weight in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight):
            own += _site(weight, None, names)
    return (*own, *_site(module.out_proj.weight, module.out_proj.bias, names))


def _site(weight: Tensor, bias: Tensor | None, names: dict[int, str], group: int = 0, groups: int = 1,
          suffix: str = "") -> list[Site]:  # fmt: skip
    if id(weight) not in names:
        return []
    outputs, name = weight.shape[0] // groups, names[id(weight)]
    bias_name = None if bias is None else names.get(id(bias))
    start = group * outputs
    return [Site(name + suffix, name, bias_name, start, start + outputs, weight[0].numel())]


def _hook(own: tuple[Site, ...], see: See) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    busy = False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal busy
        if busy:
            return
        if isinstance(module, nn.MultiheadAttention):
            busy = True
            try:
                _see_attention(module, own, args, kwargs, see)
            finally:
                busy = False
            return
        inputs = (args[0] if args else kwargs["input"]).detach()
        if isinstance(module, nn.Conv2d):
            for site, rows in zip(own, _patches(module, inputs), strict=True):
                see(site, rows)
        else:
            see(own[0], inputs.reshape(-1, own[0].columns))

    return hook


def _patches(conv: nn.Conv2d, images: Tensor) -> list[Tensor]:
    """Per group: rows [n * positions, columns]."""
    if images.dim() == 3:
        images = images[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    images = F.pad(images, conv._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(images, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    return [part.transpose(1, 2).flatten(0, 1) for part in columns.chunk(conv.groups, dim=1)]


def _see_attention(module: nn.MultiheadAttention, own: tuple[Site, ...], args: tuple[Any, ...],
                   kwargs: dict[str, Any], see: See) -> None:  # fmt: skip
    given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
    inputs = [given[name].detach() for name in ("query", "key", "value")]
    for site in own:
        if site.weight.endswith("out_proj.weight"):
            # With the identity as its last layer, attention returns the input of that layer.
            weight = module.out_proj.weight
            identity = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype)}
            if module.out_proj.bias is not None:
                identity["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
            fed: Tensor = functional_call(module, identity, args, kwargs)[0]
            see(site, fed.detach().flatten(0, -2))
        elif site.weight.endswith("in_proj_weight"):
            distinct = {id(given[name]): x for name, x in zip(("query", "key", "value"), inputs, strict=True)}
            for x in distinct.values():
                see(site, x.flatten(0, -2))
        else:
            see(site, inputs["qkv".index(site.weight.rsplit(".", 1)[-1][0])].flatten(0, -2))
