"""Spiking networks that become narrower, faster and coarser during a federation.

Chowdhury, Garg, Roy, "Spatio-Temporal Pruning and Quantization for Low-latency Spiking Neural Networks", IJCNN 2021,
arXiv 2104.12528. Three steps, each at boundaries of rounds:

1. Spatial: clients sum, over images and positions, the second moments of the average accumulated membrane potential of
   every layer's channels. The server adds the sums; a layer keeps as many channels as principal components are needed
   to explain a fraction of the variance. The server needs only sums, so secure rounds can carry them.
2. Temporal: rounds fine-tune the narrow network with fewer and fewer time steps.
3. Quantization: weights of few bits, which rounds fine-tune through a straight-through estimator.

The paper trains the narrow network from scratch. Here it starts from the channels that explain most of the variance,
because a federation's rounds are expensive. docs/plugins/spatio-temporal.md has the options and measurements.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from client.plugins.layers import leading_count, packed, unpacked
from client.plugins.round_start import subsample
from client.plugins.spiking_energy import dense_microjoules, microjoules, operations
from tofu.data import LabeledImages, to_float
from tofu.errors import PayloadError, SettingError
from tofu.models.spiking import LeakyIntegrateFire, SpikingNetwork, neurons_of
from tofu.plugins import (
    Export,
    Panel,
    Plugin,
    PluginState,
    RoundContext,
    SumSpec,
    Weights,
    keep_channels,
    option,
    plugin_registry,
)  # fmt: skip
from tofu.plugins.masking import Carrier, chain_of
from tofu.rounds.panel import Chart, Figure, Series, TableFigure
from tofu.weights import eval_mode, seeing_outputs, under

_BATCH = 50
_MAX_ROWS = 1000  # images times steps; a spiking network computes more of them in parts
_REPLACED = "both replace the layers' weights"


@plugin_registry.register("spatio-temporal")
@dataclass
class SpatioTemporalPruning(Plugin):
    """Remove channels, reduce the time steps, and quantize the weights. Time steps require a spiking network.

    `broadcast`, which the server writes: "kept/LAYER", bool [channels], once there are widths; and for the report
    "built/LAYER", the width before, and "history", float64 [rounds, 5]: round, time steps, parameters, energy per image
    and that of a non-spiking network of the same widths (microjoules).
    """

    name: ClassVar[str] = "spatio-temporal"
    excludes: ClassVar[Mapping[str, str]] = {
        "rank": _REPLACED,
        "crossbar": _REPLACED,
        "gpm": "its bases belong to the widths before",
        "dct-snn": "its neurons' thresholds belong to the widths before",
        "trend": "every client group would need widths of its own",
    }

    # fmt: off
    variance: float = option(0.999, "fraction of a layer's variance that the kept channels' number of components explains", gt=0, le=1)  # noqa: E501
    prune_after: int = option(0, "round in which clients measure, after which channels go; 0: a quarter of the rounds", ge=0, le=100_000)  # noqa: E501
    spatial: bool = option(True, "remove channels")
    images: int = option(500, "maximum number of a client's images that are measured", ge=1, le=1_000_000)
    max_potential: float = option(100.0, "magnitude to which potentials are clipped, which bounds sums", gt=0, le=1e6)
    steps: int = option(12, "time steps at first", ge=1, le=1000)
    last_steps: int = option(1, "time steps in the end", ge=1, le=1000)
    reduce_after: int = option(0, "last round with all time steps; 0: half of the rounds", ge=0, le=100_000)
    reduce_until: int = option(0, "first round with the last time steps; 0: seven eighths of the rounds", ge=0, le=100_000)  # noqa: E501
    one_step_threshold: float = option(1.0, "factor of the thresholds at one time step; it falls with the steps, from 1 at the first number of them", gt=0, le=1)  # noqa: E501
    bits: int = option(0, "bits of the weights in forward passes; 0: float32", ge=0, le=16)
    quantize_after: int = option(0, "last round with float weights; 0: that before reduce-until", ge=0, le=100_000)
    # fmt: on

    _sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.last_steps > self.steps:
            raise SettingError("spatio-temporal.last-steps", self.last_steps, f"at most steps, {self.steps}")
        if self.bits == 1:
            raise SettingError("spatio-temporal.bits", self.bits, "0, or 2 to 16: one bit has no level besides zero")

    # The schedule, a function of the options and the run's number of rounds

    def pruned_after(self, rounds: int) -> int:
        """Return the round in which clients measure."""
        return self.prune_after or max(1, rounds // 4)

    def steps_in(self, round_: int, rounds: int) -> int:
        """Return the time steps of a round: one fewer at a time, evenly spread, if there are enough rounds."""
        first, last = self.reduce_after or rounds // 2, self._reduced_in(rounds)
        done = min(1.0, max(0.0, (round_ - first) / max(1, last - first)))
        return self.steps - round(done * (self.steps - self.last_steps))

    def threshold_factor(self, steps: int) -> float:
        """Factor of the thresholds at a number of time steps.

        A neuron that has fewer steps to integrate its currents in fires only where a single current is large. With a
        lower threshold more of its neurons fire, and the surrogate gradient reaches smaller currents.
        """
        return 1 - (1 - self.one_step_threshold) * (self.steps - steps) / max(1, self.steps - 1)

    def quantizes(self, round_: int, rounds: int) -> bool:
        """Return whether a round's weights are quantized."""
        return bool(self.bits) and round_ > (self.quantize_after or self._reduced_in(rounds) - 1)

    def _reduced_in(self, rounds: int) -> int:
        return self.reduce_until or max(1, rounds * 7 // 8)

    # Clients and server

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        """Remove channels and quantize weights, as the round and the broadcast demand.

        Raises:
            SettingError: the run is too short, the rounds are not in order, or the model is not usable.
            PayloadError: the broadcast does not fit the model.
        """
        self._check(context, chain_of(model))
        super().setup(model, context)
        self._narrow(model)
        if self.quantizes(context.round, context.rounds):
            for layer in chain_of(model).values():
                if not parametrize.is_parametrized(layer):
                    parametrize.register_parametrization(layer, "weight", Quantized(self.bits))
        return model

    def on_round_begin(self, model: nn.Module, context: RoundContext) -> None:
        if isinstance(model, SpikingNetwork):
            model.steps = self.steps_in(context.round, context.rounds)
            model.threshold_factor = self.threshold_factor(model.steps)

    def _check(self, context: RoundContext, chain: Mapping[str, Carrier]) -> None:
        rounds = context.rounds
        if context.group > 0:
            raise SettingError("plugins", self.name, "a run without client groups: widths are those of one model")
        if self.spatial and self.pruned_after(rounds) >= rounds:
            accepted = f"less than the run's rounds, {rounds}, so that the narrow network is trained"
            raise SettingError("spatio-temporal.prune-after", self.pruned_after(rounds), accepted)
        if (self.reduce_after or rounds // 2) > self._reduced_in(rounds):
            raise SettingError("spatio-temporal.reduce-until", self._reduced_in(rounds), "at least reduce-after")
        if self._reduced_in(rounds) > rounds:
            raise SettingError("spatio-temporal.reduce-until", self.reduce_until, f"at most the run's rounds, {rounds}")
        if self.spatial and self.bits and (self.quantize_after or rounds) < self.pruned_after(rounds):
            accepted = f"at least prune-after, {self.pruned_after(rounds)}: quantized layers keep their channels"
            raise SettingError("spatio-temporal.quantize-after", self.quantize_after, accepted)
        if self.spatial and len(chain) < 2:
            raise SettingError("model", "of one layer", "a network of at least two layers, whose channels can go")

    def _narrow(self, model: nn.Module) -> None:
        kept = {}
        for name, value in under(self.broadcast, "kept").items():
            if not isinstance(value, Tensor) or value.dtype != torch.bool or value.dim() != 1:
                raise PayloadError(f"kept channels of {name[:80]!r} are not usable: expected bool [channels]")
            kept[name] = value.nonzero().flatten()
        try:
            keep_channels(model, kept)
        except ValueError as error:
            raise PayloadError(str(error)) from error

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        """In the round that measures the channels, "moments/LAYER"; in all rounds of a spiking network, "spikes"."""
        declared = {}
        zeros = torch.zeros(1, *self.context.shape.chw, dtype=torch.uint8)
        for name, rows in channel_potentials(model, zeros) if self._measures else ():
            size = rows.shape[1] + 1
            bound = self.images * len(rows) * max(1.0, self.max_potential) ** 2
            declared[f"moments/{name}"] = SumSpec((size * (size + 1) // 2,), bound)
        if neurons := spikes_per_layer(model, zeros):
            largest = max(size for _, size in neurons.values())
            declared["spikes"] = SumSpec((len(neurons) + 1,), float(self._watched * max(largest, 1)))
        return declared

    @property
    def _measures(self) -> bool:
        context = self.context
        return (
            self.spatial
            and context.round >= self.pruned_after(context.rounds)  # later if a secure round was abandoned
            and not self.quantizes(context.round, context.rounds)
            and not self.widths
        )

    @property
    def _watched(self) -> int:
        return min(self.images, _BATCH)

    # Client

    def on_train_begin(self, model: nn.Module, data: LabeledImages) -> None:
        with eval_mode(model), torch.no_grad():
            if self._measures:
                self._sums = second_moments(model, subsample(data, self.images), self.max_potential)
            if neurons := spikes_per_layer(model, watched := subsample(data, self._watched)):
                counts = [float(count) for count, _ in neurons.values()]
                self._sums["spikes"] = torch.tensor([*counts, float(len(watched))], dtype=torch.float64)

    def export(self) -> Export:
        return Export(self._sums)

    # Server

    def reduce(self, sums: Weights, examples: int, broadcast: PluginState) -> PluginState:
        """Choose the channels of every layer from the summed moments; keep the spikes for `on_aggregate`."""
        found = dict(broadcast)
        for key, values in sums.items():
            kind, _, name = key.partition("/")
            if kind == "moments":
                covariance = covariance_of(values)
                kept = torch.zeros(len(covariance), dtype=torch.bool)
                kept[leading_channels(covariance, significant_components(covariance, self.variance))] = True
                found |= {f"kept/{name}": kept, f"built/{name}": len(kept)}
            elif kind == "spikes":
                found["spikes"] = values[:-1] / values[-1].clamp(min=1)  # per image
        return found

    def on_aggregate(self, model: nn.Module, context: RoundContext) -> None:
        """Add this round to the history that the report draws; `model` still has the widths of this round."""
        energy = dense = 0.0
        spikes = self.broadcast.get("spikes")
        if isinstance(spikes, Tensor):
            found = operations(model, context.shape)
            energy = microjoules(found, dict(zip(neurons_of(model), spikes.tolist(), strict=True)))
            dense = dense_microjoules(found)
        parameters = sum(p.numel() for p in model.parameters())
        steps = self.steps_in(context.round, context.rounds)
        row = torch.tensor([[context.round, steps, parameters, energy, dense]], dtype=torch.float64)
        history = self.broadcast.get("history")
        rows = torch.cat([history, row]) if isinstance(history, Tensor) else row
        self.broadcast = self.broadcast | {"history": rows}

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Layer -> (channels that are kept, channels before); empty until the clients have measured."""
        kept = under(self.broadcast, "kept")
        return {name: (int(value.sum()), len(value)) for name, value in kept.items() if isinstance(value, Tensor)}

    def panel(self) -> Panel | None:
        """Return the time steps, parameters and energy by round, and the widths."""
        history = self.broadcast.get("history")
        if not isinstance(history, Tensor):
            return None
        rounds, steps, parameters, energy, dense = (tuple(column) for column in history.T.tolist())

        def chart(title: str, label: str, **lines: tuple[float, ...]) -> Chart:
            series = tuple(Series(name.replace("_", "-"), values, x=rounds) for name, values in lines.items())
            return Chart(title, series, x_label="round", y_label=label)

        figures: list[Figure] = [
            chart("Time steps", "steps", steps=steps),
            chart("Parameters", "parameters", parameters=parameters),
        ]
        if any(energy):
            title = "Energy per image: accumulations at spikes, and all multiplications of the non-spiking network"
            figures.append(chart(title, "microjoules", spiking=energy, non_spiking=dense))
        if self.widths:
            rows = tuple((name, kept, before) for name, (kept, before) in self.widths.items())
            figures.append(TableFigure("Channels", ("layer", "kept", "before"), rows))
        text = f"Channels that explain {100 * self.variance:g} % of the variance of the membrane potential; "
        text += f"{steps[-1]:g} time steps; " + (f"weights of {self.bits} bits." if self.bits else "float32 weights.")
        return Panel("Spatio-temporal pruning", text, tuple(figures))


class Quantized(nn.Module):
    """A weight on a uniform symmetric grid of b bits: `step` times -(2^(b-1) - 1) ... 2^(b-1) - 1.

    The largest magnitude of the weight is the grid's end. The gradient passes straight through (Bengio, Leonard,
    Courville, arXiv 1308.3432), also twice.

    Example:
        >>> Quantized(3)(torch.tensor([0.1, -0.6, 0.9])).tolist()
        [0.0, -0.6000000238418579, 0.8999999761581421]
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.top = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        step = weight.detach().abs().max() / self.top
        rounded = (weight.detach() / step.clamp(min=torch.finfo(weight.dtype).tiny)).round() * step
        passed: Tensor = weight + (rounded - weight).detach()
        return passed

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def channel_potentials(model: nn.Module, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (layer, potentials [n * positions, channels]) of all layers but the last, batch after batch.

    The average accumulated membrane potential of section III-A: a layer's outputs, which are its neurons' currents,
    summed over time without leak or reset and divided by the number of steps. In a non-spiking network it is the
    pre-activation.

    Args:
        images: uint8 [n, channels, height, width].
    """
    seen: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = output.detach()

    with seeing_outputs(dict(list(chain_of(model).items())[:-1]), see):
        for batch in torch.split(images, max(1, min(_BATCH, _MAX_ROWS // getattr(model, "steps", 1)))):
            with torch.no_grad():
                model(to_float(batch))
            for name, output in seen.items():
                mean = output.view(-1, len(batch), *output.shape[1:]).mean(0)
                yield name, mean.movedim(1, -1).flatten(0, -2)


def second_moments(model: nn.Module, images: Tensor, limit: float) -> dict[str, Tensor]:
    """"moments/LAYER" -> sum over rows x of [x, 1] [x, 1]^T, its upper triangle: float64 [(c + 1) (c + 2) / 2].

    The last column holds the sums of the channels and the number of rows.
    """  # fmt: skip
    sums: dict[str, Tensor] = {}
    for name, rows in channel_potentials(model, images):
        ones = torch.cat([rows.double().clamp(-limit, limit), rows.new_ones(len(rows), 1).double()], 1)
        triangle = packed(ones.T @ ones)
        sums[f"moments/{name}"] = sums[f"moments/{name}"] + triangle if f"moments/{name}" in sums else triangle
    return sums


def covariance_of(triangle: Tensor) -> Tensor:
    """Return the covariance of the channels, float64 [c, c],
    from sums of `second_moments` over any number of clients.
    """
    gram = unpacked(triangle)
    count = gram[-1, -1].clamp(min=1)
    mean = gram[-1, :-1] / count
    return gram[:-1, :-1] / count - torch.outer(mean, mean)


def significant_components(covariance: Tensor, variance: float) -> int:
    """Return the fewest principal components that explain this fraction of the variance, at least 1."""
    return leading_count(torch.linalg.eigvalsh(covariance), variance)


def leading_channels(covariance: Tensor, count: int) -> Tensor:
    """Return the `count` channels that together explain most of the variance, chosen greedily:
    int64 [count], in that order.

    The next channel is the one with the largest variance that linear regression on those chosen before leaves (a
    Cholesky decomposition with pivoting).
    """
    left = covariance.clone()
    chosen: list[int] = []
    for _ in range(count):
        variances = left.diagonal().clone()
        variances[chosen] = -1.0
        best = int(variances.argmax())
        chosen.append(best)
        if variances[best] > 0:
            left -= torch.outer(left[:, best], left[best]) / left[best, best].clone()
    return torch.tensor(chosen)


def spikes_per_layer(model: nn.Module, images: Tensor) -> dict[str, tuple[float, int]]:
    """Layer of neurons -> (its spikes for uint8 images [n, channels, height, width], maximum for one image)."""
    counts: dict[str, tuple[float, int]] = {}

    def count(name: str, layer: LeakyIntegrateFire, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        spikes, _ = counts.get(name, (0.0, 0))
        counts[name] = (spikes + float(output.sum()), output[0].numel() * layer.steps)

    layers = neurons_of(model)
    with seeing_outputs(layers, count), torch.no_grad():
        for batch in torch.split(images, _BATCH) if layers else ():
            model(to_float(batch))
    return counts
