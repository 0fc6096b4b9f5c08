"""What travelled: the bytes of every message, as Flower serialises it."""

from collections.abc import Callable

from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from tofu.messages import FIELD, RECORD, TrainReply
from tofu.payload import HEADER_BYTES


def message_bytes(message: Message) -> int:
    """The exact size of a message in bytes: its objects, headers included, and the tree of their content addresses.

    Objects with equal content travel once and count once. HTTP headers and protobuf envelopes of the requests that
    carry the objects are not in it.
    """
    with no_object_id_recompute():
        objects = get_all_nested_objects(message)
        return sum(len(item.deflate()) for item in objects.values()) + int(get_object_tree(message).ByteSize())


def reply_overhead() -> int:
    """Bytes that a client's reply adds to its payload, measured on a message of the length that real ones have."""
    payload = bytes(1000)
    reply = TrainReply(1, 0.0, 0.0, 0.0, 0.0, 0.0, payload)
    long = 1 << 63  # run and node ids of a deployment are random 64-bit numbers
    metadata = Metadata(
        run_id=long, message_id="0" * 64, src_node_id=long, dst_node_id=1, reply_to_message_id="0" * 64,
        group_id="10", created_at=1.7e9, ttl=3600.0, message_type="train",
    )  # fmt: skip
    return message_bytes(_message(reply, metadata)) - len(payload)


class Ledger:
    """Counts every message of a run as serialised.

    Args:
        write: called with each row, for example to append it to a file.

    Attributes:
        uplink, downlink: bytes so far, towards the server and towards the clients.
        fedavg_uplink: what the uplink would be had every reply carried its update as float32, in the same message.
        payload, float32: bytes of the updates' payloads so far (headers included), and of the same updates as float32.
    """

    def __init__(self, write: Callable[[dict[str, object]], None]) -> None:
        self._write = write
        self._full_message: dict[int, int] = {}
        self.uplink = self.downlink = self.fedavg_uplink = self.payload = self.float32 = 0

    def add(
        self,
        message: Message,
        *,
        round_: int,
        kind: str,
        direction: str,
        client: str,
        payload_bytes: int | None = None,
        full_payload_bytes: int | None = None,
    ) -> None:
        """Count one message.

        Args:
            kind: of the round, or "hello".
            direction: "uplink" or "downlink".
            payload_bytes: length of the payload inside, header included.
            full_payload_bytes: length that the payload of the same update would have as float32, header included.
        """
        size = message_bytes(message)
        row: dict[str, object] = {
            "round": round_, "kind": kind, "direction": direction, "client": client, "bytes": size,
        }  # fmt: skip
        if payload_bytes is not None:
            row["payload_bytes"] = payload_bytes
        if direction == "downlink":
            self.downlink += size
        else:
            self.uplink += size
            self.fedavg_uplink += size if full_payload_bytes is None else self._full(message, full_payload_bytes)
            if payload_bytes is not None and full_payload_bytes is not None:
                self.payload += payload_bytes
                self.float32 += full_payload_bytes - HEADER_BYTES
        self._write(row)

    def _full(self, message: Message, full_payload_bytes: int) -> int:
        """Bytes of the same message with a float32 payload, measured once for each size."""
        if full_payload_bytes not in self._full_message:
            blank = TrainReply(1, 0.0, 0.0, 0.0, 0.0, 0.0, bytes(full_payload_bytes))
            self._full_message[full_payload_bytes] = message_bytes(_message(blank, message.metadata))
        return self._full_message[full_payload_bytes]

    def ratio(self) -> float:
        """FedAvg's uplink bytes over ours, whole messages."""
        return self.fedavg_uplink / self.uplink if self.uplink else 1.0

    def payload_ratio(self) -> float:
        """Float32 bytes of the updates over bytes of their payloads."""
        return self.float32 / self.payload if self.payload else 1.0


def _message(reply: TrainReply, metadata: Metadata) -> Message:
    content = RecordDict({RECORD: ConfigRecord({FIELD: reply.to_bytes()})})
    return Message(content, metadata=metadata)  # type: ignore[call-overload, no-any-return]
