"""Clients whose own folders hold different classes train on the same class numbers; file names stay with them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from client.app import app as client_app
from server.app import app as server_app
from tofu.errors import RunError
from tofu.flower.in_process import InProcessGrid, run_in_process
from tofu.rounds.record import RoundRecord, read_rounds, read_summary
from tofu.settings import Settings

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write(folder: Path, names: tuple[str, ...], rows: slice, *, as_names: dict[str, str] | None = None) -> Path:
    bunch = load_digits()
    for row in range(len(bunch.target))[rows]:
        name = NAMES[bunch.target[row]]
        if name in names:
            file = folder / (as_names or {}).get(name, name) / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(bunch.images[row] * 15).astype(np.uint8)).save(file)
    return folder


def federate(
    tmp_path: Path, run: str, own: list[Path], *, policy: str = "", **settings: Any
) -> tuple[list[RoundRecord], dict[str, Any]]:
    """The rounds of a run whose clients have these folders and this policy, and its data.json."""
    node = {"policy": str(tmp_path / "policy.toml")} if policy else {}
    (tmp_path / "policy.toml").write_text(policy)
    chosen = {
        "dataset": str(tmp_path / "server"), "clients": len(own), "rounds": 3, "schedule": "fedavg", "local_epochs": 3,
        "run_folder": str(tmp_path / run), "lr": 0.2, "checkpoint": False,
    } | settings  # fmt: skip
    run_in_process(
        server_app, client_app, run_config=Settings.of(chosen).to_config(), num_supernodes=len(own),
        node_config=lambda partition: {"data": str(own[partition]), **node},
    )  # fmt: skip
    return list(read_rounds(tmp_path / run / "metrics.jsonl")), json.loads((tmp_path / run / "data.json").read_text())


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """The server's folder with all digits, and those of three clients with some."""
    write(tmp_path / "server" / "train", NAMES, slice(0, 100))
    write(tmp_path / "server" / "test", NAMES, slice(100, 400))
    parts = (NAMES[:4], NAMES[3:8], (NAMES[9], NAMES[8], NAMES[0]))
    return [write(tmp_path / f"own{n}", part, slice(400, 1200)) for n, part in enumerate(parts)]


def test_classes_are_numbered_alike_whatever_each_client_has(tmp_path: Path, folders: list[Path]) -> None:
    rounds, data = federate(tmp_path, "exchanged", folders)
    assert rounds[-1].accuracy is not None
    assert rounds[-1].accuracy > 0.6
    names = tuple(sorted(NAMES))
    federate(tmp_path, "named", folders, class_names=",".join(names))
    exchanged, named = (read_summary(tmp_path / name / "summary.json") for name in ("exchanged", "named"))
    assert exchanged is not None
    assert named is not None
    assert exchanged.weights_sha256 == named.weights_sha256
    assert data["classes"] == list(names)
    assert data["read_as"] == "images of one folder per class"
    assert [set(data["clients"][name]["classes"]) for name in "012"] == [
        set(NAMES[:4]), set(NAMES[3:8]), {NAMES[9], NAMES[8], NAMES[0]}
    ]  # fmt: skip


def test_what_a_client_cannot_read_is_counted_at_the_server_without_its_name(
    tmp_path: Path, folders: list[Path]
) -> None:
    (folders[0] / "one" / "Mrs Smith 1962.png").write_bytes(b"")
    rounds, data = federate(tmp_path, "run", folders, rounds=1)
    assert data["clients"]["0"]["unreadable"] == 1
    summary = read_summary(tmp_path / "run" / "summary.json")
    assert summary is not None
    assert summary.unreadable == 1
    assert not rounds[1].failures
    stored = "".join(path.read_text() for path in (tmp_path / "run").glob("*.json*"))
    assert "Smith" not in stored
    assert str(folders[0]) not in stored


def test_a_client_that_cannot_take_part_is_named_in_its_note_and_counted_at_the_end(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for image in folders[2].rglob("*.png"):
        image.write_bytes(b"")
    rounds, _ = federate(tmp_path, "run", folders, rounds=1)
    assert [failure.client for failure in rounds[1].failures] == ["2"]
    assert rounds[1].clients == 2
    summary = read_summary(tmp_path / "run" / "summary.json")
    assert summary is not None
    assert summary.declined == 1
    said = capsys.readouterr().err
    assert "client 2 cannot take part: " in said
    assert "left out: 1 client" in said


def test_the_classes_of_a_run_are_those_of_all_its_clients(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the server's own folder had them, or class-names listed them; the lists do not depend on who came first."""
    folders[1] = write(tmp_path / "odd", NAMES[3:8], slice(400, 1200), as_names={"five": "owl"})
    folders[2] = write(tmp_path / "odder", NAMES[7:], slice(400, 1200), as_names={"nine": "ant"})
    rounds, data = federate(tmp_path, "run", folders, rounds=2)
    names = (*sorted(NAMES), "ant", "owl")
    assert data["classes"] == list(names)
    assert json.loads((tmp_path / "run" / "model.json").read_text())["class_names"] == list(names)
    assert not any(round_.failures for round_ in rounds)
    named = federate(tmp_path, "named", folders, rounds=2, class_names=",".join(names))[0]
    assert [row.accuracy for row in named] == [row.accuracy for row in rounds]
    summaries = [read_summary(tmp_path / name / "summary.json") for name in ("run", "named")]
    assert len({summary.weights_sha256 for summary in summaries if summary}) == 1
    assert "client 1 adds the classes owl" in capsys.readouterr().err
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    sent = sum(row["bytes"] for row in ledger if row["round"] == 1 and row["direction"] == "uplink")
    assert rounds[1].uplink_bytes == sent  # clients registered before round 1, which counts this


def test_secure_rounds_have_the_classes_of_all_clients_too(tmp_path: Path, folders: list[Path]) -> None:
    folders[1] = write(tmp_path / "odd", NAMES[3:8], slice(400, 1200), as_names={"five": "owl"})
    rounds, data = federate(tmp_path, "run", folders, rounds=1, schedule="secure")
    assert data["classes"] == [*sorted(NAMES), "owl"]
    assert not rounds[1].failures
    assert not rounds[1].abandoned


def test_names_with_commas_are_added_and_other_spellings_are_not(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folders[1] = write(tmp_path / "comma", NAMES[3:8], slice(400, 1200), as_names={"five": 'owl, "big"'})
    folders[2] = write(tmp_path / "spelled", NAMES[7:], slice(400, 1200), as_names={"nine": "Nine"})
    rounds, data = federate(tmp_path, "run", folders, rounds=1)
    assert data["classes"] == [*sorted(NAMES), 'owl, "big"']
    assert len(rounds[1].by_client) == 2
    (failure,) = rounds[1].failures
    lacks = "'Nine' differs from the run's 'nine' in case or spaces only: rename it"
    assert re.search(lacks, failure.reason)
    assert lacks.split(":")[0] in capsys.readouterr().err


def fixed_head(channels: int, height: int, width: int, classes: int) -> nn.Module:
    """A model of ten classes, whatever it is asked for."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 10))


def test_a_model_that_cannot_have_the_classes_of_all_clients_is_refused_in_one_line(
    tmp_path: Path, folders: list[Path]
) -> None:
    folders[1] = write(tmp_path / "odd", NAMES[:3], slice(400, 600), as_names={"two": "owl"})
    with pytest.raises(RunError, match=r"clients have classes that .* lacks, and model='.*fixed_head' .* to \[2, 11\] "
                       r"\(found \[2, 10\]\); class-names=eight,.*,zero leaves these clients out"):  # fmt: skip
        federate(tmp_path, "run", folders, rounds=1, policy='models = ["any"]', model=f"{__name__}:fixed_head")


def test_a_class_that_class_names_lacks_is_refused_in_one_line(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folders[1] = write(tmp_path / "odd", NAMES[:3], slice(400, 600), as_names={"two": "owl"})
    rounds, _ = federate(tmp_path, "run", folders, rounds=1, class_names=",".join(sorted(NAMES)))
    (failure,) = rounds[1].failures
    concealed = "this client's data or files cannot be used in this run: see its log"
    assert failure.reason == concealed
    assert "has the label 'owl': expected one of eight, five, four, nine" in capsys.readouterr().err
    with pytest.raises(RunError, match=f"0 clients connected .*; the only node refused .*{concealed}") as caught:
        federate(tmp_path, "none", [folders[1]], rounds=1, class_names=",".join(sorted(NAMES)))
    assert int(str(caught.value).split(" connected after ")[1].split()[0]) < 30  # nobody else is expected


def test_with_privacy_no_class_names_leave_a_client(tmp_path: Path, folders: list[Path]) -> None:
    private = {"schedule": "fedavg", "noise_multiplier": 0.01, "clip_norm": 1.0}
    rounds, data = federate(tmp_path, "run", folders, rounds=1, **private)
    assert len(rounds[1].by_client) == 3
    assert data["clients"] == {"0": {}, "1": {}, "2": {}}


ROUNDS: dict[str, dict[str, Any]] = {
    "proxy": {"schedule": "compressed", "ratio": 10.0, "max_evals": 5, "downlink": "proxy", "downlink_ratio": 5.0},
    "secure": {"schedule": "secure"},
}


def same_as_with_names(tmp_path: Path, folders: list[Path], **settings: Any) -> list[RoundRecord]:
    """Return the rounds of a run, whose weights must be those of a run in which class-names lists all classes."""
    own = [*folders, write(tmp_path / "own3", NAMES[4:], slice(600, 1200))]
    settings |= {"class_names": ",".join(sorted(NAMES)), "min_clients": 3}
    federate(tmp_path, "named", own, **settings)
    rounds, _ = federate(tmp_path, "run", own, **settings | {"class_names": ""})
    summaries = [read_summary(tmp_path / name / "summary.json") for name in ("run", "named")]
    assert len({summary.weights_sha256 for summary in summaries if summary}) == 1
    return rounds


def ended_rounds(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_client_that_joins_later_numbers_classes_as_the_others(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    every = InProcessGrid.get_node_ids

    def few(grid: InProcessGrid) -> list[int]:
        run = tmp_path / "run" if (tmp_path / "named" / "summary.json").exists() else tmp_path / "named"
        return list(every(grid))[: 4 if ended_rounds(run) else 3]

    monkeypatch.setattr(InProcessGrid, "get_node_ids", few)
    rounds = same_as_with_names(tmp_path, folders, **ROUNDS[kind])
    assert [len(record.by_client) or record.clients for record in rounds[1:]] == [3, 4, 4]
    assert not any(record.failures for record in rounds)


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_client_that_loses_its_state_is_told_the_classes_again(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As a SuperNode that is started again, under the same key, does."""
    answer, lost = InProcessGrid._answer, set[str]()

    def forgetful(grid: InProcessGrid, node: Any, message: Any, expires_at: float) -> Any:
        name = "run" if (tmp_path / "named" / "summary.json").exists() else "named"
        if node.name == "2" and ended_rounds(tmp_path / name) and name not in lost:
            lost.add(name)
            node.context.state = RecordDict()
        return answer(grid, node, message, expires_at)

    monkeypatch.setattr(InProcessGrid, "_answer", forgetful)
    rounds = same_as_with_names(tmp_path, folders, **ROUNDS[kind])
    assert lost == {"run", "named"}
    assert len(rounds[-1].by_client) == 4 or kind == "secure"
    reasons = [failure.reason for record in rounds for failure in record.failures]
    assert reasons == (["2 has no secure session: it never sent keys, or lost its state"] if kind == "secure" else [])


def test_a_client_that_joins_later_with_another_class_is_left_out_in_one_line(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = InProcessGrid.get_node_ids
    monkeypatch.setattr(
        InProcessGrid, "get_node_ids", lambda grid: list(every(grid))[: 3 if ended_rounds(tmp_path / "run") else 2]
    )
    folders[2] = write(tmp_path / "odd", NAMES[:3], slice(400, 600), as_names={"two": "owl"})
    rounds, data = federate(tmp_path, "run", folders, min_clients=2)
    assert data["classes"] == sorted(NAMES)
    (failure,) = [failure for record in rounds for failure in record.failures]
    assert failure.reason.endswith(
        "(the run lacks owl: class-names=" + ",".join(sorted(NAMES)) + ",owl has all classes)"
    )
