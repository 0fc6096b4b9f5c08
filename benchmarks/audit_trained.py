"""The audit of `benchmarks.audit` in whole runs: canaries in the training of real clients, read from what they send.

Every client of a run on digits is a canary. If a fair coin says so, it trains, and a large value is added to an entry
of its own before the client's chain of steps begins; otherwise its update is zero. Clipping, rounding, noise, encoding,
masks, messages and the server are those of a run. The attacker sees what the server sees: each message of an open
round, and the model after secure rounds, which has the sums. Too little noise is that of a run with a smaller
multiplier. The command fails if a bound exceeds the epsilon that is reported for the noise that was accounted for.
"""

import struct
import tempfile
from collections.abc import Sized
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from benchmarks.audit import DELTA, Reals, fail_if_refuted, score, table
from benchmarks.common import run_command, write_results
from client.app import classes, hello, secure, train
from server.app import serve_in_process
from tofu.flower.transport import body_of
from tofu.models import run_model
from tofu.observers.base import Observer
from tofu.plugins import Plugins
from tofu.privacy import Accountant
from tofu.reporting.folder import read_model
from tofu.settings import Settings
from tofu.training import TrainingContext, TrainingResult
from tofu.wire import CLASSES, HEADER_BYTES, SECURE, TrainReply, TrainRequest
from tofu.workload import NamedWorkload

KINDS, NOISE = ("secure", "fedavg"), {1.0: "as accounted", 0.05: "a twentieth"}
CANARY = 30.0
"""What is added to an entry: so much that, once it is clipped, what the others have learned does not hide it."""


def linear(channels: int, height: int, width: int, classes: int) -> nn.Module:
    """A model with 650 values for digits, so that every client has an entry of its own."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))


class Canaries(NamedWorkload):
    """A workload whose clients train with a canary, or not at all.

    Args:
        sent: whether each client's coin lets it train [clients].
    """

    def __init__(self, settings: Settings, sent: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
        super().__init__(settings)
        self._sent = sent

    def train(self, model: nn.Module, data: Sized, context: TrainingContext, plugins: Plugins) -> TrainingResult:
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        result = super().train(model, data, context, plugins)
        after = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        after[int(context.client)] += CANARY
        nn.utils.vector_to_parameters(after if self._sent[int(context.client)] else before, model.parameters())
        return result


def audit(kind: str, multiplier: float, rounds: int, clients: int, drawn: float, seed: int) -> dict[str, Any]:
    """One run with canaries -> its row of results; `drawn` is the noise that is drawn over the accounted one."""
    sent, totals = np.random.default_rng(seed).random(clients) < 0.5, np.zeros(clients)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = Settings.of(
            {
                "dataset": "digits", "model": "benchmarks.audit_trained:linear", "clients": clients, "rounds": rounds,
                "schedule": kind, "secure_ratio": 1.5, "noise_multiplier": multiplier * drawn, "seed": seed, "lr": 0.5,
                "local_epochs": 2, "checkpoint": False, "ema_decay": 0.0, "run_folder": str(run),
            }
        )  # fmt: skip
        workload = Canaries(settings, sent)
        serve_in_process(_listening(workload, totals), settings, Observer(), workload)
        if kind == "secure":
            final, *_ = read_model(run)
            moved = final["1.weight"] - run_model(settings, workload.shape).state_dict()["1.weight"]
            totals[:] = moved.flatten()[:clients].double().numpy()
    account, guesses = Accountant(DELTA), clients // 4 * 2
    for _ in range(rounds):
        account.spend(multiplier, kind)
    found = score(totals, sent, guesses, account.epsilon)
    return {"kind": kind, "noise_multiplier": multiplier, "rounds": rounds, "drawn": drawn, "seed": seed} | found


def _listening(workload: Canaries, totals: Reals) -> ClientApp:
    """The client app; what a client sends in an open round is added to its total, by its own entry."""
    app = ClientApp()
    app.query()(partial(hello, workload=workload))
    app.query(SECURE)(secure)
    app.query(CLASSES)(classes)

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        reply = train(message, context, workload)
        if not reply.has_error():
            body, client = body_of(reply), int(context.node_config["partition-id"])
            if isinstance(body, bytes) and TrainRequest.from_bytes(body_of(message)).kind == "fedavg":
                payload = TrainReply.from_bytes(body).payload
                totals[client] += struct.unpack_from("<f", payload, HEADER_BYTES + 4 * client)[0]
        return reply

    return app


def main(
    multiplier: Annotated[float, typer.Option(help="noise multiplier of each round")] = 4.0,
    rounds: Annotated[int, typer.Option(min=1)] = 4,
    clients: Annotated[int, typer.Option(min=30, max=640, help="of which each is a canary")] = 60,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Audit whole runs, with the noise that is accounted for and with less of it."""
    rows = [
        audit(kind, multiplier, rounds, clients, drawn, seed)
        for kind in KINDS for drawn in NOISE for seed in range(seeds)
    ]  # fmt: skip
    print(table(rows, NOISE))
    write_results("audit_trained", settings={"clients": clients, "delta": DELTA, "seeds": seeds}, rows=rows)
    fail_if_refuted(rows)


if __name__ == "__main__":
    run_command(main)
