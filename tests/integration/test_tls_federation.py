"""The real apps as real processes over TLS: the same training as in one process, to the bit."""

import json
from pathlib import Path

from client.app import app as client_app
from deploy.processes import LocalCluster
from server.app import serve_in_process
from tests.integration.deployed import run_on
from tests.processes import NO_TOTAL_LIMIT
from tofu.settings import Settings

REPOSITORY = Path(__file__).parents[2]


@NO_TOTAL_LIMIT
def test_two_authenticated_nodes_train_what_one_process_trains(tmp_path: Path) -> None:
    settings = Settings.of(
        {"clients": 2, "min-clients": 2, "rounds": 3, "schedule": "switch", "recovery": "fedavg", "model": "mlp",
         "ratio": 40.0, "max-evals": 12, "lr": 0.1, "round-timeout": 900.0, "downlink": "proxy",
         "downlink-ratio": 20.0}
    )  # fmt: skip
    with LocalCluster(tmp_path / "federation", nodes=2, app=REPOSITORY, warm=True) as federation:
        run = run_on(federation, settings.to_config() | {"run-folder": str(tmp_path / "remote")})
    assert run.completed, run.log
    remote = json.loads((tmp_path / "remote" / "summary.json").read_text())
    local = serve_in_process(client_app, Settings.of(settings.to_config() | {"run-folder": str(tmp_path / "local")}))
    assert remote["weights_sha256"] == local["weights_sha256"]
    assert remote["final_accuracy"] == local["final_accuracy"] > 0.15
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "remote" / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["start", "proxy", "proxy", "fedavg"]
    ledger = [json.loads(line) for line in (tmp_path / "remote" / "ledger.jsonl").read_text().splitlines()]
    sent = {
        row["round"]: row["payload_bytes"]
        for row in ledger
        if row["direction"] == "downlink" and row["kind"] != "hello"
    }
    assert sent[1] == 0  # every node builds the initial model itself
    assert 0 < sent[2] <= sent[3] / 20
    # Ids differ in length by a few bytes, nothing else does.
    assert abs(remote["uplink_bytes"] - local["uplink_bytes"]) < 100
    assert run.traffic_bytes >= remote["uplink_bytes"]
