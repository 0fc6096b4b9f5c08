"""Remove channels or entries of a network in a plugin's `setup`, so that fewer parameters are trained and sent.

    keep_channels(model, {"conv1": torch.tensor([0, 3, 5])})   # indices from the plugin's broadcast

To remove channels, the layers must form a chain, because the inputs of the next layer are removed, too. Residual
connections, normalization layers and attention are not supported.

    keep_entries(model, {"conv1.weight": mask})   # masks from the plugin's broadcast

Masks of entries fit every layer. The parameter becomes a vector of the kept entries from which the layer's weight is
built, with zeros elsewhere (`conv1.parametrizations.weight.original`). Updates, compressors, error feedback, secure
sums and the downlink then never see the other entries. All clients and the server must apply the same masks.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tofu.errors import SettingError

Carrier = nn.Conv2d | nn.Linear
"""A layer with weights [outputs, inputs, ...]."""

_ACCEPTED = "convolutions and linear layers in sequence, without residual connections or normalization (norm=none)"


def chain_of(model: nn.Module) -> dict[str, Carrier]:
    """Return a mapping: name -> convolution or linear layer of a network in sequence, in its order.

    Raises:
        SettingError: the model is not a (nested) `nn.Sequential`, or another layer of it has parameters.
    """
    chain: dict[str, Carrier] = {}
    for name, module in _leaves(model, ""):
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            raise SettingError("model", f"{name}: {module}", _ACCEPTED)
        if isinstance(module, Carrier):
            chain[name] = module
        elif next(module.parameters(), None) is not None:
            raise SettingError("model", f"{name or 'the network'}: {type(module).__name__}", _ACCEPTED)
    return chain


def keep_channels(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Remove output channels of layers in place; the weights of the kept channels are unchanged.

    A layer stores its kept channels in the buffer `kept`, which is not sent but is part of the model's architecture
    (`tofu.weights.architecture_of`). Layers that have those channels already are left unchanged.

    Args:
        kept: layer's name -> int64 [channels], ascending indices of output channels of the layer as it was built. The
            last layer's outputs are the classes, which cannot be removed.

    Raises:
        SettingError: the model is not a chain (`chain_of`).
        ValueError: there is no such layer, it no longer has one of these channels, or its weight is made from others
            (by a mask or a factorization).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> keep_channels(model, {"0": torch.tensor([0, 2])})
        >>> model[0].weight.shape, model[2].weight.shape
        (torch.Size([2, 4]), torch.Size([2, 2]))
    """
    chain = chain_of(model)
    names = list(chain)
    for name, channels in kept.items():
        if name not in names[:-1]:
            raise ValueError(f"{name} is not a layer whose outputs can be removed: expected one of {names[:-1]}")
        layer, following = chain[name], chain[names[names.index(name) + 1]]
        current = getattr(layer, "kept", None)
        current = torch.arange(len(layer.weight)) if current is None else current
        positions = torch.isin(current, channels).nonzero().flatten()
        if not len(channels) or not torch.equal(current[positions], channels):
            raise ValueError(f"kept channels {channels.tolist()} of {name} are not some of {current.tolist()}")
        layer.register_buffer("kept", channels.clone(), persistent=False)
        if len(channels) < len(current):
            _set_weight(layer, layer.weight[positions], layer.bias[positions] if layer.bias is not None else None)
            per_channel = following.weight.shape[1] // len(current)  # a linear layer reads every position of a channel
            inputs = (positions[:, None] * per_channel + torch.arange(per_channel)).flatten()
            _set_weight(following, following.weight[:, inputs], following.bias)


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _leaves(inner, f"{name}.{child}" if name else child)


def _set_weight(layer: Carrier, weight: Tensor, bias: Tensor | None) -> None:
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"channels of {type(layer).__name__} cannot be removed: its weight is made from other parameters"
        )
    layer.weight = nn.Parameter(weight.detach().clone(), layer.weight.requires_grad)
    if bias is not None and layer.bias is not None and len(bias) < len(layer.bias):
        layer.bias = nn.Parameter(bias.detach().clone(), layer.bias.requires_grad)
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = weight.shape[:2]
    else:
        layer.out_features, layer.in_features = weight.shape[:2]


class KeptEntries(nn.Module):
    """Builds a weight from the vector of its kept entries; the other entries are 0.

    Args:
        mask: bool, of the weight's shape; True for an entry that is kept.
    """

    kept: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.shape = mask.shape
        self.register_buffer("kept", mask.flatten().nonzero().flatten(), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        weight = values.new_zeros(self.shape.numel())
        return weight.index_put((self.kept,), values).view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.flatten()[self.kept]


def keep_entries(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Replace the named parameters by their kept entries, in place.

    Args:
        masks: parameter's name -> bool tensor of its shape, with at least one True. A mask of the
            parameter is replaced if its kept entries differ.

    Raises:
        ValueError: a mask has another shape than its parameter, or no True.
    """
    for name, mask in masks.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if mask.shape != getattr(module, attribute).shape or not bool(mask.any()):
            raise ValueError(f"mask of {name} has shape {list(mask.shape)} and keeps {int(mask.sum())} entries")
        if parametrize.is_parametrized(module, attribute):
            current = module.parametrizations[attribute][0]  # type: ignore[index]
            if isinstance(current, KeptEntries) and torch.equal(current.kept, mask.flatten().nonzero().flatten()):
                continue
            parametrize.remove_parametrizations(module, attribute)
        parametrize.register_parametrization(module, attribute, KeptEntries(mask))
