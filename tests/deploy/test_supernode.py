"""A SuperNode that looks for messages often: how long Flower's own loop waits, and that nothing else is changed."""

import inspect
import time
from types import ModuleType

import pytest
from flwr.supernode import start_client_internal

from deploy.supernode import quicken


def test_waits_become_short_and_only_in_that_module(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    module = ModuleType("waits")
    quicken(module, 0.5)
    for wanted in (3, 0.5, 0.1):
        module.time.sleep(wanted)
    assert slept == [0.5, 0.5, 0.1]
    assert module.time.monotonic is time.monotonic
    time.sleep(3)
    assert slept[-1] == 3


def test_flowers_loop_still_waits_in_the_way_that_is_shortened() -> None:
    """With a version of Flower in which this fails, `quicken` may do nothing."""
    assert start_client_internal.time is time
    assert "time.sleep(3)" in inspect.getsource(start_client_internal)
