"""DCT-SNN: a spiking network whose input spikes arrive in the order of spatial frequencies.

Garg, Chowdhury, Roy, "DCT-SNN: Using DCT to Distribute Spatial Information over Time for Low-Latency Spiking Neural
Networks", ICCV 2021. The models `dct-snn-...` have the encoder and the neurons (`tofu.models.spiking`). The plugin adds
the parts that all clients must share:

1. In the first round clients sketch the components of their images. Percentiles of the summed sketches become the
   encoder's thresholds for all clients and all later rounds (in the paper every batch has its own).
2. In the first rounds the network is trained without spikes, on the expanded pixels. In the last of them clients sketch
   the currents of every layer; the 99.9th percentiles of the sums become the neurons' thresholds. The logits are scaled
   to the size that they have without spikes (ours), without which plain gradient descent hardly moves the network.
3. The other rounds fine-tune the spiking network with the surrogate gradient.

With `random-frequencies` (ours) training leaves out frequencies at random, so that fewer cost less in prediction.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from client.plugins.round_start import subsample, subsample_rows
from client.plugins.spiking_energy import dense_microjoules, microjoules, operations
from tofu.data import ImageShape, LabeledImages, to_float
from tofu.errors import SettingError
from tofu.models.spiking import (
    FREQUENCIES,
    TRAINED_FREQUENCIES,
    Balance,
    DctEncoder,
    LayerActivity,
    QuantileSketch,
    SpikingNetwork,
    balance_thresholds,
    neurons_of,
    record_activity,
    set_output_scale,
)  # fmt: skip
from tofu.plugins import Batch, Export, Panel, Plugin, PluginState, RoundContext, SumSpec, option, plugin_registry
from tofu.rounds.panel import Chart, Series, TableFigure

_MAX_POWER = 1e6
"""Limit of a client's mean squared logits."""

_AT_A_TIME = 16  # images
_KEPT = (1, 3, 6, 10, 16)  # frequencies, in the report


@plugin_registry.register("dct-snn")
@dataclass
class DctSnn(Plugin):
    """Thresholds and training of a DCT-SNN in a federation.

    `broadcast` holds "input" (the encoder's thresholds, [2]) after the first round, and "neurons" (one threshold for
    each layer, in its order) and "scale" (of the logits) after the last round without spikes.
    """

    name = "dct-snn"
    encodes_input = True

    cycles: int = option(3, "cycles of 16 time steps", ge=1, le=64)
    frequencies: int = option(16, "number of frequencies that are kept, the lowest ones", ge=1, le=16)
    percentile: float = option(3.0, "percent of the nonzero components beyond each input threshold", gt=0, lt=50)
    balance: float = option(99.9, "percentile of a layer's currents that becomes its threshold", gt=50, lt=100)
    ann_fraction: float = option(0.5, "fraction of the rounds, before the others, without spikes", ge=0, lt=1)
    images: int = option(64, "maximum number of a client's or the server's images that are measured", ge=1, le=100_000)
    random_frequencies: bool = option(False, "train each batch with 16, 10, 6 or 3 frequencies, drawn at random")

    _encoder: DctEncoder = field(default_factory=DctEncoder, init=False, repr=False)
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _panel: Panel | None = field(default=None, init=False, repr=False)

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        """Set the number of steps, the mode and the thresholds; weights stay as they are.

        Raises:
            SettingError: the model has no DCT encoder.
        """
        super().setup(model, context)
        network, encoder = _parts(model)
        network.steps = self.cycles * FREQUENCIES
        encoder.frequencies = self.frequencies
        self._encoder = encoder
        neurons = self.broadcast.get("neurons")
        network.spiking = isinstance(neurons, Tensor) or not self._ann_rounds
        if isinstance(thresholds := self.broadcast.get("input"), Tensor):
            encoder.thresholds.copy_(thresholds)
        if isinstance(neurons, Tensor):
            for layer, threshold in zip(neurons_of(network).values(), neurons, strict=True):
                layer.threshold.copy_(threshold)
            set_output_scale(network, float(self.broadcast["scale"]))
        return model

    @property
    def _ann_rounds(self) -> int:
        """Number of rounds without spikes."""
        return round(self.ann_fraction * self.context.rounds)

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        spec = SumSpec((QuantileSketch.BINS,), float(self.images))
        sums = {"input": spec} if self.context.round == 1 else {}
        if self.context.round == self._ann_rounds:
            sums |= dict.fromkeys(neurons_of(model), spec) | {"outputs": SumSpec((2,), self.images * _MAX_POWER)}
        return sums

    @torch.no_grad()
    def on_train_begin(self, model: nn.Module, data: LabeledImages) -> None:
        """Measure the sums of this round; every image has a weight of 1 in each sketch."""
        names = self.declare_sums(model)
        if not names:
            return
        images = to_float(subsample(data, self.images))
        network = copy.deepcopy(_parts(model)[0])
        encoder = _parts(network)[1]
        if "input" in names:
            sketch = QuantileSketch()
            for part in torch.split(images, _AT_A_TIME):
                components = encoder.components(part)
                sketch.add(components, len(part) / components.numel())
            self._sums["input"] = sketch.counts
            encoder.thresholds.copy_(self._input_thresholds(sketch))
        if "outputs" in names:
            # A layer's currents depend on the thresholds of the layers before it, for which a client uses its own here.
            found = balance_thresholds(network, images, quantile=self.balance / 100, batch_size=_AT_A_TIME)
            self._sums |= {name: sketch.counts for name, sketch in found.sketches.items()}
            self._sums["outputs"] = found.outputs.clamp(max=len(images) * _MAX_POWER)

    def on_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Draw the number of frequencies of this step."""
        if self.random_frequencies:
            drawn = TRAINED_FREQUENCIES[int(torch.randint(len(TRAINED_FREQUENCIES), (), generator=generator))]
            self._encoder.frequencies = min(drawn, self.frequencies)
        return batch

    def on_epoch_end(self, model: nn.Module, data: LabeledImages) -> None:
        self._encoder.frequencies = self.frequencies

    def _input_thresholds(self, sketch: QuantileSketch) -> Tensor:
        """[2], negative and positive; those that the encoder is built with if the images have no contrast."""
        tail = self.percentile / 100
        low, high = (sketch.quantile(q, ignore_zeros=True) for q in (tail, 1 - tail))
        built = DctEncoder().thresholds
        return torch.tensor([low if low < 0 else built[0], high if high > 0 else built[1]])

    def export(self) -> Export:
        return Export(self._sums)

    def reduce(self, sums: Mapping[str, Tensor], examples: int, broadcast: PluginState) -> PluginState:
        state = dict(broadcast)
        if "input" in sums:
            state["input"] = self._input_thresholds(QuantileSketch(sums["input"]))
        if "outputs" in sums:
            balance = Balance(
                {name: QuantileSketch(counts) for name, counts in sums.items() if name not in ("input", "outputs")},
                sums["outputs"],
            )
            found = [sketch.quantile(self.balance / 100) for sketch in balance.sketches.values()]
            # A layer that no positive current reaches keeps the threshold that it is built with.
            state["neurons"] = torch.tensor([threshold if threshold > 0 else 1.0 for threshold in found])
            state["scale"] = balance.scale
        return state

    def calibrate(self, model: nn.Module, data: LabeledImages) -> PluginState:
        """Measure, for the report, the final spiking network on the server's held-out images."""
        network, encoder = _parts(model)
        if self.context.round == self.context.rounds and network.spiking:
            images = to_float(subsample(data, self.images))
            labels = data.labels[subsample_rows(len(data), self.images)]
            self._panel = _measured(network, encoder, images, labels)
        return self.broadcast

    def panel(self) -> Panel | None:
        return self._panel


def _parts(model: nn.Module) -> tuple[SpikingNetwork, DctEncoder]:
    networks = [module for module in model.modules() if isinstance(module, SpikingNetwork)]
    encoders = [module for module in model.modules() if isinstance(module, DctEncoder)]
    if not networks or not encoders:
        raise SettingError("plugins", "dct-snn", "a model with a DCT encoder, such as dct-snn-small or dct-snn-vgg5")
    return networks[0], encoders[0]


def _measured(network: SpikingNetwork, encoder: DctEncoder, images: Tensor, labels: Tensor) -> Panel:
    """Return the spikes over time and layer, and accuracy and spikes by the number of kept frequencies."""
    kept = encoder.frequencies
    activity: dict[str, LayerActivity] = {}
    rows: list[tuple[float, ...]] = []
    channels, height, width = images.shape[1:]
    shape = ImageShape(channels, height, width, classes=int(labels.max()) + 1)
    try:
        arithmetic = operations(network, shape)
    except SettingError:  # another plugin has changed a layer into what is not counted
        arithmetic = {}
    for frequencies in (*(k for k in _KEPT if k < kept), kept):
        encoder.frequencies = frequencies
        with record_activity(network) as recorded:
            right = network(images).argmax(1) == labels
        activity = recorded
        spikes = {name: float(layer.spikes.sum()) / len(images) for name, layer in activity.items()}
        spikes["encoder"] = float(encoder(images).abs().sum()) / len(images)
        neurons = sum(spikes.values()) - spikes["encoder"]
        energy = (microjoules(arithmetic, spikes),) if arithmetic else ()
        rows.append((frequencies, float(right.float().mean()), spikes["encoder"], neurons, *energy))
    header = ("kept", "accuracy", "input spikes", "spikes of neurons", "uJ")
    table = TableFigure("Kept frequencies", header[: len(rows[0])], tuple(rows))
    dense = f"; the same network without spikes takes {dense_microjoules(arithmetic):.3g} uJ" if arithmetic else ""
    lines = tuple(
        Series(name, tuple(layer.spikes.flatten(1).mean(1).tolist()), x=tuple(range(1, network.steps + 1)))
        for name, layer in activity.items()
    )
    accuracy = Series("accuracy", tuple(row[1] for row in rows), x=tuple(float(row[0]) for row in rows))
    return Panel(
        "Spikes in the order of frequencies",
        f"Of the final network, on {len(images)} of the server's held-out images; spikes are per image. Dropped "
        f"frequencies leave their time steps without input. Energies count operations{dense}.",
        (
            Chart("Spikes per neuron and time step", lines, x_label="time step", y_label="fraction of neurons"),
            Chart("Accuracy by kept frequencies", (accuracy,), x_label="frequencies", y_label="accuracy"),
            table,
        ),
    )  # fmt: skip
