"""Proxies: what they are, their bytes, and the update that they decode to.

Proxies are n images x_i with labels y_i whose gradients at the shared weights W,

    G(x, y) = grad_W L(x, y; W),    L = sum_i loss(f(x_i; W), y_i),

point along an update (arXiv 2201.08494, section 3). Whoever knows W decodes them with one backward pass.

With labels on the simplex, as in the paper, the loss is cross-entropy and each image has a weight. With free labels
(ours) the loss is sum(f(x) * Y) with Y unconstrained, so G is linear in Y. A scale per tensor (ours) or one for all
(the paper) multiplies G.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tofu.codec.options import MAX_SURROGATE_BETA, ProxySettings
from tofu.codec.surrogate import Surrogate
from tofu.compression.quantize import RowCode, bfloat16_bytes, bfloat16_from
from tofu.errors import PayloadError, SettingError
from tofu.reference_model import ReferenceModel
from tofu.weights import Weights

MIN_SIDE = 7
"""Smaller proxies would spend more bytes on labels and scales than on pixels, and an encode would need many of them."""


@dataclass(frozen=True)
class ProxyData:
    """The proxies that are sent instead of an update.

    Attributes:
        images: float32 [n, channels, h, w].
        labels: float32 [n, classes]; free, or probabilities in simplex mode.
        weights: float32 [n], weight of each image in simplex mode, else None.
        scales: float32 [number of parameter tensors], or [1].
        surrogate_beta: beta of the surrogate's activations.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor | None
    scales: Tensor
    surrogate_beta: float = 4.0

    def on(self, device: torch.device) -> "ProxyData":
        """The same with images, labels and weights on a device."""
        weights = self.weights.to(device) if self.weights is not None else None
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device), weights=weights)


def proxy_side(reference: ReferenceModel, settings: ProxySettings) -> int:
    """Side of the square proxies in pixels; if the settings leave it open, the smallest of `automatic_sides`.

    Raises:
        SettingError: the side in the settings is larger than the input.
    """
    side = min(reference.shape.height, reference.shape.width)
    if settings.size > side:
        raise SettingError("proxy-size", settings.size, f"at most the input's side, {side}")
    return settings.size or automatic_sides(reference)[-1]


def automatic_sides(reference: ReferenceModel) -> list[int]:
    """Sides to choose from, largest first: from 1/2 to 1/4 of the input's side (14 to 7 for 28), but at least 7.

    At equal bytes the benchmark `codec` finds them equally good, given about 16 proxies or more; fewer and larger
    ones take less time.
    """
    side = min(reference.shape.height, reference.shape.width)
    smallest = min(side, max(MIN_SIDE, round(side / 4)))
    return list(range(max(smallest, side // 2), smallest - 1, -1))


@dataclass(frozen=True)
class ProxyCode:
    """The byte format of proxies: images, labels, weights (simplex mode only), surrogate_beta, scales; no padding.

    Attributes:
        count: number of proxies.
        channels, side: of each proxy, in pixels.
        classes: number of the network's outputs.
        tensors: number of scales.
        bits: bits of a pixel and of a label.
        weighted: whether each proxy has a weight.
    """

    count: int
    channels: int
    side: int
    classes: int
    tensors: int
    bits: int
    weighted: bool

    @staticmethod
    def of(reference: ReferenceModel, settings: ProxySettings, count: int) -> "ProxyCode":
        """The format of `count` proxies for a model."""
        tensors = len(reference.param_spec.parameters) if settings.scale == "tensor" else 1
        shape, side = reference.shape, proxy_side(reference, settings)
        weighted = settings.labels == "simplex"
        return ProxyCode(count, shape.channels, side, shape.classes, tensors, settings.bits, weighted)

    @property
    def _images(self) -> RowCode:
        return RowCode(self.count, self.channels * self.side**2, self.bits)

    @property
    def _labels(self) -> RowCode:
        return RowCode(self.count, self.classes, self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of the proxies."""
        weights = 2 * self.count if self.weighted else 0
        return self._images.nbytes + self._labels.nbytes + weights + 2 + 2 * self.tensors

    def write(self, proxies: ProxyData) -> bytes:
        """Quantize proxies to bytes of length `nbytes`."""
        weights = bfloat16_bytes(proxies.weights) if proxies.weights is not None else b""
        images, labels = self._images.write(proxies.images), self._labels.write(proxies.labels)
        return images + labels + weights + bfloat16_bytes(torch.tensor([proxies.surrogate_beta, *proxies.scales]))

    def read(self, data: bytes) -> ProxyData:
        """The inverse of `write`.

        Raises:
            PayloadError: the length is wrong, or a value is out of range.
        """
        if len(data) != self.nbytes:
            raise PayloadError(f"{self.count} proxies take {len(data)} bytes, expected {self.nbytes}")
        a = self._images.nbytes
        b = a + self._labels.nbytes
        c = b + (2 * self.count if self.weighted else 0)
        images = self._read_images(data[:a])
        labels = self._labels.read(data[a:b], "proxy labels")
        if self.weighted:  # quantization may leave the simplex
            labels = labels.clamp_min(0) / labels.clamp_min(0).sum(1, keepdim=True).clamp_min(1e-6)
        weights = bfloat16_from(data[b:c], "proxy weights") if self.weighted else None
        surrogate_beta, *scales = bfloat16_from(data[c:], "scales").tolist()
        if not 0 < surrogate_beta <= MAX_SURROGATE_BETA:
            raise PayloadError(
                f"surrogate_beta {surrogate_beta:g}, expected above 0 and at most {MAX_SURROGATE_BETA:g}"
            )
        return ProxyData(images, labels, weights, torch.tensor(scales), surrogate_beta)

    def quantize_images(self, images: Tensor) -> Tensor:
        """The images as the receiver will read them."""
        return self._read_images(self._images.write(images))

    def fits(self, proxies: ProxyData) -> bool:
        """Whether proxies have these shapes, and labels that are not all zero."""
        images = (self.count, self.channels, self.side, self.side)
        same = tuple(proxies.images.shape) == images and tuple(proxies.labels.shape) == (self.count, self.classes)
        return same and (proxies.weights is not None) == self.weighted and float(proxies.labels.abs().max()) > 0

    def _read_images(self, data: bytes) -> Tensor:
        return self._images.read(data, "proxy images").view(self.count, self.channels, self.side, self.side)


def proxy_loss(reference: ReferenceModel, weights: Weights, proxies: ProxyData, settings: ProxySettings) -> Tensor:
    """L(x, y; W), computed on the device of the weights."""
    proxies = proxies.on(next(iter(weights.values())).device)
    if settings.smooth:
        with Surrogate(surrogate_beta=proxies.surrogate_beta, batch_statistics=settings.batch_statistics):
            logits = reference.logits(weights, proxies.images)
    else:
        logits = reference.logits(weights, proxies.images)
    if proxies.weights is None:
        return torch.sum(logits * proxies.labels)
    return torch.sum(proxies.weights * F.cross_entropy(logits, proxies.labels, reduction="none"))


def gradients(reference: ReferenceModel, proxies: ProxyData, settings: ProxySettings) -> Weights:
    """G: the gradient of the proxies' loss at the base weights, before any scale."""
    weights = {name: w.detach().requires_grad_() for name, w in reference.base.items()}
    grads = torch.autograd.grad(proxy_loss(reference, weights, proxies, settings), list(weights.values()))
    return dict(zip(weights, grads, strict=True))


def decode(reference: ReferenceModel, proxies: ProxyData, settings: ProxySettings) -> Weights:
    """The update that the proxies stand for at the reference's weights: one backward pass, then the scales."""
    return scale_gradients(gradients(reference, proxies, settings), proxies.scales)


def scale_gradients(grads: Weights, scales: Tensor) -> Weights:
    """Each tensor times its scale; one scale applies to all."""
    per_tensor = scales.expand(len(grads)).unbind()
    return {name: scale * g for (name, g), scale in zip(grads.items(), per_tensor, strict=True)}
