"""Trackers, with the real libraries and offline: what they wrote is read back by the libraries themselves."""

import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import tofu
from tofu.errors import MissingExtraError, SettingError
from tofu.observers.base import Observer
from tofu.observers.trackers import FOLDER, Tracker, make_trackers, metrics_of, summary_metrics, trackers
from tofu.rounds.record import ClientRecord, Failure, RoundRecord, RunSummary
from tofu.settings import Settings

SETTINGS = Settings.of({"rounds": 4, "lr": 0.25})
HOSTILE = 'a/"b"\n{c} %ü'
SUMMARY = RunSummary(final_accuracy=0.75, rounds=4, uplink_bytes=2**40, epsilon=float("inf"))
Series = dict[str, dict[int, float]]
"""Metric -> step -> value."""


def row(number: int) -> RoundRecord:
    clients = tuple(
        ClientRecord(client, "7", number / 8, examples=number) for client in ("0", "hospital 1", HOSTILE, "..")
    )
    return RoundRecord(
        number, "secure" if number == 3 else "compressed", accuracy=number / 16, loss=float("nan"), uplink_bytes=2**40,
        failures=(Failure("1", "late"),) * number, by_client=clients, plugins={"gpm/rank": 0.5}, metrics={"f1": 0.25},
        task_accuracies=(0.5, None, 0.25), abandoned="too few" if number == 3 else "", link_seconds={"0": 1.5},
        notes=("no room for a proxy",),
    )  # fmt: skip


ROWS = [row(number) for number in range(5)]


def series(*records: RoundRecord) -> Series:
    found: Series = {}
    for record in records:
        for name, value in metrics_of(record).items():
            found.setdefault(name, {})[record.round] = value
    return found


# Each reader returns the series, the settings, and whether the run is marked as completed (None: it has no such mark).


def read_tensorboard(folder: Path) -> tuple[Series, dict[str, Any], bool | None]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    events = EventAccumulator(str(folder / FOLDER / "tensorboard"), {"scalars": 0})
    events.Reload()
    found = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    return found, {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}, None


def read_mlflow(folder: Path) -> tuple[Series, dict[str, Any], bool | None]:
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tofu").experiment_id])
    assert run.info.run_name == folder.name
    found = {
        name: {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }
    return found, run.data.params, {"FINISHED": True, "FAILED": False}[run.info.status]


def read_wandb(folder: Path) -> tuple[Series, dict[str, Any], bool | None]:
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # ends W&B's own process, which writes the file
    found: Series = {}
    settings: dict[str, Any] = {}
    ids, codes = set(), []
    for path in sorted(
        (folder / FOLDER / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns
    ):
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                assert record.run.display_name == folder.name
                settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("exit"):
                codes.append(record.exit.exit_code)
            elif record.HasField("history"):
                values = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                step = values.pop("_step")
                for name, value in values.items():
                    if not name.startswith("_"):
                        found.setdefault(name, {})[step] = value
            elif record.HasField("summary"):
                for item in record.summary.update:
                    name = item.key or "/".join(item.nested_key)
                    if name.startswith("summary/"):
                        found[name] = {4: json.loads(item.value_json)}
    assert len(ids) == 1
    return found, settings, codes[-1] == 0


def leveldb_records(data: bytes) -> list[bytes]:
    """The records of a W&B file: 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    found, parts, at = [], b"", 7
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<4xHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            found.append(parts)
            parts = b""
    return found


def read_trackio(folder: Path) -> tuple[Series, dict[str, Any], bool | None]:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("tofu")
    assert name.startswith(folder.name)
    found: Series = {}
    for line in SQLiteStorage.get_logs("tofu", name):
        for key, value in line.items():
            if key not in ("timestamp", "step"):
                found.setdefault(key, {})[line["step"]] = value
    config = SQLiteStorage.get_run_config("tofu", name)
    return found, {key: value for key, value in config.items() if not key.startswith("_")}, None


READERS: dict[str, Callable[[Path], tuple[Series, dict[str, Any], bool | None]]] = {
    "tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb, "trackio": read_trackio,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, with all libraries writing below `tmp_path`."""
    for name in ("WANDB_PROJECT", "WANDB_MODE", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "config.json").write_text(json.dumps(SETTINGS.to_config()))
    return tmp_path / "run-1"


def plain(settings: dict[str, Any]) -> dict[str, object]:
    """Settings with all numbers as floats and all else as text, as some trackers keep them."""
    return {
        name: float(value) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", str(value)) else str(value)
        for name, value in settings.items()
        if not name.startswith("_")
    }


def forbidden(note: str) -> None:
    raise AssertionError(note)


@pytest.mark.parametrize("name", READERS)
def test_a_run_that_is_resumed_is_one_tracker_run(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert set(READERS) == set(trackers.names())
    (first,) = make_trackers(name, forbidden)
    first.on_history(folder, ROWS[:1])
    first.on_round_end(ROWS[1])
    first.on_run_error(KeyboardInterrupt())
    first.close()
    first.close()
    found, settings, completed = READERS[name](folder)
    assert found == series(*ROWS[:2])
    assert plain(settings) == plain(SETTINGS.to_config())
    assert not completed
    (second,) = make_trackers(name, forbidden)
    second.on_history(folder, ROWS[:4])  # the process ended before rounds 2 and 3 were logged
    second.on_round_end(ROWS[4])
    second.on_run_end(SUMMARY)
    second.close()
    found, _, completed = READERS[name](folder)
    assert found == series(*ROWS) | {key: {4: value} for key, value in summary_metrics(SUMMARY).items()}
    assert completed in (None, True)
    assert capfd.readouterr().out == ""


class Flaky(Tracker):
    """Fails where `FAILS` says, as a tracker does whose server is out of reach."""

    name = "flaky"
    fails: str = ""
    calls: tuple[tuple[str, object], ...] = ()

    def _call(self, what: str, value: object) -> None:
        Flaky.calls += ((what, value),)
        if Flaky.fails == what:
            raise ConnectionError("no route\nto host")

    def start(self, folder: Path, settings: Any, run: str) -> str:
        self._call("start", run)
        return "id-1"

    def log(self, metrics: Any, step: int | None) -> None:
        self._call(f"log {step}", len(metrics))

    def finish(self, completed: bool) -> None:
        self._call("finish", completed)


class NeedsArguments(Observer):
    def __init__(self, argument: int) -> None: ...


HERE = "tests.tofu.observers.test_trackers"


def test_a_tracker_that_fails_is_reported_once_and_catches_up_on_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flaky, "calls", ())
    monkeypatch.setattr(Flaky, "fails", "log 2")
    notes: list[str] = []
    (tracker,) = make_trackers(f"{HERE}:Flaky", notes.append)
    tracker.on_history(folder, ROWS[:1])
    for each in ROWS[1:4]:
        tracker.on_round_end(each)
    tracker.on_run_end(SUMMARY)
    tracker.close()
    assert notes == ["tracker flaky is left out of the rest of the run: ConnectionError: no route"]
    assert [call for call, _ in Flaky.calls] == ["start", "log 0", "log 1", "log 2"]
    monkeypatch.setattr(Flaky, "calls", ())
    monkeypatch.setattr(Flaky, "fails", "finish")
    (tracker,) = make_trackers(f"{HERE}:Flaky", notes.append)
    tracker.on_history(folder, ROWS[:4])
    tracker.close()
    tracker.close()
    assert Flaky.calls[0] == ("start", "id-1")
    assert [call for call, _ in Flaky.calls[1:]] == ["log 2", "log 3", "finish"]
    assert len(notes) == 2


def test_what_cannot_be_used_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SettingError, match=r"^tracker='csv' is not usable: expected one of tensorboard, mlflow, .*Class$"
    ):
        Settings.of({"tracker": "tensorboard, csv"})
    with pytest.raises(SettingError, match="made without arguments"):
        make_trackers(f"{HERE}:NeedsArguments", forbidden)
    with pytest.raises(SettingError, match=r"a subclass of tofu\.observers\.base\.Observer"):
        make_trackers("builtins:dict", forbidden)
    monkeypatch.setattr(Flaky, "fails", "start")
    with pytest.raises(SettingError, match=r"^tracker='flaky' is not usable: .*\(ConnectionError: no route\)$"):
        make_trackers(f"{HERE}:Flaky", forbidden)[0].on_history(folder, ROWS[:1])


@pytest.mark.parametrize("name", READERS)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [known for known in sys.modules if known.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"^{name} is not installed: pip install 'tofu-fl\[{name}\]'$"):
        make_trackers(name, forbidden)


def test_names_stay_apart_and_are_accepted_everywhere() -> None:
    names = ("a/b", "a:b", "a_b", "a b", "..", "", "::", ":", "ü", "a\nb")
    clients = tuple(ClientRecord(name, train_seconds=float(number)) for number, name in enumerate(names))
    found = metrics_of(RoundRecord(1, "compressed", by_client=clients))
    made = [name for name in found if name.startswith("by_client/train_seconds/")]
    assert len(made) == len(names)
    for name in made:
        assert re.fullmatch(r"[A-Za-z0-9_ .:/-]+", name)
        assert name.rpartition("/")[2] not in ("", ".", "..")


def test_the_page_lists_every_metric() -> None:
    page = (Path(__file__).parents[3] / "docs" / "trackers.md").read_text()
    listed = set(
        re.findall(
            r"`([a-z_]+)(?:/[A-Za-z/]+)?`", " ".join(re.findall(r"^\|(.*?)\|", page.partition("## Metrics")[2], re.M))
        )
    )
    texts = {"round", "kind", "compressor", "notes"}
    assert listed == {field.name for field in fields(RoundRecord)} - texts | {"summary"}
    for field in fields(ClientRecord):
        assert (f"by_client/{field.name}/CLIENT" in page) == (field.name not in ("client", "node"))


def test_a_run_writes_to_its_trackers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flaky, "calls", ())
    monkeypatch.setattr(Flaky, "fails", "")
    own = folder.parent / "run-2"
    result = tofu.run(
        rounds=1, clients=2, local_epochs=1, max_evals=3, train_images=100, test_images=50, run_folder=str(own),
        tracker=f"tensorboard,{HERE}:Flaky", progress=False,
    )  # fmt: skip
    found, settings, _ = read_tensorboard(own)
    assert settings["train-images"] == 100
    assert {name for name in found if name.startswith("by_client/train")} == {
        f"by_client/train_seconds/{n}" for n in "01"
    }
    assert found["uplink_bytes"][1] == result.history[1].uplink_bytes
    assert found["accuracy"] == {n: pytest.approx(each.accuracy) for n, each in enumerate(result.history)}
    assert [call for call, _ in Flaky.calls] == ["start", "log 0", "log 1", "log None", "finish"]
    assert Flaky.calls[-1] == ("finish", True)
