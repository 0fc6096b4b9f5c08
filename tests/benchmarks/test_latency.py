import tomllib
from pathlib import Path

from benchmarks.latency.__main__ import TRIVIAL


def test_its_settings_are_those_of_the_app() -> None:
    """Flower refuses a run with another name in its configuration."""
    document = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert TRIVIAL.keys() <= document["tool"]["flwr"]["app"]["config"].keys()
