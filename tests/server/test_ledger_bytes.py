"""Message sizes are those of Flower's serialization, to the byte."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from tofu.flower.in_process import run_in_process
from tofu.flower.internals import message_bytes


def reply_bytes(content: RecordDict) -> int:
    """The size of a reply with this content."""
    sizes: list[int] = []
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return Message(content, reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        messages = [Message(RecordDict(), node, "train", group_id="1") for node in grid.get_node_ids()]
        for reply in grid.send_and_receive(messages):
            objects = get_all_nested_objects(reply)
            by_hand = sum(len(item.deflate()) for item in objects.values())
            assert message_bytes(reply) == by_hand + get_object_tree(reply).ByteSize()
            sizes.append(message_bytes(reply))

    run_in_process(server, client, run_config={}, num_supernodes=1)
    return sizes[0]


def payload(size: int) -> ConfigRecord:
    return ConfigRecord({"p": bytes(size)})


def test_a_payload_costs_its_bytes_and_little_more() -> None:
    assert reply_bytes(RecordDict({"r": payload(1000)})) - 1000 < 800
    growth = reply_bytes(RecordDict({"r": payload(1_001_000)})) - reply_bytes(RecordDict({"r": payload(1000)}))
    assert 1_000_000 <= growth < 1_000_016


def test_equal_records_count_once() -> None:
    once = reply_bytes(RecordDict({"a": payload(5000)}))
    assert reply_bytes(RecordDict({"a": payload(5000), "b": payload(5000)})) - once < 500


@pytest.mark.parametrize("record", [ArrayRecord([np.zeros(7, np.float32)]), MetricRecord({"loss": 1.0})])
def test_every_kind_of_record_is_counted(record: ArrayRecord | MetricRecord) -> None:
    alone = reply_bytes(RecordDict({"r": payload(1000)}))
    assert reply_bytes(RecordDict({"r": payload(1000), "x": record})) > alone


def test_an_error_reply_has_a_size() -> None:
    sizes: list[int] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        [reply] = grid.send_and_receive([Message(RecordDict(), node, "train") for node in grid.get_node_ids()])
        assert reply.has_error()
        sizes.append(message_bytes(reply))

    run_in_process(server, ClientApp(), run_config={}, num_supernodes=1)
    assert 200 < sizes[0] < 1000
