from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from server.client_registry import _introduced
from tofu.errors import PayloadError
from tofu.flower.internals import task_identity
from tofu.wire import RECORD


def introduced(**fields: Any) -> str:
    """The name of the client that introduces itself with these fields."""
    record = ConfigRecord({"client": "a", "examples": 10, **fields})
    with task_identity():
        return _introduced(1, Message(RecordDict({RECORD: record}), 1, "query")).name


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"client": 7}, "it has the name '7', expected a text of 1 to 100 characters"),
        ({"client": ""}, "it has the name '', expected"),
        ({"client": "x" * 101}, "it has the name 'x{20}', expected"),
        ({"examples": 0}, "it claims 0 examples, expected 1 to"),
        ({"examples": 2**60}, "it claims 11529.* examples, expected 1 to"),
        ({"examples": "many"}, "it claims many examples, expected 1 to"),
        ({"unreadable": -1}, "it claims -1 unreadable images, expected 0 to"),
    ],
)
def test_an_introduction_that_is_not_valid_is_refused_with_its_field_and_value(
    fields: dict[str, Any], why: str
) -> None:
    assert introduced() == "a"
    with pytest.raises(PayloadError, match=why):
        introduced(**fields)
