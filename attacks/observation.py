"""The knowledge of an attacker at the server: one message, and the client's training settings.

The server of a run chooses the model, the learning rate, the batch size and the number of epochs, and a reply contains
the number of images. An honest-but-curious server knows all of these. An attack declares what else it needs, and is
refused if the message does not provide it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from tofu.codec.options import ProxySettings
from tofu.codec.proxies import ProxyData
from tofu.reference_model import ReferenceModel
from tofu.weights import Weights

_LAYOUT_ONLY = (nn.Flatten, nn.Identity)


@dataclass(frozen=True)
class Observation:
    """One client's message, or the sum of several, as the server reads it.

    Attributes:
        message: kind of message, as a user writes it ("exact", "proxy:smooth:100", ...).
        network: the model at the base weights that the message is relative to.
        update: what the message decodes to, parameters and buffers (the mean of the updates in a secure sum).
        images: number of images that the update was computed from, over all clients in the sum.
        batch_size: number of images in one local step.
        epochs: number of passes over the images.
        lr: step size of the local SGD; None if the attacker does not know it.
        labels: int64 [images], in any order, if the attacker knows them; else None.
        proxies: the proxies in the payload, if it has any.
        proxy_settings: how they were encoded.
        payload_bytes: size of the message's payload.
        clients: number of updates in the sum.
        earlier: earlier messages of the same client about the same images.
    """

    message: str
    network: ReferenceModel
    update: Weights
    images: int
    batch_size: int
    epochs: int
    lr: float | None
    labels: Tensor | None = None
    proxies: ProxyData | None = None
    proxy_settings: ProxySettings | None = None
    payload_bytes: int = 0
    clients: int = 1
    earlier: tuple["Observation", ...] = ()

    @property
    def steps(self) -> int:
        """Number of local steps that the update is the sum of."""
        return self.epochs * math.ceil(self.images / min(self.batch_size, self.images))

    @cached_property
    def gradient(self) -> Weights:
        """The gradient of the parameters in a single step, -update / lr. Call it only if `steps` is 1."""
        assert self.lr is not None
        return {name: -self.update[name] / self.lr for name in self.network.param_spec.parameters}

    @cached_property
    def batch_statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """BatchNorm layer -> mean and variance of the batch of a single step, from the update of its running ones."""
        found = {}
        for name, layer in self.network.model.named_modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                momentum = layer.momentum or 0.1
                change = (self.update[f"{name}.running_mean"], self.update[f"{name}.running_var"])
                found[name] = (layer.running_mean + change[0] / momentum, layer.running_var + change[1] / momentum)
        return found

    @cached_property
    def first_linear(self) -> str | None:
        """The name of the linear layer on the pixels, if the network begins with one."""
        if self.network.model._forward_pre_hooks:  # an app's normalization: the layer does not see the pixels
            return None
        shape = self.network.shape
        pixels = shape.channels * shape.height * shape.width
        for name, layer in self.network.model.named_modules():
            if list(layer.children()) or isinstance(layer, _LAYOUT_ONLY):
                continue
            linear = isinstance(layer, nn.Linear) and layer.in_features == pixels and layer.bias is not None
            return name if linear and f"{name}.weight" in self.update else None
        return None

    @cached_property
    def last_linear(self) -> str | None:
        """The name of the linear layer that computes the logits, if the network ends with one."""
        layers = [(n, m) for n, m in self.network.model.named_modules() if not list(m.children())]
        name, layer = layers[-1]
        linear = isinstance(layer, nn.Linear) and layer.out_features == self.network.shape.classes
        return name if linear and f"{name}.weight" in self.update else None


Capability = tuple[str, Callable[[Observation], bool]]
"""The reason why a message lacks it, and the test."""

CAPABILITIES: dict[str, Capability] = {
    "lr": ("the step size is not known", lambda o: o.lr is not None),
    "gradient": (
        "the gradient of a single step is not known (the update is of several steps, or the step size is hidden)",
        lambda o: o.steps == 1 and o.lr is not None,
    ),
    "labels": ("the labels are not known", lambda o: o.labels is not None),
    "batchnorm": ("the network has no BatchNorm whose statistics travel", lambda o: bool(o.batch_statistics)),
    "proxies": ("the payload holds no proxies", lambda o: o.proxies is not None),
    "linear-first": (
        "the network does not begin with a linear layer with a bias on the pixels",
        lambda o: o.first_linear is not None,
    ),
    "linear-last": ("the network does not end with a linear layer", lambda o: o.last_linear is not None),
    "earlier": ("there are no earlier messages about the same images", lambda o: bool(o.earlier)),
}
"""Requirements that an attack may have besides the decoded update and the number of images of each message."""
