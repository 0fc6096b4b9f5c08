"""Compression to the utilized rank: every layer is projected onto the subspaces that it reads and writes.

Garg, Koguchi, Verma, Ulbricht, "Revealing the Utilized Rank of Subspaces of Learning in Neural Networks", arXiv
2407.04797. With S the subspace in which a layer's inputs lie (the leading eigenvectors V_S of sum x x^T) and T that of
its outputs before the bias, W' = P_T W P_S has the same outputs as W. Its rank is at most r = min(k_S, k_T), the
utilized rank.

Convolutions are matrices of patches (im2col), attention's projections matrices like any other. In one round clients
measure both sums at the weights with which it began, so the totals are those of the pooled images and the server finds
exactly their subspaces; the energy they must hold, which the paper leaves open, is an option. From then on a layer is
V_T C V_S^T, of which only the core C [k_T, k_S] is trained, sent and encoded. Factors of different clients could not be
averaged; cores in a common basis can, exactly: the average of V_T C_i V_S^T is V_T (average of C_i) V_S^T.

The server learns the second moments of every measured layer's inputs. Those of the first layer are of the raw images
themselves, so it is left out unless `rank.first-layer=gram`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from client.plugins.layers import Site, leading_count, matrix, record_inputs, rows_per_image, sites
from client.plugins.round_start import at_weights, subsample
from tofu.data import LabeledImages
from tofu.plugins import Export, Plugin, PluginState, RoundContext, RunRequirements, SumSpec, option, plugin_registry
from tofu.weights import Weights, weights_of


class Core(nn.Module):
    """Makes a weight V_T C V_S^T of its core C [k_T, k_S]; the bases are buffers that are neither trained nor sent.

    Args:
        inputs: V_S [columns, k_S], orthonormal.
        outputs: V_T [outputs, k_T], orthonormal.
        shape: the weight's shape, [outputs, ...] with `columns` elements a row.
    """

    inputs: Tensor
    outputs: Tensor

    def __init__(self, inputs: Tensor, outputs: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("inputs", inputs, persistent=False)
        self.register_buffer("outputs", outputs, persistent=False)
        self.shape = shape

    def forward(self, core: Tensor) -> Tensor:
        return (self.outputs @ core @ self.inputs.T).view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the core of the weight's projection."""
        return self.outputs.T @ weight.flatten(1) @ self.inputs


@dataclass(frozen=True)
class LayerRank:
    """The dimensions that a layer uses: k_S of `columns` and k_T of `outputs`."""

    inputs: int
    columns: int
    outputs: int
    rows: int

    @property
    def utilization(self) -> float:
        """r / (the largest rank that the layer could have)."""
        return min(self.inputs, self.outputs) / min(self.columns, self.rows)


@plugin_registry.register("rank")
@dataclass
class UtilizedRank(Plugin):
    """In round `after` clients measure. From the next round on the network is factorized, and its cores are trained.

        plugins = make_plugins("rank", "rank.energy=0.99")
        plugins.setup(model, RoundContext(data.shape))
        train_locally(model, data, config, generator=generator, plugins=plugins)
        plugins.reduce(plugins.export(model).sums, len(data))
        plugins.setup(model, RoundContext(data.shape, round=2))  # projects the weights: their names and shapes change

    `ranks` has the dimensions that each layer uses; `merged` makes a plain network again.
    """

    excludes: ClassVar[Mapping[str, str]] = {"trend": "its bases are those of one model, not of one for each group"}

    energy: float = option(0.998, "fraction of the inputs' and outputs' energy that the subspaces hold", gt=0, le=1)
    after: int = option(1, "the round in which clients measure", ge=1, le=100_000)
    first_layer: str = option("skip", "skip it, or gram: measure raw images too", choices=("skip", "gram"))
    factorize: bool = option(True, "train the cores from then on; false only measures")
    images: int = option(500, "maximum number of a client's images that are measured", ge=1, le=1_000_000)
    max_norm: float = option(0.0, "scale rows of a larger norm to it, which bounds the sums; 0 leaves them", ge=0)

    _start: Weights = field(default_factory=dict, init=False, repr=False)
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def incompatibility(self, run: RunRequirements) -> str:
        if run.secure and not self.max_norm:
            return "rank.max-norm above 0: secure aggregation needs bounded sums"
        return super().incompatibility(run)

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        super().setup(model, context)
        if self.factorize:
            for name in self.ranks:
                inputs, outputs = (self.broadcast.get(f"{name}/{side}") for side in ("inputs", "outputs"))
                if isinstance(inputs, Tensor) and isinstance(outputs, Tensor):
                    _factorize(model, name, inputs, outputs)
        return model

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        if not self._measures:
            return {}
        shape, largest = self.context.shape, self.max_norm**2 if self.max_norm else float("inf")
        rows = rows_per_image(model, *shape.chw)
        declared = {}
        for site in self._sites(model):
            bound = self.images * rows[site.name] * largest
            for side, size in (("inputs", site.columns), ("outputs", site.stop - site.start)):
                declared[f"{site.name}/{side}"] = SumSpec((size, size), bound)
        return declared

    def on_train_begin(self, model: nn.Module, data: LabeledImages) -> None:
        if self._measures:
            self._start = weights_of(model)

    def on_task_end(self, model: nn.Module, data: LabeledImages, final: bool) -> None:
        if self._measures:
            with at_weights(model, self._start):
                self._sums = grams(model, subsample(data, self.images), self._sites(model), self.max_norm)

    def export(self) -> Export:
        used = self.broadcast.get("utilization")
        return Export(self._sums, {"utilization": used} if isinstance(used, float) else {})

    def reduce(self, sums: Mapping[str, Tensor], examples: int, broadcast: PluginState) -> PluginState:
        """Return the bases of the layers that have a smaller core, the ranks of all, and their mean utilization."""
        found: PluginState = {}
        utilization = []
        for name in dict.fromkeys(key.rpartition("/")[0] for key in sums):
            inputs, outputs = (top_eigenvectors(sums[f"{name}/{side}"], self.energy) for side in ("inputs", "outputs"))
            rank = LayerRank(inputs.shape[1], inputs.shape[0], outputs.shape[1], outputs.shape[0])
            utilization.append(rank.utilization)
            found[f"{name}/ranks"] = torch.tensor([rank.inputs, rank.columns, rank.outputs, rank.rows])
            if rank.inputs * rank.outputs < rank.columns * rank.rows:
                found |= {f"{name}/inputs": inputs.float(), f"{name}/outputs": outputs.float()}
        return found | {"utilization": sum(utilization) / len(utilization)}

    @property
    def ranks(self) -> dict[str, LayerRank]:
        """Weight's name -> the dimensions that it uses; empty until the clients have measured."""
        found = {}
        for key, value in self.broadcast.items():
            name, _, what = key.rpartition("/")
            if what == "ranks" and isinstance(value, Tensor):
                found[name] = LayerRank(*map(int, value.tolist()))
        return found

    @property
    def _measures(self) -> bool:
        return self.context.round == self.after and not self.ranks

    def _sites(self, model: nn.Module) -> tuple[Site, ...]:
        """Return the matrices to measure; the others are left as they are.

        These are grouped convolutions, whose parameter is many matrices, and weights that several layers share.
        """
        every = sites(model)
        own = every if self.first_layer == "gram" else every[1:]
        owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
        return tuple(
            site for site in own if site.name == site.weight and owners[id(model.get_parameter(site.weight))] == 1
        )


def grams(model: nn.Module, images: Tensor, wanted: tuple[Site, ...], max_norm: float) -> dict[str, Tensor]:
    """`name/inputs` -> sum of x x^T over a layer's input rows, `name/outputs` -> sum of (W x)(W x)^T. float64.

    Args:
        images: uint8 [n, channels, height, width].
        max_norm: rows, of inputs and outputs each, of a larger norm are scaled to it; 0 leaves them.
    """
    weights = {site.name: matrix(site, model).detach().double() for site in wanted}
    sums = {}
    for name, weight in weights.items():
        for side, size in (("outputs", weight.shape[0]), ("inputs", weight.shape[1])):
            sums[f"{name}/{side}"] = torch.zeros(size, size, dtype=torch.float64)

    def see(site: Site, rows: Tensor) -> None:
        if site.name in weights:
            inputs = rows.double()
            for side, values in (("inputs", inputs), ("outputs", inputs @ weights[site.name].T)):
                clip = max_norm / values.norm(dim=1, keepdim=True).clamp(min=max_norm) if max_norm else None
                clipped = values if clip is None else values * clip
                sums[f"{site.name}/{side}"].addmm_(clipped.T, clipped)

    record_inputs(model, images, see)
    return sums


def top_eigenvectors(gram: Tensor, energy: float) -> Tensor:
    """Return the fewest leading eigenvectors of sum x x^T [d, d] with this fraction of its trace:
    float64 [d, k], k >= 1.
    """
    values, vectors = torch.linalg.eigh(gram)
    kept: Tensor = vectors.flip(1)[:, : leading_count(values, energy)]
    return kept


def _factorize(model: nn.Module, name: str, inputs: Tensor, outputs: Tensor) -> None:
    parent, _, weight = name.rpartition(".")
    module = model.get_submodule(parent)
    if not parametrize.is_parametrized(module, weight):
        shape = getattr(module, weight).shape
        parametrize.register_parametrization(module, weight, Core(inputs, outputs, shape))
