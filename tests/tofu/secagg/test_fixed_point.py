import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tofu.secagg.harness import ring_bits
from tofu.bytes_io import CHUNK
from tofu.errors import PayloadError, RunError, SettingError
from tofu.secagg.fixed_point import Clipped, FixedPoint
from tofu.secagg.masks import RingVector, largest


def summed(code: FixedPoint, values: list[np.ndarray], examples: list[int]) -> RingVector:
    total = np.zeros(code.length(values[0].size), dtype=np.uint64)
    for value, count in zip(values, examples, strict=True):
        total += code.encode(value, count)[0]
    return total & largest(code.bits)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(0, 40),
    st.floats(1e-6, 1e6),
    st.integers(1, 2**20),
    st.integers(0, 2**32),
    st.data(),
)
def test_the_mean_of_any_clients_is_within_the_bound(
    clients: int, spare: int, clip: float, unit: int, seed: int, data: st.DataObject
) -> None:
    code = FixedPoint(clients, ring_bits(clients, 2) + spare, clip, unit)
    generator = np.random.default_rng(seed)
    examples = data.draw(st.lists(st.integers(1, unit), min_size=clients, max_size=clients))
    values = [generator.uniform(-clip, clip, 50) * generator.integers(0, 2, 50) for _ in range(clients)]
    for value in values:
        value[:2] = clip, -clip
    decoded = code.decode(summed(code, values, examples))
    weight = sum(examples) / unit
    mean = sum(v * n for v, n in zip(values, examples, strict=True)) / sum(examples)
    assert decoded.examples == sum(examples)
    assert decoded.clipped == 0
    assert np.abs(decoded.mean - mean).max() <= clients * code.step / weight * (1 + 1e-6) + 1e-9 * clip


def test_the_rounding_is_unbiased_with_the_stated_deviation() -> None:
    code, count = FixedPoint(10, 12, 1.0), 400_000
    for value in (0.3, -0.3, 0.00123, -0.99999):
        mean = code.decode(summed(code, [np.full(count, value)] * 10, [1] * 10)).mean
        fraction = value / code.step % 1
        deviation = code.step * np.sqrt(fraction * (1 - fraction) / 10)
        assert abs(mean.mean() - value) < 5 * deviation / np.sqrt(count)
        assert mean.std() == pytest.approx(deviation, rel=0.02)
        assert deviation <= code.step / (2 * np.sqrt(10))


def test_weights_are_exact_and_cost_no_precision() -> None:
    code = FixedPoint(3, 16, 1.0, 7000)
    values = [np.full(100_000, v) for v in (0.5, -0.25, 0.125)]
    examples = [7000, 1, 3000]
    decoded = code.decode(summed(code, values, examples))
    assert decoded.examples == 10001
    expected = (0.5 * 7000 - 0.25 + 0.125 * 3000) / 10001
    assert np.abs(decoded.mean - expected).max() < 3 * code.step / (10001 / 7000)
    assert abs(decoded.mean.mean() - expected) < 5 * code.step / np.sqrt(100_000)


@pytest.mark.parametrize("bits", [2, 3, 5, 12, 31, 32, 33, 64])
def test_the_largest_counts_and_values_do_not_overflow(bits: int) -> None:
    for clients in (1, 2, 7, 100):
        if 2 * clients >= 2**bits:
            continue
        code = FixedPoint(clients, bits, 1.0)
        many = FixedPoint(clients, bits, 1.0, 2.0**32 - 1)
        for sign in (1, -1):
            decoded = many.decode(summed(many, [np.full(9, sign * 1.0)] * clients, [2**32 - 1] * clients))
            assert decoded.examples == clients * (2**32 - 1)
            assert decoded.mean == pytest.approx(np.full(9, sign * 1.0))
        decoded = code.decode(summed(code, [np.full(300, 5.0)] * clients, [1] * clients))
        assert decoded.mean == pytest.approx(np.ones(300))
        assert decoded.clipped == 300 * clients


def test_what_is_clipped_is_said() -> None:
    code = FixedPoint(4, 12, 0.5, 10)
    values = np.zeros(CHUNK + 100, dtype=np.float32)
    values[[1, 5, CHUNK + 50]] = 0.51, -2.0, 0.75
    vector, clipped = code.encode(values, 10)
    assert clipped.count == 3
    assert clipped.largest == pytest.approx(4.0)
    decoded = code.decode(vector)
    assert decoded.clipped == 3
    assert decoded.mean[[1, 5, CHUNK + 50]] == pytest.approx([0.5, -0.5, 0.5])
    assert code.encode(np.array([0.5, -0.5]), 10)[1] == Clipped(0, 1.0)
    # A client with more examples than the unit reaches the range sooner, and says so.
    assert code.encode(np.array([0.3]), 20)[1] == Clipped(1, pytest.approx(1.2))


def test_ten_clients_in_twelve_bits_have_204_levels() -> None:
    assert FixedPoint(10, 12, 1.0).levels == 204


def test_what_cannot_be_encoded_is_refused() -> None:
    code = FixedPoint(2, 12, 1.0)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(RunError, match="not finite"):
            code.encode(np.array([0.0, bad]), 1)
    for examples in (0, -1, 2**32):
        with pytest.raises(RunError, match="examples"):
            code.encode(np.zeros(1), examples)
    with pytest.raises(PayloadError, match="expected at least"):
        code.decode(np.zeros(1, dtype=np.uint64))
    with pytest.raises(RunError, match="0 examples"):
        code.decode(np.zeros(code.length(3), dtype=np.uint64))
    for fields in (
        (0, 12, 1.0),
        (2048, 12, 1.0),
        (2, 0, 1.0),
        (2, 65, 1.0),
        (2, 12, 0.0),
        (2, 12, np.inf),
        (2, 12, 1, 0),
    ):
        with pytest.raises(SettingError):
            FixedPoint(*fields)
