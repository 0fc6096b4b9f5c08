"""Proxies: their definition, their byte format, and their decoding.

Proxies are n inputs x_i (images, in the paper) with labels y_i whose gradients at the shared weights W,

    G(x, y) = grad_W L(x, y; W),    L = sum_i loss(f(x_i; W), y_i),

approximate an update (arXiv 2201.08494, section 3). A receiver that has W decodes them with one backward pass.

With labels on the simplex, as in the paper, the loss is cross-entropy and each proxy has a weight. With free labels
(ours) the loss is sum(f(x) * Y) with Y unconstrained. G is then linear in Y, and for any loss of f(x) there is a Y with
the same gradient. For models with very many outputs, users can give a loss with smaller targets. G is multiplied by one
scale per tensor (ours) or by one scale for all (the paper).
"""

import dataclasses
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tofu.codec.options import MAX_SURROGATE_BETA, ProxySettings
from tofu.codec.surrogate import Surrogate
from tofu.compression.coding import RowCode, bfloat16_bytes, bfloat16_from
from tofu.errors import PayloadError, SettingError
from tofu.reference_model import ReferenceModel, Shape
from tofu.weights import Weights

MAX_SIDE = 1024
"""Maximum side of a proxy in pixels."""

MIN_SIDE = 7
"""Minimum side that is chosen automatically. With smaller proxies most bytes would be labels and scales, not pixels."""


@dataclass(frozen=True)
class ProxyData:
    """Proxies, as they are sent instead of an update.

    Attributes:
        inputs: one float32 tensor [n, ...] for each input of the model; [n, channels, h, w] for images.
        labels: float32 [n, ...]; free, or probabilities in simplex mode.
        weights: float32 [n], weight of each proxy in simplex mode, else None.
        scales: float32 [number of parameter tensors], or [1].
        surrogate_beta: beta of the surrogate's activations.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    weights: Tensor | None
    scales: Tensor
    surrogate_beta: float = 4.0

    def on(self, device: torch.device) -> "ProxyData":
        """Return a copy with inputs, labels and weights on a device."""
        weights = self.weights.to(device) if self.weights is not None else None
        inputs = tuple(values.to(device) for values in self.inputs)
        return dataclasses.replace(self, inputs=inputs, labels=self.labels.to(device), weights=weights)


def proxy_side(reference: ReferenceModel, settings: ProxySettings) -> int:
    """Return the shortest side of a proxy: that of the settings, or by default the smallest of `automatic_sides`.

    Raises:
        SettingError: the side in the settings is larger than the input.
    """
    side = reference.call.side
    if settings.size > side:
        accepted = f"at most the input's side, {side}" if side else "0: proxies of this model have its input's shape"
        raise SettingError("proxy-size", settings.size, accepted)
    return settings.size or automatic_sides(reference)[-1]


def automatic_sides(reference: ReferenceModel) -> list[int]:
    """Sides to choose from, largest first: from 1/2 to 1/4 of the input's side (14 to 7 for 28), but at least 7.

    The benchmark `codec` finds no difference between them at equal bytes, from about 16 proxies on; fewer, larger
    proxies take less time. The list is [0] if proxies cannot be smaller than the input.
    """
    side = reference.call.side
    smallest = min(side, max(MIN_SIDE, round(side / 4)), MAX_SIDE)
    return list(range(max(smallest, min(side // 2, MAX_SIDE)), smallest - 1, -1))


@dataclass(frozen=True)
class ProxyCode:
    """The byte format of proxies: inputs, labels, weights (simplex mode only), surrogate_beta, scales; no padding.

    Attributes:
        count: number of proxies.
        shapes: shape of one proxy, for each input of the model.
        target: shape of one label.
        tensors: number of scales.
        bits: bits of a value of an input and of a label.
        weighted: whether each proxy has a weight.
    """

    count: int
    shapes: tuple[Shape, ...]
    target: Shape
    tensors: int
    bits: int
    weighted: bool

    @staticmethod
    def of(reference: ReferenceModel, settings: ProxySettings, count: int) -> "ProxyCode":
        """Return the format of `count` proxies for a model.

        Raises:
            SettingError: simplex mode with a model whose output is not one score per class.
        """
        tensors = len(reference.param_spec.parameters) if settings.scale == "tensor" else 1
        call, weighted = reference.call, settings.labels == "simplex"
        if weighted and (call.loss is not None or len(call.target) != 1):
            raise SettingError("labels", settings.labels, "free, for a model that is no classifier")
        shapes = call.proxy_shapes(proxy_side(reference, settings))
        return ProxyCode(count, shapes, call.target, tensors, settings.bits, weighted)

    @property
    def shape(self) -> Shape:
        """The shape of one proxy; if the model has several inputs, their total number of values."""
        return self.shapes[0] if len(self.shapes) == 1 else (sum(self._sizes),)

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def _inputs(self) -> RowCode:
        return RowCode(self.count, sum(self._sizes), self.bits)

    @property
    def _labels(self) -> RowCode:
        return RowCode(self.count, math.prod(self.target), self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of the proxies."""
        weights = 2 * self.count if self.weighted else 0
        return self._inputs.nbytes + self._labels.nbytes + weights + 2 + 2 * self.tensors

    def write(self, proxies: ProxyData) -> bytes:
        """Quantize proxies to bytes of length `nbytes`."""
        weights = bfloat16_bytes(proxies.weights) if proxies.weights is not None else b""
        inputs, labels = self._write_inputs(proxies.inputs), self._labels.write(proxies.labels.reshape(self.count, -1))
        return inputs + labels + weights + bfloat16_bytes(torch.tensor([proxies.surrogate_beta, *proxies.scales]))

    def read(self, data: bytes) -> ProxyData:
        """Invert `write`.

        Raises:
            PayloadError: the length is wrong, or a value is out of range.
        """
        if len(data) != self.nbytes:
            raise PayloadError(f"{self.count} proxies take {len(data)} bytes, expected {self.nbytes}")
        a = self._inputs.nbytes
        b = a + self._labels.nbytes
        c = b + (2 * self.count if self.weighted else 0)
        inputs = self._read_inputs(data[:a])
        labels = self._labels.read(data[a:b], "proxy labels").view(self.count, *self.target)
        if self.weighted:  # quantized probabilities may not sum to 1
            labels = labels.clamp_min(0) / labels.clamp_min(0).sum(1, keepdim=True).clamp_min(1e-6)
        weights = bfloat16_from(data[b:c], "proxy weights") if self.weighted else None
        surrogate_beta, *scales = bfloat16_from(data[c:], "scales").tolist()
        if not 0 < surrogate_beta <= MAX_SURROGATE_BETA:
            raise PayloadError(
                f"surrogate_beta {surrogate_beta:g}, expected above 0 and at most {MAX_SURROGATE_BETA:g}"
            )
        return ProxyData(inputs, labels, weights, torch.tensor(scales), surrogate_beta)

    def quantize_inputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the inputs after quantization, as the receiver will read them."""
        return self._read_inputs(self._write_inputs(inputs))

    def fits(self, proxies: ProxyData) -> bool:
        """Return whether proxies have these shapes, and labels that are not all zero."""
        found = [*(tuple(values.shape) for values in proxies.inputs), tuple(proxies.labels.shape)]
        same = found == [(self.count, *shape) for shape in (*self.shapes, self.target)]
        return same and (proxies.weights is not None) == self.weighted and float(proxies.labels.abs().max()) > 0

    def _write_inputs(self, inputs: tuple[Tensor, ...]) -> bytes:
        return self._inputs.write(torch.cat([values.flatten(1) for values in inputs], dim=1))

    def _read_inputs(self, data: bytes) -> tuple[Tensor, ...]:
        rows = self._inputs.read(data, "proxy inputs").view(self.count, -1)
        pieces: tuple[Tensor, ...] = torch.split(rows, self._sizes, dim=1)
        return tuple(piece.reshape(self.count, *shape) for piece, shape in zip(pieces, self.shapes, strict=True))


def proxy_loss(reference: ReferenceModel, weights: Weights, proxies: ProxyData, settings: ProxySettings) -> Tensor:
    """L(x, y; W), computed on the device of the weights."""
    proxies = proxies.on(next(iter(weights.values())).device)
    with surrogate_context(settings, proxies.surrogate_beta):
        outputs = reference.outputs(weights, proxies.inputs)
    return loss_of_outputs(reference, outputs, proxies.labels, proxies.weights)


def surrogate_context(settings: ProxySettings, surrogate_beta: float) -> AbstractContextManager[object]:
    """Return a context in which networks run as the codec differentiates them: with surrogates if `settings.smooth`."""
    if not settings.smooth:
        return nullcontext()
    return Surrogate(surrogate_beta=surrogate_beta, batch_statistics=settings.batch_statistics)


def loss_of_outputs(reference: ReferenceModel, outputs: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """L as a function of the network's outputs [n, ...], the labels, and the proxies' weights in simplex mode."""
    if reference.call.loss is not None:
        return reference.call.loss(outputs, labels)
    if weights is None:
        return torch.sum(outputs * labels)
    return torch.sum(weights * F.cross_entropy(outputs, labels, reduction="none"))


def gradients(reference: ReferenceModel, proxies: ProxyData, settings: ProxySettings) -> Weights:
    """G: the gradient of the proxies' loss at the base weights, without scales; 0 for unused parameters."""
    weights = {name: w.detach().requires_grad_() for name, w in reference.base.items()}
    loss = proxy_loss(reference, weights, proxies, settings)
    grads = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return dict(zip(weights, grads, strict=True))


def decode(reference: ReferenceModel, proxies: ProxyData, settings: ProxySettings) -> Weights:
    """Decode proxies at the reference's weights: one backward pass, times the scales."""
    return scale_gradients(gradients(reference, proxies, settings), proxies.scales)


def scale_gradients(grads: Weights, scales: Tensor) -> Weights:
    """Multiply each tensor by its scale; one scale applies to all."""
    per_tensor = scales.expand(len(grads)).unbind()
    return {name: scale * g for (name, g), scale in zip(grads.items(), per_tensor, strict=True)}
