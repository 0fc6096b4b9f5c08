"""Cost of a round for the server with 10 to 10,000 clients: time per client, and memory in excess of the model's.

The server is the real one (`server.runner.RoundRunner`), with LeNet-5. The clients are replayed: each answers with
the payload that one real client made from its update, so the server checks, decodes, adds and counts as it would. Every
size runs in a process of its own, whose peak memory is read at the end.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Annotated, Any, cast

import torch
import typer
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from benchmarks.common import joined, print_table, run_command, several, write_results
from server.ledger import Ledger
from server.runner import RoundRunner
from tofu.compression import uplink_compressor
from tofu.data import ImageShape, LabeledImages
from tofu.flower.internals import task_identity
from tofu.flower.transport import GridTransport
from tofu.formatting import format_bytes
from tofu.models import build_model
from tofu.observers.base import Observer
from tofu.reference_model import ReferenceModel
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import difference, load_weights, weights_of
from tofu.wire import FIELD, RECORD, Payload, TrainReply, TrainRequest

SHAPE = ImageShape(1, 28, 28, 10)
IMAGES = 600
SIZES = (10, 100, 1_000, 10_000)


class ReplayGrid(Grid):
    """A grid of clients that all answer with the same body, relative to whatever weights they were sent."""

    def __init__(self, clients: int, code: int, body: bytes) -> None:
        self._clients, self._code, self._body = clients, code, body
        self._sent: dict[str, Message] = {}
        self._number = 0

    def set_run(self, run: Any) -> None:
        raise NotImplementedError  # nothing here belongs to a run

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return range(2, 2 + self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            self._number += 1
            identity = f"{self._number:064d}"
            message.metadata.__dict__["_message_id"] = identity
            self._sent[identity] = message
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._reply(self._sent.pop(identity)) for identity in message_ids]

    def _reply(self, message: Message) -> Message:
        if message.metadata.message_type == "query":
            record = ConfigRecord({"client": str(message.metadata.dst_node_id), "examples": IMAGES})
            return Message(RecordDict({RECORD: record}), reply_to=message)
        request = TrainRequest.from_bytes(message.content.config_records[RECORD][FIELD])
        payload = Payload(self._code, int(message.metadata.group_id), request.identity, self._body).to_bytes()
        reply = TrainReply(IMAGES, 1.0, 0.5, 0.7, 1.0, 1.0, payload)
        return Message(RecordDict({RECORD: ConfigRecord({FIELD: reply.to_bytes()})}), reply_to=message)


def measure(clients: int, ratio: float) -> dict[str, Any]:
    """Two rounds, the second of them timed."""
    torch.set_num_threads(1)
    settings = Settings.of({"model": "lenet5", "clients": clients, "ratio": ratio, "rounds": 2, "proxies_below": 1.0})
    generator = torch.Generator().manual_seed(0)
    data = LabeledImages(
        torch.randint(0, 256, (IMAGES, 1, 28, 28), dtype=torch.uint8, generator=generator),
        torch.randint(0, 10, (IMAGES,), generator=generator), 10,
    )  # fmt: skip
    network = ReferenceModel(build_model("lenet5", SHAPE).eval(), SHAPE)
    base = weights_of(network.model)
    train_locally(network.model, data, LocalTrainingConfig(1, 32, 0.05), generator=generator)
    update = difference(weights_of(network.model), base)
    load_weights(network.model, base)
    compressor = uplink_compressor(settings, "compressed", network)
    body = compressor.compress(network, update, generator=generator).body
    decode = time.perf_counter()
    for _ in range(20):
        compressor.decompress(network, body)
    decode = (time.perf_counter() - decode) / 20
    with task_identity():
        ledger = Ledger()
        grid = ReplayGrid(clients, compressor.code, body)
        federation = RoundRunner(GridTransport(grid), network, data, settings, ledger, Observer())
        federation.run_round(1)
        ledger.take()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        federation.run_round(2)
        seconds = time.perf_counter() - began
    return {
        "clients": clients,
        "seconds": seconds,
        "seconds_per_client": seconds / clients,
        "decode_seconds": decode,
        "peak_bytes": 1024 * max(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss),
        "payload_bytes": len(body),
        "weights_bytes": network.param_spec.float32_bytes,
    }


def main(
    sizes: Annotated[Any, several(int)] = joined(SIZES),
    ratio: float = 200.0,
    one: Annotated[int | None, typer.Option(help="measure one size in this process and print its row as JSON")] = None,
) -> None:
    """Cost of a round for the server with 10 to 10,000 clients: time per client, and memory beyond the model."""
    if one:
        print(json.dumps(measure(one, ratio)))
        return
    rows = []
    for size in sizes:
        command = [sys.executable, "-m", "benchmarks.scale", "--one", str(size), "--ratio", str(ratio)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"{size} clients: {rows[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    print(write_results("scale", settings={"model": "lenet5", "ratio": ratio}, rows=rows))
    smallest = rows[0]
    print_table(
        (
            "clients",
            "time per client, relative to the first",
            "fraction spent decoding",
            "peak memory",
            "more than the first",
        ),
        [
            (
                f"{row['clients']:,}",
                f"{row['seconds_per_client'] / min(r['seconds_per_client'] for r in rows):.2f}",
                f"{row['decode_seconds'] / row['seconds_per_client']:.0%}",
                format_bytes(cast("int", row["peak_bytes"])),
                format_bytes(max(0, row["peak_bytes"] - smallest["peak_bytes"])),
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    run_command(main)
