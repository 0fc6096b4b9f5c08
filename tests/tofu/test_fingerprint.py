import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.errors import PayloadError
from tofu.weights import MAX_DRIFT, SKETCH_BYTES, Weights, after_step, drift, sketch


def weights(seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(50, 70, generator=generator),
        "b": torch.randn(3, generator=generator),
        "count": torch.tensor(5),
    }


def length(values: Weights) -> float:
    return float(sum((value.double() ** 2).sum() for value in values.values())) ** 0.5


def test_the_identity_depends_on_every_step_and_on_their_order() -> None:
    start = bytes(8)
    paths = [(b"a", b"b"), (b"b", b"a"), (b"a",), (b"a", b"b", b"b"), (b"ab",)]
    ends = set()
    for path in paths:
        identity = start
        for payload in path:
            identity = after_step(identity, payload)
        assert len(identity) == 8
        ends.add(identity)
    assert len(ends) == len(paths)


def test_equal_weights_do_not_drift_and_rounding_is_tolerated() -> None:
    ours = weights()
    assert drift(ours, sketch(ours)) < 1e-7
    rounded = {name: value * (1 + 2e-6) if value.is_floating_point() else value for name, value in ours.items()}
    assert drift(rounded, sketch(ours)) < MAX_DRIFT / 100


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(5e-3, 10))
def test_the_drift_is_about_the_distance(seed: int, share: float) -> None:
    """The largest of eight sums under random signs, each of which strays by the distance."""
    ours = weights()
    noise = weights(seed + 1)
    scale = share * length(ours) / length(noise)
    theirs = {name: ours[name] + scale * noise[name] for name in ours}
    assert 0.2 * share < drift(ours, sketch(theirs)) < 6 * share
    assert drift(ours, sketch(theirs)) > MAX_DRIFT


def test_one_tensor_against_another_of_the_same_shape_is_found() -> None:
    ours = weights()
    swapped = ours | {"w": ours["w"].flip(0)}
    assert drift(swapped, sketch(ours)) > MAX_DRIFT


def test_the_signs_never_change() -> None:
    """Both ends compute them, perhaps with other versions of numpy: the patterns are part of the protocol."""
    values = np.frombuffer(sketch({"w": torch.arange(1, 100, dtype=torch.float32)}), "<f4")
    bits = np.unpackbits(np.random.PCG64(3).random_raw(2).astype("<u8").view(np.uint8))[:99].astype(float)
    assert values[3] == pytest.approx(float(np.sum((2 * bits - 1) * np.arange(1, 100))))


@pytest.mark.parametrize("data", [b"", bytes(SKETCH_BYTES - 1), b"\xff" * SKETCH_BYTES])
def test_what_is_no_sketch_is_refused(data: bytes) -> None:
    with pytest.raises(PayloadError, match=r"sketch has (\d+ bytes|the values \[nan, .*, expected finite)"):
        drift(weights(), data)
