"""The sparse correction as a separate compressor: it sends the largest entries of an update, with several magnitudes.

The proxy codec sends the same correction in addition to its proxies (`tofu.codec.correction`). It needs only the
names and shapes of the parameters, not a forward pass, so it works for every model and every kind of input. All entries
are in one stratum: positions are coded as if they were equally likely.
"""

import numpy as np
import torch
from torch import Tensor

from tofu.codec.correction import Strata, min_bytes, read_correction, write_correction
from tofu.compression import compressors
from tofu.compression.base import FlatCompressor
from tofu.weights import ParamSpec


@compressors.register("sparse")
class SparseCorrection(FlatCompressor):
    """The largest entries in steps of three times the smallest of them (`correction.write_correction`)."""

    code = 11

    def _min_bytes(self, param_spec: ParamSpec) -> int:
        return min_bytes(param_spec.parameter_count)

    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        return write_correction(vector, self._budget(param_spec), _one_stratum(param_spec))

    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        return read_correction(data, _one_stratum(param_spec))


def _one_stratum(param_spec: ParamSpec) -> Strata:
    return Strata(np.zeros(param_spec.parameter_count, np.int8))
