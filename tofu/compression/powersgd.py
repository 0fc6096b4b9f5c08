"""PowerSGD: each matrix of an update as a product of two thin ones.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", NeurIPS
2019, arXiv 1905.13727. A tensor is taken as a matrix M [m, n], m its first dimension. One step of subspace iteration
from the sender's last Q [n, r] (normal noise at first) gives

    P = orthonormalized(M Q),    Q = M^T P,    M ~ P Q^T.

What travels is rounded, so Q is fitted to P as the receiver reads it: Q^T is the least-squares solution of P Q^T = M,
which is M^T P again where P is orthonormal. In the paper the clients' P and Q are averaged between the two halves of a
step, which takes two exchanges a round and shared Q; here each client sends its own factors in its one reply.

Vectors, and matrices that the factors would not make smaller, travel whole, at the bits of the factors.

Rank and bits follow from the ratio: 16 bits where that affords everything whole; else the highest rank (for all
matrices the same, but never above one's own) that fits at 8 bits; else rank 1 at the most of 6 to 2 bits that fit.

Own part of the body: for each tensor P^T and Q^T, or the whole tensor, as few-bit integers with a bfloat16 scale for
each column of a factor (RowCode).
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from tofu.compression.flat import FlatCompressor, checked_length
from tofu.compression.quantize import RowCode
from tofu.errors import PayloadError
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec

USUAL_BITS = 8
SMALL_BITS = (6, 5, 4, 3, 2)


class PowerSgd(FlatCompressor):
    """Factors of low rank.

    Attributes:
        rank: of the factors.
        bits: of their entries.
    """

    name: ClassVar[str] = "powersgd"
    code: ClassVar[int] = 5

    def __init__(self, network_like: ReferenceModel, *, ratio: float) -> None:
        super().__init__(network_like, ratio=ratio)
        self.rank, self.bits = _rank_and_bits(network_like.param_spec, self._room(network_like.param_spec))

    def _least(self, param_spec: ParamSpec) -> int:
        return _size(param_spec, 1, SMALL_BITS[-1])

    def _most(self, param_spec: ParamSpec) -> int:
        return _size(param_spec, self.rank, self.bits)

    def _memory(self, own: bytes) -> bytes:
        return own

    def _write(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        start = self._remembered(memory, param_spec)
        parts = []
        for name, tensor in zip(param_spec.parameters, _tensors(vector, param_spec), strict=True):
            codes = _codes(tensor.shape, self.rank, self.bits)
            if len(codes) == 2:
                noise = torch.randn(codes[1].columns, codes[1].rows, generator=generator)
                parts += _factors(tensor.flatten(1), start.get(name, noise), noise, *codes)
            else:
                parts += [code.write(tensor) for code in codes]
        return b"".join(parts)

    def _read(self, own: bytes, param_spec: ParamSpec) -> Tensor:
        checked_length(own, self._most(param_spec), "factors")
        return torch.cat([_product(matrices) for _, matrices in self._matrices(own, param_spec)])

    def _matrices(self, own: bytes, param_spec: ParamSpec) -> Iterator[tuple[str, list[Tensor]]]:
        """For each tensor its name, and P^T and Q^T, or itself, or nothing where it is empty."""
        begin = 0
        for name, shape in param_spec.parameters.items():
            matrices = []
            for code in _codes(shape, self.rank, self.bits):
                matrices.append(code.read(own[begin : begin + code.nbytes], f"factors of {name}"))
                begin += code.nbytes
            yield name, matrices

    def _remembered(self, memory: bytes, param_spec: ParamSpec) -> dict[str, Tensor]:
        """The last Q of each matrix, by name."""
        if len(memory) != self._most(param_spec):  # none, or another ratio's or model's: begin from noise
            return {}
        try:
            return {name: m[1].T for name, m in self._matrices(memory, param_spec) if len(m) == 2}
        except PayloadError:
            return {}


def _factors(matrix: Tensor, last: Tensor, noise: Tensor, left: RowCode, right: RowCode) -> list[bytes]:
    """Bytes of P^T and Q^T for a matrix [m, n], from the last Q [n, r]."""
    unit = float(matrix.abs().max()) or 1.0  # keeps products of large entries finite
    size = last.norm(dim=0)
    q = torch.where(size.isfinite() & (size > 0), last, noise)  # a column that was not needed has no direction
    p, _ = torch.linalg.qr(matrix / unit @ (q / q.norm(dim=0)))
    written = left.write(p.T)
    read = left.read(written, "factors").T
    return [written, right.write(unit * (torch.linalg.pinv(read) @ (matrix / unit)))]


def _product(matrices: list[Tensor]) -> Tensor:
    if len(matrices) == 2:
        return (matrices[0].T @ matrices[1]).flatten()
    return matrices[0].flatten() if matrices else torch.zeros(0)


def _tensors(vector: Tensor, param_spec: ParamSpec) -> list[Tensor]:
    pieces = torch.split(vector, [shape.numel() for shape in param_spec.parameters.values()])
    return [piece.view(shape) for piece, shape in zip(pieces, param_spec.parameters.values(), strict=True)]


def _codes(shape: torch.Size, rank: int, bits: int) -> tuple[RowCode, ...]:
    """How a tensor is written: as P^T and Q^T, or whole, or not at all where it is empty."""
    size = shape.numel()
    if not size:
        return ()
    rows, columns = (shape[0], size // shape[0]) if shape else (1, 1)
    rank = min(rank, rows, columns)
    if len(shape) < 2 or rank * (rows + columns) >= size:
        return (RowCode(1, size, bits),)
    return RowCode(rank, rows, bits), RowCode(rank, columns, bits)


def _size(param_spec: ParamSpec, rank: int, bits: int) -> int:
    return sum(code.nbytes for shape in param_spec.parameters.values() for code in _codes(shape, rank, bits))


def _rank_and_bits(param_spec: ParamSpec, room: int) -> tuple[int, int]:
    matrices = [shape for shape in param_spec.parameters.values() if len(shape) > 1 and shape.numel()]
    most = max((min(shape[0], shape.numel() // shape[0]) for shape in matrices), default=1)
    if _size(param_spec, most, 16) <= room:
        return most, 16
    for rank in range(most, 0, -1):
        if _size(param_spec, rank, USUAL_BITS) <= room:
            return rank, USUAL_BITS
    return 1, next(bits for bits in SMALL_BITS if _size(param_spec, 1, bits) <= room)
