"""Plugins in whole federations: in proxy, full and secure rounds, through a crash, with clients that lose state."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp

from client import app as honest
from server.app import serve_in_process
from tests.client.plugins.apps import forgetful_app
from tofu.data import FederatedData, to_float
from tofu.errors import SettingError
from tofu.models import build_model
from tofu.observers.base import Observer
from tofu.plugins import make_plugins
from tofu.reference_model import ReferenceModel
from tofu.reporting.folder import read_model
from tofu.reporting.run_settings import read_config
from tofu.rounds.record import RoundRecord
from tofu.settings import Settings
from tofu.tasks import round_context
from tofu.weights import load_weights

Row = dict[str, Any]

TINY: Row = {
    "model": "mlp", "clients": 3, "rounds": 4, "max_evals": 5, "ratio": 50.0, "local_epochs": 1, "batch_size": 32,
    "lr": 0.05, "ema_decay": 0.0, "partition": "iid",
}  # fmt: skip
RANK: Row = {"plugins": "rank", "plugin_options": "rank.after=2 rank.energy=0.99 rank.max-norm=30"}


def federate(folder: Path, app: ClientApp = honest.app, observer: Observer | None = None, **more: object) -> Row:
    return serve_in_process(app, Settings.of(TINY | more | {"run_folder": str(folder)}), observer)


def rows(folder: Path, name: str = "metrics") -> list[Row]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def payloads(folder: Path, round_: int) -> set[int]:
    return {
        row["payload_bytes"] for row in rows(folder, "ledger")
        if row["round"] == round_ and row["direction"] == "uplink" and "payload_bytes" in row
    }  # fmt: skip


@pytest.mark.parametrize("schedule", ["compressed", "fedavg", "secure"])
def test_ood_works_in_every_kind_of_round(tmp_path: Path, schedule: str) -> None:
    """The threshold comes of the summed histograms and goes out with the next requests."""
    end = federate(tmp_path / "run", plugins="ood", schedule=schedule, rounds=3, lr=0.1, local_epochs=3)
    assert float(end["final_accuracy"]) > (0.4 if schedule == "compressed" else 0.7)
    metrics = [row.get("plugins", {}) for row in rows(tmp_path / "run")[1:]]
    if schedule == "secure":
        assert metrics == [{}] * 3  # the server learns sums only
    else:
        assert "ood/false-alarms" not in metrics[0]
        assert 0.0 <= metrics[2]["ood/false-alarms"] <= 0.5


def test_what_is_saved_flags_as_many_images_as_were_asked_for(tmp_path: Path) -> None:
    """The threshold is of the very weights that were saved: here a running average that no client ever saw."""
    federate(tmp_path / "run", plugins="ood", schedule="fedavg", rounds=3, lr=0.1, local_epochs=3, ema_decay=0.5,
             plugin_options="ood.false-alarms=0.1")  # fmt: skip
    weights, shape, state = read_model(tmp_path / "run")
    settings = read_config(tmp_path / "run")
    plugins = make_plugins(settings.plugins.plugins, settings.plugins.plugin_options)
    plugins.load(broadcast=state, max_bytes=10**6)
    network = ReferenceModel.of(build_model("mlp", shape), shape, plugins, round_context(settings, shape, 2))
    load_weights(network.model, weights)
    test = FederatedData.of(settings.data, settings.run.seed).test()
    with torch.no_grad():
        unknown = plugins.predict(network.model.eval(), to_float(test.images)).unknown
    assert unknown is not None
    assert 0.07 < float(unknown.float().mean()) <= 0.1


@pytest.mark.parametrize("schedule", ["compressed", "fedavg", "secure"])
def test_rank_sends_fewer_numbers_from_the_next_round_on(tmp_path: Path, schedule: str) -> None:
    federate(tmp_path / "run", schedule=schedule, **RANK)
    before, after = payloads(tmp_path / "run", 2), payloads(tmp_path / "run", 4)
    assert all(row["failures"] == [] for row in rows(tmp_path / "run"))
    if schedule == "secure":  # round 2 has the sums in it as well
        before = payloads(tmp_path / "run", 1)
    assert max(after) < 0.7 * min(before)
    accuracies = [row["accuracy"] for row in rows(tmp_path / "run")]
    assert accuracies[4] > accuracies[1] - 0.05
    # The bases go out once: in the round after, clients are told to use those that they kept.
    downlink = [row["downlink_bytes"] for row in rows(tmp_path / "run")]
    assert downlink[4] < 0.8 * downlink[3]


def test_secure_sums_are_those_of_fedavg_rounds(tmp_path: Path) -> None:
    """The utilized rank that the server finds is the same, whether it saw each client's sums or their total alone."""
    options: Row = {"rounds": 3, "error_feedback": 0.0, "secure_ratio": 1.2, **RANK}
    federate(tmp_path / "secure", schedule="secure", **options)
    federate(tmp_path / "full", schedule="fedavg", **options)
    secure, full = (rows(tmp_path / name)[-1]["accuracy"] for name in ("secure", "full"))
    assert secure == pytest.approx(full, abs=0.01)
    sizes = [
        json.loads((tmp_path / name / "summary.json").read_text())["weights_sha256"] for name in ("secure", "full")
    ]
    assert sizes[0] != sizes[1]  # rounded, so close and not equal
    assert len(payloads(tmp_path / "full", 3)) == 1


def test_a_client_that_loses_its_state_goes_on(tmp_path: Path) -> None:
    app = forgetful_app("1", 3)
    federate(tmp_path / "run", app, plugins="rank,ood", plugin_options="rank.after=2")
    assert [row["failures"] for row in rows(tmp_path / "run")[1:]] == [[]] * 4


class KillAfter(Observer):
    def on_round_end(self, record: RoundRecord) -> None:
        if record.round == 3:
            raise KeyboardInterrupt


def test_a_run_with_plugins_goes_on_where_it_was(tmp_path: Path) -> None:
    """The factorized network and the threshold come back with the checkpoint."""
    options: Row = {"plugins": "rank,ood", "plugin_options": RANK["plugin_options"], "rounds": 5}
    whole = federate(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "run", observer=KillAfter(), **options)
    run = federate(tmp_path / "run", resume=str(tmp_path / "run"), **options)
    assert run["weights_sha256"] == whole["weights_sha256"]


def test_gpm_remembers_in_a_federation(tmp_path: Path) -> None:
    """Two tasks, the same for all: what the first one taught stays, though the server saw only secure sums."""
    tasks: Row = {
        "schedule": "secure", "tasks": "pixels", "task_count": 2, "rounds": 8, "lr": 0.1, "local_epochs": 3,
        "secure_ratio": 1.5, "error_feedback": 0.0,
    }  # fmt: skip
    plain = federate(tmp_path / "plain", **tasks)
    gpm = federate(tmp_path / "gpm", plugins="gpm", **tasks)
    assert gpm["backward_transfer"] > plain["backward_transfer"] + 5
    assert [row["task"] for row in rows(tmp_path / "gpm")[1:]] == [0] * 4 + [1] * 4
    assert all(len(row["task_accuracies"]) == 2 for row in rows(tmp_path / "gpm")[1:])
    last = rows(tmp_path / "gpm")[-1]["task_accuracies"]
    assert gpm["mean_accuracy"] == pytest.approx(100 * sum(last) / 2)


def test_tasks_of_classes_with_heads_of_their_own(tmp_path: Path) -> None:
    tasks: Row = {
        "tasks": "classes",
        "task_count": 2,
        "task_heads": "multi",
        "schedule": "fedavg",
        "lr": 0.1,
        "local_epochs": 4,
    }
    end = federate(tmp_path / "run", plugins="gpm", plugin_options="gpm.head=free", **tasks)
    assert end["mean_accuracy"] > 50
    assert rows(tmp_path / "run")[1]["failures"] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"plugins": "nosuch"}, "nosuch"),
        ({"plugins": "ood,ood"}, "each plugin once"),
        ({"plugins": "ood", "plugin_options": "ood.fraction=2"}, "ood.fraction='2'"),
        ({"plugins": "gpm"}, "at least 2 tasks"),
        ({"plugins": "rank", "schedule": "secure"}, "rank.max-norm above 0"),
        ({"tasks": "pixels", "task_count": 3}, "a divisor of rounds, 4"),
        ({"task_count": 2}, "1 with tasks=none"),
    ],
)
def test_what_cannot_be_combined_is_refused_when_it_is_configured(settings: Row, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        Settings.of(TINY | settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# What a run leaves


def pictures(folder: Path) -> Path:
    """Digits, and images unlike any digit, as files."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    digits = FederatedData.of(Settings.of(TINY).data, 0).test().images[:20, 0].numpy()
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    for kind, images in (("digit", digits), ("noise", noise)):
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{kind}-{number:02}.png")
    return folder


def test_predict_flags_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tofu import cli

    training: Row = {"plugins": "ood", "schedule": "fedavg", "rounds": 6, "lr": 0.1, "local_epochs": 4}
    federate(tmp_path / "run", **training)
    folder = pictures(tmp_path / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tofu", "predict", str(tmp_path / "run"), str(folder), "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    flagged = {row["image"].rpartition("/")[2]: row["unknown"] for row in found}
    assert sum(flag for name, flag in flagged.items() if name.startswith("digit")) <= 4
    assert sum(flag for name, flag in flagged.items() if name.startswith("noise")) >= 16
    assert all(0 < row["probability"] <= 1 and row["score"] is not None for row in found)


def test_predict_with_a_factorized_network_and_without_plugins(tmp_path: Path) -> None:
    from tofu.errors import DataError
    from tofu.reporting.predict import predict_images

    folder = pictures(tmp_path / "pictures")
    for name, more in (("plain", {}), ("rank", {**RANK, "rounds": 2})):  # whose last round makes the bases
        federate(tmp_path / name, schedule="fedavg", **{"rounds": 2, "lr": 0.1, "local_epochs": 3} | more)
        found = predict_images(tmp_path / name, folder)
        assert len(found) == 40
        assert {row["unknown"] for row in found} == {None}
    assert len(predict_images(tmp_path / "plain", folder / "digit-00.png")) == 1
    (folder / "digit-00.png").write_bytes(b"no image")
    assert len(predict_images(tmp_path / "plain", folder)) == 39
    with pytest.raises(DataError, match=r"digit-00.png cannot be read as an image"):
        predict_images(tmp_path / "plain", folder / "digit-00.png")
    with pytest.raises(SettingError, match="the folder of a run"):
        predict_images(tmp_path / "nowhere", folder)


def test_a_run_keeps_what_it_is_told_to_for_attacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tofu import cli
    from tofu.recording import read_recording, recordings

    federate(tmp_path / "run", rounds=2, record_clients="1", batch_size=4, train_images=12)
    kept = [read_recording(folder) for folder in recordings(tmp_path / "run")]
    assert [(one.round, one.client, one.kind) for one in kept] == [(1, "1", "compressed"), (2, "1", "compressed")]
    options = ["--attacks", "proxy-images", "--seconds", "5", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tofu", "attack", str(tmp_path / "run"), *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0, capsys.readouterr().err
    assert "report:" in capsys.readouterr().out
    assert (tmp_path / "run" / "attacks" / "report.html").is_file()
