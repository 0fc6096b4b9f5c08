"""The reference of compressors: a model at the weights that an update is relative to, and its call with proxies.

Both ends of a compressor need the same reference. Of the user's training loop they need only the shapes of inputs and
target.
"""

import dataclasses
import difflib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tofu.arguments import CALLS, check_kind, shown
from tofu.data import ImageShape
from tofu.errors import ModelError, SettingError, user_code
from tofu.plugins import NO_PLUGINS, Plugins, RoundContext
from tofu.rng import GlobalGenerators
from tofu.weights import ParamSpec, Weights, architecture_of, eval_mode, layout_of

LOG = logging.getLogger("tofu")

Shape = tuple[int, ...]
InputShape = Shape | tuple[Shape, ...]
"""The shape of one example, without the batch, or a tuple of shapes if the model takes several inputs."""

Forward = Callable[..., Any]
"""forward(model, *inputs) -> outputs."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""loss(outputs, targets) -> scalar."""

MAX_AXES = 8
"""Maximum number of axes of a shape, and of inputs of a model."""

MAX_LENGTH = 1 << 24
"""Maximum length of an axis."""

_SHAPES = "the shape of one example, such as (3, 32, 32), or a tuple of such shapes"

_MODES = {2: "linear", 3: "bilinear", 4: "trilinear"}


@dataclass(frozen=True)
class ModelCall:
    """The inputs and the target of a model.

    Without `forward`, proxies of inputs with 2 to 4 axes (channels, then the axes of a signal, an image or a volume)
    may be smaller than the input; they are interpolated to its size. Vectors, and inputs of `forward`, have
    exactly the given shape.

    Attributes:
        inputs: shape of one example of each input, without the batch.
        target: shape of one example's target. Without `loss` it is the shape of the output.
        forward: calls the model with the inputs; None for `model(*inputs)`.
        loss: the loss of a batch of outputs and targets; None for the sum of their products, which has the gradient of
            any loss for suitable targets.
        names: of the inputs, if the model is called by name; () if by position.
        impossible: why proxies cannot be passed to the model; "" if they can, or if nobody asked.
    """

    inputs: tuple[Shape, ...]
    target: Shape
    forward: Forward | None = None
    loss: Loss | None = None
    names: tuple[str, ...] = ()
    impossible: str = ""

    @property
    def side(self) -> int:
        """The shortest of the axes that proxies may shorten, in the largest input that has any; 0 if none has."""
        inputs = [shape for shape in self.inputs if self._shortens(shape)]
        return min(max(inputs, key=math.prod)[1:]) if inputs else 0

    def proxy_shapes(self, side: int) -> tuple[Shape, ...]:
        """Return the shape of one proxy of each input, if the shortest axis of the largest one is `side` long."""
        return tuple(self._shortened(shape, side) if self._shortens(shape) else shape for shape in self.inputs)

    def outputs(self, model: nn.Module, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs [n, ...] of the model with these parameters for proxies [n, *shape] of each input."""
        full = self.full_size(inputs)
        with using_parameters(model, parameters):
            if self.forward is not None:
                return as_tensor(self.forward(model, *full))
            return as_tensor(model(**dict(zip(self.names, full, strict=True))) if self.names else model(*full))

    def full_size(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Interpolate proxies [n, *shape] of each input to the input's size where they are smaller."""
        return [
            values if values.shape[1:] == shape
            else F.interpolate(values, size=shape[1:], mode=_MODES[len(shape)], align_corners=False)
            for values, shape in zip(inputs, self.inputs, strict=True)
        ]  # fmt: skip

    def _shortens(self, shape: Shape) -> bool:
        return self.forward is None and len(shape) in _MODES

    def _shortened(self, shape: Shape, side: int) -> Shape:
        largest = self.side
        return (shape[0], *(max(1, (2 * axis * side + largest) // (2 * largest)) for axis in shape[1:]))  # rounded


@contextmanager
def using_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace parameters of a model within the block, wherever modules share them.

    Unlike `torch.func.functional_call` it does no checks, which would be repeated in thousands of calls of a search,
    and it works for modules that occur twice.
    """
    given = {id(p): parameters[name] for name, p in model.named_parameters() if name in parameters}
    own = [
        (module._parameters, key, p)
        for module in model.modules() for key, p in module._parameters.items() if id(p) in given
    ]  # fmt: skip
    try:
        for slots, key, p in own:
            slots[key] = given[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for slots, key, p in own:
            slots[key] = p


NO_CALL = ModelCall((), ())
"""The call of a model for compressors that do not call it."""

NEEDS_CALL = frozenset({"proxy", "3sfc"})
"""Compressors that differentiate through the model."""


def call_of(
    model: nn.Module,
    input_shape: InputShape,
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    target_shape: Shape | None = None,
    names: tuple[str, ...] = (),
) -> ModelCall:
    """Return the call of a model with inputs of these shapes, checked by a forward pass of zeros.

    Args:
        input_shape, forward: see `ModelCall`.
        loss, target_shape: a loss and the shape of its target, both or neither.
        names: of the inputs, if the model is called by name.

    Raises:
        SettingError: this call fails, or its outputs are not floating-point values for each example.
    """
    inputs, forward = inputs_of(model, input_shape, forward)
    if (loss is None) != (target_shape is None):
        raise SettingError("target_shape", target_shape, "the shape of the targets of `loss`: give both or neither")
    if target_shape is not None and not (
        isinstance(target_shape, tuple | list) and all(isinstance(n, int) and n >= 1 for n in target_shape)
    ):
        raise SettingError("target_shape", target_shape, "the shape of one example's target in `loss`, such as (10,)")
    if names and len(names) != len(inputs):
        raise SettingError("input_shape", input_shape, f"one shape for each of the inputs {', '.join(names)}")
    call = ModelCall(inputs, tuple(target_shape or ()), forward, loss, () if forward else names)
    accepted = "the shape of this model's input"
    with user_code("input_shape", input_shape, accepted), eval_mode(model), torch.no_grad():
        outputs = call.outputs(model, dict(model.named_parameters()), [torch.zeros(1, *shape) for shape in inputs])
    if outputs.dim() < 1 or outputs.shape[0] != 1 or not outputs.is_floating_point():
        found = f"{outputs.dtype} {list(outputs.shape)} for a batch of one"
        raise SettingError("model", found, "outputs that are floating-point values, the batch first")
    if loss is not None:
        with user_code("loss", shown(loss), CALLS["loss"].accepted):
            value = loss(outputs, torch.zeros(1, *call.target))
        if not isinstance(value, Tensor) or value.dim():
            raise SettingError("loss", shown(loss), f"{CALLS['loss'].accepted} (it returns {type(value).__name__})")
        return call
    return replace(call, target=tuple(outputs.shape[1:]))


def resolve_compressor(
    compressor: str | None, model: nn.Module | None, input_shape: InputShape | None, **call: Any
) -> tuple[str, ModelCall]:
    """Return the name of the compressor, and how it calls the model.

    The default is `proxy`, or `sparse` (the sparse correction alone) if proxies are impossible: if no model or input
    shape is given, or the model takes integers. The fallback is logged.

    Args:
        call: as for `call_of`.

    Raises:
        SettingError: the call fails, or the compressor needs a model and an input shape.
    """
    if model is None or input_shape is None:
        if compressor in NEEDS_CALL:
            raise SettingError("compressor", compressor, "model and input_shape to be given, or compressor=sparse")
        why = f"no {'model' if model is None else 'input_shape'} is given"
    else:
        try:
            return compressor or "proxy", call_of(model, input_shape, **call)
        except SettingError:
            if compressor in NEEDS_CALL or call.get("forward") or not takes_integers(model, input_shape):
                raise
        why = "the model takes integers, and no `forward` (tofu.at_embedding) passes proxies behind its embedding"
    if compressor is None:
        LOG.warning("updates are compressed by the sparse correction alone, without proxies: %s", why)
    return compressor or "sparse", NO_CALL


def shapes_of(input_shape: InputShape) -> tuple[Shape, ...]:
    """Return the shapes of all inputs. Raises SettingError if they are not tuples of positive integers."""
    if not isinstance(input_shape, tuple | list):
        raise SettingError("input_shape", shown(input_shape), _SHAPES)
    nested = [x if isinstance(x, tuple | list) else (x,) for x in input_shape]
    shapes = [tuple(input_shape)] if all(isinstance(x, int) for x in input_shape) else nested
    usable = 1 <= len(shapes) <= MAX_AXES and all(1 <= len(shape) <= MAX_AXES for shape in shapes)
    if not usable or not all(isinstance(x, int) and 1 <= x <= MAX_LENGTH for shape in shapes for x in shape):
        raise SettingError("input_shape", input_shape, _SHAPES)
    return tuple(tuple(shape) for shape in shapes)  # type: ignore[arg-type]


def inputs_of(
    model: nn.Module, input_shape: InputShape, forward: Forward | None
) -> tuple[tuple[Shape, ...], Forward | None]:
    """Return the shapes of all inputs, and the `forward`.

    For a model of the `transformers` library, inputs of shape (tokens,) or (tokens, dim) replace the token embeddings.
    """
    shapes = shapes_of(input_shape)
    embeddings = getattr(model, "get_input_embeddings", None)
    layer = embeddings() if callable(embeddings) else None
    if forward is None and len(shapes) == 1 and isinstance(layer, nn.Embedding):
        embedded = (shapes[0][0], layer.embedding_dim)
        if shapes[0] in (embedded, embedded[:1]):
            return (embedded,), call_with_embeddings
    return shapes, forward


def takes_integers(model: nn.Module, input_shape: InputShape) -> bool:
    """Return whether a model that refuses floating-point inputs of these shapes accepts integers, as embeddings do."""
    try:
        with eval_mode(model), torch.no_grad():
            model(*(torch.zeros(1, *shape, dtype=torch.int64) for shape in shapes_of(input_shape)))
    except Exception:  # the user's own code may raise anything
        return False
    return True


def call_with_embeddings(model: nn.Module, embeddings: Tensor) -> Any:
    """Call a `transformers` model with token embeddings [n, tokens, dim]."""
    return model(inputs_embeds=embeddings)


def at_embedding(name: str) -> Forward:
    """Return a `forward` for models of token ids, in which proxies replace the output of the embedding layer `name`.

    `input_shape` is then (tokens, dim). The model itself is called with token ids [n, tokens] of zeros.

    Example:
        >>> import torch
        >>> from tofu.reference_model import at_embedding
        >>> class Words(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embedding, self.head = torch.nn.Embedding(100, 8), torch.nn.Linear(8, 2)
        ...
        ...     def forward(self, ids):
        ...         return self.head(self.embedding(ids).mean(1))
        >>> model, embedded = Words(), torch.ones(3, 5, 8)
        >>> torch.equal(at_embedding("embedding")(model, embedded), model.head(embedded.mean(1)))
        True
    """

    check_kind("at_embedding", name, str, "the name of an embedding layer, such as 'embedding'")

    def forward(model: nn.Module, embedded: Tensor) -> Any:
        with _layer(model, name).register_forward_hook(lambda layer, ids, out: embedded):
            return model(torch.zeros(embedded.shape[:2], dtype=torch.int64, device=embedded.device))

    forward.__qualname__ = f"at_embedding({name!r})"
    return forward


def _layer(model: nn.Module, name: str) -> nn.Module:
    """Return a layer of a model by its name. Raises SettingError if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        layers = dict(model.named_modules())
        near = difflib.get_close_matches(name, filter(None, layers), n=1)
        found = near or [key for key, layer in layers.items() if isinstance(layer, nn.Embedding | nn.EmbeddingBag)]
        accepted = f"a layer of this model: {' or '.join(map(repr, found))}" if found else "a model with this layer"
        raise SettingError("forward", f"at_embedding({name!r})", accepted) from None


def as_tensor(outputs: Any) -> Tensor:
    """Convert a model's outputs to one tensor: a tensor, `logits`, or several tensors, flattened and concatenated.

    Raises:
        SettingError: the outputs have another type.
    """
    outputs = getattr(outputs, "logits", outputs)
    if isinstance(outputs, Tensor):
        return outputs
    values = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    if isinstance(values, tuple | list) and values and all(isinstance(v, Tensor) and v.dim() > 0 for v in values):
        return torch.cat([value.flatten(1) if value.dim() > 1 else value[:, None] for value in values], dim=1)
    raise ModelError(outputs, "tensors as outputs: give a `forward` that returns one")


@dataclass(frozen=True)
class ReferenceModel:
    """A model at the base weights, that is, the weights that updates are relative to.

    Attributes:
        model: the network at the base weights, in eval mode. It is never changed here.
        input: the shape of the images, for a classifier of images; otherwise the call of the model.
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
        """Return the reference of a new model after the plugins' `setup`, at its initial weights;
        the same on both ends.

        Args:
            model: a newly built model for images and classes of `shape`.
            about: the position in the run; required if there are plugins.
            call: the call of the model, if there are no plugins; by default with images of `shape`.
        """
        if not plugins or about is None:
            return ReferenceModel(model, call or shape).as_built()
        with GlobalGenerators(about.seed):  # new layers draw weights, which would disturb the build of another thread
            model = plugins.setup(model, about)
        (classes,) = call_of(model, shape.chw).target  # a plugin may have changed it
        return ReferenceModel(model, dataclasses.replace(shape, classes=classes)).as_built()

    def as_built(self) -> "ReferenceModel":
        """Return a reference whose initial weights are a copy of its current ones."""
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
            SettingError: the model has other inputs, or several.
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

    def displacements(self) -> Iterator[Tensor]:
        """Yield the difference of each trainable parameter from its initial value, in the order of the param spec."""
        for name, weight in self.base.items():
            yield weight - self.initial[name] if self.initial else torch.zeros_like(weight)

    def check_differentiable(self) -> None:
        """Compute one gradient at other weights, as decoding does. Raises SettingError if the model prevents that."""
        weights = {name: value.clone().requires_grad_() for name, value in self.base.items()}
        device = next(iter(weights.values())).device
        inputs = [torch.zeros(1, *shape, device=device) for shape in self.call.inputs]
        accepted = "a network that torch.func.functional_call and torch.autograd.grad accept, or another compressor"
        with user_code("model", type(self.model).__name__, accepted), eval_mode(self.model):
            loss = self.outputs(weights, inputs).sum()
            torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """Outputs [n, ...] for proxies [n, ...] of each input; smaller ones are interpolated to the input's size."""
        with GlobalGenerators(0, inputs[0].device) if self.draws else nullcontext():
            return self.call.outputs(self.model, parameters, inputs)

    @cached_property
    @torch.no_grad()
    def draws(self) -> bool:
        """Whether the model draws random numbers in evaluation mode, which must be the same at both ends."""
        device = next(self.model.parameters()).device
        inputs = [torch.zeros(1, *shape, device=device) for shape in self.call.inputs]
        with eval_mode(self.model), GlobalGenerators(0, device) as generators:
            self.call.outputs(self.model, self.base, inputs)
            return not generators.unused
