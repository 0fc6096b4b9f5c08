"""A model at its base weights, and how it is called: what both ends of a compressor agree on."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from tofu.data import ImageShape
from tofu.errors import SettingError
from tofu.model_call import ModelCall, call_of, evaluating
from tofu.plugins import NO_PLUGINS, Plugins, RoundContext
from tofu.rng import GlobalGenerators
from tofu.weights import ParamSpec, Weights, architecture_of, layout_of


@dataclass(frozen=True)
class ReferenceModel:
    """A model at the base weights, which updates are relative to.

    Attributes:
        model: the network at the base weights, in eval mode. It is never changed here.
        input: the shape of the images that it classifies, or how any other model is called.
        initial: the trainable parameters of the run's initial model, the same on both ends; empty if they are the base.
    """

    model: nn.Module
    input: ImageShape | ModelCall
    initial: Weights = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(
        model: nn.Module,
        shape: ImageShape,
        plugins: Plugins = NO_PLUGINS,
        about: RoundContext | None = None,
        call: ModelCall | ImageShape | None = None,
    ) -> "ReferenceModel":
        """The reference of a new model after the plugins' `setup`, at its initial weights; the same on both ends.

        Args:
            model: a newly built model for images and classes of `shape`.
            about: where in the run this is; required if there are plugins.
            call: how the model is called, if there are no plugins; by default with images of `shape`.
        """
        if not plugins or about is None:
            return ReferenceModel(model, call or shape).as_built()
        with GlobalGenerators(about.seed):  # new layers draw weights, which would disturb the build of another thread
            model = plugins.setup(model, about)
        (classes,) = call_of(model, (shape.channels, shape.height, shape.width)).target  # a plugin may have changed it
        return ReferenceModel(model, dataclasses.replace(shape, classes=classes)).as_built()

    def as_built(self) -> "ReferenceModel":
        """This reference with a copy of its present weights as the initial ones."""
        return dataclasses.replace(self, initial={name: w.clone() for name, w in self.base.items()})

    @cached_property
    def call(self) -> ModelCall:
        if isinstance(self.input, ModelCall):
            return self.input
        return ModelCall(((self.input.channels, self.input.height, self.input.width),), (self.input.classes,))

    @property
    def shape(self) -> ImageShape:
        """The shape of the images that it classifies.

        Raises:
            SettingError: it takes other inputs, or several.
        """
        if isinstance(self.input, ImageShape):
            return self.input
        if len(self.call.inputs) != 1 or len(self.call.inputs[0]) != 3 or len(self.call.target) != 1:
            raise SettingError("input_shape", self.call.inputs, "one image: channels, height and width")
        return ImageShape(*self.call.inputs[0], classes=self.call.target[0])

    @cached_property
    def param_spec(self) -> ParamSpec:
        return layout_of(self.model)

    @cached_property
    def architecture(self) -> bytes:
        """The version of the model's architecture (`tofu.weights.architecture_of`), which plugins may change."""
        return architecture_of(self.model)

    @property
    def base(self) -> Weights:
        """The trainable parameters at the base weights, detached (sharing memory, not copied)."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach() for name in self.param_spec.parameters}

    def displacement(self) -> Weights:
        """The difference of each trainable parameter from its initial value."""
        return {name: w - self.initial[name] if self.initial else torch.zeros_like(w) for name, w in self.base.items()}

    def check_differentiable(self) -> None:
        """Compute one gradient at other weights, as decoding does. Raises SettingError if the model prevents that."""
        weights = {name: value.clone().requires_grad_() for name, value in self.base.items()}
        device = next(iter(weights.values())).device
        inputs = [torch.zeros(1, *shape, device=device) for shape in self.call.inputs]
        try:
            with evaluating(self.model):
                loss = self.outputs(weights, inputs).sum()
                torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        except Exception as error:  # the user's own code may raise anything
            accepted = "a network that torch.func.functional_call and torch.autograd.grad accept, or another compressor"
            reason = " ".join(str(error).split())[:200]
            raise SettingError("model", type(self.model).__name__, f"{accepted} ({reason})") from error

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """Outputs [n, ...] for proxies [n, ...] of each input; smaller ones are interpolated to the input's size."""
        with GlobalGenerators(0, inputs[0].device) if self._draws else nullcontext():
            return self.call.outputs(self.model, parameters, inputs)

    @cached_property
    @torch.no_grad()
    def _draws(self) -> bool:
        """Whether the model draws random numbers in evaluation mode; then both ends must draw the same ones."""
        device = next(self.model.parameters()).device
        inputs = [torch.zeros(1, *shape, device=device) for shape in self.call.inputs]
        with evaluating(self.model), GlobalGenerators(0, device) as generators:
            self.call.outputs(self.model, self.base, inputs)
            return not generators.unused
