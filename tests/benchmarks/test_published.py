"""The loop of `benchmarks.published`, which sends no messages, trains as a run of the library does."""

from pathlib import Path

import pytest
import torch

from benchmarks.published import TASKS, Federation, Run, bytes_to, table
from client.app import app as client_app
from server.app import serve_in_process
from tofu.reporting.folder import read_model
from tofu.settings import Settings


@pytest.mark.parametrize("compressor", ["proxy", "stc", "none"])
def test_it_ends_at_the_weights_of_a_run(tmp_path: Path, compressor: str) -> None:
    settings = Settings.of(
        {"dataset": "digits", "clients": 4, "rounds": 3, "ratio": 40.0, "max_evals": 4, "lr": 0.1,
         "run_folder": str(tmp_path / "run"), "compressor": compressor, "ema_decay": 0.5, "proxies_below": 0.9}
    )  # fmt: skip
    serve_in_process(client_app, settings)
    federation = Federation(settings)
    for round_ in range(1, 4):
        federation.run_round(round_)
    weights, _, _ = read_model(tmp_path / "run")
    assert all(torch.equal(weights[name], value) for name, value in federation.averaged.items())


def test_bytes_to_a_target_are_those_of_both_directions_until_five_rounds_reach_it() -> None:
    row = {
        "accuracy_by_round": [0.1, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5], "uplink_by_round": [1] * 7,
        "downlink_by_round": [10] * 7,
    }  # fmt: skip
    assert bytes_to(row, 0.5) == 55
    assert bytes_to(row, 0.55) == 66
    assert bytes_to(row, 0.6) is None


def test_every_task_has_usable_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOFU_SHARED_DATA", raising=False)
    for task in TASKS:
        settings = Run(task, "stc", 200, 0, 5, 1.0, 0.0).settings("cpu")
        assert settings.data.clients >= 100
        assert settings.server.client_fraction * settings.data.clients >= 10


def test_a_table_counts_runs_that_diverged() -> None:
    row = {"task": "pfl-iid", "rounds": 5, "ratio": 200, "seed": 0}
    fedavg = {
        "final_accuracy": 0.5, "accuracy_by_round": [0.5] * 5, "uplink_by_round": [100] * 5,
        "downlink_by_round": [100] * 5, "train_seconds": 2.0, "encode_seconds": 1.0, "method": "fedavg",
    }  # fmt: skip
    rows = [row | fedavg | {"ratio": 1}, row | {"method": "stc", "failed": "round 2: diverged"}]
    _, (first, second) = table(rows, "pfl-iid", 5)
    assert first == ["fedavg", "", "1 of 1", "50.0", "50.0", "500 B", "500 B", "1.0 kB", "0.50"]
    assert second[:4] == ["stc", "200x", "0 of 1", "diverged"]
