"""The real client app as the app of a node that misbehaves: it replies with something else, too late, or dies.

`faults.json` in the working directory, which in a federation of processes is its folder, says who does what when:
client name -> "round:stage" -> fault. The stage of the training is "mask" in all rounds. A node that dies takes its
SuperNode and its SuperExec with it, as a machine that loses power would.
"""

import dataclasses
import json
import os
import signal
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client import app as honest
from deploy.state import State
from tofu.weights import FINGERPRINT_BYTES
from tofu.wire import FIELD, HEADER_BYTES, RECORD, SECURE, SecureQuery, TrainReply

FAULTS_FILE = "faults.json"
HUGE_BYTES = 2**24
BOMB_BYTES = 2**30
_KEPT = "misbehaving"

Fault = Callable[[Message, Message, Context], Message]
"""From a request, the honest reply and the client's context, the reply that is sent."""

app = ClientApp()
app.query()(honest.hello)


@app.train()
def train(message: Message, context: Context) -> Message:
    return _answer(honest.train, message, context, "mask")


@app.query(SECURE)
def secure(message: Message, context: Context) -> Message:
    return _answer(honest.secure, message, context, SecureQuery.from_bytes(_content(message)).stage)


def _answer(own: Callable[[Message, Context], Message], message: Message, context: Context, stage: str) -> Message:
    faults = json.loads(Path(FAULTS_FILE).read_text()).get(honest.client_name(context), {})
    fault = faults.get(f"{message.metadata.group_id}:{stage}", "")
    if fault == "dies":
        _die(f"node-{honest.client_name(context)}")
    reply = own(message, context)
    if not fault:
        if not reply.has_error():
            context.state[_KEPT] = ConfigRecord({FIELD: _content(reply)})
        return reply
    return _FAULTS[fault](message, reply, context)


def _die(name: str) -> None:
    state = State.read(Path.cwd())
    assert state is not None
    os.kill(state.members[name].pid, signal.SIGKILL)
    os.killpg(state.members[f"{name}-exec"].pid, signal.SIGKILL)
    time.sleep(60)


def _lost(request: Message, reply: Message, context: Context) -> Message:
    return Message(Error(code=0, reason="the battery is empty"), reply_to=request)


def _late(request: Message, reply: Message, context: Context) -> Message:
    time.sleep(20)
    return reply


def _replayed(request: Message, reply: Message, context: Context) -> Message:
    """What it sent the last time that it was honest."""
    return _saying(request, _bytes(context.state.config_records[_KEPT][FIELD]))


def _huge(request: Message, reply: Message, context: Context) -> Message:
    return _saying(request, os.urandom(HUGE_BYTES))


def _with_payload(change: Callable[[bytes], bytes]) -> Fault:
    def fault(request: Message, reply: Message, context: Context) -> Message:
        honest_reply = TrainReply.from_bytes(_content(reply))
        changed = dataclasses.replace(honest_reply, payload=change(honest_reply.payload))
        return _saying(request, changed.to_bytes())

    return fault


def _with_body(change: Callable[[bytes], bytes]) -> Fault:
    """The honest header, its checksum fitting, before another body."""

    def changed(data: bytes) -> bytes:
        body = change(data[HEADER_BYTES:])
        return data[: HEADER_BYTES - 4] + struct.pack("<I", zlib.crc32(body)) + body

    return _with_payload(changed)


def _bomb(body: bytes) -> bytes:
    """A gibibyte of zeros, deflated to a mebibyte."""
    deflate, piece = zlib.compressobj(9), bytes(2**20)
    return b"".join(deflate.compress(piece) for _ in range(BOMB_BYTES // len(piece))) + deflate.flush()


_FAULTS: dict[str, Fault] = {
    "lost": _lost,
    "late": _late,
    "replayed": _replayed,
    "huge": _huge,
    "rubbish": lambda request, reply, context: _saying(request, b"\xff" * 99),
    "truncated": _with_payload(lambda data: data[:-7]),
    "nan": _with_body(lambda body: struct.pack("<f", float("nan")) * (len(body) // 4)),
    "another model": _with_payload(
        lambda data: data[: HEADER_BYTES - 4 - FINGERPRINT_BYTES] + bytes(FINGERPRINT_BYTES) + data[HEADER_BYTES - 4 :]
    ),
    "wrong shapes": _with_body(lambda body: body[: len(body) // 8 * 4]),
    "bomb": _with_body(_bomb),
}


def _saying(request: Message, data: bytes) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord({FIELD: data})}), reply_to=request)


def _content(message: Message) -> bytes:
    return _bytes(message.content.config_records[RECORD][FIELD])


def _bytes(value: object) -> bytes:
    assert isinstance(value, bytes)
    return value
