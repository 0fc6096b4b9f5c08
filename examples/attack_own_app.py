"""What does the server of this app see? python examples/attack_own_app.py [--folder RECORDINGS]

The app of examples/flower-app/before runs with one line more, `tofu.record`, around its strategy. Then the attacks of
`tofu attack` try to reconstruct the images of a client from what the server received. With one step on few images they
succeed; that is the point. Try it with your own app, model and training settings:

    tofu attack recordings --model digits_app.task:Net --dataset my_app.task:images_of
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import tofu
from tofu.flower.in_process import run_in_process

APP = Path(__file__).parent / "flower-app" / "before"
sys.path.insert(0, str(APP))
from digits_app.task import Net, datasets  # noqa: E402

IMAGES, LR = 2, 0.1


def images_of(name):
    """A client's images in [0, 1] and labels; for "test", images that nobody trained on. `tofu attack` calls it."""
    parts, test = datasets(5)
    data = test if name == "test" else parts[int(name)]
    pairs = [data[row] for row in range(len(data) if name == "test" else IMAGES)]
    return torch.stack([image for image, _ in pairs]), torch.stack([label for _, label in pairs])


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    name = str(context.node_config["partition-id"])
    images, labels = images_of(name)
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    for parameter, gradient in zip(
        model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        parameter.data -= LR * gradient
    metrics = MetricRecord({"num-examples": len(images), "partition-id": int(name)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


def main(
    folder: str = "recordings",
    attack_options: Annotated[list[str] | None, typer.Argument(help="options of `tofu attack`, after --")] = None,
) -> None:
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        strategy = tofu.record(
            FedAvg(fraction_evaluate=0.0), folder, input_shape=(1, 8, 8), batch_size=IMAGES, lr=LR, mean=0.0,
            std=1.0, clients=1,
        )  # fmt: skip
        strategy.start(grid, ArrayRecord(Net().state_dict()), num_rounds=1, train_config=ConfigRecord({"lr": LR}))

    run_in_process(server, app, run_config={}, num_supernodes=2)
    command = [
        sys.executable, "-m", "tofu.cli", "attack", folder, "--model", "digits_app.task:Net", "--dataset",
        "attack_own_app:images_of", *(attack_options or ()),
    ]  # fmt: skip
    paths = [str(APP), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    typer.run(main)
