import pytest
import torch

from tofu.compression.base import BufferCode
from tofu.errors import PayloadError
from tofu.weights import ParamSpec

SHAPES = {"mean": torch.Size([4, 3]), "none": torch.Size([0, 5]), "one": torch.Size([]), "count": torch.Size([])}
CODE = BufferCode(ParamSpec({}, SHAPES, frozenset({"count"})))


def test_empty_scalar_transposed_and_huge_buffers() -> None:
    mean = torch.linspace(-1e38, 2e38, 12).view(3, 4).T
    update = {"mean": mean, "none": torch.zeros(0, 5), "one": torch.tensor(2.0), "count": torch.tensor(17.0)}
    data = CODE.write(update)
    assert len(data) == CODE.nbytes == (2 + 12) + (2 + 1) + 4
    read = CODE.read(data)
    assert {name: value.shape for name, value in read.items()} == SHAPES
    assert torch.allclose(read["mean"], mean, atol=3e38 / 100)
    assert (float(read["one"]), float(read["count"])) == (pytest.approx(2.0, rel=0.01), 17.0)


def test_damage_is_refused() -> None:
    with pytest.raises(PayloadError, match="buffers take 20 bytes, expected 21"):
        CODE.read(bytes(20))
    with pytest.raises(PayloadError, match="buffer count holds a value that is not finite"):
        CODE.read(bytes(17) + b"\0\0\xc0\x7f")
