"""3SFC, single-step synthetic features: an update as the gradient of a full-size synthetic sample.

Zhou, Shi, Li, Ye, Sun, Lv, "Communication-efficient Federated Learning with Single-Step Synthetic Features Compressor
for Faster Convergence", ICCV 2023, arXiv 2302.13562. With G the network's own gradient at samples of the input's size
and soft labels, found from noise so that |cos(G, U)| is large, the update decodes to s G with s = |U| cos(G, U) / |G|.

This is `tofu.codec` with the settings of the published method; only sizes are chosen here. The objective of
`tofu.codec` with one scale is 1 - cos^2. Choices that the paper does not specify, and differences:

- Samples have 8 bits per pixel and label, as many as fit; if not even one fits, one sample of 4 bits. The paper sends
  float32. Samples have the input's size, up to a side of 1024.
- Each sample has a weight of 2 bytes in the loss, which the paper does not have; for one sample it is part of s.
- Up to 200 steps of Adam, and no penalty on the size of the samples.
- The error feedback is that of all compressors.
"""

from dataclasses import replace

from tofu.codec.compressor import ProxyCompressor
from tofu.codec.options import DEFAULTS, CompressorOptions, paper_settings
from tofu.codec.proxies import MAX_SIDE
from tofu.compression import compressors
from tofu.errors import SettingError
from tofu.reference_model import ReferenceModel

BITS, FALLBACK_BITS = 8, 4


@compressors.register("3sfc")
class ThreeSfc(ProxyCompressor):
    """Full-size samples through the network itself.

    Args:
        reference: the run's model, or one with equal shapes.
        ratio: float32 bytes of the update over bytes of the payload, header included.
        options: none applies; the method has its own encoder and no correction.

    Raises:
        SettingError: not even one sample fits.
    """

    code = 9

    def __init__(self, reference: ReferenceModel, *, ratio: float, options: CompressorOptions = DEFAULTS) -> None:
        side = min(reference.call.side, MAX_SIDE)

        def published(bits: int) -> CompressorOptions:
            return replace(options, proxies=0, correction=0.0, encoder=paper_settings(size=side, bits=bits))

        try:
            super().__init__(reference, ratio=ratio, options=published(BITS))
        except SettingError:
            super().__init__(reference, ratio=ratio, options=published(FALLBACK_BITS))
