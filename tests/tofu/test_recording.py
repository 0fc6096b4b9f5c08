"""Recordings: written whole, read with every field checked."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import Case
from tofu.data import ImageShape
from tofu.errors import RunError, SettingError
from tofu.recording import Recorder, read_recording, recordings
from tofu.settings import Settings
from tofu.weights import weights_of


@pytest.fixture
def recorded(tmp_path: Path, mlp_update: Case) -> Path:
    network, _ = mlp_update
    recorder = Recorder(tmp_path, ["3"], settings=Settings.of({"lr": 0.2, "rounds": 4}), shape=network.shape)
    recorder.save(2, "3", kind="compressed", examples=17, base=weights_of(network.model), payload=bytes(50))
    return tmp_path


def test_what_was_kept_is_read(recorded: Path, mlp_update: Case) -> None:
    (path,) = recordings(recorded)
    found = read_recording(path)
    assert (found.round, found.client, found.kind, found.examples) == (2, "3", "compressed", 17)
    assert found.shape == ImageShape(1, 8, 8, 10)
    assert found.settings == Settings.of({"lr": 0.2, "rounds": 4})
    assert found.lr == found.settings.training.lr_of(2)
    assert found.payload == bytes(50)
    for name, value in weights_of(mlp_update[0].model).items():
        assert torch.equal(found.base[name], value)
    assert sorted(p.name for p in path.iterdir()) == ["base.safetensors", "payload.bin", "record.json"]
    modes = {folder.stat().st_mode & 0o777 for folder in (path, path.parent)}
    assert modes == {0o700}  # it identifies the client's data


def test_a_round_that_is_run_again_replaces_its_recording(recorded: Path, mlp_update: Case) -> None:
    network, _ = mlp_update
    recorder = Recorder(recorded, ["3"], settings=Settings.of({}), shape=network.shape)
    recorder.save(2, "3", kind="fedavg", examples=18, base=weights_of(network.model), payload=bytes(60))
    (path,) = recordings(recorded)
    assert read_recording(path).examples == 18
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_recording_with_an_old_kind_of_round(recorded: Path) -> None:
    (path,) = recordings(recorded)
    about = json.loads((path / "record.json").read_text())
    about["settings"] |= {"schedule": "full", "downlink": "full"}
    (path / "record.json").write_text(json.dumps(about | {"kind": "full"}))
    read = read_recording(path)
    assert (read.kind, read.settings.rounds.schedule) == ("fedavg", "fedavg")


def test_only_wanted_clients_and_safe_names(tmp_path: Path, mlp_update: Case) -> None:
    shape = mlp_update[0].shape
    recorder = Recorder(tmp_path, ["0", "7"], settings=Settings.of({}), shape=shape)
    assert [recorder.wants(name) for name in ("0", "1", "7")] == [True, False, True]
    with pytest.raises(SettingError, match=r"record-clients='\.\./x' is not usable"):
        Recorder(tmp_path, ["../x"], settings=Settings.of({}), shape=shape)


def test_a_run_without_recordings_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no recorded messages: run it again with --record-clients 0, or"):
        recordings(tmp_path)
    with pytest.raises(RunError, match="no-run does not exist: expected the folder of a run"):
        recordings(tmp_path / "no-run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, expected 1"),
        ({"round": 3}, "is of round 3"),
        ({"client": "4"}, "client '4'"),
        ({"kind": "half"}, "kind 'half', expected one of"),
        ({"examples": 0}, "examples 0, expected a whole number"),
        ({"examples": True}, "examples True"),
        ({"examples": "9"}, "examples '9'"),
        ({"shape": {"channels": 1}}, "height None"),
        ({"shape": 5}, "no shape"),
        ({"settings": [1]}, "no settings"),
    ],
)
def test_a_changed_field_is_refused(recorded: Path, change: dict[str, object], message: str) -> None:
    (path,) = recordings(recorded)
    file = path / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(RunError, match=message) as caught:
        read_recording(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["record.json", "payload.bin", "base.safetensors"])
@pytest.mark.parametrize("data", [None, b"", b"{"])
def test_a_damaged_or_missing_file_is_refused(recorded: Path, name: str, data: bytes | None) -> None:
    (path,) = recordings(recorded)
    (path / name).unlink() if data is None else (path / name).write_bytes(data)
    with pytest.raises(RunError):
        read_recording(path)


def test_unknown_settings_are_refused(recorded: Path) -> None:
    (path,) = recordings(recorded)
    file = path / "record.json"
    about = json.loads(file.read_text())
    about["settings"]["nonsense"] = 1
    file.write_text(json.dumps(about))
    with pytest.raises(SettingError, match="nonsense"):
        read_recording(path)
