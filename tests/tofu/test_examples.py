"""The examples in docstrings of the library run."""

import doctest
import importlib

import pytest

MODULES = (
    "tofu.api",
    "tofu.running",
    "tofu.registry",
    "tofu.codec.surrogate",
    "tofu.compression.base",
    "tofu.data.subpopulations",
    "tofu.flower.compress",
    "tofu.flower.options",
    "tofu.flower.hybrid",
    "tofu.flower.record",
    "tofu.flower.secure",
    "tofu.flower.secure_mod",
    "client.plugins.label_tree",
    "client.plugins.tree_metrics",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0
