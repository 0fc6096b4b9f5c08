"""The in-process grid: what a deployment promises (state, order, errors, expiry) holds here too."""

import ast
import datetime
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from tests.processes import wait_for
from tofu.errors import SettingError
from tofu.flower import in_process
from tofu.flower.in_process import run_in_process
from tofu.flower.transport import GridTransport

Array = npt.NDArray[np.float32]
Main = Callable[[Grid, Context], None]

ENDLESS = 1_000_000
"""Steps of a message "sleep", nearly three hours."""


def serve(main: Main, client: ClientApp, *, nodes: int = 3, workers: int = 2) -> Context:
    app = ServerApp()
    app.main()(main)
    return run_in_process(app, client, run_config={"scale": 0.5}, num_supernodes=nodes, workers=workers)


def client_app(ended: list[int] | None = None) -> ClientApp:
    """Counts its messages in its state and answers with an array that depends on who and when it is.

    Args:
        ended: receives the number of steps of each message "sleep" that was not interrupted.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        before = context.state.metric_records.get("count", MetricRecord({"n": 0}))["n"]
        assert isinstance(before, int)
        count, partition = before + 1, int(context.node_config["partition-id"])
        context.state["count"] = MetricRecord({"n": count})
        given = message.content.array_records["w"].to_numpy_ndarrays()[0]
        array = given * float(context.run_config["scale"]) + np.float32(partition + 0.1 * count)
        metrics = MetricRecord({"n": count, "partition": partition})
        return Message(RecordDict({"w": ArrayRecord([array]), "m": metrics}), reply_to=message)

    @app.train("fail")
    def fail(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ZeroDivisionError("nothing to divide by")
        return Message(RecordDict(), reply_to=message)

    @app.query("sleep")
    def sleep(message: Message, context: Context) -> Message:
        steps = message.content.config_records["s"]["steps"]
        assert isinstance(steps, int)
        for _ in range(steps):
            time.sleep(0.01)
        if ended is not None:
            ended.append(steps)
        return Message(RecordDict(), reply_to=message)

    return app


def train_messages(grid: Grid, weights: Array) -> list[Message]:
    return [Message(RecordDict({"w": ArrayRecord([weights])}), node, "train") for node in grid.get_node_ids()]


def sleep_message(node: int, steps: int, ttl: float | None = None) -> Message:
    return Message(RecordDict({"s": ConfigRecord({"steps": steps})}), node, "query.sleep", ttl=ttl)


def test_state_lasts_from_round_to_round_and_replies_say_what_they_answer() -> None:
    counts: list[list[tuple[object, object]]] = []

    def main(grid: Grid, context: Context) -> None:
        for _ in range(3):
            messages = train_messages(grid, np.ones(2, np.float32))
            identities = list(grid.push_messages(messages))
            assert identities == [message.metadata.message_id for message in messages]
            seen: list[Message] = []
            while len(seen) < 3:
                seen += grid.pull_messages([i for i in identities if i not in {m.metadata.message_id for m in seen}])
                seen = [reply for reply in seen if reply.has_content()]
            by_request = {reply.metadata.reply_to_message_id: reply for reply in seen}
            assert by_request.keys() == set(identities)
            for message in messages:
                reply = by_request[message.metadata.message_id]
                assert reply.metadata.src_node_id == message.metadata.dst_node_id
            metrics = [by_request[i].content.metric_records["m"] for i in identities]
            counts.append([(m["partition"], m["n"]) for m in metrics])

    serve(main, client_app())
    assert counts == [[(0, n), (1, n), (2, n)] for n in (1, 2, 3)]


@pytest.mark.parametrize("workers", [1, 4])
def test_results_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    def run(workers: int) -> bytes:
        result: list[Array] = []

        def main(grid: Grid, context: Context) -> None:
            weights = np.linspace(0, 1, 1000, dtype=np.float32)
            for _ in range(3):
                replies = list(grid.send_and_receive(train_messages(grid, weights)))
                weights = np.mean([r.content.array_records["w"].to_numpy_ndarrays()[0] for r in replies], axis=0)
            result.append(weights)

        serve(main, client_app(), nodes=5, workers=workers)
        return result[0].tobytes()

    assert run(workers) == run(2)


def test_a_failing_client_gives_an_error_reply_and_the_others_answer(caplog: pytest.LogCaptureFixture) -> None:
    replies: list[Message] = []

    def main(grid: Grid, context: Context) -> None:
        messages = [Message(RecordDict(), node, "train.fail") for node in grid.get_node_ids()]
        replies.extend(grid.send_and_receive(messages))
        assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]

    with caplog.at_level(logging.ERROR):
        serve(main, client_app())
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "ZeroDivisionError" in str(replies[1].error.reason)
    assert "client 1 failed in train.fail" in caplog.text


def _unserializable(message: Message, context: Context) -> Message:
    return Message(RecordDict({"m": MetricRecord({"n": 1 << 64})}), reply_to=message)


def _unserializable_state(message: Message, context: Context) -> Message:
    context.state["c"] = ConfigRecord({"n": 1 << 64})
    return Message(RecordDict(), reply_to=message)


def _not_a_message(message: Message, context: Context) -> Message:
    return None  # type: ignore[return-value]


def _not_a_reply(message: Message, context: Context) -> Message:
    return Message(RecordDict(), message.metadata.src_node_id, "query")


def _exit(message: Message, context: Context) -> Message:
    sys.exit(1)


@pytest.mark.parametrize(
    "handler", [_unserializable, _unserializable_state, _not_a_message, _not_a_reply, _exit], ids=lambda f: f.__name__
)
def test_what_could_not_travel_is_an_error_reply(handler: Callable[[Message, Context], Message]) -> None:
    app = ClientApp()
    app.query()(handler)

    def main(grid: Grid, context: Context) -> None:
        for _ in range(2):
            replies = list(grid.send_and_receive([Message(RecordDict(), n, "query") for n in grid.get_node_ids()]))
            assert [reply.has_error() for reply in replies] == [True]

    serve(main, app, nodes=1)


def test_state_written_before_a_failure_is_kept_as_a_supernode_keeps_it() -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        if "c" not in context.state:
            context.state["c"] = ConfigRecord({"n": 1})
            raise ValueError
        return Message(RecordDict(), reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        [node] = grid.get_node_ids()
        outcomes = [
            r.has_error() for _ in range(2) for r in grid.send_and_receive([Message(RecordDict(), node, "query")])
        ]
        assert outcomes == [True, False]

    serve(main, app, nodes=1)


def test_one_node_answers_in_order_and_one_message_at_a_time() -> None:
    app = ClientApp()
    order: list[str] = []
    at_work = threading.Lock()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        assert at_work.acquire(blocking=False)
        time.sleep(0.005)
        order.append(message.metadata.group_id)
        at_work.release()
        return Message(RecordDict(), reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        [node] = grid.get_node_ids()
        messages = [Message(RecordDict(), node, "query", group_id=str(i)) for i in range(10)]
        assert all(reply.has_content() for reply in grid.send_and_receive(messages))

    serve(main, app, nodes=1, workers=4)
    assert order == [str(i) for i in range(10)]


def test_the_app_cannot_reach_into_what_was_sent() -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        message.content.config_records["c"]["v"] = b"changed"
        context.run_config["scale"] = 7.0
        return Message(message.content, reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        record = ConfigRecord({"v": b"as sent"})
        replies = grid.send_and_receive([Message(RecordDict({"c": record}), n, "query") for n in grid.get_node_ids()])
        assert [reply.content.config_records["c"]["v"] for reply in replies] == [b"changed"] * 3
        assert record["v"] == b"as sent"
        assert context.run_config["scale"] == 0.5

    serve(main, app)


def test_send_and_receive_gives_up_after_its_timeout_and_the_run_ends_without_the_slow_client() -> None:
    ended: list[int] = []

    def main(grid: Grid, context: Context) -> None:
        slow, quick, *_ = grid.get_node_ids()
        replies = list(grid.send_and_receive([sleep_message(slow, ENDLESS), sleep_message(quick, 1)], timeout=0.5))
        assert [reply.metadata.src_node_id for reply in replies] == [quick]

    serve(main, client_app(ended))
    assert ended == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("client-app")]


def test_a_message_that_outlives_its_time_is_answered_by_the_superlink_with_an_error() -> None:
    def main(grid: Grid, context: Context) -> None:
        node, *_ = grid.get_node_ids()
        late, queued = sleep_message(node, 100, ttl=0.3), sleep_message(node, 1, ttl=0.3)
        for reply in grid.send_and_receive([late, queued]):
            assert reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE
            assert reply.metadata.src_node_id == 1
        [after] = grid.send_and_receive([sleep_message(node, 1)])
        assert after.has_content()
        [again] = grid.pull_messages([after.metadata.reply_to_message_id])
        assert again.has_error()

    serve(main, client_app())


def test_a_message_that_cannot_be_unpacked_is_an_error_and_its_node_answers_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one worker: a thread that died of it would never answer again, nor would its node look idle."""
    unpack, failing = in_process.inflate, [True]

    def inflate(*arguments: Any) -> Any:
        if failing and threading.current_thread() is not threading.main_thread():
            failing.clear()
            raise SystemError("AST constructor recursion depth mismatch")
        return unpack(*arguments)

    monkeypatch.setattr(in_process, "inflate", inflate)
    outcomes: list[list[bool]] = []

    def main(grid: Grid, context: Context) -> None:
        for _ in range(2):
            replies = grid.send_and_receive(train_messages(grid, np.ones(2, np.float32)))
            outcomes.append(sorted(reply.has_error() for reply in replies))

    serve(main, client_app(), nodes=2, workers=1)
    assert outcomes == [[False, True], [False, False]]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="threads do not switch in the parser from Python 3.12 on")
def test_clients_that_load_arrays_never_parse_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, inside, most = ast.parse, [0], [0]

    def slow_parse(*arguments: Any, **options: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        inside[0] -= 1
        return parse(*arguments, **options)

    monkeypatch.setattr(ast, "parse", slow_parse)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        for _ in range(3):
            message.content.array_records["a"].to_numpy_ndarrays()
        return Message(message.content, reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        arrays = RecordDict({"a": ArrayRecord([np.zeros(2)])})
        messages = [Message(arrays, node, "train") for node in grid.get_node_ids()]
        assert all(reply.has_content() for reply in grid.send_and_receive(messages))

    serve(main, app, nodes=4, workers=4)
    assert most == [1]
    assert ast.parse is slow_parse


def test_messages_are_dropped_once_pulled() -> None:
    def main(grid: Grid, context: Context) -> None:
        assert len(list(grid.send_and_receive(train_messages(grid, np.zeros(3, np.float32))))) == 3
        assert vars(grid)["_sent"] == {}

    serve(main, client_app())


def test_unusable_messages_are_refused() -> None:
    def main(grid: Grid, context: Context) -> None:
        assert list(grid.push_messages([sleep_message(5, 1)])) == [""]
        [node, *_] = grid.get_node_ids()
        expired = sleep_message(node, 1, ttl=0.001)
        time.sleep(0.01)
        with pytest.raises(ValueError, match="expired"):
            grid.push_messages([expired])

    serve(main, client_app())


def test_node_config_is_added_to_the_partition() -> None:
    app, server = ClientApp(), ServerApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict({"c": ConfigRecord(dict(context.node_config))}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        replies = grid.send_and_receive([Message(RecordDict(), n, "query") for n in grid.get_node_ids()])
        assert [dict(reply.content.config_records["c"]) for reply in replies] == [
            {"partition-id": 0, "num-partitions": 2, "delay": 0, "policy": "none"},
            {"partition-id": 1, "num-partitions": 2, "delay": 3, "policy": "none"},
        ]

    run_in_process(server, app, run_config={}, num_supernodes=2, node_config=lambda partition: {"delay": 3 * partition})


def test_an_exception_of_the_server_app_reaches_the_caller_and_leaves_nothing_behind() -> None:
    before = TaskIdentity._run_id

    def main(grid: Grid, context: Context) -> None:
        grid.push_messages([sleep_message(node, ENDLESS) for node in grid.get_node_ids()])
        time.sleep(0.1)
        raise LookupError("the server app's own")

    ended: list[int] = []
    with pytest.raises(LookupError, match="the server app's own"):
        serve(main, client_app(ended), workers=3)
    assert ended == []  # the clients were interrupted
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("client-app")]
    assert TaskIdentity._run_id == before


def test_settings_are_checked() -> None:
    with pytest.raises(SettingError, match="num_supernodes"):
        run_in_process(ServerApp(), ClientApp(), run_config={}, num_supernodes=0)
    with pytest.raises(SettingError, match="workers"):
        run_in_process(ServerApp(), ClientApp(), run_config={}, num_supernodes=1, workers=0)


def _sockets() -> set[str]:
    """The sockets of this process, as the kernel names them."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the kernel's list of open files")
def test_no_socket_is_opened() -> None:
    before = _sockets()
    during: list[set[str]] = []

    def main(grid: Grid, context: Context) -> None:
        list(grid.send_and_receive(train_messages(grid, np.zeros(3, np.float32))))
        during.append(_sockets())

    serve(main, client_app())
    assert during == [before]


_ENDLESS = """
import signal
import time
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from tofu.flower import in_process
from tofu.flower.in_process import run_in_process
from tofu.flower.transport import GridTransport

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    weights = torch.ones(200, 200, requires_grad=True)
    while True:
        (weights @ weights).sum().backward()

@server.main()
def main(grid, context):
    grid.push_messages([Message(RecordDict(), node, "train") for node in grid.get_node_ids()])
    print("started", flush=True)
    list(grid.send_and_receive([Message(RecordDict(), node, "train") for node in grid.get_node_ids()]))

run_in_process(server, client, run_config={}, num_supernodes=3)
"""


def test_ctrl_c_ends_the_process_while_clients_train_for_ever() -> None:
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", _ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            process.send_signal(signal.SIGINT)
            try:
                wait_for(lambda: process.poll() is not None)  # the clients' loops have no end of their own
            except AssertionError:
                process.send_signal(signal.SIGABRT)  # faulthandler then writes what each thread was doing
                raise AssertionError(process.communicate()[1]) from None
            assert process.stderr is not None
            errors = process.stderr.read()
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT, errors
    assert "KeyboardInterrupt" in errors
    assert "failed in" not in errors


def test_a_clock_that_is_set_forward_expires_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten days ahead while clients work, for this process and for Flower, which computes a reply's time to live."""
    days, clock = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 86400 * days[0])
    for module in ("flwr.app.message.message", "flwr.server.utils.validator"):
        monkeypatch.setattr(f"{module}.now", lambda: datetime.datetime.fromtimestamp(time.time(), datetime.UTC))

    def main(grid: Grid, context: Context) -> None:
        messages = [sleep_message(node, 30, ttl=3600) for node in grid.get_node_ids()]

        def while_they_work() -> bool:
            days[0] = 10.0
            return False

        found = dict(GridTransport(grid).exchange(messages, time.monotonic() + 3600, while_they_work))
        assert [reply.error.reason for reply in found.values() if reply.has_error()] == []
        assert len(found) == 3

    serve(main, client_app())
