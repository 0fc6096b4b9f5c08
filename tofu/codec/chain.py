"""Gradients of the proxies' loss for the search, computed layer by layer for sequential networks.

A search differentiates a network hundreds of times with a few proxies. For a small network, the overhead of autograd,
of replacing the parameters and of the surrogate's context exceeds the arithmetic. Therefore an `nn.Sequential` is
differentiated layer by layer: by an explicit rule (`_RULES`) if there is one for the layer, else by autograd. Other
networks are differentiated by autograd as a whole.

A first convolution of one channel reads patches, which are linear in the pixels of small proxies (`_Patches`): they are
computed once for the gradients at several weights, by two products with small matrices.

Results equal those of `proxies.gradients` up to rounding. Only the search uses them; decoding uses `proxies.gradients`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tofu.codec.options import ProxySettings
from tofu.codec.proxies import ProxyData, loss_of_outputs, surrogate_context
from tofu.models.small import ChannelsLast
from tofu.reference_model import ReferenceModel, using_parameters
from tofu.weights import Weights

Backward = Callable[[Tensor, bool], tuple[Tensor, Sequence[Tensor]]]
"""backward(gradient of the output, with_parameters) -> gradients of the input and, if asked for, of the parameters."""

Rule = Callable[[Any, list[Tensor], Tensor, float], tuple[Tensor, Backward]]
"""rule(layer, its parameters, its input, surrogate_beta) -> its output, and its backward pass."""


@dataclass(frozen=True)
class ProxyGradients:
    """Gradients of the proxies' loss; a list is empty if it was not asked for.

    Attributes:
        weights: with respect to each trainable parameter.
        inputs: with respect to each of the prepared inputs.
        targets: with respect to the labels and, in simplex mode, the proxies' weights.
    """

    weights: list[Tensor]
    inputs: list[Tensor]
    targets: list[Tensor]


class Chain:
    """A reference's network as a chain of layers.

    Args:
        reference: the network and its inputs. The structure of the network must not change while the chain is in use.
        settings: `smooth` selects the surrogate instead of the network itself.
    """

    def __init__(self, reference: ReferenceModel, settings: ProxySettings) -> None:
        self._reference, self._settings = reference, settings
        parameters = {id(p): name for name, p in reference.model.named_parameters()}
        single = reference.call.forward is None and len(reference.call.inputs) == 1 and not reference.draws
        layers = list(_flattened(reference.model)) if single and type(reference.model) is nn.Sequential else []
        rules = [_rule_of(layer, settings) for layer in layers]
        self._patches = _Patches.of(reference, layers, rules)
        if self._patches is not None:
            skipped = len(self._patches.leading)
            layers, rules = layers[skipped:], [self._patches.rule, *rules[skipped + 1 :]]
        owned = [{parameters[id(p)]: p for p in layer.parameters()} for layer in layers]
        self._layers = list(zip(layers, rules, owned, strict=True))

    def prepare(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return what `gradients` reads: a linear function of the proxies' inputs, which autograd differentiates.

        It is the patches of a first convolution of one channel, else the inputs at the network's size.
        """
        if self._patches is not None:
            return [self._patches.read(inputs[0])]
        return self._reference.call.full_size(inputs)

    def gradients(
        self, weights: Weights, inputs: Sequence[Tensor], proxies: ProxyData, *, by_weights: bool, by_inputs: bool
    ) -> ProxyGradients:
        """Return the gradients of the proxies' loss at `weights`; `inputs` are the prepared inputs of the proxies."""
        if not self._layers:
            return self._by_autograd(weights, inputs, proxies, by_weights=by_weights, by_inputs=by_inputs)
        x, passes = inputs[0], []
        with torch.no_grad():
            for layer, rule, own in self._layers:
                values = [weights.get(name, p) for name, p in own.items()]  # frozen parameters keep their values
                x, backward = rule(layer, values, x, proxies.surrogate_beta)
                passes.append((backward, own))
        gradient, targets = _at_outputs(self._reference, x, proxies)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for backward, names in reversed(passes if by_weights or by_inputs else []):
                gradient, by_parameter = backward(gradient, by_weights)
                for name, g in zip(names, by_parameter, strict=False):
                    found[name] = found[name] + g if name in found else g
        by_weight = [found[n] if n in found else torch.zeros_like(w) for n, w in weights.items() if by_weights]
        return ProxyGradients(by_weight, [gradient] if by_inputs else [], targets)

    def _by_autograd(
        self, weights: Weights, inputs: Sequence[Tensor], proxies: ProxyData, *, by_weights: bool, by_inputs: bool
    ) -> ProxyGradients:
        own = {name: w.detach().requires_grad_(by_weights) for name, w in weights.items()}
        leaves = [x.detach().requires_grad_(by_inputs) for x in inputs]
        with surrogate_context(self._settings, proxies.surrogate_beta):
            outputs = self._reference.outputs(own, leaves)
        gradient, targets = _at_outputs(self._reference, outputs, proxies)
        wanted = [*(own.values() if by_weights else ()), *(leaves if by_inputs else ())]
        found: Sequence[Tensor] = [torch.zeros_like(one) for one in wanted]
        if wanted and outputs.requires_grad:  # false if the inputs become token ids
            found = torch.autograd.grad(outputs, wanted, gradient, materialize_grads=True)
        split = len(own) if by_weights else 0
        return ProxyGradients(list(found[:split]), list(found[split:]), targets)


def _flattened(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of nested `nn.Sequential` in order."""
    for child in module.children():
        if type(child) is nn.Sequential and _plain(child):
            yield from _flattened(child)
        else:
            yield child


def _plain(module: nn.Module) -> bool:
    """Return whether a call of the module only calls the unmodified `forward` of its class: no hooks, no wrapper."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in vars(module) and not hasattr(type(module).forward, "__wrapped__")


def _rule_of(layer: nn.Module, settings: ProxySettings) -> Rule:
    rule = _RULES.get(type(layer)) if _plain(layer) else None
    swapped = isinstance(layer, nn.ReLU | nn.MaxPool2d)
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        rule = None
    if isinstance(layer, nn.GroupNorm) and not layer.affine:
        rule = None
    if isinstance(layer, nn.MaxPool2d) and (layer.return_indices or layer.dilation not in (1, (1, 1))):
        rule = None
    return rule if rule is not None and (settings.smooth or not swapped) else _autograd_rule(settings)


class _Patches:
    """The pixels that each output of a first convolution of one channel reads, and the convolution as their product.

    Interpolation and the choice of patches are linear and separable, so the patches of an image X [h, w] are the
    products R X C, where R has a row for each offset in the kernel and each output, and C such columns.

    Attributes:
        leading: the layers before the convolution; they only interpolate.
    """

    def __init__(self, reference: ReferenceModel, leading: list[nn.Module], layer: nn.Conv2d) -> None:
        self._reference, self._layer, self.leading = reference, layer, leading
        self._last = any(isinstance(one, ChannelsLast) for one in leading)
        self._axes: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        self._outputs = (0, 0)

    @staticmethod
    def of(reference: ReferenceModel, layers: Sequence[nn.Module], rules: Sequence[Rule]) -> "_Patches | None":
        """Return the patches if the first layer that does not interpolate is a convolution of one channel."""
        leading = list(itertools.takewhile(_interpolates, layers))
        layer = layers[len(leading)] if len(leading) < len(layers) else None
        if not isinstance(layer, nn.Conv2d) or layer.in_channels != 1 or rules[len(leading)] is not _convolution:
            return None
        return _Patches(reference, leading, layer)

    def read(self, images: Tensor) -> Tensor:
        """Return the patches [n, kernel height * kernel width, outputs] of images [n, 1, h, w]."""
        if images.shape not in self._axes:
            self._axes[images.shape] = (self._axis(images, 0), self._axis(images, 1))
        rows, columns = self._axes[images.shape]
        self._outputs = (rows.shape[1], columns.shape[1])
        read = rows.flatten(0, 1) @ (images[:, 0] @ columns.flatten(0, 1).t())
        read = read.view(-1, *rows.shape[:2], *columns.shape[:2])
        return read.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)

    def _axis(self, images: Tensor, axis: int) -> Tensor:
        """Return the weights [kernel, outputs, pixels] of the pixels along one axis."""
        height, width = images.shape[2:]
        basis = torch.eye(images.shape[2 + axis], device=images.device, dtype=images.dtype)
        basis = basis[:, None, :, None].expand(-1, 1, -1, width) if axis == 0 else basis[:, None, None, :]
        full = self._reference.call.full_size([basis if axis == 0 else basis.expand(-1, 1, height, -1)])[0]
        for layer in self.leading:
            full = layer(full)
        line = full[:, :, :, :1].transpose(2, 3) if axis == 0 else full[:, :, :1]
        assert not isinstance(self._layer.padding, str)  # `_rule_of` has no rule for other paddings
        kernel, stride, padding, dilation = (
            values[axis]
            for values in (self._layer.kernel_size, self._layer.stride, self._layer.padding, self._layer.dilation)
        )
        read = F.unfold(line, (1, kernel), (1, dilation), (0, padding), (1, stride))
        return read.permute(1, 2, 0).contiguous()

    def rule(self, layer: nn.Conv2d, weights: list[Tensor], x: Tensor, beta: float) -> tuple[Tensor, Backward]:
        """The rule of the convolution, whose input are the patches."""
        kernels = weights[0].flatten(1)

        def backward(gradient: Tensor, wanted: bool) -> tuple[Tensor, Sequence[Tensor]]:
            rows = gradient.flatten(2)
            by_weight = [torch.bmm(rows, x.transpose(1, 2)).sum(0).view_as(weights[0])] if wanted else []
            if wanted and len(weights) > 1:
                by_weight.append(rows.sum((0, 2)))
            return kernels.t() @ rows, by_weight

        out = kernels @ x
        if len(weights) > 1:
            out += weights[1][:, None]
        out = out.view(*out.shape[:2], *self._outputs)
        return out.contiguous(memory_format=torch.channels_last) if self._last else out, backward


def _interpolates(layer: nn.Module) -> bool:
    return _plain(layer) and (
        isinstance(layer, ChannelsLast) or (type(layer) is nn.Upsample and layer.mode == "bilinear")
    )


def _at_outputs(reference: ReferenceModel, outputs: Tensor, proxies: ProxyData) -> tuple[Tensor, list[Tensor]]:
    """Return the gradient of the loss with respect to the outputs,
    and those for the labels and the proxies' weights.
    """
    if reference.call.loss is None and proxies.weights is None:
        return proxies.labels, [outputs.detach()]
    own = outputs.detach().requires_grad_()
    labels = proxies.labels.detach().requires_grad_()
    weights = None if proxies.weights is None else proxies.weights.detach().requires_grad_()
    leaves = [own, labels] if weights is None else [own, labels, weights]
    gradient, *targets = torch.autograd.grad(
        loss_of_outputs(reference, own, labels, weights), leaves, materialize_grads=True
    )
    return gradient, targets


def _autograd_rule(settings: ProxySettings) -> Rule:
    def rule(layer: nn.Module, weights: list[Tensor], x: Tensor, beta: float) -> tuple[Tensor, Backward]:
        leaf, own = x.detach().requires_grad_(), [w.detach().requires_grad_() for w in weights]
        given = {name: w for (name, _), w in zip(layer.named_parameters(), own, strict=True)}
        with torch.enable_grad(), surrogate_context(settings, beta), using_parameters(layer, given):
            out = layer(leaf)

        def backward(gradient: Tensor, wanted: bool) -> tuple[Tensor, Sequence[Tensor]]:
            leaves = [leaf, *own] if wanted else [leaf]
            if not out.requires_grad:
                return torch.zeros_like(leaf), [torch.zeros_like(w) for w in leaves[1:]]
            by_input, *by_weight = torch.autograd.grad(out, leaves, gradient, materialize_grads=True)
            return by_input, by_weight

        return out.detach(), backward

    return rule


def _linear(layer: nn.Linear, weights: list[Tensor], x: Tensor, beta: float) -> tuple[Tensor, Backward]:
    def backward(gradient: Tensor, wanted: bool) -> tuple[Tensor, Sequence[Tensor]]:
        rows = gradient.flatten(0, -2)
        by_weight = [rows.t() @ x.flatten(0, -2), rows.sum(0)] if wanted else []
        return gradient @ weights[0], by_weight

    return F.linear(x, *weights), backward


def _convolution(layer: nn.Conv2d, weights: list[Tensor], x: Tensor, beta: float) -> tuple[Tensor, Backward]:
    weight, bias = weights[0], weights[1] if len(weights) > 1 else None
    assert not isinstance(layer.padding, str)  # `_rule_of` has no rule for other paddings
    geometry = (layer.stride, layer.padding, layer.dilation)
    folds = layer.in_channels == 1  # then F.fold is three times as fast as oneDNN's gradient of the input

    def backward(gradient: Tensor, wanted: bool) -> tuple[Tensor, Sequence[Tensor]]:
        mask = [not folds, wanted, wanted and bias is not None]
        by_input, by_weight, by_bias = torch.ops.aten.convolution_backward(
            gradient, x, weight, [layer.out_channels], *geometry, False, [0, 0], layer.groups, mask
        )
        if folds:
            columns = weight.flatten(1).t() @ gradient.flatten(2)
            by_input = F.fold(columns, x.shape[2:], layer.kernel_size, layer.dilation, geometry[1], layer.stride)
        return by_input, [by_weight, by_bias][: sum(mask[1:])]

    return F.conv2d(x, weight, bias, *geometry, layer.groups), backward


def _relu(layer: nn.ReLU, weights: list[Tensor], x: Tensor, beta: float) -> tuple[Tensor, Backward]:
    steep = x * beta
    return F.silu(steep).mul_(1 / beta), lambda gradient, _: (torch.ops.aten.silu_backward(gradient, steep), [])


def _pooling(layer: nn.MaxPool2d, weights: list[Tensor], x: Tensor, beta: float) -> tuple[Tensor, Backward]:
    if _halves(layer, x):
        return _halving(x)
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode, False)

    def backward(gradient: Tensor, _: bool) -> tuple[Tensor, Sequence[Tensor]]:
        gradient = torch.empty_like(out).copy_(gradient)  # in the memory format of x; two formats are slow
        return torch.ops.aten.avg_pool2d_backward(gradient, x, *geometry, None), []

    out = F.avg_pool2d(x, *geometry)
    return out, backward


def _halves(layer: nn.MaxPool2d, x: Tensor) -> bool:
    """Return whether the layer reduces each square of 2 x 2 pixels of contiguous images to a pixel."""
    plain = (layer.kernel_size, layer.stride, layer.padding) in ((2, 2, 0), ((2, 2), (2, 2), (0, 0)))
    return plain and x.is_contiguous() and not (x.shape[-2] % 2 or x.shape[-1] % 2)


def _halving(x: Tensor) -> tuple[Tensor, Backward]:
    """Average pooling of `_halves` by slices, which is faster than torch's kernels for images in memory order."""

    def backward(gradient: Tensor, _: bool) -> tuple[Tensor, Sequence[Tensor]]:
        return (gradient / 4).repeat_interleave(2, -1).repeat_interleave(2, -2), []

    rows = x[..., ::2, :] + x[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(1 / 4), backward


def _group_norm(layer: nn.GroupNorm, weights: list[Tensor], x: Tensor, beta: float) -> tuple[Tensor, Backward]:
    weight, bias = weights
    sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), layer.num_groups)
    out, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, layer.eps)

    def backward(gradient: Tensor, wanted: bool) -> tuple[Tensor, Sequence[Tensor]]:
        gradient = torch.empty_like(x).copy_(gradient)  # in the memory format of x
        by_input, *by_weight = torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, rstd, weight, *sizes, [True, wanted, wanted]
        )
        return by_input, by_weight if wanted else []

    return out, backward


def _channels_last(layer: ChannelsLast, weights: list[Tensor], x: Tensor, beta: float) -> tuple[Tensor, Backward]:
    return layer(x), lambda gradient, _: (gradient, [])


def _flatten(layer: nn.Flatten, weights: list[Tensor], x: Tensor, beta: float) -> tuple[Tensor, Backward]:
    return x.flatten(layer.start_dim, layer.end_dim), lambda gradient, _: (gradient.reshape(x.shape), [])


_RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.ReLU: _relu,
    nn.MaxPool2d: _pooling,
    nn.GroupNorm: _group_norm,
    nn.Flatten: _flatten,
    ChannelsLast: _channels_last,
}
