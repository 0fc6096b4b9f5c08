"""NNC, Neural Network Coding (ISO/IEC 15938-17): rate-distortion optimized quantization and DeepCABAC.

Becking, Haase, Kirchhoffer, Müller, Samek, Marpe, "NNCodec: An Open Source Software Implementation of the Neural
Network Coding ISO/IEC Standard", ICML 2023 workshop on neural compression. The standard's software is the package
`nncodec`, which is imported when an update is first encoded. Its core needs numpy only, so it is installed without
what its other parts ask for: `pip install --no-deps nncodec`, with a C++ compiler.

Of its tools an update gets uniform quantization with rate-distortion optimization, context-adaptive arithmetic coding
with optimized adaptation rates, row skipping, one unit for a weight and its bias, and a threshold of magnitude.
Bisection finds the finest quantization parameter, one for all tensors, that fits. Of an update with many entries of one
size a slightly finer one may take several times the bytes, so the next finer one is tried, too, with the lowest
threshold that fits; what misses less is sent. Two choices save bytes that both ends know: tensors are named by one
character, and a tensor of zeros is left out, as NNC does it for updates of a known model. `DependentNnc` has dependent
(trellis-coded) quantization, which takes much longer. Temporal context adaptation is not used: it needs the receiver to
keep each client's last update.

Data: NNC's bitstream, or nothing for an update that is zero. The decoder of `nncodec` does not check its input: for
measurements only.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu.compression.base import FlatCompressor
from tofu.errors import PayloadError
from tofu.weights import ParamSpec, split_vector

DENSITY = 4
"""Quantization parameters per octave of the step, as a power of two; the finest that NNC's steps distinguish well."""
RANGE = (-20 << DENSITY, 20 << DENSITY)
"""Of quantization parameters: steps of 2^-20 to 2^20."""
UNARY_LENGTH = 10
LAMBDA = 1.0
"""Weight of the rate in rate-distortion optimization; 0 to 5 were tried on recorded updates."""

Arrays = dict[str, npt.NDArray[np.float32]]


class Nnc(FlatCompressor):
    """An update as one bitstream of NNC.

    Attributes:
        dependent: whether quantization is dependent, or uniform in each entry.
    """

    dependent = False

    def _min_bytes(self, param_spec: ParamSpec) -> int:
        one = torch.zeros(param_spec.parameter_count)
        one[-1] = 1.0
        return len(encode(_arrays(one, param_spec), -4 << DENSITY, self.dependent))  # at a step of 1 it would become 0

    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        arrays, budget = _arrays(vector, param_spec), self._budget(param_spec)
        qp, plain = _first_fitting(lambda qp: encode(arrays, qp, self.dependent), budget, *RANGE)
        magnitudes = vector.abs().sort().values

        def thinned(number: int) -> bytes:
            largest = vector.where(vector.abs() > magnitudes[number], torch.zeros(()))
            return encode(_arrays(largest, param_spec), qp - 1, self.dependent)

        count = len(magnitudes)
        _, thin = _first_fitting(thinned, budget, max(0, count - 8 * budget), count - 1)
        return min(plain, thin, key=lambda data: float((vector - self._decode(data, param_spec)).square().sum()))

    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        return decode(data, param_spec.parameters.values())


class DependentNnc(Nnc):
    """NNC with dependent quantization."""

    dependent = True


def _first_fitting(coded: Callable[[int], bytes], budget: int, first: int, end: int) -> tuple[int, bytes]:
    """Bisect for the first number in [first, end) whose code has at most `budget` bytes; (end, b"") without one."""
    best = b""
    while first < end:
        middle = (first + end) // 2
        data = coded(middle)
        if len(data) <= budget:
            end, best = middle, data
        else:
            first = middle + 1
    return end, best


def encode(arrays: Arrays, qp: int, dependent: bool) -> bytes:
    """Quantize with the steps of one quantization parameter and code; tensors that become zero are left out.

    Args:
        arrays: name -> values. A vector after a weight with as many rows is coded as its bias.
    """
    from nncodec import nnc_core

    info: dict[str, Any] = nnc_core.nnr_model.NNRModel(arrays).model_info
    nnc_core.nnr_model.set_block_id_and_param_type(info, _blocks(arrays))
    given = nnc_core.approximator.init_approx_data(arrays, info, qp_density=DENSITY, scan_order=0)
    how = nnc_core.approximator.ApproxInfo(
        given, info, "uniform", 0, qp, opt_qp=False, disable_dq=not dependent, cabac_unary_length_minus1=UNARY_LENGTH,
        lambda_scale=LAMBDA, nonweight_qp=qp,
    ).approx_info  # fmt: skip
    options = {
        "cabac_unary_length_minus1": UNARY_LENGTH, "param_opt_flag": True, "row_skip_enabled_flag": 1,
        "general_profile_idc": 1, "partial_data_counter": 0, "node_id_present_flag": 0, 
        "parent_node_id_present_flag": 0, "mps_parent_signalling_enabled_flag": 0, "temporal_context_modeling_flag": 0,
    }  # fmt: skip
    quantized = nnc_core.approximator.approx(how, info, given, options)
    left = {name: values for name, values in arrays.items() if quantized["parameters"][name].any()}
    if not left:
        return b""
    if len(left) < len(arrays):
        return encode(left, qp, dependent)
    return bytes(nnc_core.coder.encode(enc_info=options, model_info=info, approx_data=quantized)[0])


def decode(data: bytes, shapes: Iterable[torch.Size]) -> Tensor:
    """Invert `encode`: the tensors of these shapes as one float32 vector.

    Raises:
        PayloadError: nncodec cannot decode the bytes, or decodes other tensors.
    """
    decoded = _parameters(data) if data else {}
    parts = []
    for number, shape in enumerate(shapes):
        part = decoded.pop(f"{number:x}", np.zeros(shape, dtype=np.float32))
        if part.size != shape.numel():
            raise PayloadError(f"nnc body has a tensor of {part.size} entries, expected {shape.numel()}")
        parts.append(torch.from_numpy(part.astype(np.float32).ravel()))
    if decoded:
        raise PayloadError(f"nnc body has unknown tensors: {', '.join(map(ascii, decoded))}")
    return torch.cat(parts)


def _parameters(data: bytes) -> Arrays:
    from nncodec import nnc_core

    flags = ("sparsification", "pruning", "unification")
    info: dict[str, Any] = {
        **{name: {} for name in ("parameter_type", "parameter_dimensions", "parameter_index", "block_identifier")},
        "topology_storage_format": None, "topology_compression_format": None,
        "performance_maps": {"mps": {}, "lps": {}},
        "performance_map_flags": {f"{unit}_{flag}_flag": {} for unit in ("mps", "lps") for flag in flags}
        | {f"{unit}_decomposition_performance_map_flag": {} for unit in ("mps", "lps")},
    }  # fmt: skip
    try:
        found = nnc_core.coder.decode(bytearray(data), info)
        nnc_core.approximator.rec(found)
        parameters: Arrays = nnc_core.approximator.recompose_params(info, found)["parameters"]
    except (Exception, SystemExit) as error:
        raise PayloadError(f"nnc body cannot be decoded: {error}") from error
    return parameters


def _arrays(vector: Tensor, param_spec: ParamSpec) -> Arrays:
    """The tensors of a vector by the number of each in the param spec."""
    return {
        f"{number:x}": tensor.numpy().astype(np.float32)
        for number, tensor in enumerate(split_vector(vector, param_spec.parameters).values())
        if tensor.numel()
    }


def _blocks(arrays: Arrays) -> dict[str, dict[str, str | None]]:
    kinds: dict[str, str | None] = {
        name: "weight" if array.ndim > 1 else "unspecified" for name, array in arrays.items()
    }
    blocks: dict[str, str | None] = dict.fromkeys(arrays)
    names = list(arrays)
    for weight, bias in pairwise(names):
        if arrays[weight].ndim > 1 and arrays[bias].shape == arrays[weight].shape[:1]:
            blocks[weight] = blocks[bias] = weight
            kinds[bias] = "bias"
    return {"parameter_type": kinds, "block_identifier": blocks}
