"""Packages of extras that are not installed: one line says which extra to install."""

import sys
from collections.abc import Callable

import pytest

from tofu.errors import MissingExtraError
from tofu.imports import from_extra, import_object
from tofu.privacy.accounting import epsilon_of, noise_multiplier_for


@pytest.mark.parametrize("call", [lambda: epsilon_of(1.0, 1e-5), lambda: noise_multiplier_for(1.0, 1e-5, 3)])
def test_noise_without_its_extra_names_it(call: Callable[[], float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtraError, match=r"^dp_accounting is not installed: pip install 'tofu-fl\[privacy\]'$"):
        call()


def test_an_error_inside_of_a_package_that_is_installed_is_not_hidden() -> None:
    with pytest.raises(ImportError, match="no_such_name"), from_extra("privacy"):
        from math import no_such_name  # type: ignore[attr-defined]  # noqa: F401


def test_a_module_that_is_named_as_a_file_is_named_right() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"without \.py: nets:small$"):
        import_object("nets.py:small")
