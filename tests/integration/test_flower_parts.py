"""The mods and strategy wrappers in an app of their own under `flwr run` on ray: compressed rounds with a compressed
downlink, then a secure round.

In the quick tests test_flwr_run.py shows that what an app's clients keep survives on ray, and
tests/tofu/flower/test_hybrid.py that the same mods and wrappers learn.
"""

import json
from pathlib import Path

import pytest

from tests.integration.test_flwr_run import ROOT, in_namespace
from tests.processes import NO_TOTAL_LIMIT

pytestmark = [NO_TOTAL_LIMIT, pytest.mark.slow]

PROJECT = """
[project]
name = "digitsapp"
version = "1.0.0"

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "digitsapp.server_app:app"
clientapp = "digitsapp.client_app:app"

[tool.flwr.app.config]
result = ""
"""

CLIENT = """
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import tofu
from tofu.data import open_data, to_float

app = ClientApp(mods=[tofu.hybrid(ratio=20, downlink=10)])


def net():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


@app.train()
def train(message, context):
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = open_data("digits", clients=4, partition="iid", seed=0).client(int(context.node_config["partition-id"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for rows in torch.arange(len(data)).split(16):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(to_float(data.images[rows])), data.labels[rows]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(data), "own": float(context.node_config["partition-id"])})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)
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
    strategy = tofu.Hybrid(
        FedAvg(fraction_evaluate=0.0, min_available_nodes=4), ratio=20, downlink=10, switch_round=4
    )
    result = strategy.start(grid, ArrayRecord(net().state_dict()), num_rounds=5)
    model, test = net(), open_data("digits", clients=4, partition="iid", seed=0).test()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    accuracy = float((model(to_float(test.images)).argmax(1) == test.labels).float().mean())
    rounds = {round_: dict(metrics) for round_, metrics in result.train_metrics_clientapp.items()}
    Path(context.run_config["result"]).write_text(json.dumps({"accuracy": accuracy, "rounds": rounds}))
"""

SCRIPT = """
flwr run app local --stream --federation-config "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2" \
    --run-config "result='$RESULT'"
"""


def test_compressed_and_secure_rounds_on_ray(tmp_path: Path) -> None:
    app = tmp_path / "app"
    (app / "digitsapp").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    for name, text in (("__init__", ""), ("client_app", CLIENT), ("server_app", SERVER)):
        (app / "digitsapp" / f"{name}.py").write_text(text)
    log = in_namespace(
        tmp_path,
        SCRIPT,
        tmp_path / "home" / "local-superlink",
        PYTHONPATH=str(ROOT),
        RESULT=str(tmp_path / "result.json"),
    )
    assert (tmp_path / "result.json").is_file(), log[-3000:]
    found = json.loads((tmp_path / "result.json").read_text())
    rounds = found["rounds"]
    assert ["tofu-ratio" in rounds[str(number)] for number in range(1, 6)] == [True] * 3 + [False] * 2
    assert rounds["3"]["tofu-downlink-bytes"] < rounds["1"]["tofu-downlink-bytes"] / 9
    assert rounds["5"]["tofu-clients"] == 4
    assert rounds["5"]["own"] == pytest.approx(1.5, abs=0.02)  # the mean of the partition ids
    assert found["accuracy"] > 0.6
