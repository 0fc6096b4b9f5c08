"""Checkpoint files: whole or not at all, and damage never goes unnoticed."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.checkpoint import FOLDER, Snapshot, keep_last_checkpoint, read_checkpoint, write_checkpoint
from tofu.errors import RunError, SettingError

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def snapshot(number: int = 0) -> Snapshot:
    made = Snapshot({"number": number}, {}, {"blob": bytes([number] * 5), "none": b""})
    made.put_tensors("model", {"weight": torch.arange(6.0).reshape(2, 3) + number, "count": torch.tensor(3)})
    return made


def same(one: Snapshot, other: Snapshot) -> bool:
    tensors = one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(value, other.tensors[name]) and value.dtype == other.tensors[name].dtype
        for name, value in one.tensors.items()
    )
    return tensors and (one.plain, one.blobs) == (other.plain, other.blobs)


def ignore(text: str) -> None:
    pass


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(), plain, max_size=3),
    st.dictionaries(st.text(), st.binary(max_size=40), max_size=3),
    st.lists(st.integers(0, 3), max_size=3),
)
def test_round_trip(values: dict[str, object], blobs: dict[str, bytes], shape: list[int]) -> None:
    made = Snapshot(values, {"t": torch.ones(shape)}, blobs)
    assert same(Snapshot.from_bytes(made.to_bytes()), made)


def test_every_single_change_is_found() -> None:
    data = snapshot().to_bytes()
    for at in range(0, len(data), 3):
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises(RunError):
            Snapshot.from_bytes(bytes(changed))
    for length in range(0, len(data), 7):
        with pytest.raises(RunError):
            Snapshot.from_bytes(data[:length])
    with pytest.raises(RunError):
        Snapshot.from_bytes(data + b"x")


def test_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    for round_ in (8, 9, 10, 11):
        write_checkpoint(tmp_path, round_, snapshot(round_))
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [
        "round-000010.checkpoint",
        "round-000011.checkpoint",
    ]
    read = read_checkpoint(tmp_path, ignore)
    assert read is not None
    assert same(read, snapshot(11))
    keep_last_checkpoint(tmp_path)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["round-000011.checkpoint"]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path: Path, damage: str) -> None:
    write_checkpoint(tmp_path, 1, snapshot(1))
    write_checkpoint(tmp_path, 2, snapshot(2))
    newest = tmp_path / FOLDER / "round-000002.checkpoint"
    data = newest.read_bytes()
    newest.write_bytes({"cut": data[:-9], "changed": data[:90] + b"?" + data[91:], "empty": b""}[damage])
    notes: list[str] = []
    read = read_checkpoint(tmp_path, notes.append)
    assert read is not None
    assert same(read, snapshot(1))
    assert len(notes) == 1
    assert "round-000002.checkpoint is skipped" in notes[0]


def test_none_at_all_and_none_that_is_whole(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path, ignore) is None
    write_checkpoint(tmp_path, 1, snapshot())
    (tmp_path / FOLDER / "round-000001.checkpoint").write_bytes(b"TOFUCKPT")
    with pytest.raises(SettingError, match="complete checkpoint"):
        read_checkpoint(tmp_path, ignore)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may become longer than 4 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_leaves_the_one_before(tmp_path: Path, full_disk: None) -> None:
    write_checkpoint(tmp_path, 1, snapshot(1))
    large = snapshot(2)
    large.blobs["large"] = bytes(10_000)
    with pytest.raises(RunError, match=r"round 2: its checkpoint cannot be written to .* \(File too large\)"):
        write_checkpoint(tmp_path, 2, large)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["round-000001.checkpoint"]
    read = read_checkpoint(tmp_path, ignore)
    assert read is not None
    assert same(read, snapshot(1))
