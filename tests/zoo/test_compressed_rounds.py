"""Every kind of network goes through proxy and secure rounds: a file of its own, so that a second process runs it."""

from pathlib import Path

import pytest

from tests.zoo.networks import ACCEPTED
from tests.zoo.test_networks import check_network


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_network_loses_no_reply_and_the_same_run_gives_the_same_weights(name: str, tmp_path: Path) -> None:
    check_network(name, "compressed", tmp_path)
