"""Command lines of the processes of a federation."""

from pathlib import PurePath

import pytest
from flwr.common.config import parse_config_args
from hypothesis import given
from hypothesis import strategies as st

from deploy.topology import Trust, supernode
from tofu.errors import SettingError


def node_config(value: str) -> str:
    trust = Trust(PurePath("ca.crt"), PurePath("server.crt"), PurePath("server.key"), PurePath("secret"))
    member = supernode(trust, superlink="a:1", key=PurePath("key"), config={"data": value}, host="h", port=1)
    return member.arguments[member.arguments.index("--node-config") + 1]


@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), max_size=20))
def test_flower_reads_the_path_that_was_given_or_it_is_refused(value: str) -> None:
    try:
        written = node_config(value)
    except SettingError:
        assert "'" in value or not value.isprintable()
        return
    assert parse_config_args([written]) == {"data": value}


def test_a_quotation_mark_is_kept_and_a_mix_is_refused_in_one_line() -> None:
    assert node_config('/data/"a"') == "data='/data/\"a\"'"
    with pytest.raises(SettingError, match=r"data=.* is not usable: expected printable characters without a mix"):
        node_config('/it\'s/"a"')
