"""Recordings of any Flower app's messages, so that attacks can be tried on what its server receives.

strategy = tofu.record(FedAvg(), "recordings", input_shape=(3, 32, 32), batch_size=32)        # server
$ tofu attack recordings --model my_app.task:Net --dataset my_app.task:images_of              # then
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from tofu.errors import PayloadError, SettingError
from tofu.flower.compress import Compressed
from tofu.flower.update_codec import RECORD, tensors_of
from tofu.flower.wrapper import StrategyWrapper, only_arrays
from tofu.recording import AppCodec, AppRecording
from tofu.settings import python_call

LOG = logging.getLogger("tofu.flower")
_RATES = ("lr", "learning-rate", "learning_rate")


@python_call
def record(
    inner: Strategy, folder: str | Path, *, input_shape: tuple[int, int, int], batch_size: int, epochs: int = 1,
    lr: float | None = None, mean: float = 0.5, std: float = 0.5, clients: int | None = None,
) -> "Recorded":  # fmt: skip
    """Return a strategy that saves the train replies which `inner` receives, and otherwise is `inner`.

    Around `Compressed` it saves payloads, around a plain strategy the arrays, and inside of `SecureAggregation`, as in
    `SecureAggregation(record(FedAvg(), ...))`, the sums. A recording may reveal the clients' data:
    protect it like them.

    Args:
        inner: any strategy of Flower's Message API, or `Compressed`.
        folder: recordings are saved in its subfolder `record`.
        input_shape: channels, height and width of the model's input.
        batch_size: batch size of the clients' local training.
        epochs: epochs of the clients' local training.
        lr: step size of the clients; by default what the train message's config has as `lr` or `learning-rate`.
        mean: pixels in [0, 1] minus this, divided by `std`, are the model's input.
        std: see `mean`.
        clients: maximum number of clients whose messages are saved, in the order of their names (`partition-id`, or
            the node's number) whichever replies first; None saves all.

    Raises:
        SettingError: an argument is out of range.

    Example:
        >>> from flwr.serverapp.strategy import FedAvg
        >>> strategy = record(FedAvg(), "recordings", input_shape=(1, 28, 28), batch_size=32)
    """
    for name, value in (("batch_size", batch_size), ("epochs", epochs), ("clients", 1 if clients is None else clients)):
        if value < 1:
            raise SettingError(name, value, "a whole number above 0")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise SettingError("input_shape", input_shape, "channels, height and width")
    if std <= 0 or (lr is not None and lr <= 0):
        raise SettingError("lr" if std > 0 else "std", lr if std > 0 else std, "a number above 0")
    known = {
        "input_shape": input_shape, "batch_size": batch_size, "epochs": epochs, "lr": lr, "mean": mean, "std": std,
    }  # fmt: skip
    return Recorded(inner, Path(folder), known, clients)


class Recorded(StrategyWrapper):
    """The strategy that `record` returns.

    Args:
        known: fields of `AppRecording` that are the same in all messages.
    """

    def __init__(self, inner: Strategy, folder: Path, known: dict[str, Any], clients: int | None) -> None:
        super().__init__(inner)
        self._folder, self._known, self._clients = folder, known, clients
        self._sent: dict[int, Message] = {}
        self._names: set[str] = set()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the inner strategy's messages."""
        messages = list(self._configure_train(server_round, arrays, config, grid))
        self._sent = {message.metadata.dst_node_id: message for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Save the replies, then aggregate them. Raises RunError if the folder cannot be written."""
        replies = list(replies)
        for reply in sorted((reply for reply in replies if not reply.has_error()), key=_by_name):
            try:
                recording = self._recording(reply, server_round)
            except PayloadError as error:
                LOG.warning("round %d: a reply is not recorded: %s", server_round, error)
                continue
            if self._wants(recording.client):
                recording.save(self._folder)
        return self._aggregate_train(server_round, replies)

    def _wants(self, client: str) -> bool:
        if client in self._names or self._clients is None or len(self._names) < self._clients:
            self._names.add(client)
            return True
        return False

    def _recording(self, reply: Message, round_: int) -> AppRecording:
        """Raises PayloadError if the reply holds neither arrays nor a payload, or was not asked for."""
        node = reply.metadata.src_node_id
        if node not in self._sent:
            raise PayloadError(f"node {node} was not asked in this round")
        metrics = _metrics(reply)
        examples = metrics.get(str(getattr(self, "weighted_by_key", "num-examples")), 0)
        clients = metrics.get("tofu-clients", 0)
        if isinstance(examples, list) or isinstance(clients, list) or not (1 <= examples < 2**62 > clients >= 0):
            raise PayloadError(f"node {node} reports {examples} examples of {clients} clients, expected at least 1")
        base, codec, payload = self._contents(reply, node)
        return AppRecording(
            round=round_,
            client="sum" if clients else _name(reply),
            clients=max(1, int(clients)),
            examples=int(examples),
            codec=codec,
            base=base,
            payload=payload,
            **{**self._known, "lr": self._known["lr"] or _rate(self._sent[node])},
        )

    def _contents(self, reply: Message, node: int) -> tuple[dict[str, Tensor], AppCodec | None, bytes]:
        """Return the arrays that the reply is relative to, the codec's arguments, and the payload."""
        request = reply.content.config_records.get(RECORD)
        if request is not None and isinstance(self.inner, Compressed):
            sent, payload = self.inner.sent_to(node), request.get("payload")
            if sent is None or not isinstance(payload, bytes):
                raise PayloadError(f"node {node} sent no payload")
            return sent.held, self.inner.codec.arguments, payload
        _, record = only_arrays(reply.content, "the reply")
        _, arrays = only_arrays(self._sent[node].content, "the train message")
        new = {name: value.contiguous() for name, value in tensors_of(record).items()}
        return tensors_of(arrays), None, safetensors.torch.save(new)


def _metrics(reply: Message) -> dict[str, Any]:
    return {name: value for part in reply.content.metric_records.values() for name, value in part.items()}


def _name(reply: Message) -> str:
    """Return the number of the client's partition if it reports one, otherwise that of its node."""
    return str(_metrics(reply).get("partition-id", reply.metadata.src_node_id))


def _by_name(reply: Message) -> tuple[int, str]:
    """Sorts numbers by their size."""
    return len(_name(reply)), _name(reply)


def _rate(message: Message) -> float | None:
    """Return the learning rate in a train message's config."""
    for config in message.content.config_records.values():
        for name in _RATES:
            value = config.get(name)
            if isinstance(value, int | float) and value > 0:
                return float(value)
    return None
