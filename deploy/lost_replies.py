"""Client apps that end without a reply: the node replies with an error in their place.

Flower's SuperNode asks for the next message only when it has the reply to the last one. It replies for an app that is
silent for a minute, but only if the app had fetched its message and neither reported its own end nor began its reply:
otherwise the node waits for ever. Here the end of an app, however it becomes known, ends the wait for its reply, and
the process that forks the apps (deploy/prefork.py) reports at once those that failed.
"""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.proto.runtime_pb2 import PushTaskOutputRequest
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

__all__ = ["AnsweringNodeState", "report_end"]

_TRIES = 3


class AnsweringNodeState(InMemoryNodeState):
    """A SuperNode's state in which each message has a complete reply once its client app has ended."""

    def finish_task(self, task_id: int, sub_status: str, details: str) -> bool:
        """Finish a task, and reply for it if it has not replied."""
        finished = super().finish_task(task_id, sub_status, details)
        if finished:
            with self.lock_task_store:
                self._answer([self.task_store[task_id]])
        return finished

    def _on_task_tokens_expired(self, tasks: list[Task]) -> None:
        self._answer(tasks)
        super()._on_task_tokens_expired([task for task in tasks if task.type != TaskType.CLIENT_APP])

    def get_messages_legacy(self, **filters: Any) -> list[Message]:
        """Return the messages that wait, but no reply whose app is still pushing it:
        the app may end before it is complete.
        """
        found = super().get_messages_legacy(**filters)
        with self._lock_object_push_sessions, self.lock_msg_store:
            complete = []
            for message in found:
                entry = self.msg_store.get(message.metadata.message_id)
                if entry is None:
                    continue
                if self._unfinished_push(message) is None:
                    complete.append(message)
                else:
                    entry.is_retrieved = False
        return complete

    def delete_messages(self, *, message_ids: Sequence[str] | None = None) -> None:
        """Delete messages, and what their apps have not fetched of them, which the node may have been receiving."""
        super().delete_messages(message_ids=message_ids)
        for message_id in message_ids or ():
            self.object_store.delete(message_id)

    def _unfinished_push(self, message: Message) -> str | None:
        """Return the session in which a message's objects are pushed, unless it has all of them."""
        session_id = self._object_push_session_by_root.get(message.metadata.message_id, "")
        session = self._object_push_sessions.get(session_id)
        return session_id if session is not None and session.pending_object_ids else None

    def _answer(self, ended: Sequence[Task]) -> None:
        """Reply with an error for client apps that have ended without a reply. Callers hold `lock_task_store`.

        A node has one message at a time. Where another app of the run has not ended, the message is that one's.
        """
        busy = {task.run_id for task in self.task_store.values() if task.status.status != Status.FINISHED}
        for task in ended:
            if task.type != TaskType.CLIENT_APP or task.run_id in busy:
                continue
            with self._lock_object_push_sessions, self.lock_msg_store:
                messages = [entry for entry in self.msg_store.values() if entry.message.metadata.run_id == task.run_id]
                for entry in messages:
                    metadata = entry.message.metadata
                    if metadata.reply_to_message_id:
                        if session_id := self._unfinished_push(entry.message):
                            self._cleanup_push_session(session_id, cleanup_messages=True)
                        continue
                    if not entry.is_retrieved:
                        entry.is_retrieved = True
                        self.record_message_processing_start(metadata.message_id)
                reason = f"the client's app ended without a reply: {task.status.details}"
                self._store_error_replies({task.run_id}, Error(ErrorCode.CLIENT_APP_CRASHED, reason))


def report_end(command: Sequence[str], reason: str) -> int:
    """Tell a SuperNode that a client app has failed, which does nothing if the app has said so itself.

    Args:
        command: the app's command line, that of `flwr-clientapp`.
        reason: how it ended.

    Returns:
        The exit status of the process that reports.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--runtime-api-address", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--root-certificates", type=Path)
    parser.add_argument("--insecure", action="store_true")
    given, _ = parser.parse_known_args(command[1:])
    retry = make_simple_http_retry_invoker()
    retry.max_tries = _TRIES
    client = RuntimeHttpClient.from_server_address(
        server_address=given.runtime_api_address,
        insecure=given.insecure,
        root_certificates=given.root_certificates.read_bytes() if given.root_certificates else None,
        interceptors=[RuntimeVersionHttpInterceptor("flwr-clientapp"), RuntimeTokenHttpInterceptor(given.token)],
        retry_invoker=retry,
    )
    with suppress(Exception):  # the token of an app that has reported its own end is not valid any more
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=reason))
    client.close()
    return 0
