"""A SuperNode that looks for messages often: `python -m deploy.supernode flower-supernode …`

Flower's own waits 3 s between two looks, and 0.5 s between two looks for the client app's reply: most of a round with
little training, and no option changes it. Here both are at most TOFU_NODE_POLL_SECONDS, 0.5 by default. A look is one
small request over a connection that stays open. A federation of thousands of nodes may want more.

Flower's own also takes a certificate that is not valid for a network that is down, and tries again for ever. Here one
line ends the command at once.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

from deploy.certificates import check_server
from tofu.errors import TofuError

_POLL_SECONDS = 0.5
VARIABLE = "TOFU_NODE_POLL_SECONDS"


def quicken(module: ModuleType, seconds: float) -> None:
    """Make a module that waits with `time.sleep` wait so many seconds at most; for no other module anything changes."""
    brief = SimpleNamespace(**vars(time))
    brief.sleep = lambda wanted: time.sleep(min(wanted, seconds))
    module.time = brief  # type: ignore[attr-defined]


def check_superlink(arguments: Sequence[str]) -> None:
    """Check the certificate of the SuperLink that a command line of `flower-supernode` names.

    Raises:
        RunError: it is not valid.
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
    """Become the SuperNode; its command line is that of `flower-supernode`."""
    try:
        check_superlink(command[1:])
    except TofuError as error:
        sys.exit(f"error: {error}")
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    quicken(start_client_internal, float(os.environ.get(VARIABLE, _POLL_SECONDS)))
    sys.argv = list(command)
    flower_supernode()


if __name__ == "__main__":
    main(sys.argv[1:])
