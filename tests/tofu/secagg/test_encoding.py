"""The vector of a secure round: its sum gives the mean update; what that costs in precision; what it says besides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tofu.secagg.harness import ring_bits
from tofu.errors import PayloadError, RunError
from tofu.secagg.encoding import (
    FIRST_RANGE,
    MAX_REPORTED,
    EncodingConfig,
    RingEncoder,
    SecureMean,
    first_ranges,
    nearest_range,
    next_range,
)
from tofu.secagg.masks import RingVector, largest
from tofu.weights import ParamSpec, Weights

LAYOUT = ParamSpec(
    {"weight": torch.Size((6, 5)), "bias": torch.Size((6,))}, {"mean": torch.Size(()), "none": torch.Size((0,))}
)


def code_for(
    clients: int, *, value_bits: int = 12, unit: float = 50.0, ranges: tuple[float, ...] = (1.0,) * 4
) -> RingEncoder:
    return RingEncoder(LAYOUT, EncodingConfig(clients, ring_bits(clients, value_bits), unit, ranges))


def updates(count: int, scale: float = 0.2, seed: int = 0) -> list[Weights]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.rand(shape, generator=generator) * 2 * scale - scale for name, shape in LAYOUT.shapes.items()}
        for _ in range(count)
    ]


def summed(vectors: list[RingVector], bits: int) -> RingVector:
    total = np.zeros_like(vectors[0])
    for vector in vectors:
        total += vector
    return total & largest(bits)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=8),
    st.integers(6, 20),
    st.lists(st.floats(0.5, 4), min_size=4, max_size=4),
    st.integers(0, 2**16),
)
def test_the_sum_decodes_to_the_weighted_mean(
    examples: list[int], value_bits: int, ranges: list[float], seed: int
) -> None:
    """Each client's error is below a step; the losses and the counts come out too."""
    count, unit = len(examples), sum(examples) / len(examples)
    scale = 0.5 / max(1.0, max(examples) / unit)  # nothing is clipped
    code = code_for(count, value_bits=value_bits, unit=unit, ranges=tuple(ranges))
    bits, weights = ring_bits(count, value_bits), torch.tensor(examples) / sum(examples)
    sent = updates(count, scale, seed)
    encoded = [code.encode(update, n, 1.5) for update, n in zip(sent, examples, strict=True)]
    mean = code.decode(summed([one.vector for one in encoded], bits), count)
    levels = 2 ** (value_bits - 1) - 1
    for place, name in enumerate(LAYOUT.shapes):
        exact = sum(w * update[name] for w, update in zip(weights, sent, strict=True))
        delivered = sum(w * one.decoded[name] for w, one in zip(weights, encoded, strict=True))
        step = float(np.float32(ranges[place])) / levels
        assert torch.all((mean.update[name] - exact).abs() <= step + 1e-6)
        # What each client knows that it delivered is what arrived: error feedback leans on it.
        assert torch.all((mean.update[name] - delivered).abs() <= 1e-5)
    assert mean.examples == sum(examples)
    assert (mean.clipped, mean.largest_clipped) == (0, 1.0)
    assert abs(mean.loss - 1.5) <= MAX_REPORTED / levels


def test_what_does_not_fit_is_counted_named_by_distance_and_not_delivered() -> None:
    code = code_for(3, ranges=(0.1, 1.0, 1.0, 1.0))
    sent = updates(3, 0.05)
    sent[1]["weight"][2, 3] = 0.45
    encoded = [code.encode(update, 50, 0.0) for update in sent]
    assert [one.clipped.count for one in encoded] == [0, 1, 0]
    assert encoded[1].clipped.largest == pytest.approx(4.5)
    assert float(encoded[1].decoded["weight"][2, 3]) == pytest.approx(0.1)
    mean = code.decode(summed([one.vector for one in encoded], ring_bits(3, 12)), 3)
    assert mean.clipped == 1
    assert mean.largest_clipped == pytest.approx(4.5, abs=MAX_REPORTED / 2047)
    # Only the range of the tensor that was too narrow grows, by as much.
    assert mean.ranges[0] == pytest.approx(0.45, rel=0.05)
    assert all(range_ <= 1.0 for range_ in mean.ranges[1:])


def test_a_value_just_out_of_range_is_not_rounded_away() -> None:
    for seed in range(20):
        code = code_for(2, value_bits=4)
        update = updates(1, 0.1)[0]
        update["bias"][0] = 1.001
        one = code.encode(update, 50, 0.0, bytes([seed]) * 32)
        other = code.encode(updates(1, 0.1)[0], 50, 0.0)
        mean = code.decode(summed([one.vector, other.vector], ring_bits(2, 4)), 2)
        assert mean.clipped == 1
        assert mean.largest_clipped > 1.001
        assert mean.ranges[1] >= 2.0


def test_weights_count_in_what_fits() -> None:
    """A client with four times the usual examples takes four times the range."""
    code, update = code_for(2), updates(1, 0.2)[0]
    assert code.encode(update, 50, 0.0).clipped.count == 0
    assert code.encode(update, 400, 0.0).clipped.count > 0


def test_a_seed_repeats_the_rounding_and_no_seed_does_not() -> None:
    code, update = code_for(2, value_bits=4), updates(1)[0]
    same = [code.encode(update, 50, 1.0, bytes(32)).vector for _ in range(2)]
    assert np.array_equal(*same)
    assert not np.array_equal(code.encode(update, 50, 1.0).vector, code.encode(update, 50, 1.0).vector)


def test_ranges_follow_the_sums() -> None:
    assert next_range(1.0, 0.0, 0.5) == 1.0  # never grows without need
    assert next_range(1.0, 0.0, 0.2) == pytest.approx(0.8)
    assert next_range(1.0, 0.0, 0.0) == 0.5  # at most half a round
    assert next_range(1.0, 0.1, 0.2) == 2.0
    assert next_range(1.0, 4.0, 0.2) == 5.0
    assert next_range(1.0, 31.0, 0.2) == 8.0
    assert next_range(1e-12, 0.0, 0.0) > 0


def test_first_ranges_come_from_what_was_seen() -> None:
    ranges = first_ranges(LAYOUT, {"weight": 0.4, "bias": 0.0, "mean": float("nan")})
    assert ranges == (pytest.approx(0.4), FIRST_RANGE, FIRST_RANGE, FIRST_RANGE)


def heavy_tailed(count: int, seed: int = 0) -> list[Weights]:
    """Updates whose values are Laplace-distributed with deviation 0.1."""
    generator = np.random.default_rng(seed)
    return [
        {
            name: torch.from_numpy(generator.laplace(scale=0.1 / np.sqrt(2), size=tuple(shape))).float()
            for name, shape in BROAD.shapes.items()
        }
        for _ in range(count)
    ]


BROAD = ParamSpec({"weight": torch.Size((100, 200)), "bias": torch.Size((100,))}, {})


def coarse_mean(code: RingEncoder, sent: list[Weights], examples: list[int], bits: int) -> tuple[SecureMean, float]:
    """What the server decodes, and what share of the mean's power that leaves out."""
    encoded = [code.encode(update, n, 1.0) for update, n in zip(sent, examples, strict=True)]
    mean = code.decode(summed([one.vector for one in encoded], bits), len(sent))
    weights = torch.tensor(examples) / sum(examples)
    exact, delivered = (
        {name: sum(w * update[name] for w, update in zip(weights, some, strict=True)) for name in BROAD.shapes}
        for some in (sent, [one.decoded for one in encoded])
    )
    for name in BROAD.shapes:
        assert torch.all((mean.update[name] - delivered[name]).abs() <= 1e-6)
    missed = sum(float((mean.update[name] - exact[name]).square().sum()) for name in BROAD.shapes)
    return mean, missed / sum(float(value.square().sum()) for value in exact.values())


def test_coarse_terms_deliver_most_of_an_update_in_few_levels() -> None:
    """Seven bits for ten clients; ranges from the largest value and unbiased rounding add more noise than they save."""
    sent, examples, bits = heavy_tailed(10), [30, 70] * 5, 7
    wide = RingEncoder(BROAD, EncodingConfig(10, bits, 50.0, (4 * 1.5,) * 2))
    fit = RingEncoder(
        BROAD, EncodingConfig(10, bits, 50.0, (nearest_range(wide.levels) * 0.11,) * 2, nearest_rounding=True)
    )
    (_, missed_wide), (mean, missed) = (coarse_mean(code, sent, examples, bits) for code in (wide, fit))
    assert missed < 0.1
    assert missed_wide > 1
    assert mean.sums == {}
    assert mean.examples == 500


def test_coarse_ranges_follow_the_mean_square_of_all_clients() -> None:
    sent, examples, bits = heavy_tailed(4, seed=1), [20, 40, 60, 80], 6
    code = RingEncoder(BROAD, EncodingConfig(4, bits, 50.0, (0.5, 0.002), nearest_rounding=True))
    mean, _ = coarse_mean(code, sent, examples, bits)
    weighted = [update["weight"] * (n / 50.0) for update, n in zip(sent, examples, strict=True)]
    deviation = float(torch.stack(weighted).square().mean().sqrt())
    assert mean.ranges[0] == pytest.approx(nearest_range(code.levels) * deviation, rel=1e-4)
    assert mean.ranges[1] == pytest.approx(nearest_range(code.levels) * 0.002, rel=1e-4)
    assert mean.clipped > 100
    assert mean.largest_clipped > 2
    still = [{name: torch.zeros(shape) for name, shape in BROAD.shapes.items()}] * 4
    assert coarse_mean_ranges(code, still, bits) == (pytest.approx(0.5 / 8), pytest.approx(0.002 / 8))


def coarse_mean_ranges(code: RingEncoder, sent: list[Weights], bits: int) -> tuple[float, ...]:
    encoded = [code.encode(update, 50, 1.0).vector for update in sent]
    return code.decode(summed(encoded, bits), len(sent)).ranges


@pytest.mark.parametrize("levels", [1, 3, 6, 25, 63])
def test_reach_is_where_rounding_and_clipping_cost_least(levels: int) -> None:
    """Of a Laplace distribution: measured on draws, no range a fifth wider or narrower errs less."""
    values = np.random.default_rng(levels).laplace(scale=1 / np.sqrt(2), size=400_000)

    def error(range_: float) -> float:
        step = range_ / levels
        # Dithered, so that the rounding's error is step^2 / 12 as the formula has it.
        dither = np.random.default_rng(0).random(values.size) - 0.5
        rounded = (np.rint(np.clip(values, -range_, range_) / step + dither) - dither) * step
        return float(np.square(rounded - values).mean())

    best = nearest_range(levels) / 1.5
    assert error(best) < min(error(0.8 * best), error(1.25 * best))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 65535), st.integers(1, 64), st.floats(1, 1e4, width=32),
    st.lists(st.floats(2**-20, 2**20, width=32), max_size=6), st.booleans(),
)  # fmt: skip
def test_terms_go_round(clients: int, bits: int, unit: float, ranges: list[float], coarse: bool) -> None:
    terms = EncodingConfig(clients, bits, unit, tuple(ranges), nearest_rounding=coarse)
    assert EncodingConfig.from_bytes(terms.to_bytes()) == terms


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        (EncodingConfig(3, 12, 1.0, (1.0, float("nan"))), "range or weight outside"),
        (EncodingConfig(3, 12, 1.0, (-1.0,)), "range or weight outside"),
        (EncodingConfig(3, 12, float("inf"), (1.0,)), "range or weight outside"),
        (EncodingConfig(3, 65, 1.0, (1.0,)), "65 bits"),
        (EncodingConfig(3, 0, 1.0, (1.0,)), "0 bits"),
    ],
)
def test_terms_that_nobody_can_work_by_are_refused(terms: EncodingConfig, reason: str) -> None:
    with pytest.raises(PayloadError, match=reason):
        EncodingConfig.from_bytes(terms.to_bytes())


def test_cut_terms_and_terms_of_another_model_are_refused() -> None:
    data = EncodingConfig(3, 12, 1.0, (1.0,) * 4).to_bytes()
    for cut in (b"", data[:-1], data + b"x"):
        with pytest.raises(PayloadError, match="encoding config has"):
            EncodingConfig.from_bytes(cut)
    with pytest.raises(PayloadError, match="3 ranges, expected 4"):
        code_for(3, ranges=(1.0,) * 3)
    with pytest.raises(PayloadError, match="is not usable"):
        RingEncoder(LAYOUT, EncodingConfig(1000, 3, 1.0, (1.0,) * 4))
    with pytest.raises(PayloadError, match="elements, expected"):
        code_for(3).decode(np.zeros(7, np.uint64), 3)


@pytest.mark.parametrize(("place", "what"), [(0, "sum exceeds"), (35, "sum exceeds"), (-3, "counts exceed")])
def test_a_sum_that_its_clients_cannot_have_is_refused(place: int, what: str) -> None:
    """The ring holds the sum of 12 clients; 3 of them have sent, one of which put 9 clients' worth in one element."""
    code, bits = code_for(12), ring_bits(12, 12)
    vectors = [code.encode(update, 50, 0.1).vector for update in updates(3)]
    assert code.decode(summed(vectors, bits), 3).examples == 150
    vectors[0][place] += 9 * code.levels
    with pytest.raises(RunError, match=f"the {what} what 3 clients can send: one of them sent an impossible vector"):
        code.decode(summed(vectors, bits), 3)


def test_an_update_that_is_not_finite_stops_the_client() -> None:
    update = updates(1)[0]
    update["bias"][3] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        code_for(2).encode(update, 50, 0.0)


@given(st.integers(0, 2**16), st.integers(4, 12))
def test_to_the_nearest_step_an_error_is_half_a_step_and_never_more_than_the_value(seed: int, value_bits: int) -> None:
    terms = EncodingConfig(2, ring_bits(2, value_bits), 50.0, (1.0,) * 4, nearest_rounding=True)
    code, update = RingEncoder(LAYOUT, terms), updates(1, 0.2, seed)[0]
    one = code.encode(update, 50, 1.0)
    assert torch.equal(one.decoded["weight"], code.encode(update, 50, 1.0).decoded["weight"])
    half = 0.5 / (2 ** (value_bits - 1) - 1)
    for name in LAYOUT.shapes:
        error = (one.decoded[name] - update[name]).abs()
        assert torch.all(error <= half + 1e-6)
        assert torch.all(error <= update[name].abs() + 1e-6)
