"""Ends or delays a node's process in the middle of a message, where `fates.json` in its FLWR_HOME says so.

The file has a list with an item for each message, as "CALL signal NUMBER" or "CALL sleep SECONDS", or "" for nothing:
what happens before the call of that name of Flower's API. A client's app begins a message with PullMessages, has it
with ConfirmMessageReceived, and replies with PushObject. A SuperNode begins a reply with PushMessages, and sends its
parts with PushObject.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

_FATES = Path(os.environ.get("FLWR_HOME", "/nowhere"), "fates.json")


def _hook(client: Any, begins: str, *names: str) -> None:
    fate: list[str] = []

    def hook(name: str) -> None:
        call = getattr(client, name)

        def hooked(*arguments: Any) -> Any:
            if name == begins:
                first, *rest = json.loads(_FATES.read_text()) or [""]
                _FATES.write_text(json.dumps(rest))
                fate[:] = first.split()
            if fate and fate[0] == name:
                _, kind, number = fate
                fate.clear()
                if kind == "sleep":
                    time.sleep(float(number))
                else:
                    os.kill(os.getpid(), int(number))
            return call(*arguments)

        setattr(client, name, hooked)

    for name in (begins, *names):
        hook(name)


if _FATES.exists():
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.fleet_http_client import FleetHttpClient

    _hook(RuntimeHttpClient, "PullMessages", "ConfirmMessageReceived", "PushObject")
    _hook(FleetHttpClient, "PushMessages", "PushObject")
