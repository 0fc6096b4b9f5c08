"""Checkpoints: everything that a run needs to resume after a crash, written after every round.

A checkpoint is written to a temporary file, flushed to disk and renamed, so a complete one exists at all times. Two are
kept in case the disk damages the newest, which a checksum detects.

    8   "TOFUCKPT"
    1   version
    32  SHA-256 of everything after it
    8   length of the JSON, then the JSON: {"plain": ..., "blobs": {name: length}}
    8   length of the tensors, then these as safetensors
    -   the blobs, concatenated

Reading never unpickles anything.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from tofu.errors import RunError, SettingError
from tofu.files import replace_file
from tofu.weights import under

FOLDER = "checkpoints"
_MAGIC = b"TOFUCKPT"
_VERSION = 3
_HEAD = struct.Struct("<8sB32s")
_LENGTH = struct.Struct("<Q")
_KEPT = 2


@dataclass
class Snapshot:
    """A run's state.

    Attributes:
        plain: JSON values.
        tensors: name -> tensor.
        blobs: name -> bytes.
    """

    plain: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def put_tensors(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Add copies of tensors as `prefix/name`."""
        self.tensors |= {f"{prefix}/{name}": value.detach().clone().contiguous() for name, value in tensors.items()}

    def tensors_of(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors with a prefix, by their names after it."""
        return under(self.tensors, prefix)

    def put_part(self, prefix: str, part: "Snapshot") -> None:
        """Add another snapshot under a prefix."""
        self.plain[prefix] = part.plain
        self.tensors |= {f"{prefix}/{name}": value for name, value in part.tensors.items()}
        self.blobs |= {f"{prefix}/{name}": blob for name, blob in part.blobs.items()}

    def part(self, prefix: str) -> "Snapshot":
        """Return the snapshot that `put_part` added."""
        return Snapshot(self.plain[prefix], self.tensors_of(prefix), under(self.blobs, prefix))

    def to_bytes(self) -> bytes:
        head = json.dumps({"plain": self.plain, "blobs": {name: len(blob) for name, blob in self.blobs.items()}})
        text, tensors = head.encode(), safetensors.torch.save(self.tensors)
        body = b"".join((_LENGTH.pack(len(text)), text, _LENGTH.pack(len(tensors)), tensors, *self.blobs.values()))
        return _HEAD.pack(_MAGIC, _VERSION, hashlib.sha256(body).digest()) + body

    @staticmethod
    def from_bytes(data: bytes) -> "Snapshot":
        """Raises RunError if the bytes are not a complete checkpoint of this version."""
        if len(data) < _HEAD.size:
            raise RunError(f"has {len(data)} bytes, expected more")
        magic, version, digest = _HEAD.unpack_from(data)
        if magic != _MAGIC or version != _VERSION:
            raise RunError(f"is no checkpoint of version {_VERSION}")
        body = memoryview(data)[_HEAD.size :]
        if hashlib.sha256(body).digest() != digest:
            raise RunError("is damaged: its checksum does not match")
        try:
            text, at = _section(body, 0)
            table = json.loads(bytes(text))
            tensors, at = _section(body, at)
            blobs = {}
            for name, length in table["blobs"].items():
                blobs[name] = bytes(body[at : at + length])
                at += length
            return Snapshot(table["plain"], safetensors.torch.load(bytes(tensors)), blobs)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise RunError(f"cannot be read: {error}") from error


def write_checkpoint(run: Path, round_: int, snapshot: Snapshot) -> None:
    """Write a run's checkpoint after a round, and remove all but the last two.

    Raises:
        RunError: it cannot be written, for example because the disk is full; the earlier ones remain.
    """
    folder = run / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        replace_file(_path(folder, round_), snapshot.to_bytes())
        for old in sorted(folder.glob("round-*.checkpoint"))[:-_KEPT]:
            old.unlink()
    except OSError as error:
        raise RunError(f"round {round_}: its checkpoint cannot be written to {folder} ({error.strerror})") from error


def read_checkpoint(run: Path, note: Callable[[str], None]) -> Snapshot | None:
    """Return the newest complete checkpoint of a run, or None if it has none yet.

    Args:
        note: called with a line about each checkpoint that is skipped.

    Raises:
        SettingError: there are checkpoints, but none is complete.
    """
    files = sorted((run / FOLDER).glob("round-*.checkpoint"), reverse=True)
    for file in files:
        try:
            return Snapshot.from_bytes(file.read_bytes())
        except (RunError, OSError) as error:
            note(f"checkpoint {file.name} is skipped: it {error}")
    if files:
        raise SettingError("resume", str(run), "a run with a complete checkpoint")
    return None


def keep_last_checkpoint(run: Path) -> None:
    """Remove all checkpoints of a finished run but the last, from which it can be extended."""
    for file in sorted((run / FOLDER).glob("*round-*"))[:-1]:
        file.unlink()


def _path(folder: Path, round_: int) -> Path:
    return folder / f"round-{round_:06}.checkpoint"


def _section(body: memoryview, at: int) -> tuple[memoryview, int]:
    start = at + _LENGTH.size
    end = start + int(_LENGTH.unpack_from(body, at)[0])
    if end > len(body):
        raise ValueError("a section is longer than the file")
    return body[start:end], end
