"""The ledger: the size in bytes of every message, as Flower serializes it."""

from collections.abc import Mapping

from flwr.app import ConfigRecord, Message, Metadata, RecordDict

from tofu.data import ImageShape
from tofu.flower.internals import message_bytes
from tofu.weights import FINGERPRINT_BYTES
from tofu.wire import FIELD, HEADER_BYTES, RECORD, TrainReply, TrainRequest

_TOTALS = ("uplink", "downlink", "fedavg_uplink", "fedavg_downlink", "payload", "float32")


def client_order(name: str) -> tuple[int, str]:
    """Sort key of client names: partition numbers first, then other names alphabetically."""
    return (int(name), "") if name.isdecimal() else (2**63, name)


def reply_overhead() -> int:
    """Return the number of bytes that a client's reply adds to its payload,
    measured on a message with ids of realistic length.
    """
    payload = bytes(1000)
    reply = TrainReply(1, 0.0, 0.0, 0.0, 0.0, 0.0, payload)
    long = 1 << 63  # run and node ids of a deployment are random 64-bit numbers
    metadata = Metadata(
        run_id=long, message_id="0" * 64, src_node_id=long, dst_node_id=1, reply_to_message_id="0" * 64,
        group_id="10", created_at=1.7e9, ttl=3600.0, message_type="train",
    )  # fmt: skip
    return message_bytes(_message(reply, metadata)) - len(payload)


class Ledger:
    """Counts every message of a run as serialized.

    Attributes:
        uplink, downlink: bytes so far, from the clients and to the clients.
        fedavg_uplink, fedavg_downlink: the same if every reply carried its update, and every request the weights, as
            float32 in the same message.
        payload, float32: bytes of the updates' payloads so far (headers included), and of the same updates as float32.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []
        self._full_message: dict[tuple[str, int], int] = {}
        self.uplink = self.downlink = self.fedavg_uplink = self.fedavg_downlink = self.payload = self.float32 = 0

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
        fedavg: bool = True,
    ) -> None:
        """Count one message.

        Args:
            kind: the round's kind, or "hello".
            direction: "uplink" or "downlink".
            payload_bytes: length of the payload inside, header included.
            full_payload_bytes: length of the same payload as float32, header included.
            fedavg: whether FedAvg would send this message, too.
        """
        size = message_bytes(message)
        row: dict[str, object] = {
            "round": round_, "kind": kind, "direction": direction, "client": client, "bytes": size,
        }  # fmt: skip
        if payload_bytes is not None:
            row["payload_bytes"] = payload_bytes
        same = 0 if not fedavg else size
        if fedavg and full_payload_bytes is not None:
            same = self._full(message, direction, full_payload_bytes)
        if direction == "downlink":
            self.downlink += size
            self.fedavg_downlink += same
        else:
            self.uplink += size
            self.fedavg_uplink += same
            if payload_bytes is not None and full_payload_bytes is not None:
                self.payload += payload_bytes
                self.float32 += full_payload_bytes - HEADER_BYTES
        self._rows.append(row)

    def take(self) -> list[dict[str, object]]:
        """Return the rows since the last call, sorted by client, because the order of replies varies."""
        rows, self._rows = sorted(self._rows, key=lambda row: client_order(str(row["client"]))), []
        return rows

    def totals(self) -> dict[str, int]:
        """Return all totals, for a checkpoint."""
        return {name: getattr(self, name) for name in _TOTALS}

    def restore(self, totals: Mapping[str, int]) -> None:
        """Restore what `totals` returned."""
        for name in _TOTALS:
            setattr(self, name, int(totals[name]))

    def _full(self, message: Message, direction: str, full_payload_bytes: int) -> int:
        """Size of the same message with a float32 payload, measured once for each length."""
        key = direction, full_payload_bytes
        if key not in self._full_message:
            payload = bytes(full_payload_bytes)
            reply = TrainReply(1, 0.0, 0.0, 0.0, 0.0, 0.0, payload)
            request = TrainRequest("fedavg", -1, ImageShape(1, 1, 1, 1), payload, bytes(FINGERPRINT_BYTES))
            blank = reply if direction == "uplink" else request
            self._full_message[key] = message_bytes(_message(blank, message.metadata))
        return self._full_message[key]

    def ratio(self) -> float:
        """Return FedAvg's uplink bytes over this run's, complete messages."""
        return self.fedavg_uplink / self.uplink if self.uplink else 1.0

    def both_ratio(self) -> float:
        """Return FedAvg's bytes in both directions over this run's, complete messages."""
        ours = self.uplink + self.downlink
        return (self.fedavg_uplink + self.fedavg_downlink) / ours if ours else 1.0

    def payload_ratio(self) -> float:
        """Float32 bytes of the updates over bytes of their payloads."""
        return self.float32 / self.payload if self.payload else 1.0


def _message(reply: TrainReply | TrainRequest, metadata: Metadata) -> Message:
    content = RecordDict({RECORD: ConfigRecord({FIELD: reply.to_bytes()})})
    return Message(content, metadata=metadata)  # type: ignore[call-overload, no-any-return]
