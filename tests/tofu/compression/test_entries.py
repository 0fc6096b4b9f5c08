import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tofu.compression.classes import CLASSES, Classes
from tofu.compression.entries import least_room, read_entries, slots_length, write_entries
from tofu.errors import PayloadError


def random_classes(length: int, seed: int) -> Classes:
    return Classes(np.random.default_rng(seed).integers(0, CLASSES, length).astype(np.int8))


@given(st.integers(1, 400), st.integers(0, 2**32 - 1), st.integers(0, 300), st.floats(0, 1))
def test_the_largest_entries_come_back_in_no_more_than_the_room(
    length: int, seed: int, more: int, zeros: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(length, generator=generator) * (torch.rand(length, generator=generator) >= zeros)
    classes = random_classes(length, seed)
    room = least_room(length) + more
    data = write_entries(vector, room, classes)
    assert len(data) <= room
    read = read_entries(data, classes)
    sent = torch.nonzero(read).flatten()
    assert len(sent) > 0 or not bool(vector.any())
    if len(sent):
        assert bool((torch.sign(read[sent]) == torch.sign(vector[sent])).all())
        rest = vector.abs().clone()
        rest[sent] = 0
        assert float(vector[sent].abs().min()) >= float(rest.max())
        if not data[2]:  # one magnitude, the mean of all
            assert float(read[sent[0]].abs()) == pytest.approx(float(vector[sent].abs().mean()), rel=2**-8)


def test_more_magnitudes_only_where_one_would_leave_bytes_unused() -> None:
    vector = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    classes = random_classes(2000, 0)
    bits = {room: write_entries(vector, room, classes)[2] for room in (60, 200, 1000)}
    assert bits[60] == bits[200] == 0
    assert bits[1000] > 0


def test_classes_that_tell_where_entries_are_make_room_for_more_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(20_000, generator=generator) * 0.1
    vector[:1000] *= 20
    one = Classes(np.zeros(20_000, dtype=np.int8))
    right = Classes((np.arange(20_000) >= 1000).astype(np.int8))
    entries = [int(torch.count_nonzero(read_entries(write_entries(vector, 300, c), c))) for c in (one, right)]
    assert entries[1] > 1.3 * entries[0]


def test_a_position_takes_little_more_than_its_entropy() -> None:
    """Golomb's code is within 6 % of the entropy where entries are equally likely inside a class."""
    draw = np.random.default_rng(0)
    numbers = (np.arange(50_000) >= 5000).astype(np.int8)
    chances = np.where(numbers == 0, 0.1, 0.005)
    classes = Classes(numbers)
    chosen = np.sort(classes.slots[draw.random(50_000) < chances])
    entropy = float(-(chances * np.log2(chances) + (1 - chances) * np.log2(1 - chances)).sum())
    assert slots_length(chosen, classes) < 1.06 * entropy + 5 + 8 * 10


def test_what_cannot_have_been_written_is_refused() -> None:
    vector = torch.randn(500, generator=torch.Generator().manual_seed(0))
    classes = random_classes(500, 0)
    good = write_entries(vector, 100, classes)
    with pytest.raises(PayloadError, match="classes"):
        read_entries(good, random_classes(500, 1))
    for bad in (good[:3], good[:-4], good + b"\1", good[:2] + b"\xc0\x7f" + good[4:]):
        with pytest.raises(PayloadError):
            read_entries(bad, classes)


@given(st.binary(max_size=60), st.integers(0, 3))
def test_hostile_bytes_give_a_vector_or_a_payload_error(data: bytes, seed: int) -> None:
    classes = random_classes(200, seed)
    try:
        read = read_entries(classes.checksum.to_bytes(2, "little") + data, classes)
    except PayloadError:
        return
    assert read.shape == (200,)
    assert bool(torch.isfinite(read).all())
