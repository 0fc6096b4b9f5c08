"""The mods and wrappers of a user's app in a deployment: SuperLink and SuperNodes are processes, connected by TLS.

A node whose training lasts longer than the run, a layer that stays on the clients, a robust rule and a compressed
downlink in one app; in another secure sums, whose results are recorded; and a mod that is missing.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.processes import LocalCluster
from tests.integration.deployed import run_on, wait_online
from tests.integration.test_flower_parts import PROJECT
from tests.processes import NO_TOTAL_LIMIT

pytestmark = [NO_TOTAL_LIMIT, pytest.mark.slow]

CLIENT = """
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import tofu
from tofu.data import open_data, to_float

app = ClientApp(mods=[{mods}])


def net():
    layers = torch.nn.LayerNorm(64), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)


@app.train()
def train(message, context):
    model, own = net(), int(context.node_config["partition-id"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    slow = context.run_config["slow"]
    while own == 3 and slow and not Path(slow).exists():
        time.sleep(0.05)
    data = open_data("digits", clients=4, partition="iid", seed=0).client(own)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for rows in torch.arange(len(data)).split(16):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(to_float(data.images[rows])), data.labels[rows]).backward()
        optimizer.step()
    metrics = MetricRecord({{"num-examples": len(data), "own": float(own)}})
    return Message(RecordDict({{"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}}), reply_to=message)
"""

SERVER = """
import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import tofu
from digitsapp.client_app import net
from tofu.data import open_data, to_float

app = ServerApp()


@app.main()
def main(grid, context):
    torch.manual_seed(0)
    folder = Path(context.run_config["result"])
    plain = FedAvg(fraction_evaluate=0.0, min_available_nodes=4)
    result = ({strategy}).start(grid, ArrayRecord(net().state_dict()), num_rounds=4)
    arrays = result.arrays.to_torch_state_dict()
    model, test = net(), open_data("digits", clients=4, partition="iid", seed=0).test()
    model.load_state_dict(arrays)
    accuracy = float((model(to_float(test.images)).argmax(1) == test.labels).float().mean())
    rounds = [dict(metrics) for _, metrics in sorted(result.train_metrics_clientapp.items())]
    kept = bool((arrays["1.weight"] == 1).all())
    (folder / "result.json").write_text(json.dumps({{"accuracy": accuracy, "rounds": rounds, "kept": kept}}))
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("deploy") / "federation", nodes=4, warm=True) as federation:
        yield federation


def deployed(federation: LocalCluster, folder: Path, mods: str, strategy: str, **config: str) -> Any:
    """Write the app into a folder and run it."""
    wait_online(federation)
    app = folder / "app"
    (app / "digitsapp").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT + 'slow = ""\n')
    texts = {"__init__": "", "client_app": CLIENT.format(mods=mods), "server_app": SERVER.format(strategy=strategy)}
    for name, text in texts.items():
        (app / "digitsapp" / f"{name}.py").write_text(text)
    return run_on(federation, {"result": str(folder), **config}, app)


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_rounds_with_local_layers_a_robust_rule_steps_down_and_first_replies(
    federation: LocalCluster, tmp_path: Path
) -> None:
    end = tmp_path / "end"
    try:
        run = deployed(
            federation, tmp_path, 'tofu.compress(ratio=20, downlink=10), tofu.keep_local("1.*")',
            'tofu.FirstReplies(tofu.Compressed(tofu.Robust(plain, "median"), ratio=20, downlink=10), fraction=0.75)',
            slow=str(end),
        )  # fmt: skip
    finally:
        end.touch()  # until now node 3 trains for the first round
    assert run.completed, run.log
    found = result_of(tmp_path)
    assert found["accuracy"] > 0.6
    assert found["kept"]
    assert [metrics["own"] for metrics in found["rounds"]] == pytest.approx([1.0] * 4, abs=0.02)  # of nodes 0 to 2
    assert found["rounds"][2]["tofu-downlink-bytes"] < found["rounds"][0]["tofu-downlink-bytes"] / 9


def test_secure_sums_with_local_layers_are_recorded(federation: LocalCluster, tmp_path: Path) -> None:
    record = f'tofu.record(plain, "{tmp_path}/sums", input_shape=(1, 8, 8), batch_size=16)'
    run = deployed(federation, tmp_path, 'tofu.secure(), tofu.keep_local("1.*")', f"tofu.SecureAggregation({record})")
    assert run.completed, run.log
    found = result_of(tmp_path)
    assert found["accuracy"] > 0.6
    assert found["kept"]
    assert [metrics["tofu-clients"] for metrics in found["rounds"]] == [4] * 4
    assert len(list((tmp_path / "sums" / "record").iterdir())) == 4


def test_a_missing_mod_fails_the_run_in_one_line(federation: LocalCluster, tmp_path: Path) -> None:
    run = deployed(federation, tmp_path, "", "tofu.Compressed(plain, ratio=20)")
    assert run.status == "finished:failed"
    assert (
        "error: round 1: no reply of 4 clients can be used (it sent no compressed update: add tofu.compress" in run.log
    )
    assert "Traceback" not in run.log
