import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.codec.options import BITS
from tofu.compression.coding import RowCode, bfloat16_bytes, bfloat16_from
from tofu.errors import PayloadError


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 33),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 2**31),
    spread=st.floats(1e-6, 1e6),
)
def test_round_trip_is_within_half_a_step_and_a_second_trip_changes_nothing(
    rows: int, columns: int, bits: int, seed: int, spread: float
) -> None:
    values = spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    code = RowCode(rows, columns, bits)
    data = code.write(values)
    assert len(data) == code.nbytes
    back = code.read(data, "test")
    if bits == 32:
        assert torch.equal(back, values)
    else:
        step = values.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        # Half a step of rounding, and bfloat16's 2^-8 on the scale, which clamps or shifts the largest values.
        assert bool(((back - values).abs() <= 0.5 * step * 1.01 + values.abs().amax(1, keepdim=True) / 128).all())
    assert code.read(code.write(back), "test").allclose(back, rtol=2**-7)


def test_zero_rows_stay_zero() -> None:
    code = RowCode(2, 5, 4)
    assert torch.equal(code.read(code.write(torch.zeros(2, 5)), "test"), torch.zeros(2, 5))


def test_known_bytes() -> None:
    # top = 7, scale = 7/7 = 1 -> bfloat16 0x3f80; codes 7+7=14, -7+7=0, 1+7=8 -> nibbles e 0 8, low nibble first
    assert RowCode(1, 3, 4).write(torch.tensor([[7.0, -7.0, 1.0]])) == bytes([0x80, 0x3F, 0x0E, 0x08])


def test_wrong_length_code_out_of_range_and_infinite_scale_are_refused() -> None:
    code = RowCode(1, 3, 4)
    good = code.write(torch.tensor([[7.0, -7.0, 1.0]]))
    with pytest.raises(PayloadError, match="take 3 bytes, expected 4"):
        code.read(good[:-1], "pixels")
    with pytest.raises(PayloadError, match="code above 14"):
        code.read(good[:2] + bytes([0x0F, 0x08]), "pixels")
    with pytest.raises(PayloadError, match="not finite"):
        code.read(bytes([0x80, 0x7F]) + good[2:], "pixels")
    with pytest.raises(PayloadError, match="not finite"):
        RowCode(1, 1, 32).read(np.array([np.nan], dtype="<f4").tobytes(), "pixels")


def test_bfloat16_keeps_eight_bits() -> None:
    values = torch.tensor([1.0, -3.5, 1e-30, 3.14159])
    assert torch.allclose(bfloat16_from(bfloat16_bytes(values), "test"), values, rtol=2**-8)
