"""What a server can make a client do: a refusal names its rule, and no reply tells of the client's files or data."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from client import app as client_app
from client.app import app
from tofu.data import ImageShape
from tofu.errors import PolicyError, SettingError
from tofu.flower.policy import Policy
from tofu.settings import Settings
from tofu.wire import FIELD, RECORD, TrainRequest

IMPORTED = "imported_by_a_server"


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's Message asks which task it is made in."""
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


def reason(
    node: dict[str, str | int], run: dict[str, object], request: TrainRequest | None = None, group: str = "1"
) -> str:
    """The reason of the client's error reply to `hello`, or to `train` if there is a request."""
    content = RecordDict({RECORD: ConfigRecord({FIELD: request.to_bytes()})}) if request else RecordDict()
    message = Message(content, 2, "train" if request else "query", group_id=group)
    message.metadata.__dict__["_message_id"] = "1"
    config = Settings.of({"model": "mlp", "clients": 2, "local-epochs": 1}).to_config() | run
    reply = app(message, Context(1, 2, node, RecordDict(), config))  # type: ignore[arg-type]
    return str(reply.error.reason) if reply.has_error() else ""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in the client's working directory that leaves a file when it is imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{IMPORTED}.py").write_text("open('imported', 'w').close()\nThing = make = object\n")
    return tmp_path / "imported"


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("model", f"{IMPORTED}:make", "models"),
        ("plugins", f"gpm,{IMPORTED}:Thing", "plugins"),
        ("compressor", f"{IMPORTED}:Thing", "components"),
        ("downlink", f"{IMPORTED}:Thing", "components"),
        ("schedule", f"{IMPORTED}:Thing", "components"),
        ("dataset", "/etc", "datasets"),
        ("dataset", "no-such-folder", "datasets"),
        ("plugin-options", "dct-snn.thresholds=@/etc/passwd", "plugins"),
    ],
)
def test_without_a_policy_file_a_server_cannot_name_code_folders_or_files(
    setting: str, value: str, rule: str, marker: Path
) -> None:
    given = {setting: value} | ({"plugins": "dct-snn"} if setting == "plugin-options" else {})
    assert f"rule {rule} accepts" in reason({"partition-id": 0}, given)
    assert not marker.exists()


FILE = """
models = ["mlp"]
plugins = []
own-data = true
allowed-rounds = ["compressed"]
min-noise-multiplier = 0.5
[settings]
lr = {min = 0.01, max = 1}
batch-size = {min = 8}
partition = ["iid"]
"""


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"model": "cnn"}, "models"),
        ({"plugins": "gpm"}, "plugins"),
        ({"lr": 1e-30}, "settings.lr"),
        ({"lr": float("nan")}, "settings.lr"),
        ({"batch-size": 1}, "settings.batch-size"),
        ({"partition": "shards"}, "settings.partition"),
        ({"noise-multiplier": 0.4}, "min-noise-multiplier"),
        ({}, "own-data"),
    ],
)
def test_a_refusal_names_the_rule_of_the_file(change: dict[str, object], rule: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(FILE)
    node: dict[str, str | int] = {"partition-id": 0, "policy": str(tmp_path / "policy.toml")}
    run = {"partition": "iid", "noise-multiplier": 0.5, "norm": "none"} | change
    if change:
        node["data"] = str(tmp_path / "none")
    assert f"rule {rule} accepts" in reason(node, run)


@pytest.mark.parametrize(
    "text", ["modles = []", "models = 1", "min-noise-multiplier = nan", "not TOML", "allowed-rounds = ['x']",
             "[settings]\nlearning-rate = {min = 1}", "[settings]\nlr = {least = 1}"],
)  # fmt: skip
def test_a_policy_that_cannot_be_read_refuses_everything(text: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(text)
    node: dict[str, str | int] = {"partition-id": 0, "policy": str(tmp_path / "policy.toml")}
    with pytest.raises(SettingError):
        Policy.of(Context(1, 2, dict(node), RecordDict(), {}))
    found = reason(node, {})
    assert found
    assert str(tmp_path) not in found


def test_a_rule_in_the_file_and_in_the_node_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(FILE)
    config: dict[str, bool | float | int | str] = {"policy": str(tmp_path / "policy.toml"), "allowed-rounds": "fedavg"}
    with pytest.raises(SettingError, match="once"):
        Policy.of(Context(1, 2, config, RecordDict(), {}))


@pytest.mark.parametrize("group", ["", "x", "-1", "1e3", "1\n", "9" * 5000])
def test_a_round_that_is_no_number_is_refused_in_one_line(group: str) -> None:
    request = TrainRequest("fedavg", -1, ImageShape(1, 8, 8, 10), b"x", bytes(8))
    assert reason({"partition-id": 0}, {}, request, group) == (
        f"train request is for round {group[:20]!r}, expected a number"
    )
    assert not reason({"partition-id": 0}, {}, None, group)  # hello needs no round


@pytest.mark.parametrize("request_", [None, TrainRequest("fedavg", -1, ImageShape(1, 8, 8, 10), b"x", bytes(8))])
def test_noise_that_the_server_says_it_adds_is_no_minimum_at_any_stage(request_: TrainRequest | None) -> None:
    run = {"noise-multiplier": 1.0, "server-noise": "independent", "schedule": "fedavg", "norm": "none"}
    found = reason({"partition-id": 0, "min-noise-multiplier": 1}, run, request_)
    assert "rule min-noise-multiplier accepts 1 or more" in found


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("adds", ["none", "independent"])
def test_with_noise_hello_tells_neither_images_nor_classes(noise: float, adds: str, tmp_path: Path) -> None:
    for name in "01":
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("L", (8, 8)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "0" / "broken.png").write_bytes(b"no image")
    run = {"noise-multiplier": noise, "norm": "none"} | ({"server-noise": adds, "schedule": "fedavg"} if noise else {})
    message = Message(RecordDict(), 2, "query", group_id="1")
    message.metadata.__dict__["_message_id"] = "1"
    config = Settings.of({"model": "mlp", "clients": 2} | run).to_config()
    reply = app(message, Context(1, 2, {"data": str(tmp_path)}, RecordDict(), config))
    fields = dict(reply.content.config_records[RECORD])
    open_ = {"examples": 8, "unreadable": 1, "classes": '["0", "1"]'}
    assert fields == {"client": "2"} | ({"examples": 1, "classes": "[]"} if noise else open_)


SECRET = "patients-of-dr-smith"


def folder_of_a_class(path: Path) -> Path:
    (path / SECRET).mkdir(parents=True)
    Image.new("L", (8, 8)).save(path / SECRET / "1.png")
    return path


def broken_image(path: Path) -> Path:
    (path / "0").mkdir(parents=True)
    (path / "0" / f"{SECRET}.png").write_bytes(b"no image")
    return path


@pytest.mark.parametrize("allowed", ["secure", "compressed, secure, fedavg"])
@pytest.mark.parametrize("make", [folder_of_a_class, broken_image, lambda path: path])
def test_error_replies_hold_no_paths_and_no_class_names(
    make: Callable[[Path], Path], allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node: dict[str, str | int] = {"data": str(make(tmp_path / "own")), "allowed-rounds": allowed}
    found = reason(node, {"class-names": "0,1"})
    assert found == "this client's data or files cannot be used in this run: see its log"
    assert str(tmp_path) in capsys.readouterr().err


def test_an_unexpected_exception_tells_the_server_its_type_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        raise FileNotFoundError(f"/home/{SECRET}")

    monkeypatch.setattr(client_app, "client_data", failing)
    assert reason({"partition-id": 0}, {}) == "client 0: the client app failed with FileNotFoundError: see its log"
    assert SECRET in capsys.readouterr().err


@pytest.mark.parametrize("shape", [ImageShape(65_535, 65_535, 65_535, 10), ImageShape(1, 8, 8, 65_535)])
def test_no_model_of_a_shape_that_does_not_fit_the_data_is_built(
    shape: ImageShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: object, **__: object) -> torch.nn.Module:
        raise AssertionError("the client allocated the requested model")

    monkeypatch.setattr("tofu.workload.run_model", built)
    found = reason({"partition-id": 0}, {}, TrainRequest("compressed", -1, shape, b"x", bytes(8)))
    assert "data" in found or "rule max-classes" in found


def test_a_policy_of_an_earlier_version_allows_the_same_rounds(tmp_path: Path) -> None:
    """Compressed rounds were called proxy."""
    (tmp_path / "policy.toml").write_text('allowed-rounds = ["proxy"]\n[settings]\nschedule = ["proxy"]\n')
    node: dict[str, str | int] = {"partition-id": 0, "policy": str(tmp_path / "policy.toml")}
    policy = Policy.of(Context(1, 2, node, RecordDict(), {}))  # type: ignore[arg-type]
    policy.check_round("compressed", 0.0)
    policy.check_run({"schedule": "compressed"}, node)
    with pytest.raises(PolicyError, match="allowed-rounds"):
        policy.check_round("fedavg", 0.0)
    with pytest.raises(PolicyError, match="schedule"):
        policy.check_run({"schedule": "secure"}, node)
