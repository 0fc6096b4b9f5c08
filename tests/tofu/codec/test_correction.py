import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.codec.correction import MAX_LEVELS, STRATA, Strata, min_bytes, read_correction, slots_length, write_correction
from tofu.errors import PayloadError


def random_strata(length: int, seed: int) -> Strata:
    return Strata(np.random.default_rng(seed).integers(0, STRATA, length).astype(np.int8))


@given(st.integers(1, 400), st.integers(0, 2**32 - 1), st.integers(0, 300), st.floats(0, 1), st.floats(0.1, 8))
def test_the_largest_entries_come_back_in_within_the_budget(
    length: int, seed: int, more: int, zeros: float, tail: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(length, generator=generator)
    values *= values.abs() ** tail
    vector = values * (torch.rand(length, generator=generator) >= zeros)
    strata = random_strata(length, seed)
    budget = min_bytes(length) + more
    data = write_correction(vector, budget, strata)
    assert len(data) <= budget
    read = read_correction(data, strata)
    sent = torch.nonzero(read).flatten()
    assert len(sent) > 0 or not bool(vector.any())
    if len(sent):
        assert bool((torch.sign(read[sent]) == torch.sign(vector[sent])).all())
        rest = vector.abs().clone()
        rest[sent] = 0
        assert float(vector[sent].abs().min()) >= float(rest.max())


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 4))
def test_an_entry_comes_back_as_the_mean_of_its_level(seed: int, tail: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(300, generator=generator)
    vector *= vector.abs() ** tail
    strata = random_strata(300, seed)
    read = read_correction(write_correction(vector, 150, strata), strata)
    sent = torch.nonzero(read).flatten()
    values = vector[sent].abs().double()
    levels = ((values / values.min() + 2) // 3).clamp(max=MAX_LEVELS)
    for level in levels.unique():
        mine = levels == level
        assert read[sent][mine].abs().double() == pytest.approx(values[mine].mean().expand(int(mine.sum())), rel=2**-8)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 4))
def test_more_bytes_explain_more(seed: int, tail: float) -> None:
    """Also where nearly all entries fit, and the smallest of them is tiny beside the largest."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(4000, generator=generator)
    vector *= vector.abs() ** tail
    strata = random_strata(4000, seed)
    missed = [
        float((vector - read_correction(write_correction(vector, 16_000 // ratio, strata), strata)).square().sum())
        for ratio in (4, 5, 6, 8, 10, 14, 20, 40)
    ]
    allowed = 0.005 * float(vector.square().sum())
    assert all(more <= less + allowed for more, less in itertools.pairwise(missed))


def test_equal_entries_are_sent_as_far_as_they_fit() -> None:
    strata = random_strata(2000, 0)
    few, all_ = (
        read_correction(write_correction(torch.full((2000,), -3.0), budget, strata), strata) for budget in (60, 2000)
    )
    assert 0 < int(torch.count_nonzero(few)) < 2000
    assert torch.equal(all_, torch.full((2000,), -3.0))


def test_the_highest_level_has_no_end() -> None:
    vector = torch.ones(500)
    vector[7] = 1e6
    strata = random_strata(500, 0)
    read = read_correction(write_correction(vector, 1000, strata), strata)
    assert int(torch.count_nonzero(read)) == 500
    assert float(read[7]) == pytest.approx(1e6, rel=2**-8)  # alone in the highest level, whose mean it is


def test_entries_of_all_sizes_are_told_apart_by_the_large_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(2000, generator=generator) * 10 ** (-8 * torch.rand(2000, generator=generator))
    read = read_correction(write_correction(vector, 4000, random_strata(2000, 0)), random_strata(2000, 0))
    assert float((vector - read).square().sum()) < 0.01 * float(vector.square().sum())


def test_strata_that_predict_the_entries_leave_bytes_for_more_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(20_000, generator=generator) * 0.1
    vector[:1000] *= 20
    one = Strata(np.zeros(20_000, dtype=np.int8))
    right = Strata((np.arange(20_000) >= 1000).astype(np.int8))
    entries = [int(torch.count_nonzero(read_correction(write_correction(vector, 300, c), c))) for c in (one, right)]
    assert entries[1] > 1.3 * entries[0]


def test_a_position_takes_little_more_than_its_entropy() -> None:
    """Golomb's code is within 6 % of the entropy where entries are equally likely inside a class."""
    draw = np.random.default_rng(0)
    numbers = (np.arange(50_000) >= 5000).astype(np.int8)
    chances = np.where(numbers == 0, 0.1, 0.005)
    strata = Strata(numbers)
    chosen = np.sort(strata.slots[draw.random(50_000) < chances])
    entropy = float(-(chances * np.log2(chances) + (1 - chances) * np.log2(1 - chances)).sum())
    assert slots_length(chosen, strata) < 1.06 * entropy + 5 + 8 * 10


def test_what_cannot_have_been_written_is_refused() -> None:
    vector = torch.randn(500, generator=torch.Generator().manual_seed(0))
    strata = random_strata(500, 0)
    good = write_correction(vector, 100, strata)
    with pytest.raises(PayloadError, match="strata"):
        read_correction(good, random_strata(500, 1))
    for bad in (good[:3], good[:-4], good + b"\1", good[:2] + b"\xc0\x7f" + good[4:]):
        with pytest.raises(PayloadError):
            read_correction(bad, strata)


@given(st.binary(max_size=60), st.integers(0, 3))
def test_hostile_bytes_give_a_vector_or_a_payload_error(data: bytes, seed: int) -> None:
    strata = random_strata(200, seed)
    try:
        read = read_correction(strata.checksum.to_bytes(2, "little") + data, strata)
    except PayloadError:
        return
    assert read.shape == (200,)
    assert bool(torch.isfinite(read).all())
