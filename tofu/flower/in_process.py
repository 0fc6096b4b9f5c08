"""A ServerApp and a ClientApp in one process: no ray, no port, nothing to start or to clean up.

Messages and contexts pass through Flower's own serialization, so an object that a deployment could not send fails here,
too. Each node answers one message at a time, in the order sent;
`workers` threads share the nodes.
"""

import ast
import ctypes
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Self

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from tofu.errors import SettingError, TofuError, described
from tofu.flower.internals import (
    CLIENT_ERROR,
    OLDER_API,
    SERVER_NODE,
    ConfigValue,
    Run,
    context_bytes,
    copy_context,
    inflate,
    message_errors,
    restore_state,
    serialize,
    task_identity,
    unavailable_reply,
)
from tofu.flower.policy import NO_POLICY
from tofu.settings import python_call

_LOG = logging.getLogger(__name__)

# Flower draws run, task and node ids from 64 random bits. Ids of that length make messages as long as in a deployment,
# and reveal fields that hold only signed 64-bit numbers.
_RUN_ID = _TASK_ID = _FIRST_NODE_ID = 1 << 63

_GRACE_SECONDS = 0.2
_STOP_SECONDS = 0.8


@python_call
def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise SettingError(name, value, "a whole number above 0")


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    run_config: dict[str, ConfigValue],
    num_supernodes: int,
    workers: int = 2,
    node_config: Callable[[int], dict[str, ConfigValue]] | None = None,
) -> Context:
    """Run `server_app` in the calling thread against `num_supernodes` nodes that all run `client_app`.

    Messages that are unanswered when the server app ends are abandoned: their handlers are interrupted. One run at a
    time in a process, because Flower keeps the identity of the running task in a global.

    Args:
        run_config: what both apps find in `context.run_config`.
        workers: how many nodes answer at the same time.
        node_config: returns, for a partition id, node config entries besides `partition-id` and `num-partitions`. Nodes
            without `data` accept all requests (`tofu.flower.policy`).

    Returns:
        The server app's context as the app left it.

    Raises:
        SettingError: `num_supernodes` or `workers` is below 1.
        BaseException: whatever the server app raises, KeyboardInterrupt included, after the threads were stopped.
    """
    _check_numbers(num_supernodes=num_supernodes, workers=workers)
    contexts = []
    for partition in range(num_supernodes):
        config: dict[str, ConfigValue] = {"partition-id": partition, "num-partitions": num_supernodes}
        config |= node_config(partition) if node_config else {}
        if "data" not in config:  # the client runs in the server's process and has no data of its own
            config.setdefault("policy", NO_POLICY)
        contexts.append(Context(_RUN_ID, _FIRST_NODE_ID + partition, config, RecordDict(), dict(run_config)))
    context = Context(_RUN_ID, SERVER_NODE, {}, RecordDict(), dict(run_config))
    with task_identity(_RUN_ID, _TASK_ID), _one_thread_parses():
        grid = InProcessGrid(client_app, contexts, workers=workers)
        try:
            server_app(grid, context)
        finally:
            grid.close()
    return context


@contextmanager
def _one_thread_parses() -> Iterator[None]:
    """While the block runs, only one thread at a time is in `ast.parse`.

    In CPython 3.11 two threads in it may fail with "AST constructor recursion depth mismatch", and numpy parses the
    header of each array that it loads, in Flower as in an app's own code. From 3.12 on threads do not switch there.
    """
    if sys.version_info >= (3, 12):
        yield
        return
    parse, lock = ast.parse, threading.RLock()

    def parse_alone(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return parse(*args, **kwargs)

    ast.parse = parse_alone
    try:
        yield
    finally:
        ast.parse = parse


class InProcessGrid(Grid):
    """Passes messages to threads that call the client app.

    As in a deployment: a message to an unknown node gets the id "", a reply that is asked for after the message's
    time to live (or for a message that is not known) is an error from the SuperLink's own node id, and an exception
    in the client app is an error reply.

    Args:
        contexts: one for each node, with its id and its config.
        workers: number of threads.
    """

    def __init__(self, client_app: ClientApp, contexts: Sequence[Context], *, workers: int) -> None:
        self._client_app = client_app
        self._run = Run.create_empty(_RUN_ID)
        self._nodes = {context.node_id: _Node(context) for context in contexts}
        self._sent: dict[str, _Sent] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._ready: SimpleQueue[_Node | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"client-app-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return Run(**vars(self._run))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, set their `metadata.message_id`, and return their ids in the same order.

        Raises:
            ValueError: a message that a SuperLink would refuse: expired, a reply, or from another run.
            RuntimeError: the run is over.
        """
        identities = []
        contents: dict[str, bytes] = {}
        for message in messages:
            parcel = _Parcel.pack(message, contents)
            errors = message_errors(message, reply=False)
            if message.metadata.run_id != self._run.run_id:
                errors.append("`metadata.run_id` is of another run")
            if errors:
                raise ValueError(", ".join(errors))
            identities.append(self._post(message, parcel))
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived to the messages with these ids, in their order.

        Each is returned once.
        """
        replies = []
        for identity in message_ids:
            with self._changed:
                sent = self._sent.get(identity)
                if sent is not None and not sent.settled:
                    continue
                self._sent.pop(identity, None)
            if sent is None or sent.reply is None or sent.expired:
                replies.append(unavailable_reply(identity, self._run.run_id))
            else:
                replies.append(sent.reply.unpack())
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for their replies, at most `timeout` seconds; replies in the order of the messages."""
        order = [identity for identity in self.push_messages(messages) if identity]
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while waiting := [sent for sent in map(self._sent.get, order) if sent is not None and not sent.settled]:
                left = min(sent.expires_at for sent in waiting) - time.monotonic()
                if end is not None:
                    left = min(left, end - time.monotonic())
                    if left <= 0:
                        break
                self._changed.wait(min(max(left, 0.0), threading.TIMEOUT_MAX))
        return self.pull_messages(order)

    def contexts(self) -> dict[str, bytes]:
        """Every node's context as Flower serializes it, by partition; only while no message is under way."""
        return {node.name: context_bytes(node.context) for node in self._nodes.values()}

    def restore_contexts(self, contexts: Mapping[str, bytes]) -> None:
        """Restore the nodes' `Context.state` from what `contexts` returned. Raises RunError for other bytes."""
        for node in self._nodes.values():
            restore_state(node.context, contexts.get(node.name, b""), node.name)

    def close(self) -> None:
        """Drop queued messages, interrupt running handlers, and end the threads; takes about a second."""
        with self._changed:
            self._closed = True
            self._sent.clear()
            for node in self._nodes.values():
                node.inbox.clear()
        for _ in self._threads:
            self._ready.put(None)
        self._join(_GRACE_SECONDS)
        for thread in self._threads:
            if thread.is_alive() and thread.ident is not None:
                # A thread cannot be killed, but its Python code can be made to raise at its next step, which ends a
                # training loop at its next batch. One that does not return from C dies with the process: a daemon.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        self._join(_STOP_SECONDS)

    def _join(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _post(self, message: Message, parcel: "_Parcel") -> str:
        node = self._nodes.get(message.metadata.dst_node_id)
        if node is None:
            _LOG.error("message to node %d, which is not there", message.metadata.dst_node_id)
            return ""
        with self._changed:
            if self._closed:
                raise RuntimeError("the run is over")
            for identity in [identity for identity, sent in self._sent.items() if sent.expired]:
                del self._sent[identity]
            self._sent[parcel.identity] = _Sent(time.monotonic() + message.metadata.ttl, parcel)
            node.inbox.append(parcel.identity)
            if not node.busy:
                node.busy = True
                self._ready.put(node)
        return parcel.identity

    def _work(self) -> None:
        with suppress(SystemExit):
            while (node := self._ready.get()) is not None:
                self._answer_next(node)
                with self._changed:
                    if node.inbox:
                        self._ready.put(node)
                    else:
                        node.busy = False

    def _answer_next(self, node: "_Node") -> None:
        with self._changed:
            sent = self._sent.get(node.inbox.popleft()) if node.inbox else None
            if sent is None or sent.expired or sent.request is None:
                return
            request, sent.request = sent.request, None
        try:
            message = request.unpack()
            reply = self._answer(node, message, sent.expires_at)
        except Exception as error:
            # This thread must go on: a node whose message is neither answered nor dropped would stay busy forever.
            if self._closed:
                raise SystemExit from None
            _LOG.error("a message to client %s got lost", node.name, exc_info=error)
            reply = None
        with self._changed:
            sent.reply, sent.lost = reply, reply is None
            self._changed.notify_all()

    def _answer(self, node: "_Node", message: Message, expires_at: float) -> "_Parcel":
        context = node.context
        try:
            try:
                reply = self._client_app(message=message, context=context)
            finally:
                # As in a SuperNode, the state that a failed handler has written is kept.
                node.context = copy_context(context)
            if not isinstance(reply, Message):
                raise TypeError(f"the client app returned {type(reply).__name__}, not a Message")
            if reply.metadata.ttl <= 0:  # Flower has computed it by the time of day
                reply.metadata.ttl = expires_at - time.monotonic()
            parcel = _Parcel.pack(reply, {})
            errors = message_errors(reply, reply=True)
            if reply.metadata.reply_to_message_id != message.metadata.message_id:
                errors.append("not a reply to the message that was handled")
            if errors:
                raise ValueError(", ".join(errors))
            return parcel
        except BaseException as error:
            if self._closed:
                raise SystemExit from None
            _log_failure(node.name, message, error)
            failure = Error(code=CLIENT_ERROR, reason=described(error))
            return _Parcel.pack(Message(failure, reply_to=message), {})


def _log_failure(client: str, message: Message, error: BaseException) -> None:
    """Log what a client app raised: in one line if the two apps do not fit, otherwise with its traceback.

    Such an app asks for arrays where the strategy sends none, or for records of Flower's older API.
    """
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    missing = isinstance(key, str) and key not in message.content
    unfit = missing and (str(key).startswith(OLDER_API) or not message.content.array_records)
    kind = message.metadata.message_type
    if unfit or isinstance(error, TofuError):
        _LOG.error("client %s failed in %s: %s", client, kind, described(error))
    else:
        _LOG.error("client %s failed in %s", client, kind, exc_info=error)


@dataclass(frozen=True)
class _Parcel:
    """A message on its way: its objects as Flower serializes them, by their content addresses."""

    identity: str
    contents: dict[str, bytes]

    @classmethod
    def pack(cls, message: Message, shared: dict[str, bytes]) -> Self:
        """Serialize a message; objects that other messages carry, too, are taken from `shared` or added to it."""
        return cls(*serialize(message, shared))

    def unpack(self) -> Message:
        """Deserialize the message. This works once, because it empties `contents`."""
        return inflate(self.identity, self.contents)


@dataclass
class _Sent:
    """A message whose reply was not pulled yet.

    Attributes:
        expires_at: end of its time to live (`time.monotonic`, so that setting the clock does not matter).
        request: None once a worker has taken it.
        reply: None until the worker has finished.
        lost: whether there will be no reply.
    """

    expires_at: float
    request: _Parcel | None
    reply: _Parcel | None = None
    lost: bool = False

    @property
    def expired(self) -> bool:
        """Whether the time to live is over. A SuperLink then returns no reply, even if one had arrived in time."""
        return time.monotonic() >= self.expires_at

    @property
    def settled(self) -> bool:
        return self.reply is not None or self.lost or self.expired


@dataclass
class _Node:
    """A node: its context, and the ids of the messages that it has not answered; `busy` while it is queued or works."""

    context: Context
    inbox: deque[str] = field(default_factory=deque)
    busy: bool = False

    @property
    def name(self) -> str:
        return str(self.context.node_config.get("partition-id", self.context.node_id))
