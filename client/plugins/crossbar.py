"""Crossbar-aware pruning: equally many weights in every column of a tile, so that its converter needs fewer bits.

Ibrayev, Garg, Chakraborty, Roy, "Pruning for Improved ADC Efficiency in Crossbar-based Analog In-memory Accelerators",
arXiv 2403.13082. An analog crossbar reads a column of t weights with an analog-to-digital converter (ADC), whose
resolution is set by the fullest column of a tile. Unstructured pruning leaves a full column in nearly every tile, so it
saves little. Here clients first train with a penalty on the variance, within each tile, of a differentiable count of a
column's weights. Then the server prunes the global model to a power of two of weights per column, and clients fine-tune
what remains.

All clients must use the same masks, because the average of differently pruned models has the weights of all of them.
Pruned weights are no longer parameters: they are neither trained, sent nor encoded (`tofu.plugins.masking`).
`masks=local` gives each client its own masks, for comparison. docs/plugins/crossbar.md has the options and
measurements.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.plugins.crossbar_tiles import (
    AdcEnergy,
    adc_energies,
    adc_energy,
    balanced_mask,
    column_counts,
    column_hoyer,
    occupancy_variance,
    percentile_threshold,
    to_tiles,
)  # fmt: skip
from client.plugins.layers import Site, matrix, rows_per_image, sites
from tofu.data import LabeledImages
from tofu.errors import PayloadError, RunError, SettingError
from tofu.plugins import (
    Batch,
    Export,
    Panel,
    Plugin,
    PluginState,
    RoundContext,
    Weights,
    keep_entries,
    option,
    plugin_registry,
)  # fmt: skip
from tofu.rounds.panel import Chart, Figure, ImageFigure, Series, TableFigure
from tofu.weights import under

_PICTURE = (64, 256)  # largest height and width of a picture in the report


@plugin_registry.register("crossbar")
@dataclass
class CrossbarPruning(Plugin):
    """Balanced pruning for crossbars. A weight is the parameter of a linear layer, a convolution or attention.

    `broadcast`, once the server has pruned: "mask/WEIGHT", one bit for each entry, uint8; and for the report
    "layer/WEIGHT", float64 [fraction of zeros, energy, energy of the dense layer], "before/WEIGHT", uint8 [input
    blocks, outputs], the columns' squared Hoyer measure in 255ths of a full column, and "after/WEIGHT", uint8 [input
    blocks, output blocks], the entries of a tile's fullest column. With `masks=local` the masks are in `state`.
    """

    order: ClassVar[int] = Plugin.MASK
    excludes: ClassVar[Mapping[str, str]] = {
        "rank": "both replace the layers' weights",
        "gpm": "it projects whole weight matrices, of which masks leave parts",
        "trend": "every client group would need masks of its own",
    }

    # fmt: off
    tile: int = option(32, "columns and rows of a tile, a power of two", ge=2, le=1024)
    strength: float = option(0.3, "factor of the penalty: mean variance of column occupancy over all tiles", ge=0, le=1e6)  # noqa: E501
    after: int = option(0, "round after which the server prunes; 0: half of the run's rounds", ge=0, le=100_000)
    rule: str = option("percentile", "which weights count as zero: percentile (smallest in their layer) or tolerance", choices=("percentile", "tolerance"))  # noqa: E501
    percentile: float = option(0.8, "fraction of a layer's weights that count as zero, for rule=percentile", ge=0, lt=1)
    tolerance: float = option(1e-3, "largest magnitude that counts as zero, for rule=tolerance", ge=0, le=1e6)
    layers: str = option("all", "all; conv: convolutions; inner: all but the first and the last", choices=("all", "conv", "inner"))  # noqa: E501
    masks: str = option("common", "common: the server's, of the global model; local: each client's own", choices=("common", "local"))  # noqa: E501
    energy: str = option("exponential", "energy model of a converter: exponential, survey or package.module:Class")
    # fmt: on

    _adc: AdcEnergy = field(default_factory=AdcEnergy, init=False, repr=False)
    _own: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _metrics: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tile & (self.tile - 1):
            raise SettingError("crossbar.tile", self.tile, "a power of two")
        self._adc = adc_energies.get(self.energy)()

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        """Remove the pruned entries from the model.

        Raises:
            SettingError: the run ends before pruned weights can be fine-tuned, or has client groups.
            PayloadError: a mask of the broadcast does not fit the model.
        """
        if self._prunes_after(context) >= context.rounds:
            raise SettingError("crossbar.after", self.after, f"less than the run's rounds, {context.rounds}")
        if context.group > 0:
            raise SettingError("plugins", "crossbar", "a run without client groups: masks are those of one model")
        super().setup(model, context)
        self._own, self._metrics = {}, {}
        if self.masks == "common":
            keep_entries(model, _masks(self.broadcast, model))
        return model

    def on_train_begin(self, model: nn.Module, data: LabeledImages) -> None:
        if self.masks == "local":
            try:
                self._own = _masks(self.state, model)
            except PayloadError:  # the state of another model
                self._own = {}
            self._zero(model)

    def on_loss(self, outputs: Tensor, batch: Batch, loss: Tensor, model: nn.Module) -> Tensor:
        if self._pruned or not self.strength:
            return loss
        variance = occupancy_variance((matrix(site, model) for site in self._sites(model)), self.tile)
        return loss + self.strength * variance.to(loss)

    @torch.no_grad()
    def on_step(self, model: nn.Module, before: Weights, momenta: Mapping[str, Tensor]) -> None:
        """Keep a client's own pruned entries, and their momentum, at zero. Common masks left no such entries."""
        self._zero(model)
        for name, mask in self._own.items():
            if name in momenta:
                momenta[name].mul_(mask.to(momenta[name]))

    @torch.no_grad()
    def on_task_end(self, model: nn.Module, data: LabeledImages, final: bool) -> None:
        context = self.context
        if not self._pruned:
            own = self._sites(model)
            variance = occupancy_variance((matrix(site, model) for site in own), self.tile)
            self._metrics["column-variance"] = float(variance)
            if self.masks == "local" and context.round >= self._prunes_after(context):
                self._own = self._make_masks(model)
                self.state = {f"mask/{name}": _pack(mask) for name, mask in self._own.items()}
                self._zero(model)
        if self._own:
            kept, entries = (sum(count(m) for m in self._own.values()) for count in (torch.sum, torch.numel))
            self._metrics["own-sparsity"] = 1 - float(kept) / float(entries)

    def export(self) -> Export:
        """Metrics of open rounds: the mean variance of the penalty, and the sparsity of a client's own masks."""
        return Export(metrics=self._metrics)

    @property
    def _pruned(self) -> bool:
        return bool(self._own) or bool(under(self.broadcast, "mask"))

    def _zero(self, model: nn.Module) -> None:
        for name, mask in self._own.items():
            weight = model.get_parameter(name).data
            weight.mul_(mask.to(weight))

    def _prunes_after(self, context: RoundContext) -> int:
        return self.after or max(1, context.rounds // 2)

    def _sites(self, model: nn.Module) -> tuple[Site, ...]:
        """Return the matrices that are pruned."""
        every = sites(model)
        if self.layers == "conv":
            return tuple(site for site in every if model.get_parameter(site.weight).dim() == 4)
        if self.layers == "inner":
            ends = {every[0].weight, every[-1].weight} if every else set()
            return tuple(site for site in every if site.weight not in ends)
        return every

    def _make_masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a mapping: weight's name -> which of its entries remain.

        Raises:
            RunError: none of a weight's entries remain.
        """
        masks = {site.weight: torch.ones_like(model.get_parameter(site.weight), dtype=torch.bool)
                 for site in self._sites(model)}  # fmt: skip
        for site in self._sites(model):
            weights = matrix(site, model).detach()
            by_rank = self.rule == "percentile"
            threshold = percentile_threshold(weights, self.percentile) if by_rank else self.tolerance
            rows = masks[site.weight].flatten(1)[site.start : site.stop]
            rows.copy_(balanced_mask(weights, self.tile, threshold))
        for name, mask in masks.items():
            if not bool(mask.any()):
                raise RunError(f"crossbar leaves no entry of {name}: a smaller {self.rule} may help")
        return masks

    # Server

    def on_aggregate(self, model: nn.Module, context: RoundContext) -> None:
        """Prune after the chosen round. With local masks, only measure the averaged model."""
        if self.masks == "common" and context.round >= self._prunes_after(context) and not self._pruned:
            masks = self._make_masks(model)
            packed: PluginState = {f"mask/{name}": _pack(mask) for name, mask in masks.items()}
            self.broadcast = packed | self._measured(model, masks)
        if self.masks == "local" and context.round == context.rounds:
            nonzero = {site.weight: model.get_parameter(site.weight) != 0 for site in self._sites(model)}
            self.broadcast = self._measured(model, nonzero)

    def _measured(self, model: nn.Module, masks: Mapping[str, Tensor]) -> PluginState:
        """Return the arrays for the report: zeros and energy of every weight, and column occupancy before and after."""
        context = self.context
        positions = rows_per_image(model, *context.shape.chw)
        measured: PluginState = {}
        for name, mask in masks.items():
            energy, before, after = torch.zeros(2, dtype=torch.float64), [], []
            for site in self._sites(model):
                if site.weight != name:
                    continue
                kept = mask.flatten(1)[site.start : site.stop]
                spent = adc_energy(self._adc, kept, self.tile, positions=positions[site.name])
                energy += torch.tensor(spent, dtype=torch.float64)
                hoyer = column_hoyer(to_tiles(matrix(site, model).detach(), self.tile))
                before.append(hoyer.transpose(0, 1).flatten(1)[:, : len(kept)])
                after.append(column_counts(to_tiles(kept, self.tile)).amax(-1).T)
            sparsity = 1 - mask.double().mean()
            measured[f"layer/{name}"] = torch.stack([sparsity, *energy])
            for when, parts in (("before", before), ("after", after)):
                picture = (torch.cat(parts, 1) * 255 / self.tile).round().clamp(max=255)
                measured[f"{when}/{name}"] = picture.to(torch.uint8)
        return measured

    def panel(self) -> Panel | None:
        """Sparsity, energy and the picture of column occupancy, by layer; None before the server has pruned."""
        layers = under(self.broadcast, "layer")
        rows = {name: value.tolist() for name, value in layers.items() if isinstance(value, Tensor)}
        if not rows:
            return None
        energy, dense = (sum(row[i] for row in rows.values()) for i in (1, 2))
        table = tuple((name, *row, _ratio(row[2], row[1])) for name, row in rows.items())
        savings = Series("times less", tuple(row[-1] for row in table), labels=tuple(rows))
        figures: list[Figure] = [
            TableFigure("Layers", ("weight", "zeros", "energy", "dense energy", "times less"), table),
            Chart("ADC energy of the dense layer over that of the pruned one", (savings,), kind="bars"),
        ]
        for name in rows:
            before, after = (self.broadcast.get(f"{when}/{name}") for when in ("before", "after"))
            if isinstance(before, Tensor) and isinstance(after, Tensor):
                title = f"{name}: column occupancy before (above) and after pruning; the bar is the scale from 0 to 1"
                figures.append(ImageFigure(title, (_picture(before, after, self.tile),)))
        common = self.masks == "common"
        return Panel(
            "Crossbar-aware pruning",
            f"ADC energy per image ({self.energy}): {_ratio(dense, energy):.2f} times less than of dense layers, on "
            f"tiles of {self.tile} x {self.tile}. "
            + ("The masks are common to all clients." if common else "The average of clients' own pruned models."),
            tuple(figures),
        )


def _ratio(dense: float, pruned: float) -> float:
    return dense / pruned if pruned else 1.0


def _picture(before: Tensor, after: Tensor, tile: int) -> tuple[tuple[float, ...], ...]:
    """Draw rows of pixels: the columns before, a scale from 0 to 1, and the fullest columns of the tiles after."""
    height, width = min(before.shape[0], _PICTURE[0]), min(before.shape[1], _PICTURE[1])
    wide = after.repeat_interleave(tile, 1)[:, : before.shape[1]]
    parts = [F.adaptive_avg_pool2d(part.double()[None] / 255, (height, width))[0] for part in (before, wide)]
    scale = torch.linspace(0, 1, width, dtype=torch.float64)[None]
    return tuple(map(tuple, torch.cat([parts[0], scale, parts[1]]).tolist()))


def _pack(mask: Tensor) -> Tensor:
    """Return a mask's entries as bits, uint8."""
    return torch.from_numpy(np.packbits(mask.flatten().numpy()))


def _masks(state: PluginState, model: nn.Module) -> dict[str, Tensor]:
    """Read a mapping: weight's name -> mask, of a broadcast or of a client's own state.

    Raises:
        PayloadError: a mask that does not fit the model, or that keeps nothing.
    """
    masks = {}
    for name, bits in under(state, "mask").items():
        path, _, attribute = name.rpartition(".")
        try:
            weight = getattr(model.get_submodule(path), attribute)
        except AttributeError:
            weight = None
        if not isinstance(weight, Tensor):
            raise PayloadError(f"mask of {name[:80]!r} does not fit the model: it has no such weight")
        size = (weight.numel() + 7) // 8
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or tuple(bits.shape) != (size,):
            raise PayloadError(f"mask of {name} is not usable: expected {size} bytes")
        flat = np.unpackbits(bits.numpy(), count=weight.numel()).astype(bool)
        if not flat.any():
            raise PayloadError(f"mask of {name} is not usable: it keeps nothing")
        masks[name] = torch.from_numpy(flat).view(weight.shape)
    return masks
