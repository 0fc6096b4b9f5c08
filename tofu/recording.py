"""Recordings of clients' messages, on which attacks can be tried.

    record/round-0003-client-7/
        base.safetensors   the weights that the payload is relative to: parameters and buffers
        payload.bin        the bytes as received, including the header
        record.json        everything else that the server knew

A folder is written completely and then renamed. Reading executes no code and checks every field. A recording has the
information of an attacker at the server, and with the run's settings it identifies the client's images: protect it like
the data.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
from annotated_types import Ge, Gt, Len
from pydantic import StringConstraints, TypeAdapter, ValidationError
from torch import Tensor

from tofu.data import ImageShape
from tofu.errors import RunError, SettingError
from tofu.imports import remember_modules
from tofu.rounds import KINDS
from tofu.rounds.panel import StrictFields
from tofu.settings import Settings
from tofu.settings.deprecated import present_kind
from tofu.weights import Weights
from tofu.wire import HEADER_BYTES

FOLDER = "record"
VERSION = 1
_NAME = re.compile(r"round-(\d{4,6})-client-([A-Za-z0-9_.]{1,64})")
_SHAPE = ("channels", "height", "width", "classes")


@dataclass(frozen=True)
class Recording:
    """One client's message of one round.

    Attributes:
        round: counted from 1.
        client: its name in the ledger; the partition number of a simulated client.
        kind: the round's kind, one of `tofu.rounds.KINDS`.
        examples: number of training images that the reply states.
        shape: size of the model's input and output.
        settings: the run's settings: model, codec, learning rate, epochs, batch size, seed and dataset.
        base: the weights that the payload is relative to.
        payload: the bytes as received.
    """

    round: int
    client: str
    kind: str
    examples: int
    shape: ImageShape
    settings: Settings
    base: Weights
    payload: bytes

    @property
    def lr(self) -> float:
        """The client's learning rate in this round."""
        return self.settings.training.lr_of(self.round)


@dataclass(frozen=True)
class AppCodec(StrictFields):
    """The arguments, except model and input shape, of the `UpdateCodec` that decodes an app's payloads."""

    compressor: Annotated[str, StringConstraints(pattern="^[a-z0-9-]{1,64}$")]
    ratio: float
    correction: float
    over_relaxation: float


@dataclass(frozen=True)
class AppRecording(StrictFields):
    """One client's message of one round of a Flower app (`tofu.record`), or the sum of several clients' updates.

    Attributes:
        round: counted from 1.
        client: its partition id, if its metrics contain one, or its node id; "sum" for a sum.
        clients: number of clients in it.
        examples: number of training examples of these clients.
        input_shape: of one example.
        batch_size: of local training.
        epochs: of local training.
        lr: of local training; None if it is not known.
        mean: pixels in [0, 1] minus this, divided by `std`, are the model's input.
        std: see `mean`.
        codec: the codec of the payload; None for uncompressed arrays.
        base: the arrays that the message is relative to.
        payload: the bytes as received; or the received arrays in the format of safetensors.
    """

    round: Annotated[int, Ge(1)]
    client: Annotated[str, Len(1, 64)]
    clients: Annotated[int, Ge(1)]
    examples: Annotated[int, Ge(1)]
    input_shape: tuple[Annotated[int, Ge(1)], ...]
    batch_size: Annotated[int, Ge(1)]
    epochs: Annotated[int, Ge(1)]
    lr: Annotated[float, Gt(0)] | None
    mean: float
    std: Annotated[float, Gt(0)]
    codec: AppCodec | None
    base: Any
    payload: bytes

    def save(self, run: Path) -> None:
        """Save it in a folder of recordings. Raises RunError if that cannot be written."""
        fields = {name: value for name, value in vars(self).items() if name not in ("base", "payload")}
        fields["codec"] = vars(self.codec) if self.codec else None
        save_message(run / FOLDER, self.round, self.client, {"app": fields}, self.base, self.payload)


_APP = TypeAdapter(AppRecording)


class Recorder:
    """Saves the messages of some clients in a run's folder.

    Args:
        folder: the run's folder.
        clients: names of the clients whose messages are saved.
        settings: the run's settings.
        shape: size of the model's input and output.

    Raises:
        SettingError: a name that is not usable in the name of a folder.
    """

    def __init__(self, folder: Path, clients: Sequence[str], *, settings: Settings, shape: ImageShape) -> None:
        self._folder, self._clients = folder / FOLDER, frozenset(clients)
        self._settings, self._shape = settings, shape
        for client in clients:
            if not _NAME.fullmatch(_folder_name(1, client)):
                raise SettingError("record_clients", client, "names of clients: letters, digits, dots and underscores")

    def in_folder(self, folder: Path) -> "Recorder":
        """Return a recorder of the same clients in another run's folder."""
        return Recorder(folder, sorted(self._clients), settings=self._settings, shape=self._shape)

    def wants(self, client: str) -> bool:
        """Return whether this client's messages are saved."""
        return client in self._clients

    def save(
        self, round_: int, client: str, *, kind: str, examples: int, base: Mapping[str, Tensor], payload: bytes
    ) -> None:
        """Save one message atomically. A message of a round that is repeated after a crash replaces the first one.

        Args:
            base: parameters and buffers that the payload is relative to.

        Raises:
            RunError: the folder cannot be written.
        """
        fields = {
            "kind": kind,
            "examples": examples,
            "shape": {name: getattr(self._shape, name) for name in _SHAPE},
            "settings": self._settings.to_config(),
        }
        save_message(self._folder, round_, client, fields, base, payload)


def save_message(
    folder: Path, round_: int, client: str, fields: Mapping[str, object], base: Mapping[str, Tensor], payload: bytes
) -> None:
    """Save one message atomically in its own folder, and replace an earlier one of this round and client.

    Raises:
        RunError: the folder cannot be written.
    """
    final = folder / _folder_name(round_, client)
    part = final.with_name(f".{final.name}.part")
    about = {"version": VERSION, "round": round_, "client": client, **fields}
    try:
        shutil.rmtree(part, ignore_errors=True)
        final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.mkdir(mode=0o700)
        weights = {name: value.detach().contiguous() for name, value in base.items()}
        _write(part / "base.safetensors", safetensors.torch.save(weights))
        _write(part / "payload.bin", payload)
        _write(part / "record.json", json.dumps(about, indent=1, allow_nan=False).encode())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
    except OSError as error:
        raise RunError(f"{final} cannot be written: {error.strerror or error}") from error


def without_messages(run: Path) -> str:
    """Return the error of a run without recordings."""
    if not run.is_dir():
        return f"{run} does not exist: expected the folder of a run with recorded messages"
    return f"{run} has no recorded messages: run it again with --record-clients 0, or the names of other clients"


def recordings(run: Path) -> list[Path]:
    """List the folders of a run's recordings, by client and then by round.

    Raises:
        RunError: the run has no recordings, or its `modules.json` is damaged.
    """
    remember_modules(run)
    found = [(m[2], int(m[1]), path) for path in sorted((run / FOLDER).glob("round-*")) if (m := _match(path))]
    if not found:
        raise RunError(without_messages(run))
    return [path for *_, path in sorted(found)]


def round_of(folder: Path) -> int:
    """Return the round of a folder that `recordings` found."""
    return int(folder.name.split("-")[1])


def read_recording(folder: Path) -> "Recording | AppRecording":
    """Read one recording and check every field. (The codec checks the contents of base and payload when it decodes.)

    Raises:
        RunError: a file is missing or was not written by `Recorder`.
        SettingError: a setting of the run is unknown to this version.
    """
    match = _match(folder)
    try:
        about = json.loads((folder / "record.json").read_bytes())
        payload = (folder / "payload.bin").read_bytes()
        base = safetensors.torch.load((folder / "base.safetensors").read_bytes())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise RunError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
    if match is None or not isinstance(about, dict):
        raise RunError(f"{folder} is not a recording: expected a folder named round-NUMBER-client-NAME")
    if not all(bool(value.isfinite().all()) for value in base.values()):
        raise RunError(f"{folder}/base.safetensors holds a value that is not finite")
    if "app" in about:
        return _app_recording(folder, about, base, payload)
    shape = about.get("shape")
    if not isinstance(shape, dict) or not isinstance(about.get("settings"), dict):
        raise RunError(f"{folder}/record.json has no shape or no settings")
    numbers = {"version": about.get("version"), "round": about.get("round"), "examples": about.get("examples")}
    for name, value in [*numbers.items(), *((name, shape.get(name)) for name in _SHAPE)]:
        if type(value) is not int or not 1 <= value < 2**31:
            raise RunError(f"{folder}/record.json has {name} {value!r}, expected a whole number of at least 1")
    if about["version"] != VERSION:
        raise RunError(f"{folder}/record.json has version {about['version']}, expected {VERSION}")
    about["kind"] = present_kind(str(about.get("kind")))
    if about["kind"] not in KINDS:
        raise RunError(f"{folder}/record.json has kind {about['kind']!r}, expected one of {', '.join(KINDS)}")
    if (about["round"], about.get("client")) != (int(match[1]), match[2]):
        raise RunError(f"{folder}/record.json is of round {about['round']}, client {about.get('client')!r}")
    if len(payload) < HEADER_BYTES:
        raise RunError(f"{folder}/payload.bin has {len(payload)} bytes, expected at least {HEADER_BYTES}")
    return Recording(
        round=about["round"],
        client=about["client"],
        kind=about["kind"],
        examples=about["examples"],
        shape=ImageShape(*(shape[name] for name in _SHAPE)),
        settings=Settings.of(about["settings"], warn=False),
        base=base,
        payload=payload,
    )


def _app_recording(folder: Path, about: dict[str, object], base: Weights, payload: bytes) -> AppRecording:
    app = about["app"]
    if about.get("version") != VERSION or not isinstance(app, dict):
        raise RunError(f"{folder}/record.json has version {about.get('version')!r}, expected {VERSION}")
    try:
        recording = _APP.validate_python({**app, "base": base, "payload": payload})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise RunError(f"{folder}/record.json has {name} {first['input']!r}: {first['msg']}") from error
    if folder.name != _folder_name(recording.round, recording.client):
        raise RunError(f"{folder}/record.json is of round {recording.round}, client {recording.client!r}")
    return recording


def _folder_name(round_: int, client: str) -> str:
    return f"round-{round_:04d}-client-{client}"


def _match(folder: Path) -> "re.Match[str] | None":
    return _NAME.fullmatch(folder.name)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
