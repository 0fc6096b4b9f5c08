"""Energy of a network's arithmetic, estimated as the number of operations times the energy of one.

A layer that receives real numbers multiplies and accumulates (MAC) once per weight and position. One that receives
spikes only accumulates (AC), and only where there is a spike: each spike costs one accumulation per weight that it
meets. Energies are those of 32-bit floating-point arithmetic in 45 nm at 0.9 V, from Horowitz, "Computing's energy
problem", ISSCC 2014, figure 1.1.9: an addition takes 0.9 pJ and a multiplication 3.7 pJ. Memory traffic, which often
costs more, leak and reset are not counted, as in arXiv 2104.12528.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tofu.data import ImageShape
from tofu.models.spiking import DctEncoder, LeakyIntegrateFire
from tofu.plugins.masking import chain_of
from tofu.weights import eval_mode, removing

PJ_AC = 0.9
PJ_MAC = 4.6


@dataclass(frozen=True)
class LayerOperations:
    """Operations of one layer for one image.

    Attributes:
        macs: multiplications of one pass over real numbers.
        passes: passes for one image: the number of steps, or 1 for constant currents.
        fan_out: mean number of weights that one input meets.
        source: name of the layer of neurons, or of the encoder, whose spikes it receives; "" if it receives real
            numbers.
    """

    macs: int
    passes: int
    fan_out: float
    source: str

    def picojoules(self, spikes: Mapping[str, float]) -> float:
        """Return the energy for one image.

        Args:
            spikes: name of a layer of neurons -> its spikes per image, over all steps.
        """
        return spikes[self.source] * self.fan_out * PJ_AC if self.source else self.macs * self.passes * PJ_MAC


@torch.no_grad()
def operations(model: nn.Module, shape: ImageShape) -> dict[str, LayerOperations]:
    """Return a mapping: name -> operations of every convolution and linear layer of a network in sequence (`chain_of`).

    Pooling between neurons and a layer is counted as part of the layer: every spike reaches it.
    """
    layers = chain_of(model)
    names: dict[nn.Module, str] = {layer: name for name, layer in layers.items()}
    neurons: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, LeakyIntegrateFire | DctEncoder)
    }
    found: dict[str, LayerOperations] = {}
    source = ""

    def see_neurons(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal source
        source = neurons[module]

    def see_layer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal source
        macs = output[0].numel() * layers[names[module]].weight[0].numel()
        found[names[module]] = LayerOperations(macs, len(output), macs / inputs[0][0].numel(), source)
        source = ""

    handles = [module.register_forward_hook(see_neurons) for module in neurons]
    handles += [layer.register_forward_hook(see_layer) for layer in layers.values()]
    with eval_mode(model), removing(handles):
        model(torch.zeros(1, *shape.chw))
    return found


def microjoules(found: Mapping[str, LayerOperations], spikes: Mapping[str, float]) -> float:
    """Return the energy of all layers for one image; `spikes` as in `LayerOperations.picojoules`."""
    return sum(layer.picojoules(spikes) for layer in found.values()) / 1e6


def dense_microjoules(found: Mapping[str, LayerOperations]) -> float:
    """Return the energy for one image of the same layers in a non-spiking network."""
    return sum(layer.macs for layer in found.values()) * PJ_MAC / 1e6
