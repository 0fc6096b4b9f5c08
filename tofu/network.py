"""A model at its base weights together with the shape of its input: what both ends of a codec agree on."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tofu.data import ImageShape
from tofu.weights import Layout, Weights, layout_of


@dataclass(frozen=True)
class Network:
    """A classification network at the base weights, as the codec sees it.

    Attributes:
        model: the network, holding the base weights. It is never changed here; call `eval()` on it first.
        shape: channels, height, width and classes of its input and output.
    """

    model: nn.Module
    shape: ImageShape

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.model)

    @property
    def base(self) -> Weights:
        """The trainable parameters at the base weights, detached (shared memory, not a copy)."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach() for name in self.layout.parameters}

    def logits(self, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Output [n, classes] for images [n, channels, h, w] of any size: smaller ones are upsampled bilinearly."""
        size = (self.shape.height, self.shape.width)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        logits: Tensor = functional_call(self.model, dict(parameters), (images,))
        return logits
