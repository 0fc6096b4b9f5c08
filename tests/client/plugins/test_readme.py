"""The page on plugins: its table of hooks has their parameters."""

import inspect
import re
from pathlib import Path

from tofu.plugins import Plugin

PAGE = Path(__file__).parents[3] / "client" / "plugins" / "README.md"


def test_the_table_of_hooks_has_their_parameters() -> None:
    table = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| (both|client|server) \|", line)
    ]
    shown = dict(re.findall(r"`(\w+)\(([\w, ]*)\)`", "\n".join(line.split("|")[2] for line in table)))
    hooks = {name: hook for name, hook in inspect.getmembers(Plugin, inspect.isfunction) if not name.startswith("_")}
    assert len(shown) == 16
    for name, parameters in shown.items():
        assert ["self", *filter(None, parameters.split(", "))] == list(inspect.signature(hooks[name]).parameters), name
    assert {name for name in hooks if name.startswith("on_")} <= shown.keys()
