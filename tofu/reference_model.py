"""A model at its base weights, with the shape of its input: what both ends of a compressor agree on."""

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
    """A classifier at the base weights, which updates are relative to.

    Attributes:
        model: the network at the base weights, in eval mode. It is never changed here.
        shape: channels, height and width of its input, and the number of its outputs as `classes`.
        initial: the trainable parameters of the run's initial model, the same on both ends; empty if they are the base.
    """

    model: nn.Module
    shape: ImageShape
    initial: Weights = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(
        model: nn.Module, shape: ImageShape, plugins: Plugins = NO_PLUGINS, about: RoundContext | None = None
    ) -> "ReferenceModel":
        """The reference of a new model after the plugins' `setup`, at its initial weights; the same on both ends.

        Args:
            model: a newly built model for images and classes of `shape`.
            about: where in the run this is; required if there are plugins.
        """
        if not plugins or about is None:
            return ReferenceModel(model, shape).as_built()
        model = plugins.setup(model, about)
        return ReferenceModel(model, dataclasses.replace(shape, classes=output_count(model, shape))).as_built()

    def as_built(self) -> "ReferenceModel":
        """This reference with a copy of its present weights as the initial ones."""
        return dataclasses.replace(self, initial={name: w.clone() for name, w in self.base.items()})

    @cached_property
    def param_spec(self) -> ParamSpec:
        return layout_of(self.model)

    @property
    def base(self) -> Weights:
        """The trainable parameters at the base weights, detached (sharing memory, not copied)."""
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
def output_count(model: nn.Module, shape: ImageShape) -> int:
    """Number of a model's outputs per image, which a plugin may have changed."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    outputs: Tensor = model(torch.zeros(1, shape.channels, shape.height, shape.width))
    for module, training in modes.items():
        module.training = training
    return outputs.shape[1]
