"""A model at its base weights together with the shape of its input: what both ends of a codec agree on."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tofu.data import ImageShape
from tofu.plugins import NO_PLUGINS, Plugins, RoundContext
from tofu.weights import ParamSpec, Weights, layout_of


@dataclass(frozen=True)
class ReferenceModel:
    """A classification network at the base weights, as the codec sees it.

    Attributes:
        model: the network, at_weights the base weights. It is never changed here; call `eval()` on it first.
        shape: channels, height, width of its input, and the number of its outputs as `classes`.
        initial: the trainable parameters that both ends built the run's model with; none where they are the base.
    """

    model: nn.Module
    shape: ImageShape
    initial: Weights = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(
        model: nn.Module, shape: ImageShape, plugins: Plugins = NO_PLUGINS, about: RoundContext | None = None
    ) -> "ReferenceModel":
        """A network of a new model, as the plugins make it, at its initial weights; the same on both ends.

        Args:
            model: as built, for images and classes of `shape`.
            about: where in the run this is; needed where there are plugins.
        """
        if not plugins or about is None:
            return ReferenceModel(model, shape).as_built()
        model = plugins.setup(model, about)
        return ReferenceModel(model, dataclasses.replace(shape, classes=_outputs(model, shape))).as_built()

    def as_built(self) -> "ReferenceModel":
        """This network with its weights of now as the initial ones, whatever becomes of the model."""
        return dataclasses.replace(self, initial={name: w.clone() for name, w in self.base.items()})

    @cached_property
    def param_spec(self) -> ParamSpec:
        return layout_of(self.model)

    @property
    def base(self) -> Weights:
        """The trainable parameters at the base weights, detached (shared memory, not a copy)."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach() for name in self.param_spec.parameters}

    def displacement(self) -> Weights:
        """The difference of each trainable parameter from its initial value."""
        return {name: w - self.initial[name] if self.initial else torch.zeros_like(w) for name, w in self.base.items()}

    def logits(self, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Output [n, classes] for images [n, channels, h, w] of any size: smaller ones are upsampled bilinearly."""
        size = (self.shape.height, self.shape.width)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        logits: Tensor = functional_call(self.model, dict(parameters), (images,))
        return logits


@torch.no_grad()
def _outputs(model: nn.Module, shape: ImageShape) -> int:
    """How many numbers a model gives for an image: a plugin may have added some."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    outputs: Tensor = model(torch.zeros(1, shape.channels, shape.height, shape.width))
    for module, training in modes.items():
        module.training = training
    return outputs.shape[1]
