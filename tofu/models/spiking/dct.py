"""The encoder of DCT-SNN, which converts images to spikes in the order of spatial frequencies.

Garg, Chowdhury, Roy, "DCT-SNN: Using DCT to Distribute Spatial Information over Time for Low-Latency Spiking Neural
Networks", ICCV 2021. Blocks of 4x4 pixels are decomposed by the orthonormal DCT-II, C = Q X Q^T. The component of
frequency k, g_k = C_mn outer(Q_m, Q_n), is again a block of pixels, and the 16 components sum to the block. One time
step adds the next component, cyclically in zig-zag order, to an accumulator. The accumulator fires +1 or -1 where it
exceeds the upper or the lower threshold, which is then subtracted from it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tofu.codec.surrogate import register_surrogate
from tofu.models.spiking.layers import OverTime

BLOCK = 4
FREQUENCIES = BLOCK * BLOCK
"""Number of components, and of time steps in one cycle."""

TRAINED_FREQUENCIES = (FREQUENCIES, FREQUENCIES, 10, 6, 3)
"""Numbers of frequencies from which training with random frequencies draws one for each batch."""

CYCLES = 3

_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
"""The color transform of JPEG (ITU-T T.871), without its offsets."""

DEFAULT_THRESHOLDS = (-0.05, 0.05)
"""Approximately the percentiles 3 and 97 of the components of CIFAR-10; the plugin dct-snn measures them on clients."""


def dct_components() -> Tensor:
    """Return the images outer(Q_m, Q_n) of the 16 frequencies in zig-zag order: float32 [16, 4, 4], orthonormal."""
    n = torch.arange(BLOCK, dtype=torch.float64)
    q = math.sqrt(2 / BLOCK) * torch.cos(math.pi * (2 * n + 1) * n[:, None] / (2 * BLOCK))
    q[0] = math.sqrt(1 / BLOCK)
    pairs = [(row, column) for row in range(BLOCK) for column in range(BLOCK)]
    # Along each diagonal of equal m + n; odd ones downward, even ones upward.
    pairs.sort(key=lambda pair: (sum(pair), pair[0] if sum(pair) % 2 else pair[1]))
    return torch.stack([torch.outer(q[row], q[column]) for row, column in pairs]).float()


def to_ycbcr(images: Tensor) -> Tensor:
    """Convert images [n, channels, height, width] in [-1, 1] to [-1/2, 1/2]; three channels become Y, Cb and Cr.

    Unlike in the paper, luminance is centered like chrominance. Positive and negative thresholds are then nearly equal,
    and fewer spikes approximate the pixels.
    """
    half = images / 2
    if half.shape[1] != 3:
        return half
    return torch.einsum("ij,njhw->nihw", torch.tensor(_YCBCR, device=half.device, dtype=half.dtype), half)


class DctEncoder(OverTime):
    """Images [n, channels, height, width] in [-1, 1] -> spikes -1, 0 or 1, [steps * n, channels, height', width'].

    In non-spiking mode it returns the pixels of all blocks, in [-1/2, 1/2], with the components that are used; in the
    codec those with all components (`expanded`).

    Args:
        stride: distance of neighboring blocks: 2 (overlapping; 32x32 pixels become 60x60) or 4.

    Attributes:
        frequencies: number of components that are used, 1 to 16. It may be changed at any time; the time steps of the
            other components have no input.

    Example:
        >>> import torch
        >>> encoder = DctEncoder(stride=4)
        >>> encoder.steps = 32
        >>> images = torch.rand(2, 1, 8, 8) * 2 - 1
        >>> encoder(images).shape
        torch.Size([64, 1, 8, 8])
        >>> torch.allclose(encoder.components(images).sum(0), images / 2, atol=1e-6)
        True
    """

    thresholds: Tensor
    basis: Tensor

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        if stride not in (2, 4):
            raise ValueError(f"stride={stride} is not usable: expected 2 or 4")
        self.stride, self.frequencies, self.steps = stride, FREQUENCIES, CYCLES * FREQUENCIES
        self.register_buffer("thresholds", torch.tensor(DEFAULT_THRESHOLDS), persistent=False)
        self.register_buffer("basis", dct_components(), persistent=False)

    def encoded_side(self, side: int) -> int:
        """Return the pixels along a side of the spikes, for an image's side in pixels."""
        return self._blocks(side) * BLOCK

    def expanded(self, images: Tensor) -> Tensor:
        """Return the pixels of all blocks, side by side: [n, channels, height', width']."""
        blocks = self._split(to_ycbcr(images))
        return blocks.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)

    def components(self, images: Tensor) -> Tensor:
        """Return the components g_k in zig-zag order: [16, n, channels, height', width']; their sum is `expanded`."""
        blocks = self._split(to_ycbcr(images))
        coefficients = torch.einsum("ncyxij,kij->kncyx", blocks, self.basis)
        parts = torch.einsum("kncyx,kij->kncyixj", coefficients, self.basis)
        return parts.flatten(5, 6).flatten(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        if not self.spiking:
            all_used = self.frequencies == FREQUENCIES
            return self.expanded(images) if all_used else self.components(images)[: self.frequencies].sum(0)
        with torch.no_grad():
            parts = self.components(images)
            low, high = self.thresholds.unbind()
            potential = torch.zeros_like(parts[0])
            spikes = parts.new_empty(self.steps, *potential.shape)
            for step, out in enumerate(spikes):
                if step % FREQUENCIES < self.frequencies:
                    potential += parts[step % FREQUENCIES]
                above, below = (potential > high).to(out.dtype), (potential < low).to(out.dtype)
                torch.sub(above, below, out=out)
                potential -= above.mul_(high).add_(below.mul_(low))
        return spikes.flatten(0, 1)

    def _blocks(self, side: int) -> int:
        """Return the number of blocks along a side; the border
        of the image is repeated where the last block exceeds it.
        """
        return 1 + max(0, math.ceil((side - BLOCK) / self.stride))

    def _split(self, images: Tensor) -> Tensor:
        """Split images into blocks: [n, channels, blocks down, blocks across, 4, 4]."""
        missing = [(self._blocks(side) - 1) * self.stride + BLOCK - side for side in images.shape[2:]]
        if any(missing):
            images = F.pad(images, (0, missing[1], 0, missing[0]), mode="replicate")
        return images.unfold(2, BLOCK, self.stride).unfold(3, BLOCK, self.stride)


register_surrogate(DctEncoder, lambda beta: DctEncoder.expanded)
