"""A SuperNode that polls for messages often: `python -m deploy.supernode flower-supernode …`

Flower's SuperNode polls for messages every 3 s and for the client app's reply every 0.5 s. That is most of a round with
little training, and no option changes it. Here both intervals are at most TOFU_NODE_POLL_SECONDS, 0.5 by default. A
poll is one small request over an open connection; a federation of thousands of nodes may need a longer interval.

Flower's SuperNode also treats an invalid certificate as a network failure and retries forever. Here the command ends
with a one-line error. It also waits forever for the reply of some apps that have ended (deploy/lost_replies.py).
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

from deploy.certificates import check_server
from deploy.patience import extend_tokens
from tofu.errors import TofuError

_POLL_SECONDS = 0.5
VARIABLE = "TOFU_NODE_POLL_SECONDS"


def quicken(module: ModuleType, seconds: float) -> None:
    """Limit each `time.sleep` of one module to `seconds`; other modules are not affected."""
    brief = SimpleNamespace(**vars(time))
    brief.sleep = lambda wanted: time.sleep(min(wanted, seconds))
    module.time = brief  # type: ignore[attr-defined]


def check_superlink(arguments: Sequence[str]) -> None:
    """Check the certificate of the SuperLink that a command line of `flower-supernode` names.

    Raises:
        RunError: the certificate is not valid.
        SettingError: the CA's certificate cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--superlink", default="")
    parser.add_argument("--root-certificates", type=Path)
    parser.add_argument("--insecure", action="store_true")
    found, _ = parser.parse_known_args(arguments)
    if found.superlink and not found.insecure:
        check_server(found.superlink, found.root_certificates)


def main(command: Sequence[str]) -> None:
    """Run the SuperNode in this process; the command line is that of `flower-supernode`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until Flower's own handler is there
    try:
        check_superlink(command[1:])
    except TofuError as error:
        sys.exit(f"error: {error}")
    from flwr.supercore.corestate import in_memory_corestate
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode
    from flwr.supernode.nodestate import nodestate_factory

    from deploy.lost_replies import AnsweringNodeState

    extend_tokens(in_memory_corestate, in_memory_corestate.InMemoryCoreState)
    nodestate_factory.InMemoryNodeState = AnsweringNodeState  # type: ignore[attr-defined]
    quicken(start_client_internal, float(os.environ.get(VARIABLE, _POLL_SECONDS)))
    sys.argv = list(command)
    flower_supernode()


if __name__ == "__main__":
    main(sys.argv[1:])
