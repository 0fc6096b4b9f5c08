"""3SFC, single-step synthetic features: an update as the gradient of a full-size synthetic sample.

Zhou, Shi, Li, Yang, Sun, Li, "Communication-efficient Federated Learning with Single-Step Synthetic Features Compressor
for Faster Convergence", ICCV 2023, arXiv 2302.13562. With G the network's own gradient at samples of the input's size
and soft labels, made from noise so that |cos(G, U)| is large, the update decodes to s G with s = |U| cos(G, U) / |G|.

That is `tofu.codec.proxies` with the published method's settings, so only sizes are chosen here. Its objective, the share of U
that the best s G misses, is 1 - cos^2. What the paper leaves open, or we do otherwise:

- Samples have 8 bits a pixel and a label, as many as fit; where not even one does, one sample of 4 bits. The paper
  sends float32. Samples are square, of the input's smaller side.
- Each sample has a weight of 2 bytes in the loss, which the paper's have not; for one sample it is part of s.
- Up to 200 steps of Adam, and no penalty on the samples' size.
- The error feedback, which is part of the paper's method, is the one around every codec.
"""

from typing import ClassVar

from tofu.codec.compressor import Proxy
from tofu.codec.proxies import paper_settings
from tofu.errors import SettingError
from tofu.reference_model import ReferenceModel

BITS, FEWEST_BITS = 8, 4
LARGEST_SIDE = 1024


class ThreeSfc(Proxy):
    """Full-size samples through the network as it is.

    Args:
        network_like: any network of the run.
        ratio: payload wanted, as float32 bytes of the update over bytes of the payload with its header.

    Raises:
        SettingError: not even one sample fits.
    """

    name: ClassVar[str] = "3sfc"
    code: ClassVar[int] = 9

    def __init__(self, network_like: ReferenceModel, *, ratio: float) -> None:
        side = min(network_like.shape.height, network_like.shape.width, LARGEST_SIDE)
        try:
            super().__init__(network_like, ratio=ratio, count=0, settings=paper_settings(size=side, bits=BITS))
        except SettingError:
            super().__init__(network_like, ratio=ratio, count=0, settings=paper_settings(size=side, bits=FEWEST_BITS))
