"""Train and send only chosen entries of a parameter.

    keep_entries(model, {"conv1.weight": mask})   # in a plugin's `setup`, with masks from its broadcast

The parameter becomes a vector of the kept entries (`conv1.parametrizations.weight.original`) from which the layer's
weight is built, with zeros elsewhere. Updates, compressors, error feedback, secure sums and the downlink then never see
the other entries. All clients and the server must apply the same masks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


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
        masks: parameter's name -> bool tensor of its shape, with at least one True. A parameter that is masked already
            is left unchanged where its kept entries are the same, and otherwise is masked anew.

    Raises:
        ValueError: a mask has another shape than its parameter, or keeps nothing.
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
