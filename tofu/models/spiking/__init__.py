"""Spiking networks as federated models: neurons, layers that know the time steps, and networks of them.

- `neuron`: leaky integrate-and-fire arithmetic with the linear surrogate gradient
- `layers`: layers that depend on the number of steps, and what the codec differentiates in their place
- `network`: networks of any widths, changed to fewer steps at run time, and a record of their activity
"""

from tofu.models.spiking.layers import LeakyIntegrateFire, MeanOverTime, OverTime, RepeatOverTime
from tofu.models.spiking.network import (
    POOL,
    LayerActivity,
    SpikingNetwork,
    record_activity,
    spiking_model,
    spiking_vgg,
)  # fmt: skip
from tofu.models.spiking.neuron import LEAK, potentials, spike

__all__ = [
    "LEAK", "POOL", "LayerActivity", "LeakyIntegrateFire", "MeanOverTime", "OverTime", "RepeatOverTime",
    "SpikingNetwork", "potentials", "record_activity", "spike", "spiking_model", "spiking_vgg",
]  # fmt: skip
