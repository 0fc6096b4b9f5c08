"""A SuperNode's state in which every app that ended has replied; test_deploy_faults.py has it in real processes."""

from datetime import timedelta

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.start_client_internal import _insert_message

from deploy.lost_replies import AnsweringNodeState

RUN = 7


@pytest.fixture(autouse=True)
def server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are made as in the app of a server."""
    for name, value in {"_task_id": 1, "_run_id": RUN, "_node_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


class Node:
    """A node that has a message, and the task of an app that has its token."""

    def __init__(self) -> None:
        self.state = AnsweringNodeState(ObjectStoreFactory().store())
        self.task = self.start_app()
        self.message = Message(RecordDict({"given": ConfigRecord({"value": 1})}), 5, "train", group_id="1")
        _insert_message(self.message, self.state, self.state.object_store)

    def start_app(self) -> int:
        task = self.state.create_task(TaskType.CLIENT_APP, RUN)
        assert task is not None
        assert self.state.claim_task(task)
        return task

    def fetch(self) -> None:
        assert self.state.activate_task(self.task)
        (message,) = self.state.get_messages_legacy(run_ids=[RUN], is_reply=False, limit=1)
        self.state.record_message_processing_start(message.metadata.message_id)

    def push(self, *, objects: int | None = None) -> None:
        """Push a reply with so many of its objects; by default, with all."""
        reply = Message(RecordDict({"found": ConfigRecord({"value": 2})}), reply_to=self.message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.state.record_message_processing_end(reply.metadata.reply_to_message_id)
        session = self.state.start_session(RUN)
        with no_object_id_recompute():
            bare = remove_content_from_message(reply)
            _, missing = self.state.store_message_and_object_tree(bare, get_object_tree(reply), session)
            parts = get_all_nested_objects(reply)
            for number, name in enumerate(missing):
                if objects is None or number < objects:
                    assert self.state.store_object(RUN, session, name, parts[name].deflate())

    def expire(self) -> None:
        """Let the time pass in which the app should have shown that it lives."""
        self.state.task_token_store[self.task].active_until = now() - timedelta(seconds=1)

    def replies(self) -> list[str]:
        """What the node would send now: "" for a complete reply, and otherwise the reason of its error."""
        found = []
        for reply in self.state.get_messages_legacy(is_reply=True):
            tree = self.state.object_store.get_object_tree(reply.metadata.message_id)
            assert self.state.object_store.get(tree.object_id)
            assert reply.metadata.reply_to_message_id == self.message.metadata.message_id
            found.append(reply.error.reason or "" if reply.has_error() else "")
        return found

    def fail(self, reason: str = "ended by signal 9") -> None:
        assert self.state.finish_task(self.task, SubStatus.FAILED, reason)


LOST = "the client's app ended without a reply: "


def test_an_app_that_fails_before_it_has_fetched_its_message() -> None:
    node = Node()
    node.fail()
    assert node.replies() == [LOST + "ended by signal 9"]
    assert node.replies() == []
    assert node.state.get_messages_legacy(is_reply=False) == []  # no later app gets the message


def test_objects_that_were_not_fetched_stay_until_the_reply_is_sent() -> None:
    """The node may still be receiving them."""
    node = Node()
    node.fail()
    [reply] = node.state.get_messages_legacy(is_reply=True)
    tree = node.state.object_store.get_object_tree(node.message.metadata.message_id)
    for sent in (False, True):
        if sent:
            metadata = reply.metadata
            node.state.delete_messages(message_ids=[metadata.message_id, metadata.reply_to_message_id])
        assert (node.state.object_store.get(tree.object_id) is None) == sent


def test_an_app_that_falls_silent_before_it_has_fetched_its_message() -> None:
    node = Node()
    assert node.state.activate_task(node.task)
    node.expire()
    (reason,) = node.replies() or node.replies()
    assert reason.startswith(LOST)


@pytest.mark.parametrize("objects", [0, 1])
def test_an_app_that_fails_while_it_pushes_its_reply(objects: int) -> None:
    node = Node()
    node.fetch()
    node.push(objects=objects)
    assert node.replies() == []  # or the node would wait for the rest of it
    node.fail()
    assert node.replies() == [LOST + "ended by signal 9"]


def test_an_app_that_could_not_push_its_reply_but_says_that_it_is_done() -> None:
    node = Node()
    node.fetch()
    assert node.state.finish_task(node.task, SubStatus.COMPLETED, "")
    assert node.replies() == [LOST]


@pytest.mark.parametrize("status", [SubStatus.COMPLETED, SubStatus.FAILED])
def test_a_complete_reply_stays(status: str) -> None:
    node = Node()
    node.fetch()
    node.push()
    assert node.state.finish_task(node.task, status, "")
    assert node.replies() == [""]


def test_the_message_of_a_next_app_is_not_replied_to() -> None:
    """The node may have sent a reply and got the next message before the app has said that it failed."""
    node = Node()
    later = node.start_app()
    node.fail()
    assert node.replies() == []
    assert node.state.finish_task(later, SubStatus.FAILED, "")
    assert node.replies() == [LOST]
