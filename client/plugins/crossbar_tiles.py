"""Weight matrices on crossbar tiles: column occupancy, its levels, and the energy of the converters that read it.

A layer is a matrix [outputs, inputs] (`client.plugins.layers`). A tile holds t x t of its entries: `rows` are t
consecutive inputs, and a `column` is the part of one output that these inputs reach. The currents of a column add up in
one wire, so its analog-to-digital converter (ADC) must distinguish as many sums as the column has non-zero entries. The
columns of a tile share a converter, whose resolution is set by the fullest column.

    occupancy = column_counts(to_tiles(matrix != 0, 32))       # non-zero entries of every column
    adc_energy(ExponentialAdc(), matrix != 0, 32, positions=1)  # (of this matrix, of a dense one)

Source: Ibrayev, Garg, Chakraborty, Roy, "Pruning for Improved ADC Efficiency in Crossbar-based Analog In-memory
Accelerators", arXiv 2403.13082.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from tofu.registry import Registry

_EPSILON = 1e-6


def to_tiles(matrix: Tensor, tile: int) -> Tensor:
    """Return the matrix [outputs, inputs] as tiles [output blocks, input blocks, columns, rows], padded with zeros.

    Args:
        tile: t, the number of columns and of rows of a tile.
    """
    outputs, inputs = matrix.shape
    padded = F.pad(matrix, (0, -inputs % tile, 0, -outputs % tile))
    return padded.view(len(padded) // tile, tile, padded.shape[1] // tile, tile).transpose(1, 2)


def from_tiles(tiles: Tensor, outputs: int, inputs: int) -> Tensor:
    """Invert `to_tiles`: the matrix [outputs, inputs] without its padding."""
    whole = tiles.transpose(1, 2).reshape(tiles.shape[0] * tiles.shape[2], tiles.shape[1] * tiles.shape[3])
    return whole[:outputs, :inputs]


def columns_in_use(outputs: int, tile: int) -> Tensor:
    """Return bool [output blocks, columns]: which columns belong to an output and not to the padding."""
    return (torch.arange(outputs + -outputs % tile) < outputs).view(-1, tile)


def column_counts(kept: Tensor) -> Tensor:
    """Non-zero entries of every column, int64 [output blocks, input blocks, columns], of bool tiles."""
    return kept.sum(-1)


def column_hoyer(tiles: Tensor) -> Tensor:
    """Squared Hoyer measure (sum |w|)^2 / sum w^2 of every column: a differentiable count of its non-zero entries.

    1 for a single non-zero entry, n for n entries of equal magnitude, 0 for none.
    """
    return tiles.abs().sum(-1).square() / (tiles.square().sum(-1) + _EPSILON)


class PositiveGradient(torch.autograd.Function):
    """The identity, whose backward pass keeps only positive gradients.

    Before a minimized variance, only columns above the mean are changed: towards fewer entries, never towards more.
    """

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient.clamp(min=0)


def occupancy_variance(matrices: Iterable[Tensor], tile: int) -> Tensor:
    """Return the mean over all tiles of the unbiased variance
    of the squared Hoyer measure over a tile's columns; a scalar.

    The gradient passes the gate (`PositiveGradient`). Columns of the padding do not count, nor do tiles of one column.
    """
    total, tiles = torch.zeros(()), 0
    for matrix in matrices:
        hoyer = PositiveGradient.apply(column_hoyer(to_tiles(matrix, tile)))  # type: ignore[no-untyped-call]
        used = columns_in_use(len(matrix), tile).to(hoyer)[:, None]
        columns = used.sum(-1, keepdim=True)
        mean = (hoyer * used).sum(-1, keepdim=True) / columns
        variance = ((hoyer - mean).square() * used).sum(-1) / (columns[..., 0] - 1).clamp(min=1)
        total, tiles = total.to(hoyer.device) + variance.sum(), tiles + variance.numel()
    return total / max(1, tiles)


def round_to_level(largest: Tensor, tile: int) -> Tensor:
    """Return the occupancy that every column of a tile gets, a power of two or 0, from that of its fullest column.

    The levels of sparsity are 1 - 2^-k and 1. Sparsity from the middle between two levels on is raised to the upper
    one, and below it lowered to the lower one.

    Args:
        largest: integers, 0 to `tile`, which is a power of two.
    """
    above = 2.0 ** largest.clamp(min=1).double().log2().ceil()
    level = torch.where(4 * largest <= 3 * above, above / 2, above)
    return torch.where(largest > 0, level, 0).long().clamp(max=tile)


def percentile_threshold(matrix: Tensor, percentile: float) -> float:
    """Return the magnitude that this fraction of a matrix's entries does not exceed."""
    count = int(percentile * matrix.numel())
    return float(matrix.detach().abs().flatten().kthvalue(count).values) if count else 0.0


def balanced_mask(matrix: Tensor, tile: int, threshold: float) -> Tensor:
    """Mask of the entries that remain, bool [outputs, inputs]: in each tile the same number in every column.

    A tile's level follows from the column with most magnitudes above the threshold (`round_to_level`). Every column
    keeps its largest magnitudes, up to the level, also those of at most the threshold: they cost no energy.
    """
    magnitudes = to_tiles(matrix.detach().abs(), tile)
    level = round_to_level(column_counts(magnitudes > threshold).amax(-1), tile)
    rank = magnitudes.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return from_tiles(rank < level[..., None, None], *matrix.shape)


class AdcEnergy:
    """Energy model of the converters; a subclass without arguments is selected as `package.module:Class`.

    Override `conversion`, or `tile` where not all columns of a tile share one resolution.
    """

    def conversion(self, occupancy: Tensor) -> Tensor:
        """Return the energy of one conversion, float64, in any unit, by the non-zero entries (int64,
        at least 1) of the column.
        """
        raise NotImplementedError

    def tile(self, occupancy: Tensor, columns: Tensor) -> Tensor:
        """Return the energy of a tile for one input vector, float64 [tiles].

        By default a tile converts each of its columns in the resolution that its fullest column needs, and an empty
        tile converts nothing.

        Args:
            occupancy: int64 [tiles, t], non-zero entries of every column; 0 for the padding.
            columns: int64 [tiles], columns that are in use.
        """
        fullest = occupancy.amax(1)
        return torch.where(fullest > 0, columns * self.conversion(fullest.clamp(min=1)), 0.0)


def resolution(occupancy: Tensor) -> Tensor:
    """Return the bits of a converter for columns with n >= 1 entries: ceil(log2 n) + 1, float64.

    This is for inputs of one bit at a time and cells of one bit (Shafiee et al., ISAAC, ISCA 2016, section V: log2 R +
    v + w - 1 for R rows, v input bits and w bits a cell). A weight of more bits is several such cells.
    """
    return occupancy.double().log2().ceil() + 1


class ExponentialAdc(AdcEnergy):
    """Energy proportional to 2^bits, as of a flash converter: every bit less halves it. The paper's assumption."""

    def conversion(self, occupancy: Tensor) -> Tensor:
        return 2.0 ** resolution(occupancy)


class SurveyAdc(AdcEnergy):
    """k1 bits + k2 4^bits in femtojoules, k1 = 100 and k2 = 0.001: the lower envelope of published converters.

    Murmann, "Mixed-Signal Computing for Deep Neural Network Inference", IEEE Transactions on VLSI Systems, 2021. At few
    bits the linear term dominates, so a bit less saves little.
    """

    def conversion(self, occupancy: Tensor) -> Tensor:
        bits = resolution(occupancy)
        return 100 * bits + 0.001 * 4.0**bits


adc_energies: Registry[type[AdcEnergy]] = Registry("crossbar.energy", AdcEnergy)
# Not as decorators: `plugin_registry` would take those in this folder for plugins.
adc_energies.register("exponential")(ExponentialAdc)
adc_energies.register("survey")(SurveyAdc)


def adc_energy(model: AdcEnergy, kept: Tensor, tile: int, *, positions: int = 1) -> tuple[float, float]:
    """Return the energy of a layer's conversions for one image: with the entries that are kept, and with all of them.

    Args:
        kept: bool [outputs, inputs].
        positions: input vectors of one image: 1 of a linear layer, the output's positions of a convolution.
    """
    columns = columns_in_use(len(kept), tile).sum(1)[:, None].expand(-1, -(-kept.shape[1] // tile)).flatten()

    def total(entries: Tensor) -> float:
        return positions * float(model.tile(column_counts(to_tiles(entries, tile)).flatten(0, 1), columns).sum())

    return total(kept), total(torch.ones_like(kept))
