"""The other half of the networks of test_compressed_rounds.py."""

from pathlib import Path

import pytest

from tests.zoo.networks import ACCEPTED
from tests.zoo.test_compressed_rounds import check_rounds


@pytest.mark.parametrize("name", list(ACCEPTED)[1::2])
def test_secure_sums_are_those_of_plain_torch_and_proxies_explain_updates(name: str, tmp_path: Path) -> None:
    check_rounds(name, tmp_path)
