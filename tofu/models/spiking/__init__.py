"""Spiking neural networks.

- `neuron`: leaky integrate-and-fire neurons with the linear surrogate gradient
- `layers`: layers that depend on the number of time steps, and their surrogates in the codec
- `dct`: the encoder of DCT-SNN, which converts images to spikes in the order of spatial frequencies
- `network`: networks whose number of time steps can be changed, and recording of their activity
- `conversion`: firing thresholds for a network that was trained without spikes
"""

from tofu.models.spiking.conversion import (
    BALANCE,
    Balance,
    QuantileSketch,
    balance_thresholds,
    set_output_scale,
    thresholds_of,
)  # fmt: skip
from tofu.models.spiking.dct import FREQUENCIES, TRAINED_FREQUENCIES, DctEncoder
from tofu.models.spiking.layers import LeakyIntegrateFire, MeanOverTime, OverTime, RepeatOverTime, neurons_of
from tofu.models.spiking.network import (
    POOL,
    LayerActivity,
    SpikingNetwork,
    dct_model,
    record_activity,
    spiking_model,
    spiking_vgg,
)  # fmt: skip
from tofu.models.spiking.neuron import LEAK, integrate_and_fire, potentials, spike

__all__ = [
    "BALANCE", "FREQUENCIES", "LEAK", "POOL", "TRAINED_FREQUENCIES", "Balance", "DctEncoder", "LayerActivity",
    "LeakyIntegrateFire", "MeanOverTime", "OverTime", "QuantileSketch", "RepeatOverTime", "SpikingNetwork",
    "balance_thresholds", "dct_model", "integrate_and_fire", "neurons_of", "potentials", "record_activity",
    "set_output_scale", "spike", "spiking_model", "spiking_vgg", "thresholds_of",
]  # fmt: skip
